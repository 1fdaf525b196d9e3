"""Sampling under the current policy.

Shape letters: B samples of this rank, S denoising steps, (C, H, W) one sample's latents, L tokens, E and P embedding widths.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo_fast.kernels import Ops
from ddpo_fast.policy import Policy
from ddpo_fast.schedule import Schedule
from ddpo_fast.updates.score_accumulation import ScoreAccumulator

EVAL_SAMPLE_ID = 1 << 48
"""Evaluation samples are numbered from here, training samples from 0: their noise never meets."""
HELDOUT_SAMPLE_ID = 1 << 49
"""And samples of held-out prompts from here."""


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
    schedule: Schedule,
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
