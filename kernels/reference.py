"""Pure-PyTorch definition of every operation: the specification, the CPU path, the test oracle, the benchmark baseline.

Shape letters: B rows (samples or transitions); G network rows for each row (2 with guidance, the B unconditional rows first; otherwise
1); *shape the shape of one row's latents, such as (C, H, W); N the number of elements in a row; S denoising steps; M samples. All
arithmetic is at least fp32, whatever the network's dtype.
"""

import math

import torch
from torch import Tensor

from ddpo_fast.kernels.checks import check_ddim_step, check_geglu, check_group_norm, check_ppo_loss, check_values

INITIAL_STEP = 0xFFFFFFFF  # the `step` under which the noise of the initial latents x_T is drawn
MAX_LOG_RATIO = 20.0  # a log ratio beyond it counts as +-20: the ratio is finite and has no gradient
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
    """Standard normal noise as a function of (seed, sample id, step, element). Batch and rank can change its last bits at most.

    Element e of a row takes lane e % 4 of Philox at counter (e // 4, step, id mod 2^32, id div 2^32); lanes (0, 1) and
    (2, 3) go through Box-Muller: sqrt(-2 ln u1) * (cos, sin)(2 pi u2).

    sample_ids: (B,) int64 in [0, 2^63). steps: (B,) int64, a denoising step or INITIAL_STEP. Returns (B, N) fp32.
    """
    counter = torch.arange((num_elements + 3) // 4, device=sample_ids.device)
    ids, steps = sample_ids[:, None], steps[:, None]
    u = [_uniform(word) for word in philox4x32(seed, counter[None], steps, ids & _U32, ids >> 32)]
    lanes = []
    for u1, u2 in ((u[0], u[1]), (u[2], u[3])):
        radius, quarter = (-2.0 * u1.clamp(min=1e-7).log()).sqrt(), (4 * u2 + 0.5).floor()
        angle = 2 * math.pi * (u2 - 0.25 * quarter)  # within +-pi/4, where fp32 resolves it best
        cos, sin = angle.cos(), angle.sin()
        for _ in range(4):  # adds `quarter` right angles to the angle: one of them turns (cos, sin) into (-sin, cos)
            cos, sin = (torch.where(quarter > 0, pair, one) for pair, one in ((-sin, cos), (cos, sin)))
            quarter = quarter - 1
        lanes += [radius * cos, radius * sin]
    return torch.stack(lanes, dim=-1).flatten(1)[:, :num_elements]


def guide(noise_pred: Tensor, num_rows: int, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: uncond + w * (cond - uncond); the gradient flows through both branches.

    noise_pred: (2B, *shape), the B unconditional rows first; or (B, *shape), which is returned without guidance. Returns (B, *shape),
    fp32 or wider.
    """
    noise_pred = noise_pred.to(torch.promote_types(noise_pred.dtype, torch.float32))
    if len(noise_pred) == num_rows:
        return noise_pred
    uncond, cond = noise_pred.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def step_mean(out: Tensor, latents: Tensor, coefficients: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (B, *shape), standard deviation s (B, 1, ...) and log(s sqrt(2 pi)) (B,) of the step from `latents`, see `ddim_step`.

    out: the guided network output. out, latents x_t: (B, *shape), at least fp32. coefficients, steps: see `ddim_step`.
    """
    row = (-1, *[1] * (latents.dim() - 1))
    c_x, c_out, std, log_norm, *clip = coefficients[steps].unbind(1)
    c_x, c_out, std = c_x.view(row), c_out.view(row), std.view(row)
    if not clip:
        return c_x * latents + c_out * out, std, log_norm
    q_x, q_out, bound = (column.view(row) for column in clip)
    scaled_x0 = (q_x * latents + q_out * out).clamp(-bound, bound)
    return (c_x - q_x) * latents + (c_out - q_out) * out + scaled_x0, std, log_norm


def _log_prob(next_latents: Tensor, mean: Tensor, std: Tensor, log_norm: Tensor) -> Tensor:
    return -0.5 * ((next_latents - mean) / std).square().flatten(1).mean(1) - log_norm


@torch.no_grad()
def ddim_step(
    noise_pred: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    seed: int,
    sample_ids: Tensor,
    guidance_scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of every row and its mean log-density, DDPO (arXiv:2305.13301) section 4.2.

        out   = uncond + w (cond - uncond)
        mean  = c_x x_t + c_out out            or, with x0 clipped to [-r, r] (q_x x_t + q_out out is sqrt(a_p) x0):
        mean  = (c_x - q_x) x_t + (c_out - q_out) out + clamp(q_x x_t + q_out out, -sqrt(a_p) r, sqrt(a_p) r)
        x_p   = mean + s z,  z = normal_noise(seed, sample_ids, steps)
        log p = mean over the N elements of -(x_p - mean)^2 / (2 s^2) - log(s sqrt(2 pi)); 0 where s = 0, a step without a density

    noise_pred: (G B, *shape) fp32, fp16 or bf16. latents x_t: (B, *shape) fp32. coefficients: (S, 4) fp32 rows of
    (c_x, c_out, s, log(s sqrt(2 pi))), the last one 0 where s is 0. For x0 clipping they are (S, 7), with (q_x, q_out, sqrt(a_p) r) after
    those four. They account for the prediction type. steps: (B,) int64, for each row the number of its coefficients' row. sample_ids: (B,)
    int64. Returns x_p (B, *shape) fp32; log p (B,) fp32 in nats per element, of x_p as it is returned, after rounding; and the next
    network input (G B, *shape): x_p in `dtype` (default: noise_pred's) and noise_pred's memory layout, once for each branch. Nothing here
    has a gradient.
    Raises ValueError for arguments that do not fit. On a CPU it also does so for a step outside the table; on a GPU that check would
    synchronise, and the row becomes NaN instead.
    """
    check_ddim_step(noise_pred, latents, coefficients, steps, seed, sample_ids, dtype)
    check_values(coefficients, steps=steps)
    out = guide(noise_pred, len(latents), guidance_scale)
    mean, std, log_norm = step_mean(out, latents, coefficients, steps)
    noise = normal_noise(seed, sample_ids, steps, latents[0].numel()).view(latents.shape)
    next_latents = mean + std * noise
    unet_input = next_latents.to(dtype or noise_pred.dtype).repeat(len(noise_pred) // len(latents), *[1] * (latents.dim() - 1))
    row = noise_pred[:1]
    if row.dim() == 4 and not row.is_contiguous() and row.is_contiguous(memory_format=torch.channels_last):
        unet_input = unet_input.contiguous(memory_format=torch.channels_last)
    log_prob = _log_prob(next_latents, mean, torch.where(std == 0, 1.0, std), log_norm)  # 0 / 1 in a step without noise
    return next_latents, log_prob, unet_input


def ppo_loss(
    noise_pred: Tensor,
    latents: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    coefficients: Tensor,
    rows: Tensor,
    steps: Tensor,
    guidance_scale: float = 1.0,
    clip_range: float = 1e-4,
    weight: float = 1.0,
    score_function: bool = False,
) -> tuple[Tensor, Tensor]:
    """The policy loss of a micro-batch of B transitions taken from M stored trajectories, DDPO (arXiv:2305.13301) section 4.3.

        log p = as in `ddim_step`, of x_p = latents[row, step + 1] given x_t = latents[row, step]
        rho   = exp(log p - old log p)
        loss  = weight * sum over the B transitions of max(-A rho, -A clip(rho, 1 - eps, 1 + eps))
                or, with score_function, of -A log p, which is never clipped

    noise_pred: (G B, *shape) fp32, fp16 or bf16, the only argument that gets a gradient. The gradient goes through log p, in closed form
    d log p / d out = d mean / d out (x_p - mean) / (N s^2), times (1 - w, w) for the two branches.
    latents: (M, S + 1, *shape) fp32. old_log_probs: (M, S) fp32. advantages: (M,) fp32. coefficients: see `ddim_step`.
    rows, steps: (B,) int64, the transitions. Returns the scalar loss, and (4, B) fp32 statistics without a gradient: each
    transition's loss, rho, whether |rho - 1| > eps, and (log p - old log p)^2 / 2, whose mean is the approximate KL divergence.
    Raises ValueError as `ddim_step` does, and on a CPU for a step with s = 0; on a GPU such a step gives NaN.
    """
    check_ppo_loss(noise_pred, latents, old_log_probs, advantages, coefficients, rows, steps)
    check_values(coefficients, steps=steps, rows=rows, num_rows=len(latents))
    out = guide(noise_pred, len(rows), guidance_scale)
    x_t, next_latents = latents[rows, steps], latents[rows, steps + 1]
    mean, std, log_norm = step_mean(out, x_t, coefficients, steps)
    log_prob = _log_prob(next_latents, mean, torch.where(std > 0, std, torch.nan), log_norm)
    advantages, log_ratio = advantages[rows], log_prob - old_log_probs[rows, steps]
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if score_function:
        losses = -advantages * log_prob
    else:
        losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    clipped = ((ratio - 1).abs() > clip_range).to(ratio.dtype)
    return weight * losses.sum(), torch.stack([losses, ratio, clipped, 0.5 * log_ratio.square()]).detach()


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool = True) -> Tensor:
    """GroupNorm (arXiv:1803.08494) and, if wanted, the SiLU that follows it in a residual block.

        z = (x - mean) / sqrt(var + eps) * weight + bias,  y = z / (1 + exp(-z)), or y = z without silu

    mean and var (over n, not n - 1) are those of the C / num_groups * H * W elements of a sample's group.

    x: (B, C, H, W) fp32, fp16 or bf16 (here also fp64). weight, bias: (C,) or None (1 and 0), each of any of these dtypes.
    Returns y (B, C, H, W) in x's dtype.
    Raises ValueError for a shape, dtype or device that does not fit, an empty x, or a num_groups that does not divide C.
    """
    check_group_norm(x, num_groups, weight, bias)
    dtype = x.dtype
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # without a weight torch cannot differentiate the bias
    for tensor in (weight, bias):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    weight, bias = (tensor if tensor is None else tensor.to(dtype) for tensor in (weight, bias))
    y = torch.group_norm(x.to(dtype), num_groups, weight, bias, eps)
    return (torch.nn.functional.silu(y) if silu else y).to(x.dtype)


def geglu(x: Tensor) -> Tensor:
    """The gated linear unit of a transformer block's feed-forward (arXiv:2002.05202): y = a * gelu(g), with the exact GELU (erf).

    x: (..., 2D) fp32, fp16 or bf16 (here also fp64); a is its first D columns and g the others. Returns y (..., D) in x's dtype.
    Raises ValueError for an odd last dimension, an empty x or another dtype.
    """
    check_geglu(x)
    value, gate = x.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)
