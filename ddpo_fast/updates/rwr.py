"""Reward-weighted regression: the denoising loss on own samples, each weighed by its reward (a baseline of DDPO, arXiv:2305.13301).

Shape letters: N samples of an iteration, B transitions of a micro-batch (a sample and a training timestep), T the
model's training timesteps, (C, H, W) one sample's latents.
"""

import torch
from torch import Tensor

from ddpo_fast.kernels.reference import guide


def reward_weights(
    prompts: list[str], rewards: Tensor, sparse: bool, inverse_temperature: float, percentile: float, by_prompt: bool
) -> Tensor:
    """What each of an iteration's samples counts in the denoising loss.

        w_i = n softmax(beta r)_i                    over a population of n rewards, so that its mean is 1
        w_i = 1 if r_i >= quantile(r, p) else 0      sparse; quantiles between two rewards are interpolated

    The population is the iteration, or, by_prompt, the samples of the same prompt where there are several; one whose prompt has no
    other good sample is compared with the whole iteration. Rewards that are not finite are in no population and get 0.

    prompts: N strings. rewards: (N,) of any dtype, reward's units; beta (inverse_temperature) in 1 / reward's units; percentile p in
    [0, 1). Returns (N,) fp64.
    """
    rewards = rewards.double()
    good = rewards.isfinite()
    weights, rows_of = torch.zeros_like(rewards), {}
    for row in good.nonzero()[:, 0].tolist():
        rows_of.setdefault(prompts[row], []).append(row)
    everybody = [row for rows in rows_of.values() for row in rows]
    groups = [rows for rows in rows_of.values() if by_prompt and len(rows) > 1]
    others = [row for row in everybody if not by_prompt or len(rows_of[prompts[row]]) == 1]
    for rows, population in [*zip(groups, groups), (others, everybody)]:
        if not rows:
            continue
        ordered = rewards[population].sort().values  # so that sums do not depend on the order of the samples
        if sparse:
            weights[rows] = (rewards[rows] >= ordered.quantile(percentile)).double()
        else:
            log_sum = (inverse_temperature * ordered).logsumexp(0)
            weights[rows] = len(population) * (inverse_temperature * rewards[rows] - log_sum).exp()
    return weights


def denoising_loss(noise_pred: Tensor, target: Tensor, weights: Tensor, guidance_scale: float, weight: float) -> tuple[Tensor, Tensor]:
    """The weighted denoising loss of a micro-batch, weight * sum over its B transitions of w mean((guided output - target)^2).

    The guided output is uncond + scale (cond - uncond), the mean over the latent's elements. noise_pred: (G B, C, H, W), G = 2 with
    guidance, the unconditional rows first. target: (B, C, H, W). weights w: (B,), at least fp32. Returns the scalar loss, and (1, B)
    statistics without a gradient: each transition's part.
    """
    errors = (guide(noise_pred, len(target), guidance_scale) - target).square().flatten(1).mean(1)
    losses = weights * errors
    return weight * losses.sum(), losses.detach()[None]
