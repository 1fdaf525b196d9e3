"""The host side that all kernels share: how one is launched, and the memory layouts that they read."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

ELEMENTS_PER_THREAD = 8
"""16 bytes of fp16: the widest load there is."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what `record_launches` keeps instead of running it."""

    kernel: object
    args: tuple
    num_warps: int
    constexprs: dict


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Inside it kernels are not run but listed, with the very arguments they would get: for compiling them ahead of time."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def launch(kernel, num_programs: int, *args, num_warps: int, **constexprs) -> None:
    """Runs `num_programs` programs of a kernel on the device of its first argument.

    Contraction of a * b + c is off: where a kernel wants an fma it says so, so that two kernels with the same expression, or two
    releases of Triton with different defaults, give the same bits.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, args, num_warps, constexprs))
        return
    with torch.cuda.device_of(args[0]):
        kernel[(num_programs,)](*args, num_warps=num_warps, enable_fp_fusion=False, **constexprs)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors: TRITON_INTERPRET=1 was set before the first import."""
    return triton.knobs.runtime.interpret


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return triton.next_power_of_2(n)


def block_and_warps(num_elements: int, largest: int = 2048) -> tuple[int, int]:
    """Elements of a one-dimensional block and its number of warps: 8 elements a thread, at most `largest` in all.

    It depends on the length of a row alone, so that a row's sums do not depend on how many rows there are.
    """
    block = max(16, min(largest, power_of_2(num_elements)))
    return block, max(1, block // (32 * ELEMENTS_PER_THREAD))


def dense(tensor: Tensor) -> tuple[Tensor, int, bool]:
    """A (B, C, H, W) tensor whose rows are dense, the stride between rows, and whether a row is in channels_last order.

    Slices of a batch come back as they are; a layout that is neither NCHW nor channels_last is copied.
    """
    row = tensor[:1]
    if row.is_contiguous():
        return tensor, tensor.stride(0), False
    if row.is_contiguous(memory_format=torch.channels_last):
        return tensor, tensor.stride(0), True
    tensor = tensor.contiguous()
    return tensor, tensor.stride(0), False


def counters(count: int, device: torch.device) -> Tensor:
    """At least `count` int32 zeros for `last_to_arrive`, which leaves them at zero: no launch is spent on clearing them.

    Each stream has its own, since kernels on one stream do not overlap; a CUDA graph under capture gets new ones.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _persistent_counters(max(4096, power_of_2(count)), device, stream)


@functools.lru_cache(maxsize=64)
def _persistent_counters(count: int, device: torch.device, stream: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
