"""The fused denoising step: one launch does guidance, mean, Philox noise, x_p, the copies of x_p for the next UNet call and the log-prob.

`reference.ddim_step` has the equations, shapes and errors. Bytes per element of a guided fp16 row: 2 x 2 (noise_pred) + 4 (x_t) +
4 (x_p) + 2 x 2 (UNet input) = 16. The kernel stores no noise tensor and does not synchronise. A row is cut into chunks of BLOCK elements,
one program each. The last program of a row adds up the chunks' sums. Everything that rounds depends on the row alone, not on the batch.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpo_fast.kernels.checks import check_ddim_step, check_fp32, check_values
from ddpo_fast.kernels.gaussian import finish_log_prob, last_to_arrive, load_guided, load_step, mean_of_step, memory_offset
from ddpo_fast.kernels.launch import block_and_warps, counters, dense, empty_like, launch, power_of_2


@triton.jit
def _box_muller(u1, u2):
    """sqrt(-2 ln u1) * (cos, sin)(2 pi u2), by polynomials on [-pi/4, pi/4].

    tl.sin and tl.cos also reduce huge angles. The registers for that made this kernel spill on sm_90.
    """
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(u1, 1.0e-7)))
    quarter = tl.floor(tl.fma(u2, 4.0, 0.5))
    theta = 6.283185307179586 * tl.fma(quarter, -0.25, u2)
    square = theta * theta
    sine = tl.fma(tl.fma(tl.fma(square, -1.9515295891e-4, 8.3321608736e-3), square, -1.6666654611e-1) * square, theta, theta)
    cosine = tl.fma(
        tl.fma(tl.fma(square, 2.443315711809948e-5, -1.388731625493765e-3), square, 4.166664568298827e-2),
        square * square,
        tl.fma(square, -0.5, 1.0),
    )
    q = quarter.to(tl.int32) & 3
    odd = (q & 1) == 1
    cos, sin = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return radius * tl.where((q == 1) | (q == 2), -cos, cos), radius * tl.where(q >= 2, -sin, sin)


@triton.jit
def normal_noise(seed, sample_id, step, group):
    """`reference.normal_noise` of elements 4 * group to 4 * group + 3: (4 * len(group),) fp32."""
    c0 = group.to(tl.uint32)
    c1 = tl.zeros_like(c0) + step.to(tl.uint32)
    c2 = tl.zeros_like(c0) + sample_id.to(tl.uint32)
    c3 = tl.zeros_like(c0) + (sample_id >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    z0, z1 = _box_muller(tl.uint_to_uniform_float(w0), tl.uint_to_uniform_float(w1))
    z2, z3 = _box_muller(tl.uint_to_uniform_float(w2), tl.uint_to_uniform_float(w3))
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit(do_not_specialize=["seed"])
def _ddim_step_kernel(
    noise_pred_ptr, latents_ptr, coefficients_ptr, steps_ptr, sample_ids_ptr,
    next_latents_ptr, unet_input_ptr, log_probs_ptr, partials_ptr, counters_ptr,
    seed: tl.int64, guidance_scale, num_rows, noise_pred_stride, latents_stride,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, NUM_STEPS: tl.constexpr, CLIP: tl.constexpr, GUIDED: tl.constexpr,
    NOISE_PRED_CHANNELS_LAST: tl.constexpr, LATENTS_CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_P2: tl.constexpr,
):  # fmt: skip
    ELEMENTS: tl.constexpr = CHANNELS * PIXELS
    row, chunk = (tl.program_id(0) // CHUNKS).to(tl.int64), tl.program_id(0) % CHUNKS
    element = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = element < ELEMENTS
    noise_pred_offset = memory_offset(element, CHANNELS, PIXELS, NOISE_PRED_CHANNELS_LAST)
    latents_offset = memory_offset(element, CHANNELS, PIXELS, LATENTS_CHANNELS_LAST)
    step = tl.load(steps_ptr + row)
    c_x, c_out, std, log_norm, q_x, q_out, bound = load_step(coefficients_ptr, step, NUM_STEPS, CLIP)

    out = load_guided(noise_pred_ptr, noise_pred_offset, row, num_rows, noise_pred_stride, guidance_scale, mask, GUIDED)
    x = tl.load(latents_ptr + row * latents_stride + latents_offset, mask=mask, other=0.0)
    mean, _ = mean_of_step(out, x, c_x, c_out, q_x, q_out, bound, CLIP)
    noise = normal_noise(seed, tl.load(sample_ids_ptr + row), step, chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4))
    x_p = tl.fma(std, noise, mean)

    tl.store(next_latents_ptr + row * ELEMENTS + element, x_p, mask=mask)
    unet_input = x_p.to(unet_input_ptr.dtype.element_ty)
    tl.store(unet_input_ptr + row * ELEMENTS + noise_pred_offset, unet_input, mask=mask)
    if GUIDED:
        tl.store(unet_input_ptr + (num_rows + row) * ELEMENTS + noise_pred_offset, unet_input, mask=mask)

    deviation = tl.where(mask, (x_p - mean) / tl.where(std == 0.0, 1.0, std), 0.0)  # 0 / 1 in a step without noise
    tl.store(partials_ptr + row * CHUNKS + chunk, tl.sum(deviation * deviation))
    if last_to_arrive(counters_ptr + row, CHUNKS):
        tl.store(log_probs_ptr + row, finish_log_prob(partials_ptr, row, log_norm, ELEMENTS, CHUNKS, CHUNKS_P2))


@torch.library.custom_op("ddpo_fast::ddim_step", mutates_args=())
def _ddim_step(
    noise_pred: Tensor, latents: Tensor, coefficients: Tensor, steps: Tensor, seed: int, sample_ids: Tensor, guidance_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_values(coefficients, steps=steps)
    num_rows, channels, *inner = latents.shape
    pixels = math.prod(inner)
    next_latents, log_probs, unet_input = _outputs(noise_pred, latents, dtype)
    noise_pred, noise_pred_stride, noise_pred_channels_last = dense(noise_pred)
    latents, latents_stride, latents_channels_last = dense(latents)
    block, num_warps = block_and_warps(channels * pixels)
    chunks = triton.cdiv(channels * pixels, block)
    launch(
        _ddim_step_kernel, chunks * num_rows,
        noise_pred, latents, coefficients.contiguous(), steps.contiguous(), sample_ids.contiguous(), next_latents, unet_input, log_probs,
        torch.empty(num_rows * chunks, dtype=torch.float32, device=latents.device), counters(num_rows, latents.device),
        seed, guidance_scale, num_rows, noise_pred_stride, latents_stride,
        CHANNELS=channels, PIXELS=pixels, NUM_STEPS=len(coefficients), CLIP=coefficients.shape[1] == 7,
        GUIDED=len(noise_pred) != num_rows, NOISE_PRED_CHANNELS_LAST=noise_pred_channels_last,
        LATENTS_CHANNELS_LAST=latents_channels_last, BLOCK=block, CHUNKS=chunks, CHUNKS_P2=power_of_2(chunks), num_warps=num_warps,
    )  # fmt: skip
    return next_latents, log_probs, unet_input


@_ddim_step.register_fake
def _(noise_pred, latents, coefficients, steps, seed, sample_ids, guidance_scale, dtype):
    return _outputs(noise_pred, latents, dtype)


def _outputs(noise_pred: Tensor, latents: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(latents.shape, dtype=torch.float32, device=latents.device),
        torch.empty(len(latents), dtype=torch.float32, device=latents.device),
        empty_like(noise_pred, dtype),
    )


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
    """`reference.ddim_step` in one Triton launch."""
    check_ddim_step(noise_pred, latents, coefficients, steps, seed, sample_ids, dtype)
    check_fp32(latents, noise_pred)
    return _ddim_step(noise_pred, latents, coefficients, steps, seed, sample_ids, float(guidance_scale), dtype or noise_pred.dtype)
