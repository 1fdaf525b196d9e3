"""The DDIM Gaussian in Triton: the computations that `ddim_step` and `ppo_loss` share.

`reference.ddim_step` has the shape letters and equations. Elements of a row are numbered as if the row were contiguous, whatever the
memory layout.
"""

import triton
import triton.language as tl


@triton.jit
def memory_offset(element, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where an element of a row lies in memory."""
    if CHANNELS_LAST:
        return (element % PIXELS) * CHANNELS + element // PIXELS
    else:
        return element


@triton.jit
def load_guided(noise_pred_ptr, offset, row, num_rows, row_stride, guidance_scale, mask, GUIDED: tl.constexpr):
    """uncond + w (cond - uncond) in fp32."""
    out = tl.load(noise_pred_ptr + row * row_stride + offset, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        cond = tl.load(noise_pred_ptr + (num_rows + row) * row_stride + offset, mask=mask, other=0.0).to(tl.float32)
        out = tl.fma(guidance_scale, cond - out, out)
    return out


@triton.jit
def load_step(coefficients_ptr, step, NUM_STEPS: tl.constexpr, CLIP: tl.constexpr):
    """A row of the coefficients: c_x, c_out, s, log(s sqrt(2 pi)), q_x, q_out, bound. For a step outside the table all are NaN."""
    WIDTH: tl.constexpr = 7 if CLIP else 4
    valid = (step >= 0) & (step < NUM_STEPS)
    base = coefficients_ptr + step * WIDTH
    nan = float("nan")
    c_x = tl.load(base, mask=valid, other=nan)
    c_out = tl.load(base + 1, mask=valid, other=nan)
    std = tl.load(base + 2, mask=valid, other=nan)
    log_norm = tl.load(base + 3, mask=valid, other=nan)
    if CLIP:
        q_x = tl.load(base + 4, mask=valid, other=nan)
        q_out = tl.load(base + 5, mask=valid, other=nan)
        bound = tl.load(base + 6, mask=valid, other=nan)
    else:
        q_x, q_out, bound = c_x, c_out, std  # not read
    return c_x, c_out, std, log_norm, q_x, q_out, bound


@triton.jit
def mean_of_step(out, x, c_x, c_out, q_x, q_out, bound, CLIP: tl.constexpr):
    """The mean of x_p, and d mean / d out. Each fma is written out, so that rollout and update get the same bits."""
    if CLIP:
        scaled_x0 = tl.fma(q_x, x, q_out * out)
        inside = (scaled_x0 <= bound) & (scaled_x0 >= -bound)
        # a NaN fails every comparison, so it stays NaN
        clamped = tl.where(scaled_x0 > bound, bound, tl.where(scaled_x0 < -bound, -bound, scaled_x0))
        mean = tl.fma(c_x - q_x, x, (c_out - q_out) * out) + clamped
        return mean, tl.where(inside, c_out, c_out - q_out)
    else:
        return tl.fma(c_x, x, c_out * out), c_out


@triton.jit
def last_to_arrive(counter_ptr, num_programs):
    """True in the last of `num_programs` programs to get here. That program sees what the others stored, and sets the counter to 0."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_programs - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit
def finish_log_prob(partials_ptr, row, log_norm, ELEMENTS: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_P2: tl.constexpr):
    """The row's log-prob from the sums of ((x_p - mean) / s)^2 over its chunks. Every program adds the sums in the same order."""
    chunk = tl.arange(0, CHUNKS_P2)
    partials = tl.load(partials_ptr + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=0.0)
    return -0.5 * (tl.sum(partials) / ELEMENTS) - log_norm
