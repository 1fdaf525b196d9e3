"""Which transitions every update trains on: coverage, balance between ranks, and what the choice depends on."""

import numpy as np
import pytest
import torch
from shared import recorded

from ddpo_fast.config.command_line import parse
from ddpo_fast.distributed.ranks import Ranks
from ddpo_fast.planning.work import Work
from ddpo_fast.schedule import Schedule
from ddpo_fast.updates.transitions import Rollout, Update, micro_batches, minibatches, transitions

KEY = (0, 3, 1)  # seed, iteration, epoch


def of_all_ranks(num_samples, num_minibatches, world_size, key=KEY) -> list[list[np.ndarray]]:
    """Global ids of each minibatch, by rank: [minibatch][rank]."""
    block = num_samples // world_size
    ranks = [
        [rows + rank * block for rows in minibatches(num_samples, num_minibatches, Ranks(rank, world_size), key)]
        for rank in range(world_size)
    ]
    return [list(parts) for parts in zip(*ranks)]


@pytest.mark.parametrize("num_samples, num_minibatches", [(32, 4), (32, 1), (48, 3), (16, 2), (256, 4)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_epoch_sees_every_sample_once_in_the_same_minibatches_on_any_number_of_ranks(num_samples, num_minibatches, world_size):
    epoch = of_all_ranks(num_samples, num_minibatches, world_size)
    assert len(epoch) == num_minibatches
    for parts, whole in zip(epoch, of_all_ranks(num_samples, num_minibatches, 1)):
        assert [len(rows) for rows in parts] == [num_samples // num_minibatches // world_size] * world_size
        assert np.concatenate(parts).tolist() == whole[0].tolist()
    block = num_samples // world_size
    for rank in range(world_size):
        mine = np.sort(np.concatenate([parts[rank] for parts in epoch]))
        assert mine.tolist() == list(range(rank * block, (rank + 1) * block))


@pytest.mark.parametrize("other", [(1, 3, 1), (0, 4, 1), (0, 3, 2)])
def test_minibatches_depend_on_seed_iteration_and_epoch(other):
    first, again, different = (minibatches(64, 4, Ranks(), key) for key in (KEY, KEY, other))
    assert np.array_equal(first, again)
    assert not np.array_equal(np.sort(first), np.sort(different))


def test_every_minibatch_is_as_likely_for_every_sample():
    counts = np.zeros((16, 4))
    for epoch in range(400):
        for number, rows in enumerate(minibatches(16, 4, Ranks(), (0, 0, epoch))):
            counts[rows, number] += 1
    assert np.abs(counts - 100).max() < 4.5 * (400 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("num_steps, fraction, count", [(10, 1.0, 10), (10, 0.5, 5), (10, 0.01, 1), (50, 0.9, 45), (7, 0.5, 4), (1, 1, 1)])
def test_fraction_of_steps_is_drawn_for_every_sample(num_steps, fraction, count):
    """Of the steps that may be trained on, wherever they are."""
    assert Work.of(parse([f"--sample.num_steps={num_steps}", f"--train.timestep_fraction={fraction}"])).trained_steps == count
    rows, population = np.array([4, 0, 9]), np.arange(num_steps) + 3
    row_of, step_of = transitions(rows, 0, population, count, KEY)
    assert row_of.tolist() == np.repeat(rows, count).tolist()
    for steps in step_of.reshape(3, count):
        assert (np.diff(steps) > 0).all(), "sorted and distinct"
        assert 3 <= steps[0] and steps[-1] < num_steps + 3


def test_choice_of_steps_does_not_depend_on_the_rank():
    whole = transitions(np.array([2, 9, 14]), 0, np.arange(50), 25, KEY)[1].reshape(3, -1)
    assert np.array_equal(transitions(np.array([2]), 0, np.arange(50), 25, KEY)[1], whole[0])
    assert np.array_equal(transitions(np.array([1, 6]), 8, np.arange(50), 25, KEY)[1].reshape(2, -1), whole[1:])


def test_choice_of_steps_depends_on_sample_and_key_and_is_uniform():
    rows = np.arange(400)
    steps = transitions(rows, 0, np.arange(10), 3, KEY)[1].reshape(400, 3)
    assert not np.array_equal(steps, transitions(rows, 0, np.arange(10), 3, (0, 3, 2))[1].reshape(400, 3))
    assert len(np.unique(steps, axis=0)) > 100  # of the 120 there are
    assert np.abs(np.bincount(steps.ravel(), minlength=10) - 120).max() < 4 * (400 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("first_kept", [0, 2])
@pytest.mark.parametrize("num_branches", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 5, 12, 13, 100])
def test_micro_batches_cover_every_transition_once(size, num_branches, first_kept):
    rows, steps = transitions(np.array([3, 1, 8]), 0, np.arange(4), 4, KEY)
    recording, prompts = recorded(num_branches), np.arange(9) + num_branches - 1
    parts = list(micro_batches(Update(0, 0, rows, steps), size, first_kept, recording, prompts, torch.tensor([901, 601, 301, 1])))
    lengths = [len(part.rows) for part in parts]
    assert len(parts) == -(-12 // size) and max(lengths) <= size and max(lengths) - min(lengths) <= 1
    assert torch.cat([part.rows for part in parts]).tolist() == rows.tolist()
    assert torch.cat([part.steps for part in parts]).tolist() == steps.tolist()
    for part in parts:
        assert torch.equal(part.kept, part.steps - first_kept)
        assert [index.tolist() for index in part.pairs] == [part.rows.tolist(), part.steps.tolist()]
        times = torch.tensor([901, 601, 301, 1])[part.steps]
        for ours, network in ((part.rows, part.x_rows), (part.kept, part.x_kept), (times, part.times)):
            assert ours.dtype == network.dtype == torch.int64
            assert network.tolist() == ours.tolist() * num_branches
        assert part.text_rows.tolist() == [0] * len(part.rows) * (num_branches - 1) + (part.rows + num_branches - 1).tolist()


def rollout(value: float, count: int) -> Rollout:
    schedule = Schedule(torch.arange(9), torch.arange(36.0).view(9, 4), np.arange(2, 7))
    prompts, latents = [f"{value} {i}" for i in range(count)], torch.full((count, 6, 4, 1, 1), value)
    return Rollout(prompts, torch.arange(count), latents, torch.full((count, 5), value), torch.ones(count, dtype=bool), schedule, 2)


def test_rollouts_join_along_the_samples():
    joined = Rollout.cat([rollout(0, 2), rollout(1, 1)])
    assert joined.prompts == ["0 0", "0 1", "1 0"] and joined.latents.shape == (3, 6, 4, 1, 1) and joined.log_probs.shape == (3, 5)
    assert joined.latents[:, 0, 0, 0, 0].tolist() == joined.log_probs[:, 0].tolist() == [0, 0, 1]
    assert joined.sample_ids.tolist() == [0, 1, 0] and joined.good.tolist() == [True] * 3 and joined.first_kept == 2


def test_a_rollout_has_the_coefficients_of_the_steps_that_it_keeps():
    assert torch.equal(rollout(0, 1).coefficients, torch.arange(36.0).view(9, 4)[2:7])
