"""GEGLU in Triton: one kernel forward and one backward. Only the projection's output is saved."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpo_fast.kernels.checks import TRITON_FLOATS, check_geglu
from ddpo_fast.kernels.launch import launch, power_of_2

TILE = 2048
LARGEST_BLOCK_D = 256
"""256 divides the widths 1280, 2560 and 5120 of Stable Diffusion's feed-forwards, so that no lane of a tile is idle."""


@triton.jit
def _tile(num_rows, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of the tile's first element in y and in x, offsets within the tile in y and in x, and the mask."""
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    first = (pid // D_TILES).to(tl.int64) * BLOCK_R
    column = pid % D_TILES * BLOCK_D
    r = tl.arange(0, BLOCK_R)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    return first * D + column, first * (2 * D) + column, r * D + d, r * (2 * D) + d, (first + r < num_rows) & (column + d < D)


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["num_rows"])
def _geglu_fwd_kernel(x_ptr, y_ptr, num_rows, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    y_origin, x_origin, y_within, x_within, mask = _tile(num_rows, D, BLOCK_R, BLOCK_D)
    value = tl.load(x_ptr + x_origin + x_within, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + x_origin + D + x_within, mask=mask, other=0.0).to(tl.float32)
    y = value * (gate * _normal_cdf(gate))
    tl.store(y_ptr + y_origin + y_within, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _geglu_bwd_kernel(dy_ptr, x_ptr, dx_ptr, num_rows, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    y_origin, x_origin, y_within, x_within, mask = _tile(num_rows, D, BLOCK_R, BLOCK_D)
    dy = tl.load(dy_ptr + y_origin + y_within, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + x_origin + x_within, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + x_origin + D + x_within, mask=mask, other=0.0).to(tl.float32)
    cdf = _normal_cdf(gate)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    dvalue = dy * (gate * cdf)
    dgate = dy * value * (cdf + gate * density)
    tl.store(dx_ptr + x_origin + x_within, dvalue.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + x_origin + D + x_within, dgate.to(dx_ptr.dtype.element_ty), mask=mask)


def _tiling(x: Tensor) -> tuple[int, dict]:
    """The number of tiles, and the kernels' sizes."""
    d = x.shape[-1] // 2
    block_d = min(LARGEST_BLOCK_D, power_of_2(d))
    block_r = TILE // block_d
    return triton.cdiv(x.numel() // (2 * d), block_r) * triton.cdiv(d, block_d), dict(D=d, BLOCK_R=block_r, BLOCK_D=block_d)


@torch.library.custom_op("ddpo_fast::geglu", mutates_args=())
def _forward(x: Tensor) -> Tensor:
    x = x.contiguous()
    d = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], d), dtype=x.dtype, device=x.device)
    tiles, sizes = _tiling(x)
    launch(_geglu_fwd_kernel, tiles, x, y, x.numel() // (2 * d), num_warps=4, **sizes)
    return y


@_forward.register_fake
def _(x):
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


@torch.library.custom_op("ddpo_fast::geglu_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor) -> Tensor:
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles, sizes = _tiling(x)
    launch(_geglu_bwd_kernel, tiles, dy, x, dx, x.numel() // x.shape[-1], num_warps=4, **sizes)
    return dx


@_backward.register_fake
def _(dy, x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _differentiate(ctx, dy):
    return _backward(dy, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)


def geglu(x: Tensor) -> Tensor:
    """Gated linear unit with the exact GELU (`reference.geglu` specifies it).

    y = a * g * Phi(g), a = x[..., :D], g = x[..., D:], Phi the normal distribution function (erf, no tanh approximation).

    x: (..., 2D) fp32, fp16 or bf16; copied if it is not contiguous. Returns y (..., D) in x's dtype; all arithmetic is fp32.
    Saves only x, if a gradient is wanted. Raises ValueError as `reference.geglu` does, and for fp64.
    """
    check_geglu(x, TRITON_FLOATS)
    return _forward(x)
