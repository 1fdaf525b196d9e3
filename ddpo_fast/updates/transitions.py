"""Which transitions each update trains on, and what the UNet is given of them. Shape letter: B transitions."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Pairs = tuple[np.ndarray, np.ndarray]
"""Transitions of this rank: samples (B,) and steps (B,)."""


def minibatches(num_samples: int, num_minibatches: int, rank: int, world_size: int, key: tuple[int, ...]) -> list[np.ndarray]:
    """This rank's rows of every minibatch of one pass over `num_samples` samples of which each rank holds a block in order.

    Samples come in strata of `num_minibatches` neighbours, and each stratum gives one sample, at random, to every minibatch.
    So the minibatches depend on `key` (seed, iteration, epoch) alone, and each holds equally many samples of every rank.
    """
    size = num_samples // num_minibatches
    order = np.random.default_rng((1, *key)).permuted(np.tile(np.arange(num_minibatches), (size, 1)), axis=1)
    rows = order + num_minibatches * np.arange(size)[:, None]
    block = num_samples // world_size
    mine = rows[rank * size // world_size : (rank + 1) * size // world_size] - rank * block
    return list(mine.T)


def transitions(rows: np.ndarray, first_row: int, num_steps: int, fraction: float, key: tuple[int, ...]) -> Pairs:
    """The (row, step) pairs that a minibatch trains on: round(fraction * S) steps, at least one, of each of its samples.

    Which steps depends on `key` and the sample's index in the iteration, `first_row + row`, not on the rank that holds it.
    """
    count = max(1, round(fraction * num_steps))
    steps = [np.sort(np.random.default_rng((2, *key, first_row + row)).permutation(num_steps)[:count]) for row in rows]
    return np.repeat(rows, count), np.concatenate(steps)


def passes(
    num_samples: int,
    num_steps: int,
    inner_epochs: int,
    num_minibatches: int,
    fraction: float,
    rank: int,
    world_size: int,
    key: tuple[int, int],
) -> Iterator[tuple[int, int, Pairs]]:
    """Every update of an iteration: its epoch, its number in the epoch, this rank's transitions. key: (seed, iteration)."""
    for epoch in range(inner_epochs):
        for number, rows in enumerate(minibatches(num_samples, num_minibatches, rank, world_size, (*key, epoch))):
            yield epoch, number, transitions(rows, num_samples // world_size * rank, num_steps, fraction, (*key, epoch))


@dataclass
class MicroBatch:
    """B transitions of a Rollout and the UNet rows that they need, as int64 indices on the device: G B rows, G = 2 with guidance."""

    pairs: Pairs
    """The transitions, not on the device."""
    rows: Tensor
    """(B,) sample."""
    steps: Tensor
    """(B,) denoising step."""
    unet_rows: Tensor
    """(G B,) sample whose latents the UNet row takes."""
    unet_steps: Tensor
    """(G B,) and the step that they are of."""
    timesteps: Tensor
    """(G B,)."""
    embed_rows: Tensor
    """(G B,) row of the prompt embeddings with the empty prompt's put before them."""


def micro_batches(rows: np.ndarray, steps: np.ndarray, size: int, timesteps: Tensor, guided: bool, device) -> Iterator[MicroBatch]:
    """Transitions in pieces of at most `size`, all about as large: a small last one would use the hardware badly.

    All indices go to the device in one copy; timesteps: (S,) int64, on the CPU.
    """
    parts, num_parts = [], -(-len(rows) // size)
    pairs = list(zip(np.array_split(rows, num_parts), np.array_split(steps, num_parts)))
    for r, s in pairs:
        parts.append([r, s, r, s, timesteps.numpy()[s], r + 1])
        if guided:
            parts[-1][2:] = [np.tile(index, 2) for index in parts[-1][2:5]] + [np.concatenate([np.zeros_like(r), r + 1])]
    indices = torch.from_numpy(np.concatenate(sum(parts, []))).to(device).split([len(index) for part in parts for index in part])
    yield from (MicroBatch(pair, *indices[6 * number : 6 * number + 6]) for number, pair in enumerate(pairs))
