"""Sampling under the current policy, and which transitions each update trains on.

Shape letters: B samples of this rank, S denoising steps, (C, H, W) one sample's latents, L tokens, E and P embedding widths.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpo_fast.ddim import DDIMSchedule
from ddpo_fast.kernels import Ops
from ddpo_fast.policy import Policy
from ddpo_fast.score_accumulation import ScoreAccumulator

EVAL_SAMPLE_ID = 1 << 48
"""Evaluation samples are numbered from here, training samples from 0: their noise never meets."""
HELDOUT_SAMPLE_ID = 1 << 49
"""And samples of held-out prompts from here."""

Pairs = tuple[np.ndarray, np.ndarray]
"""Transitions of this rank: samples (B,) and steps (B,)."""


@dataclass
class Rollout:
    """Trajectories of B samples. Transition (i, k) is latents[i, k] -> latents[i, k + 1]: each latent is stored once."""

    prompt_embeds: Tensor
    """(B, L, E) in the compute dtype."""
    pooled_embeds: Tensor | None
    """(B, P) in the compute dtype, of SDXL; None for SD 1.x and 2.x."""
    latents: Tensor
    """(B, S + 1, C, H, W) fp32."""
    log_probs: Tensor
    """(B, S) fp32, mean log-density of each transition under the policy that made it."""
    good: Tensor
    """(B,) bool. A sample that is not finite (an overflow in fp16, say) is not: its trajectory is zeros, so that it cannot spoil the
    gradient of the others."""

    @classmethod
    def cat(cls, parts: list["Rollout"]) -> "Rollout":
        columns = ([getattr(part, name) for part in parts] for name in cls.__dataclass_fields__)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


@torch.no_grad()
def generate(
    policy: Policy,
    schedule: DDIMSchedule,
    ops: Ops,
    sample_ids: Tensor,
    prompts: list[str],
    seed: int,
    guidance_scale: float,
    progress: Callable[[int], object] = lambda n: None,
    filling: Callable[[int], AbstractContextManager] = lambda k: nullcontext(),
    scores: ScoreAccumulator | None = None,
) -> tuple[Rollout, Tensor]:
    """Denoises one batch of samples. Returns its Rollout and the final latents decoded: images (B, 3, H, W) fp32 in [0, 1] where good.

    sample_ids: (B,) int64, which with `seed` fix all noise. `progress(n)` is called with B after every step. The UNet of step k is
    called inside of `filling(k)`. `scores`, whose batch these samples are, takes the gradient of every step as it is made.
    """
    prompt_embeds, pooled_embeds = policy.encode_prompts(prompts), policy.pool_prompts(prompts)
    texts = [prompt_embeds] if pooled_embeds is None else [prompt_embeds, pooled_embeds]
    latents, log_probs = [schedule.initial_latents(policy.latent_shape, seed, sample_ids)], []
    unet_input = latents[0].to(policy.dtype)
    if guidance_scale != 1:
        unet_input = unet_input.repeat(2, 1, 1, 1)
        uncond = policy.uncond_embeds, policy.uncond_pooled_embeds
        texts = [torch.cat([empty.expand_as(text), text]) for empty, text in zip(uncond, texts)]
    timesteps = schedule.timesteps[:, None].expand(-1, len(unet_input)).unbind()
    every_step = torch.arange(schedule.num_steps, device=policy.device)[:, None].repeat(1, len(prompts)).unbind()
    for k, (steps, t) in enumerate(zip(every_step, timesteps)):
        with filling(k):
            if scores is None:
                noise_pred = policy.predict_noise(unet_input, t, *texts)
            else:
                noise_pred = scores.predict_noise(policy.predict_noise, k, unet_input, t, *texts)
        next_latents, log_prob, unet_input = ops.ddim_step(
            noise_pred, latents[-1], schedule.coefficients, steps, seed, sample_ids, guidance_scale, policy.dtype
        )
        if scores is not None:
            scores.backward(k, latents[-1], next_latents, log_prob, schedule.coefficients[k : k + 1])
        latents.append(next_latents)
        log_probs.append(log_prob)
        progress(len(prompts))
    latents, log_probs, images = torch.stack(latents, 1), torch.stack(log_probs, 1), policy.decode_latents(latents[-1])
    good = images.flatten(1).isfinite().all(1) & latents.flatten(1).isfinite().all(1)
    latents[~good], log_probs[~good] = 0.0, 0.0
    return Rollout(prompt_embeds, pooled_embeds, latents, log_probs, good), images


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
