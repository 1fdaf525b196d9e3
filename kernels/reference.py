"""Pure-PyTorch definition of every operation: the specification, the CPU path, the test oracle, the benchmark baseline.

Shape letters: B rows (samples or transitions), N elements of one row's latents (C*H*W), S denoising steps.
All arithmetic is at least fp32, whatever the dtype of the UNet's output.
"""

import math

import torch
from torch import Tensor

INITIAL_STEP = 0xFFFFFFFF  # the `step` under which the noise of the initial latents x_T is drawn
_U32 = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    product = a * b  # int64 wraps modulo 2^64: the bits are those of the unsigned product
    return (product >> 32) & _U32, product & _U32


def philox4x32(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> list[Tensor]:
    """Philox 4x32-10 (Salmon et al. 2011), the counter-based generator behind Triton's `tl.philox`.

    seed: 64-bit key. c0..c3: int64 tensors holding 32-bit counters, broadcastable to one shape.
    Returns four int64 tensors of 32-bit random words.
    """
    k0, k1 = seed & _U32, (seed >> 32) & _U32
    for _ in range(10):
        hi0, lo0 = _mulhilo(0xD2511F53, c0)
        hi1, lo1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return [c0, c1, c2, c3]


def _uniform(word: Tensor) -> Tensor:
    """32-bit word -> fp32 in [0, 1), as Triton's `uint_to_uniform_float`."""
    return torch.where(word > 0x7FFFFFFF, _U32 - word, word).float() * 4.6566127342e-10


def normal_noise(seed: int, sample_ids: Tensor, steps: Tensor, num_elements: int) -> Tensor:
    """Standard normal noise as a pure function of (seed, sample id, step, element): batch and rank do not enter.

    Element e of a row takes lane e % 4 of Philox at counter (e // 4, step, id mod 2^32, id div 2^32); lanes (0, 1) and
    (2, 3) go through Box-Muller: sqrt(-2 ln u1) * (cos, sin)(2 pi u2).

    sample_ids: (B,) int64 in [0, 2^63). steps: (B,) int64, a denoising step or INITIAL_STEP. Returns (B, N) fp32.
    """
    counter = torch.arange((num_elements + 3) // 4, device=sample_ids.device)
    ids, steps = sample_ids[:, None], steps[:, None]
    u = [_uniform(word) for word in philox4x32(seed, counter[None], steps, ids & _U32, ids >> 32)]
    lanes = []
    for u1, u2 in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = (-2.0 * u1.clamp(min=1e-7).log()).sqrt(), 2 * math.pi * u2
        lanes += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(lanes, dim=-1).flatten(1)[:, :num_elements]


def guide(noise_pred: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: uncond + w * (cond - uncond); the gradient flows through both branches.

    noise_pred: (2B, C, H, W), the B unconditional rows first. Returns (B, C, H, W), fp32 or wider.
    """
    uncond, cond = noise_pred.to(torch.promote_types(noise_pred.dtype, torch.float32)).chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def _mean(noise_pred: Tensor, latents: Tensor, coefficients: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c_x, c_out, std, log_norm = coefficients[steps].unbind(1)
    row = (-1, *[1] * (latents.dim() - 1))
    return c_x.view(row) * latents + c_out.view(row) * noise_pred, std.view(row), log_norm


def _log_prob(next_latents: Tensor, mean: Tensor, std: Tensor, log_norm: Tensor) -> Tensor:
    return -0.5 * ((next_latents - mean) / std).square().flatten(1).mean(1) - log_norm


def ddim_log_prob(noise_pred: Tensor, latents: Tensor, next_latents: Tensor, coefficients: Tensor, steps: Tensor) -> Tensor:
    """Mean Gaussian log-density of a DDIM transition, DDPO (arXiv:2305.13301) section 4.2.

    log p = mean over the N elements of -(x_p - mean)^2 / (2 s^2) - log s - log sqrt(2 pi),  mean = c_x x_t + c_out out

    noise_pred (the guided UNet output `out`), latents x_t, next_latents x_p: (B, C, H, W). coefficients: (S, 4) rows of
    (c_x, c_out, s, log(s sqrt(2 pi))). steps: (B,) int64 row of the table. Returns (B,), in nats per element.
    """
    return _log_prob(next_latents, *_mean(noise_pred, latents, coefficients, steps))


def ddim_step(
    noise_pred: Tensor, latents: Tensor, coefficients: Tensor, steps: Tensor, seed: int, sample_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """One stochastic DDIM step x_p = mean + s z and its mean log-density (see `ddim_log_prob` for both and the shapes).

    z is `normal_noise(seed, sample_ids, steps)`. Returns x_p (B, C, H, W) and log p (B,); log p is that of the x_p
    returned, rounding included, by the very expression that the update uses.
    """
    mean, std, log_norm = _mean(noise_pred, latents, coefficients, steps)
    noise = normal_noise(seed, sample_ids, steps, latents[0].numel()).view_as(latents)
    next_latents = mean + std * noise
    return next_latents, _log_prob(next_latents, mean, std, log_norm)


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate: max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = exp(log_prob - old_log_prob).

    All tensors (B,). Returns the loss of each row and rho, both (B,).
    """
    ratio = (log_prob - old_log_prob).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)), ratio
