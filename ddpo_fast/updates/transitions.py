"""Which transitions each update trains on, and what the network is given of them. Shape letter: B transitions."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ddpo_fast.distributed.ranks import Ranks
from ddpo_fast.pipelines.template import Recording
from ddpo_fast.planning.work import Work
from ddpo_fast.schedule import Schedule


@dataclass
class Rollout:
    """B samples. Transition (i, k) is latents[i, k] -> latents[i, k + 1], of the K steps that are kept: each latent is stored once.

    *shape is that of one sample's latents.
    """

    prompts: list[str]
    sample_ids: Tensor
    """(B,) int64, which with the run's seed fix all noise."""
    latents: Tensor
    """(B, K + 1, *shape) fp32; (B, 1, *shape) where only the finished ones are kept, (B, 0, *shape) where none are."""
    log_probs: Tensor
    """(B, K) fp32, mean log-density of each kept transition under the policy that made it."""
    good: Tensor
    """(B,) bool. A sample that is not finite (an overflow in fp16, say) is not: its trajectory is zeros, so that it cannot spoil the
    gradient of the others."""
    schedule: Schedule
    """The steps that made the samples."""
    first_kept: int
    """The first step that is kept."""

    @property
    def coefficients(self) -> Tensor:
        """(K, 4) or (K, 7): the kept steps' rows of the schedule's table."""
        return self.schedule.coefficients[self.first_kept : self.first_kept + self.log_probs.shape[1]]

    @classmethod
    def cat(cls, parts: list["Rollout"]) -> "Rollout":
        """The rollouts of several batches as one."""
        columns = {name: [getattr(part, name) for part in parts] for name in cls.__dataclass_fields__}
        joined = {name: torch.cat(column) for name, column in columns.items() if isinstance(column[0], Tensor)}
        return replace(parts[0], prompts=[prompt for part in parts for prompt in part.prompts], **joined)


@dataclass(frozen=True)
class Update:
    """This rank's part of one optimizer update: B transitions, pairs (sample, step)."""

    epoch: int
    number: int
    """Of the epoch's minibatch."""
    rows: np.ndarray
    """(B,) samples of this rank."""
    steps: np.ndarray
    """(B,) denoising steps, or of a regression levels of noise."""

    @property
    def is_first(self) -> bool:
        """Whether the policy is still the one that made the samples."""
        return self.epoch == self.number == 0


def minibatches(num_samples: int, num_minibatches: int, ranks: Ranks, key: tuple[int, ...]) -> list[np.ndarray]:
    """This rank's rows of every minibatch of one pass over `num_samples` samples of which each rank holds a block in order.

    Samples come in strata of `num_minibatches` neighbours, and each stratum gives one sample, at random, to every minibatch.
    So the minibatches depend on `key` (seed, iteration, epoch) alone, and each holds equally many samples of every rank.
    """
    size = num_samples // num_minibatches
    order = np.random.default_rng((1, *key)).permuted(np.tile(np.arange(num_minibatches), (size, 1)), axis=1)
    rows = order + num_minibatches * np.arange(size)[:, None]
    mine = rows[ranks.block(size)] - ranks.block(num_samples).start
    return list(mine.T)


def transitions(
    rows: np.ndarray, first_row: int, population: np.ndarray, count: int, key: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The (row, step) pairs that a minibatch trains on: of each of its samples `count` steps of a population of steps, or all that it has.

    Which steps depends on `key` and the sample's index in the iteration, `first_row + row`, not on the rank that holds it.
    """
    count = min(count, len(population))  # a window may end with a step that has no density
    steps = [np.random.default_rng((2, *key, first_row + row)).permutation(len(population))[:count] for row in rows]
    return np.repeat(rows, count), population[np.concatenate([np.sort(chosen) for chosen in steps])]


def updates(work: Work, population: np.ndarray, ranks: Ranks, key: tuple[int, int]) -> list[Update]:
    """Every update of an iteration: inner epochs x minibatches. key: (seed, iteration)."""
    made, first_row = [], ranks.block(work.num_samples).start
    for epoch in range(work.inner_epochs):
        for number, rows in enumerate(minibatches(work.num_samples, work.num_minibatches, ranks, (*key, epoch))):
            made.append(Update(epoch, number, *transitions(rows, first_row, population, work.trained_steps, (*key, epoch))))
    return made


@dataclass
class MicroBatch:
    """B transitions of a Rollout and the rows that the network is given of them, G B; as int64 indices on the device."""

    pairs: tuple[np.ndarray, np.ndarray]
    """The transitions, samples and steps, not on the device."""
    rows: Tensor
    """(B,) sample."""
    steps: Tensor
    """(B,) denoising step, or of a regression level of noise."""
    kept: Tensor
    """(B,) the same among the steps that the rollout keeps; only of a rollout that keeps a trajectory."""
    x_rows: Tensor
    """(G B,) sample whose latents the network row takes,"""
    x_kept: Tensor
    """(G B,) and which of the latents that the rollout keeps."""
    text_rows: Tensor
    """(G B,) the row of the rollout's texts that the network row is given."""
    times: Tensor
    """(G B,) what the network is told of its step."""


def micro_batches(
    update: Update, size: int, first_kept: int, recording: Recording, prompts: np.ndarray, times: Tensor
) -> Iterator[MicroBatch]:
    """An update's transitions in pieces of at most `size`, all about as large: a small last one would use the hardware badly.

    All indices go to the device in one copy. first_kept: the first step that the rollout keeps. recording: how the network is called.
    prompts: which text each sample of the rollout has. times: of every step, on the device.
    """
    parts, num_parts = [], -(-len(update.rows) // size)
    pairs = list(zip(np.array_split(update.rows, num_parts), np.array_split(update.steps, num_parts)))
    for r, s in pairs:
        k = s - first_kept
        parts.append([r, s, k, *(np.tile(index, recording.num_outputs) for index in (r, k)), recording.text_rows(prompts[r])])
    steps = np.concatenate([np.tile(s, recording.num_outputs) for _, s in pairs])
    indices = torch.from_numpy(np.concatenate([*sum(parts, []), steps])).to(times.device)
    *indices, steps = indices.split([*(len(index) for part in parts for index in part), len(steps)])
    told = times[steps].split([recording.num_outputs * len(r) for r, _ in pairs])
    yield from (MicroBatch(pair, *indices[6 * number : 6 * number + 6], told[number]) for number, pair in enumerate(pairs))
