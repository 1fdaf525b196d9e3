"""The statistics of an update."""

import math

import numpy as np
import pytest
import torch

from ddpo_fast.updates.update_statistics import UpdateStatistics


def figures(loss, ratio, clip_range) -> torch.Tensor:
    """The (4, B) statistics that `ppo_loss` gives for these rows."""
    loss, ratio = torch.as_tensor(loss), torch.as_tensor(ratio)
    return torch.stack([loss, ratio, ((ratio - 1).abs() > clip_range).to(ratio), 0.5 * ratio.double().log().square().to(ratio)])


FIGURES = ("loss", "ratio", "clip_fraction", "approx_kl")
GOOD = torch.ones(48, dtype=torch.bool)


def one_rank(tensor, op):
    """The reduction over a single rank."""


def test_statistics_are_those_of_all_transitions():
    generator = np.random.default_rng(0)
    loss, log_ratio = generator.normal(size=48), 2e-4 * generator.normal(size=48)
    steps = generator.integers(5, size=48)
    ratio, first = np.exp(log_ratio), np.arange(48) < 16
    recorded = UpdateStatistics(FIGURES, 5, GOOD)
    for rows in np.split(np.arange(48), [7, 16, 17, 40]):
        part = torch.from_numpy(rows), torch.from_numpy(steps[rows]), figures(loss[rows], ratio[rows], 1e-4)
        recorded.add([part], is_first=bool(first[rows[0]]))
    for norm in (2.0, np.inf, 4.0, np.nan):
        recorded.stepped(norm)
    summary = recorded.summary(one_rank)
    errors = np.where(first, np.abs(ratio - 1), 0)
    assert summary.pop("transitions") == 48
    assert summary.pop("ratio_error_step") == steps[errors.argmax()]
    expected = dict(
        loss=loss.mean(), clip_fraction=np.mean(np.abs(ratio - 1) > 1e-4), approx_kl=0.5 * np.mean(np.log(ratio) ** 2),
        ratio_error=errors.max(), grad_norm=3.0, skipped_updates=2,
    )  # fmt: skip
    assert summary == pytest.approx(expected, rel=1e-12)


def test_statistics_of_several_ranks():
    def two_equal_ranks(tensor, op):
        tensor.mul_({"sum": 2, "max": 1}[op])

    recorded = UpdateStatistics(FIGURES, 5, GOOD)
    recorded.add([(torch.arange(2), torch.tensor([1, 3]), figures([1.0, 2.0], [1.0, 1.5], 0.2))], is_first=True)
    summary = recorded.summary(two_equal_ranks)
    assert summary["transitions"] == 4
    assert (summary["loss"], summary["clip_fraction"], summary["ratio_error"]) == (1.5, 0.5, 0.5)


@pytest.mark.parametrize("ratios, worst", [([1.0, 1.1, 0.7, 1.2], 2), ([1.0, 1.4, 0.7, 1.2], 1), ([1.9, 1.4, 0.7, 1.2], 0)])
def test_worst_step_is_named(ratios, worst):
    recorded = UpdateStatistics(FIGURES, 5, GOOD)
    recorded.add([(torch.arange(4), torch.arange(4), figures(torch.zeros(4), ratios, 0.2))], is_first=True)
    summary = recorded.summary(one_rank)
    assert summary["ratio_error_step"] == worst
    assert summary["ratio_error"] == pytest.approx(abs(ratios[worst] - 1), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_ratio_that_is_no_number_shows(bad):
    recorded = UpdateStatistics(FIGURES, 5, GOOD)
    recorded.add([(torch.arange(4), torch.arange(4), figures(torch.zeros(4), [1.0, 1.5, bad, 1.0], 0.2))], is_first=True)
    recorded.add([(torch.arange(4), torch.arange(4), figures(torch.zeros(4), torch.ones(4), 0.2))], is_first=True)
    summary = recorded.summary(one_rank)
    assert summary["ratio_error"] == float("inf") and summary["ratio_error_step"] == 2


def test_a_sample_that_is_not_good_counts_as_one_that_did_not_change():
    recorded = UpdateStatistics(FIGURES, 5, torch.tensor([True, False]))
    ratio = [1.0, 7.0, 1.5, float("nan")]
    recorded.add([(torch.tensor([0, 1, 0, 1]), torch.arange(4), figures([2.0, 1e9, 4.0, float("nan")], ratio, 0.2))], is_first=True)
    summary = recorded.summary(one_rank)
    assert (summary["loss"], summary["ratio_error"], summary["ratio_error_step"], summary["clip_fraction"]) == (1.5, 0.5, 2, 0.25)
    assert summary["approx_kl"] == pytest.approx(0.5 * math.log(1.5) ** 2 / 4) and summary["transitions"] == 4


def test_figures_are_known_by_their_names():
    """Of a regression the loss alone; of a KL penalty one more; those of samples that are not good count as 0."""
    recorded = UpdateStatistics(("loss",), 1000, torch.tensor([True, False]))
    recorded.add([(torch.tensor([0, 1]), torch.tensor([999, 3]), torch.tensor([[3.0, torch.nan]]))], is_first=True)
    assert recorded.summary(one_rank) == {"transitions": 2, "loss": 1.5, "grad_norm": None, "skipped_updates": 0}
    recorded = UpdateStatistics((*FIGURES, "kl_to_reference"), 5, GOOD)
    values = torch.cat([figures([1.0, 1.0], [1.0, 1.0], 0.2), torch.tensor([[2.0, 4.0]])])
    recorded.add([(torch.arange(2), torch.arange(2), values)], is_first=True)
    assert recorded.summary(one_rank)["kl_to_reference"] == 3
