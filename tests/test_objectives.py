"""The clipped surrogate and the score-function loss."""

import numpy as np
import pytest
import torch

from ddpo_fast.algorithms.ddpo_is import DDPO_IS
from ddpo_fast.kernels.reference import ppo_loss
from ddpo_fast.updates.objectives import OnTrajectory, scaled_clip_range


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


@pytest.mark.parametrize(
    "times, said", [(torch.tensor([981, 1]), "t=1"), (torch.tensor([1000.0, 600.5]), "t=600.5"), (torch.tensor([1.0, 0.75]), "t=0.75")]
)
def test_a_warning_names_the_time_as_the_network_is_told_it(times, said):
    """A timestep of a diffusion model; a flow model's may be in [0, 1]."""
    objective = OnTrajectory(DDPO_IS(), None, None, 1e-4, 4 * 64 * 64)
    doubt = objective.doubt({"ratio_error": 1.1e-5, "ratio_error_step": 1}, times)
    assert f"(worst at step 1, {said})" in doubt and not objective.doubt({"ratio_error": 0.9e-5, "ratio_error_step": 1}, times)
