"""GroupNorm and the SiLU after it in Triton: x is read twice, y is written once, and only x and (B, groups) moments are saved.

Forward launches three kernels: `_group_norm_moments_kernel` (mean and squared deviations of every channel of a chunk of pixels),
`_group_norm_merge_kernel` (which merges them by Chan's formula) and `_group_norm_silu_fwd_kernel`. Backward launches three, too: for the
sums of dy' and dy' * xhat in the same tiles, to merge these sums, and for dx. A tile is [BLOCK_P pixels, BLOCK_C channels] of one sample.
Its size depends on the sample's shape alone, so that a sample's result has the same bits in any batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpo_fast.kernels.checks import TRITON_FLOATS, check_group_norm
from ddpo_fast.kernels.launch import block_and_warps, dense, empty_like, launch, power_of_2

LARGEST_TILE = 8192
CHANNELS_LAST_CHANNELS = 64
"""Channels of a channels_last tile. 64 are 128 bytes of fp16, a whole cache line. 64 divides most widths of Stable Diffusion's UNets."""


@triton.jit
def _tile(C: tl.constexpr, HW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr, REVERSE: tl.constexpr):
    """Sample, chunk of pixels, channels, the tile's offset in x, the offsets in the tile and its mask."""
    CHUNKS: tl.constexpr = (HW + BLOCK_P - 1) // BLOCK_P
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    if REVERSE:  # the L2 cache still holds what the pass before read last
        pid = tl.num_programs(0) - 1 - pid
    if LAST:
        c_tile, chunk = pid % C_TILES, pid // C_TILES % CHUNKS
    else:
        chunk, c_tile = pid % CHUNKS, pid // CHUNKS % C_TILES
    sample = (pid // (C_TILES * CHUNKS)).to(tl.int64)
    in_p = tl.arange(0, BLOCK_P)[:, None]
    in_c = tl.arange(0, BLOCK_C)[None, :]
    c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    if LAST:
        origin = chunk.to(tl.int64) * (BLOCK_P * C) + c_tile * BLOCK_C
        within = in_p * C + in_c
    else:
        origin = c_tile.to(tl.int64) * (BLOCK_C * HW) + chunk * BLOCK_P
        within = in_c * HW + in_p
    mask = (chunk * BLOCK_P + in_p < HW) & (c[None, :] < C)
    return sample, chunk, c, sample * (C * HW) + origin, within, mask


@triton.jit
def _affine(weight_ptr, bias_ptr, c, C: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr):
    weight = tl.full([BLOCK_C], 1.0, tl.float32)
    bias = tl.zeros([BLOCK_C], tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def _gradients(x, dy, mean, rstd, weight, bias, SILU: tl.constexpr):
    """xhat, and dy', the gradient of the affine result z. z is recomputed from x."""
    xhat = (x - mean[None, :]) * rstd[None, :]
    if SILU:
        z = xhat * weight[None, :] + bias[None, :]
        gate = 1.0 / (1.0 + tl.exp(-z))
        dy = dy * (gate * (1.0 + z * (1.0 - gate)))
    return xhat, dy


@triton.jit
def _group_norm_moments_kernel(
    x_ptr, mean_ptr, square_ptr,
    C: tl.constexpr, HW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (HW + BLOCK_P - 1) // BLOCK_P
    sample, chunk, c, origin, within, mask = _tile(C, HW, BLOCK_P, BLOCK_C, LAST, False)
    x = tl.load(x_ptr + origin + within, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(HW - chunk * BLOCK_P, BLOCK_P).to(tl.float32)
    mean = tl.sum(x, 0) / count
    deviation = tl.where(mask, x - mean[None, :], 0.0)
    rest = tl.sum(deviation, 0)  # count times the mean's rounding error, which would be the largest error where the mean is large
    square = tl.maximum(tl.sum(deviation * deviation, 0) - rest * (rest / count), 0.0)
    out = (sample * CHUNKS + chunk) * C + c
    tl.store(mean_ptr + out, mean + rest / count, mask=c < C)
    tl.store(square_ptr + out, square, mask=c < C)


@triton.jit
def _group_norm_merge_kernel(
    chunk_mean_ptr, chunk_square_ptr, mean_ptr, rstd_ptr, eps,
    C: tl.constexpr, HW: tl.constexpr, CPG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (HW + BLOCK_P - 1) // BLOCK_P
    GROUPS: tl.constexpr = C // CPG
    pid = tl.program_id(0)
    origin = (pid // GROUPS).to(tl.int64) * (CHUNKS * C) + pid % GROUPS * CPG
    first = tl.load(chunk_mean_ptr + origin)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, CPG * CHUNKS, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = n < CPG * CHUNKS
        chunk = n // CPG
        count = tl.minimum(HW - chunk * BLOCK_P, BLOCK_P).to(tl.float32)
        total += tl.where(mask, count * (tl.load(chunk_mean_ptr + origin + chunk * C + n % CPG, mask=mask, other=0.0) - first), 0.0)
    mean = first + tl.sum(total, 0) / (CPG * HW)
    square = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, CPG * CHUNKS, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = n < CPG * CHUNKS
        chunk = n // CPG
        count = tl.minimum(HW - chunk * BLOCK_P, BLOCK_P).to(tl.float32)
        offsets = origin + chunk * C + n % CPG
        shift = tl.load(chunk_mean_ptr + offsets, mask=mask, other=0.0) - mean
        square += tl.where(mask, tl.load(chunk_square_ptr + offsets, mask=mask, other=0.0) + count * shift * shift, 0.0)
    tl.store(mean_ptr + pid, mean)
    tl.store(rstd_ptr + pid, tl.rsqrt(tl.sum(square, 0) / (CPG * HW) + eps))


@triton.jit
def _group_norm_silu_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, y_ptr,
    C: tl.constexpr, HW: tl.constexpr, CPG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    sample, _, c, origin, within, mask = _tile(C, HW, BLOCK_P, BLOCK_C, LAST, True)
    x = tl.load(x_ptr + origin + within, mask=mask, other=0.0).to(tl.float32)
    group = sample * (C // CPG) + c // CPG
    mean = tl.load(mean_ptr + group, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < C, other=0.0)
    weight, bias = _affine(weight_ptr, bias_ptr, c, C, HAS_WEIGHT, HAS_BIAS, BLOCK_C)
    y = (x - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + origin + within, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_norm_silu_sums_kernel(
    x_ptr, dy_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sum_ptr, dot_ptr,
    C: tl.constexpr, HW: tl.constexpr, CPG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (HW + BLOCK_P - 1) // BLOCK_P
    sample, chunk, c, origin, within, mask = _tile(C, HW, BLOCK_P, BLOCK_C, LAST, False)
    x = tl.load(x_ptr + origin + within, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + origin + within, mask=mask, other=0.0).to(tl.float32)
    group = sample * (C // CPG) + c // CPG
    mean = tl.load(mean_ptr + group, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < C, other=0.0)
    weight, bias = _affine(weight_ptr, bias_ptr, c, C, HAS_WEIGHT, HAS_BIAS, BLOCK_C)
    xhat, dz = _gradients(x, dy, mean, rstd, weight, bias, SILU)
    out = (sample * CHUNKS + chunk) * C + c
    tl.store(sum_ptr + out, tl.sum(dz, 0), mask=c < C)
    tl.store(dot_ptr + out, tl.sum(dz * xhat, 0), mask=c < C)


@triton.jit
def _group_norm_silu_merge_bwd_kernel(
    chunk_sum_ptr, chunk_dot_ptr, weight_ptr, sum_ptr, dot_ptr,
    C: tl.constexpr, HW: tl.constexpr, CPG: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = C // CPG
    pid = tl.program_id(0)
    channel = pid % GROUPS * CPG
    origin = (pid // GROUPS).to(tl.int64) * (CHUNKS * C) + channel
    total = tl.zeros([BLOCK_N], tl.float32)
    dot = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, CPG * CHUNKS, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = n < CPG * CHUNKS
        offsets = origin + n // CPG * C + n % CPG
        chunk_sum = tl.load(chunk_sum_ptr + offsets, mask=mask, other=0.0)
        chunk_dot = tl.load(chunk_dot_ptr + offsets, mask=mask, other=0.0)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + channel + n % CPG, mask=mask, other=0.0).to(tl.float32)
            chunk_sum, chunk_dot = chunk_sum * weight, chunk_dot * weight
        total += chunk_sum
        dot += chunk_dot
    tl.store(sum_ptr + pid, tl.sum(total, 0) / (CPG * HW))
    tl.store(dot_ptr + pid, tl.sum(dot, 0) / (CPG * HW))


@triton.jit
def _group_norm_silu_bwd_kernel(
    x_ptr, dy_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sum_ptr, dot_ptr, dx_ptr,
    C: tl.constexpr, HW: tl.constexpr, CPG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    sample, _, c, origin, within, mask = _tile(C, HW, BLOCK_P, BLOCK_C, LAST, True)
    x = tl.load(x_ptr + origin + within, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + origin + within, mask=mask, other=0.0).to(tl.float32)
    group = sample * (C // CPG) + c // CPG
    mean = tl.load(mean_ptr + group, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < C, other=0.0)
    group_sum = tl.load(sum_ptr + group, mask=c < C, other=0.0)
    group_dot = tl.load(dot_ptr + group, mask=c < C, other=0.0)
    weight, bias = _affine(weight_ptr, bias_ptr, c, C, HAS_WEIGHT, HAS_BIAS, BLOCK_C)
    xhat, dz = _gradients(x, dy, mean, rstd, weight, bias, SILU)
    dx = rstd[None, :] * (dz * weight[None, :] - group_sum[None, :] - xhat * group_dot[None, :])
    tl.store(dx_ptr + origin + within, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _rows(x: Tensor) -> tuple[Tensor, bool]:
    """x with its samples one after another, aligned to 16 bytes, and whether they are in channels_last order; otherwise they are in NCHW.

    The strides and the alignment are then the same for any batch, and so is the order in which the kernels sum.
    """
    x, stride, channels_last = dense(x)
    if stride != x[0].numel() and x.shape[0] > 1:
        x = x.contiguous(memory_format=_memory_format(channels_last))
    return (x if x.data_ptr() % 16 == 0 else x.clone()), channels_last


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _tiling(x: Tensor, channels_last: bool) -> tuple[int, int, int]:
    """BLOCK_P, BLOCK_C and the number of tiles of a sample. A tile has about 1/64 of the sample's elements, from 512 to 8192."""
    _, c, h, w = x.shape
    elements = min(LARGEST_TILE, max(512, power_of_2(c * h * w) // 64))
    if channels_last:
        block_c = min(CHANNELS_LAST_CHANNELS, power_of_2(c))
        block_p = min(elements // block_c, power_of_2(h * w))
    else:
        block_p = min(elements, power_of_2(h * w))
        block_c = min(elements // block_p, power_of_2(c))
    return block_p, block_c, triton.cdiv(h * w, block_p) * triton.cdiv(c, block_c)


def _num_warps(elements: int, elements_per_thread: int) -> int:
    return min(16, max(1, elements // (32 * elements_per_thread)))


@torch.library.custom_op("ddpo_fast::group_norm_silu", mutates_args=())
def _forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, channels_last = _rows(x)
    batch, c, h, w = x.shape
    block_p, block_c, tiles = _tiling(x, channels_last)
    warps = _num_warps(block_p * block_c, 32)
    sizes = dict(C=c, HW=h * w, BLOCK_P=block_p)
    tile = dict(BLOCK_C=block_c, LAST=channels_last)
    chunks = triton.cdiv(h * w, block_p)
    chunk_mean, chunk_square = torch.empty((2, batch, chunks, c), dtype=torch.float32, device=x.device).unbind()
    launch(_group_norm_moments_kernel, batch * tiles, x, chunk_mean, chunk_square, num_warps=warps, **sizes, **tile)

    mean = torch.empty((batch, num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    cpg = c // num_groups
    block, merge_warps = block_and_warps(cpg * chunks)
    launch(
        _group_norm_merge_kernel, batch * num_groups, chunk_mean, chunk_square, mean, rstd, eps,
        num_warps=merge_warps, CPG=cpg, BLOCK_N=block, **sizes,
    )  # fmt: skip

    y = empty_like(x)
    launch(
        _group_norm_silu_fwd_kernel, batch * tiles, x, x if weight is None else weight, x if bias is None else bias, mean, rstd, y,
        num_warps=warps, CPG=cpg, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, SILU=silu, **sizes, **tile,
    )  # fmt: skip
    return y, mean, rstd


@_forward.register_fake
def _(x, num_groups, weight, bias, eps, silu):
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    return empty_like(x), mean, torch.empty_like(mean)


@torch.library.custom_op("ddpo_fast::group_norm_silu_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, silu: bool,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and bias. A gradient that is not needed is an empty tensor."""
    x, channels_last = _rows(x)
    dy, _ = _rows(dy.contiguous(memory_format=_memory_format(channels_last)))
    batch, c, h, w = x.shape
    num_groups = mean.shape[1]
    cpg = c // num_groups
    block_p, block_c, tiles = _tiling(x, channels_last)
    warps = _num_warps(block_p * block_c, 16)
    chunks = triton.cdiv(h * w, block_p)
    affine = (x if weight is None else weight, x if bias is None else bias, mean, rstd)
    sizes = dict(
        C=c, HW=h * w, CPG=cpg, BLOCK_P=block_p, BLOCK_C=block_c, LAST=channels_last,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, SILU=silu,
    )  # fmt: skip
    chunk_sums = torch.empty((2, batch, chunks, c), dtype=torch.float32, device=x.device)
    chunk_sum, chunk_dot = chunk_sums.unbind()
    launch(_group_norm_silu_sums_kernel, batch * tiles, x, dy, *affine, chunk_sum, chunk_dot, num_warps=warps, **sizes)

    dx, dweight, dbias = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if need_x:
        group_sum, group_dot = torch.empty((2, batch, num_groups), dtype=torch.float32, device=x.device).unbind()
        block, merge_warps = block_and_warps(cpg * chunks)
        launch(
            _group_norm_silu_merge_bwd_kernel, batch * num_groups, chunk_sum, chunk_dot, affine[0], group_sum, group_dot,
            num_warps=merge_warps, C=c, HW=h * w, CPG=cpg, CHUNKS=chunks, BLOCK_N=block, HAS_WEIGHT=weight is not None,
        )  # fmt: skip
        dx = empty_like(x)
        launch(_group_norm_silu_bwd_kernel, batch * tiles, x, dy, *affine, group_sum, group_dot, dx, num_warps=warps, **sizes)
    if need_weight:
        dweight = chunk_dot.sum((0, 1)).to(weight.dtype)
    if need_bias:
        dbias = chunk_sum.sum((0, 1)).to(bias.dtype)
    return dx, dweight, dbias


@_backward.register_fake
def _(dy, x, weight, bias, mean, rstd, silu, need_x, need_weight, need_bias):
    return (
        empty_like(x) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else x.new_empty(0),
        bias.new_empty(bias.shape) if need_bias else x.new_empty(0),
    )


def _save(ctx, inputs, output):
    x, _, weight, bias, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _differentiate(ctx, dy, _dmean, _drstd):
    need_x, _, need_weight, need_bias, _, _ = ctx.needs_input_grad
    if dy is None:
        return None, None, None, None, None, None
    dx, dweight, dbias = _backward(dy, *ctx.saved_tensors, ctx.silu, need_x, need_weight, need_bias)
    return dx if need_x else None, None, dweight if need_weight else None, dbias if need_bias else None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool = True) -> Tensor:
    """GroupNorm and the SiLU after it (`reference.group_norm_silu` specifies them). The output has x's memory format.

    y = silu(z), z = xhat * weight + bias, xhat = (x - mean) / sqrt(var + eps) with the moments of a sample's group; y = z without silu.

    x: (B, C, H, W) fp32, fp16 or bf16, NCHW or channels_last (any other layout is copied). weight, bias: (C,) or None, of any of
    these dtypes. Returns y in x's dtype; all arithmetic is fp32. A sample's y and dx have the same bits alone and in any batch.
    Saves x and fp32 (B, groups) moments if a gradient is wanted; weight gradients are not computed for frozen weights.
    Raises ValueError as `reference.group_norm_silu` does, and for fp64.
    """
    check_group_norm(x, num_groups, weight, bias, TRITON_FLOATS)
    return _forward(x, num_groups, weight, bias, eps, silu)[0]
