"""The update's loss as one autograd node: log-prob, ratio, clipped surrogate, statistics, and the closed-form gradient of both branches.

`reference.ppo_loss` has the equations, shapes and errors. The kernels read the trajectories in place and make no gathered copy. Bytes per
element of a guided fp16 row: forward 2 x 2 (noise_pred) + 4 + 4 (x_t, x_p) = 12; backward the same and 2 x 2 for the gradient = 16.
Backward needs the arguments and one number a row. The log-prob is that of `ddim_step`: same expressions, chunks and order of sums.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpo_fast.kernels.checks import check_fp32, check_ppo_loss, check_values
from ddpo_fast.kernels.gaussian import finish_log_prob, last_to_arrive, load_guided, load_step, mean_of_step, memory_offset
from ddpo_fast.kernels.launch import block_and_warps, counters, dense, empty_like, launch, power_of_2
from ddpo_fast.kernels.reference import MAX_LOG_RATIO


@triton.jit
def _load_index(rows_ptr, steps_ptr, index, num_samples, NUM_STEPS: tl.constexpr):
    """A transition's (sample, step). A transition that does not exist gets (0, -1); step -1 has no coefficients, so the result is NaN."""
    sample, step = tl.load(rows_ptr + index), tl.load(steps_ptr + index)
    valid = (sample >= 0) & (sample < num_samples) & (step >= 0) & (step < NUM_STEPS)
    return tl.where(valid, sample, 0), tl.where(valid, step, -1)


@triton.jit
def _load_transition(
    noise_pred_ptr, latents_ptr, coefficients_ptr, index, sample, step, element, mask, num_rows, noise_pred_stride, guidance_scale,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, NUM_STEPS: tl.constexpr, CLIP: tl.constexpr, GUIDED: tl.constexpr,
    NOISE_PRED_CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """x_p - mean, d mean / d out, s and log(s sqrt(2 pi)) of a chunk of a transition."""
    ELEMENTS: tl.constexpr = CHANNELS * PIXELS
    c_x, c_out, std, log_norm, q_x, q_out, bound = load_step(coefficients_ptr, step, NUM_STEPS, CLIP)
    std = tl.where(std > 0.0, std, float("nan"))  # a step with s = 0 has no density to train on
    offset = memory_offset(element, CHANNELS, PIXELS, NOISE_PRED_CHANNELS_LAST)
    out = load_guided(noise_pred_ptr, offset, index, num_rows, noise_pred_stride, guidance_scale, mask, GUIDED)
    x_ptr = latents_ptr + (sample * (NUM_STEPS + 1) + tl.maximum(step, 0)) * ELEMENTS + element
    x = tl.load(x_ptr, mask=mask, other=0.0)
    x_p = tl.load(x_ptr + ELEMENTS, mask=mask, other=0.0)
    mean, d_out = mean_of_step(out, x, c_x, c_out, q_x, q_out, bound, CLIP)
    return x_p - mean, d_out, std, log_norm


@triton.jit
def _ppo_loss_fwd_kernel(
    noise_pred_ptr, latents_ptr, old_log_probs_ptr, advantages_ptr, coefficients_ptr, rows_ptr, steps_ptr,
    loss_ptr, statistics_ptr, slopes_ptr, partials_ptr, counters_ptr,
    guidance_scale, clip_range, weight, num_rows, num_samples, noise_pred_stride,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, NUM_STEPS: tl.constexpr, CLIP: tl.constexpr, GUIDED: tl.constexpr,
    NOISE_PRED_CHANNELS_LAST: tl.constexpr, SCORE_FUNCTION: tl.constexpr, MAX_LOG_RATIO: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_P2: tl.constexpr, ROWS_P2: tl.constexpr,
):  # fmt: skip
    ELEMENTS: tl.constexpr = CHANNELS * PIXELS
    index, chunk = (tl.program_id(0) // CHUNKS).to(tl.int64), tl.program_id(0) % CHUNKS
    element = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = element < ELEMENTS
    sample, step = _load_index(rows_ptr, steps_ptr, index, num_samples, NUM_STEPS)
    difference, _, std, log_norm = _load_transition(
        noise_pred_ptr, latents_ptr, coefficients_ptr, index, sample, step, element, mask, num_rows, noise_pred_stride, guidance_scale,
        CHANNELS, PIXELS, NUM_STEPS, CLIP, GUIDED, NOISE_PRED_CHANNELS_LAST,
    )  # fmt: skip
    deviation = tl.where(mask, difference / std, 0.0)
    tl.store(partials_ptr + index * CHUNKS + chunk, tl.sum(deviation * deviation))

    if last_to_arrive(counters_ptr + 1 + index, CHUNKS):
        log_prob = finish_log_prob(partials_ptr, index, log_norm, ELEMENTS, CHUNKS, CHUNKS_P2)
        log_ratio = log_prob - tl.load(old_log_probs_ptr + sample * NUM_STEPS + tl.maximum(step, 0))
        advantage = tl.load(advantages_ptr + sample)
        bounded = tl.where(log_ratio > MAX_LOG_RATIO, MAX_LOG_RATIO, tl.where(log_ratio < -MAX_LOG_RATIO, -MAX_LOG_RATIO, log_ratio))
        ratio = tl.exp(bounded)
        low, high = 1.0 - clip_range, 1.0 + clip_range
        if SCORE_FUNCTION:
            loss = -advantage * log_prob
            slope = -advantage
        else:
            clipped_ratio = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
            loss, clipped_loss = -advantage * ratio, -advantage * clipped_ratio
            flat = (clipped_loss > loss) | (log_ratio > MAX_LOG_RATIO) | (log_ratio < -MAX_LOG_RATIO)
            slope = tl.where(flat, 0.0, loss)  # d loss / d log p = -A rho
            loss = tl.where(clipped_loss > loss, clipped_loss, loss)
        tl.store(slopes_ptr + index, weight * slope)
        tl.store(statistics_ptr + index, loss)
        tl.store(statistics_ptr + num_rows + index, ratio)
        tl.store(statistics_ptr + 2 * num_rows + index, (tl.abs(ratio - 1.0) > clip_range).to(tl.float32))
        tl.store(statistics_ptr + 3 * num_rows + index, 0.5 * log_ratio * log_ratio)
        if last_to_arrive(counters_ptr, num_rows):
            all_rows = tl.arange(0, ROWS_P2)
            losses = tl.load(statistics_ptr + all_rows, mask=all_rows < num_rows, other=0.0)
            tl.store(loss_ptr, weight * tl.sum(losses))


@triton.jit
def _ppo_loss_bwd_kernel(
    upstream_ptr, slopes_ptr, noise_pred_ptr, latents_ptr, coefficients_ptr, rows_ptr, steps_ptr, grad_ptr,
    guidance_scale, num_rows, num_samples, noise_pred_stride,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, NUM_STEPS: tl.constexpr, CLIP: tl.constexpr, GUIDED: tl.constexpr,
    NOISE_PRED_CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    ELEMENTS: tl.constexpr = CHANNELS * PIXELS
    index, chunk = (tl.program_id(0) // CHUNKS).to(tl.int64), tl.program_id(0) % CHUNKS
    element = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = element < ELEMENTS
    sample, step = _load_index(rows_ptr, steps_ptr, index, num_samples, NUM_STEPS)
    difference, d_out, std, _ = _load_transition(
        noise_pred_ptr, latents_ptr, coefficients_ptr, index, sample, step, element, mask, num_rows, noise_pred_stride, guidance_scale,
        CHANNELS, PIXELS, NUM_STEPS, CLIP, GUIDED, NOISE_PRED_CHANNELS_LAST,
    )  # fmt: skip
    scale = tl.load(upstream_ptr) * tl.load(slopes_ptr + index) / (std * std * ELEMENTS)
    grad = scale * d_out * difference
    dtype = grad_ptr.dtype.element_ty
    offset = memory_offset(element, CHANNELS, PIXELS, NOISE_PRED_CHANNELS_LAST)
    if GUIDED:
        tl.store(grad_ptr + index * ELEMENTS + offset, ((1.0 - guidance_scale) * grad).to(dtype), mask=mask)
        tl.store(grad_ptr + (num_rows + index) * ELEMENTS + offset, (guidance_scale * grad).to(dtype), mask=mask)
    else:
        tl.store(grad_ptr + index * ELEMENTS + offset, grad.to(dtype), mask=mask)


def _shape_constants(noise_pred: Tensor, channels_last: bool, coefficients: Tensor, rows: Tensor) -> dict:
    _, channels, *inner = noise_pred.shape
    pixels = math.prod(inner)
    block, num_warps = block_and_warps(channels * pixels)
    return dict(
        CHANNELS=channels, PIXELS=pixels, NUM_STEPS=len(coefficients), CLIP=coefficients.shape[1] == 7,
        GUIDED=len(noise_pred) != len(rows), NOISE_PRED_CHANNELS_LAST=channels_last,
        BLOCK=block, CHUNKS=triton.cdiv(channels * pixels, block), num_warps=num_warps,
    )  # fmt: skip


@torch.library.custom_op("ddpo_fast::ppo_loss", mutates_args=())
def _ppo_loss(
    noise_pred: Tensor, latents: Tensor, old_log_probs: Tensor, advantages: Tensor, coefficients: Tensor, rows: Tensor, steps: Tensor,
    guidance_scale: float, clip_range: float, weight: float, score_function: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, the statistics, and weight times each row's d loss / d log p, which is all that backward needs from forward."""
    check_values(coefficients, steps=steps, rows=rows, num_rows=len(latents))
    num_rows = len(rows)
    loss, statistics, slopes = _outputs(latents, rows)
    noise_pred, stride, channels_last = dense(noise_pred)
    constants = _shape_constants(noise_pred, channels_last, coefficients, rows)
    chunks = constants["CHUNKS"]
    launch(
        _ppo_loss_fwd_kernel, chunks * num_rows,
        noise_pred, latents.contiguous(), old_log_probs.contiguous(), advantages.contiguous(), coefficients.contiguous(),
        rows.contiguous(), steps.contiguous(), loss, statistics, slopes,
        torch.empty(num_rows * chunks, dtype=torch.float32, device=latents.device), counters(1 + num_rows, latents.device),
        guidance_scale, clip_range, weight, num_rows, len(latents), stride,
        SCORE_FUNCTION=score_function, MAX_LOG_RATIO=MAX_LOG_RATIO, CHUNKS_P2=power_of_2(chunks), ROWS_P2=power_of_2(num_rows),
        **constants,
    )  # fmt: skip
    return loss, statistics, slopes


@_ppo_loss.register_fake
def _(noise_pred, latents, old_log_probs, advantages, coefficients, rows, steps, guidance_scale, clip_range, weight, score_function):
    return _outputs(latents, rows)


def _outputs(latents: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(shape, dtype=torch.float32, device=latents.device) for shape in ((), (4, len(rows)), (len(rows),)))


@torch.library.custom_op("ddpo_fast::ppo_loss_backward", mutates_args=())
def _ppo_loss_backward(
    upstream: Tensor, slopes: Tensor, noise_pred: Tensor, latents: Tensor, coefficients: Tensor, rows: Tensor, steps: Tensor,
    guidance_scale: float,
) -> Tensor:  # fmt: skip
    noise_pred, stride, channels_last = dense(noise_pred)
    grad = empty_like(noise_pred)
    constants = _shape_constants(noise_pred, channels_last, coefficients, rows)
    launch(
        _ppo_loss_bwd_kernel, constants["CHUNKS"] * len(rows),
        upstream.contiguous(), slopes, noise_pred, latents.contiguous(), coefficients.contiguous(), rows.contiguous(),
        steps.contiguous(), grad, guidance_scale, len(rows), len(latents), stride, **constants,
    )  # fmt: skip
    return grad


@_ppo_loss_backward.register_fake
def _(upstream, slopes, noise_pred, latents, coefficients, rows, steps, guidance_scale):
    return empty_like(noise_pred)


def _setup_context(ctx, inputs, output):
    noise_pred, latents, _, _, coefficients, rows, steps, ctx.guidance_scale, *_ = inputs
    _, statistics, slopes = output
    ctx.mark_non_differentiable(statistics, slopes)
    ctx.set_materialize_grads(False)  # otherwise autograd makes zero gradients for the two
    ctx.save_for_backward(slopes, noise_pred, latents, coefficients, rows, steps)


def _backward(ctx, grad_loss, *_):
    grad = None if grad_loss is None else _ppo_loss_backward(grad_loss, *ctx.saved_tensors, ctx.guidance_scale)
    return grad, *[None] * 10


_ppo_loss.register_autograd(_backward, setup_context=_setup_context)


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
    """`reference.ppo_loss` in one Triton launch, and its gradient in another."""
    check_ppo_loss(noise_pred, latents, old_log_probs, advantages, coefficients, rows, steps)
    check_fp32(latents, noise_pred)
    loss, statistics, _ = _ppo_loss(
        noise_pred, latents, old_log_probs, advantages, coefficients, rows, steps,
        float(guidance_scale), float(clip_range), float(weight), score_function,
    )  # fmt: skip
    return loss, statistics
