"""The clipped surrogate, the score-function loss and the statistics of an update."""

import math

import numpy as np
import pytest
import torch

from ddpo_fast.kernels.reference import ppo_loss
from ddpo_fast.updates.losses import UpdateStatistics, scaled_clip_range


def loss_and_gradient(algorithm, log_ratio, advantages, clip_range, old_log_prob=None):
    """Loss, ratio and d loss / d log p of rows whose log p is what it has to be: one element, x_p - mean = 1 and s = 1."""
    advantages = torch.as_tensor(advantages, dtype=torch.float64)
    old_log_prob = torch.zeros_like(advantages) if old_log_prob is None else old_log_prob
    log_prob = old_log_prob + torch.as_tensor(log_ratio, dtype=torch.float64)
    count = len(advantages)
    table = torch.stack([torch.zeros(count), torch.ones(count), torch.ones(count), -0.5 - log_prob], 1)  # one step for each row
    noise_pred = torch.zeros(count, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    latents, every = torch.ones(count, count + 1, 1, 1, 1, dtype=torch.float64), torch.arange(count)
    old_log_probs = old_log_prob[:, None].expand(count, count)
    loss, (losses, ratio, _, _) = ppo_loss(
        noise_pred, latents, old_log_probs, advantages, table, every, every,
        clip_range=clip_range, weight=0.5, score_function=algorithm == "ddpo_sf",
    )  # fmt: skip
    torch.testing.assert_close(loss, 0.5 * losses.sum())
    return losses, ratio, torch.autograd.grad(loss, noise_pred)[0].flatten() / 0.5


@pytest.mark.parametrize("clip_range", [1e-4, 1e-2, 0.2])
def test_clipped_surrogate_is_the_formula(clip_range):
    generator = np.random.default_rng(0)
    log_ratio, advantages, old = generator.normal(size=(3, 200)) * [[2 * clip_range], [3], [1]]
    loss, ratio, gradient = loss_and_gradient("ddpo_is", log_ratio, advantages, clip_range, torch.from_numpy(old))
    rho = np.exp(log_ratio)
    bounded = np.where(rho > 1 + clip_range, 1 + clip_range, np.where(rho < 1 - clip_range, 1 - clip_range, rho))
    free = -advantages * rho >= -advantages * bounded  # the rows whose maximum is the unclipped term
    np.testing.assert_allclose(ratio, rho, rtol=1e-12)
    np.testing.assert_allclose(loss, np.where(free, -advantages * rho, -advantages * bounded), rtol=1e-12)
    np.testing.assert_allclose(gradient, np.where(free, -advantages * rho, 0), rtol=1e-12)
    assert 0 < free.mean() < 1


@pytest.mark.parametrize(
    "ratio, advantage, clipped",
    [
        (1.21, 1, True), (1.19, 1, False), (0.81, 1, False), (0.79, 1, False),
        (1.21, -1, False), (1.19, -1, False), (0.81, -1, False), (0.79, -1, True),
    ],
)  # fmt: skip
def test_clip_stops_only_what_moves_on_in_the_direction_of_the_advantage(ratio, advantage, clipped):
    loss, _, gradient = loss_and_gradient("ddpo_is", [np.log(ratio)], [advantage], 0.2)
    bound = 1 + 0.2 * advantage
    assert loss.item() == pytest.approx(-advantage * (bound if clipped else ratio), rel=1e-12)
    assert gradient.item() == pytest.approx(0 if clipped else -advantage * ratio, rel=1e-12, abs=0)


def test_score_function_never_clips():
    log_ratio, advantages = torch.tensor([-3.0, -0.1, 0.0, 0.1, 3.0]), torch.tensor([1.0, -2.0, 3.0, 4.0, -5.0])
    old = torch.full((5,), 0.7, dtype=torch.float64)
    loss, _, gradient = loss_and_gradient("ddpo_sf", log_ratio, advantages, 1e-4, old)
    torch.testing.assert_close(loss, -advantages.double() * (old + log_ratio.double()), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, -advantages.double(), rtol=1e-12, atol=0)


def test_both_estimators_have_one_gradient_on_the_policy_that_sampled():
    advantages = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old = torch.linspace(-1, 2, 32, dtype=torch.float64)
    importance, score = (loss_and_gradient(a, torch.zeros(32), advantages, 1e-4, old) for a in ("ddpo_is", "ddpo_sf"))
    torch.testing.assert_close(importance[1], torch.ones(32, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(importance[2], score[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("latent_dim, factor", [(4 * 64 * 64, 1), (4 * 16 * 16, 16), (4 * 128 * 128, 0.25)])
def test_clip_range_keeps_the_trust_region_of_the_picture(latent_dim, factor):
    assert scaled_clip_range(1e-4, latent_dim) == pytest.approx(1e-4 * factor, rel=1e-15)


def figures(loss, ratio, clip_range) -> torch.Tensor:
    """The (4, B) statistics that `ppo_loss` gives for these rows."""
    loss, ratio = torch.as_tensor(loss), torch.as_tensor(ratio)
    return torch.stack([loss, ratio, ((ratio - 1).abs() > clip_range).to(ratio), 0.5 * ratio.double().log().square().to(ratio)])


GOOD = torch.ones(48, dtype=torch.bool)


def one_rank(tensor, op):
    """The reduction over a single rank."""


def test_statistics_are_those_of_all_transitions():
    generator = np.random.default_rng(0)
    loss, log_ratio = generator.normal(size=48), 2e-4 * generator.normal(size=48)
    steps = generator.integers(5, size=48)
    ratio, first = np.exp(log_ratio), np.arange(48) < 16
    recorded = UpdateStatistics(5, GOOD)
    for rows in np.split(np.arange(48), [7, 16, 17, 40]):
        recorded.add(
            torch.from_numpy(rows),
            torch.from_numpy(steps[rows]),
            figures(loss[rows], ratio[rows], 1e-4),
            first_minibatch=bool(first[rows[0]]),
        )
    summary = recorded.summary(one_rank)
    errors = np.where(first, np.abs(ratio - 1), 0)
    assert summary.pop("transitions") == 48
    assert summary.pop("ratio_error_step") == steps[errors.argmax()]
    expected = dict(
        loss=loss.mean(), clip_fraction=np.mean(np.abs(ratio - 1) > 1e-4), approx_kl=0.5 * np.mean(np.log(ratio) ** 2),
        ratio_error=errors.max(),
    )  # fmt: skip
    assert summary == pytest.approx(expected, rel=1e-12)


def test_statistics_of_several_ranks():
    def two_equal_ranks(tensor, op):
        tensor.mul_({"sum": 2, "max": 1}[op])

    recorded = UpdateStatistics(5, GOOD)
    recorded.add(torch.arange(2), torch.tensor([1, 3]), figures([1.0, 2.0], [1.0, 1.5], 0.2), first_minibatch=True)
    summary = recorded.summary(two_equal_ranks)
    assert summary["transitions"] == 4
    assert (summary["loss"], summary["clip_fraction"], summary["ratio_error"]) == (1.5, 0.5, 0.5)


@pytest.mark.parametrize("ratios, worst", [([1.0, 1.1, 0.7, 1.2], 2), ([1.0, 1.4, 0.7, 1.2], 1), ([1.9, 1.4, 0.7, 1.2], 0)])
def test_worst_step_is_named(ratios, worst):
    recorded = UpdateStatistics(5, GOOD)
    recorded.add(torch.arange(4), torch.arange(4), figures(torch.zeros(4), ratios, 0.2), first_minibatch=True)
    summary = recorded.summary(one_rank)
    assert summary["ratio_error_step"] == worst
    assert summary["ratio_error"] == pytest.approx(abs(ratios[worst] - 1), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_ratio_that_is_no_number_shows(bad):
    recorded = UpdateStatistics(5, GOOD)
    recorded.add(torch.arange(4), torch.arange(4), figures(torch.zeros(4), [1.0, 1.5, bad, 1.0], 0.2), first_minibatch=True)
    recorded.add(torch.arange(4), torch.arange(4), figures(torch.zeros(4), torch.ones(4), 0.2), first_minibatch=True)
    summary = recorded.summary(one_rank)
    assert summary["ratio_error"] == float("inf") and summary["ratio_error_step"] == 2


def test_a_sample_that_is_not_good_counts_as_one_that_did_not_change():
    recorded = UpdateStatistics(5, torch.tensor([True, False]))
    ratio = [1.0, 7.0, 1.5, float("nan")]
    recorded.add(torch.tensor([0, 1, 0, 1]), torch.arange(4), figures([2.0, 1e9, 4.0, float("nan")], ratio, 0.2), first_minibatch=True)
    summary = recorded.summary(one_rank)
    assert (summary["loss"], summary["ratio_error"], summary["ratio_error_step"], summary["clip_fraction"]) == (1.5, 0.5, 2, 0.25)
    assert summary["approx_kl"] == pytest.approx(0.5 * math.log(1.5) ** 2 / 4) and summary["transitions"] == 4
