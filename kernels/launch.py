"""The host code that all kernels share: how a kernel is launched, and which memory layouts kernels read."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

ELEMENTS_PER_THREAD = 8
"""8 elements are 16 bytes of fp16, the widest load there is."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch, which `record_launches` keeps instead of running it."""

    kernel: object
    args: tuple
    num_warps: int
    constexprs: dict


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Inside this context, launches are not run but listed with their arguments, so that the kernels can be compiled ahead of time."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def launch(kernel, num_programs: int, *args, num_warps: int, **constexprs) -> None:
    """Runs `num_programs` programs of a kernel on the device of its first argument.

    The compiler may not contract a * b + c to an fma: a kernel that wants an fma writes it. So two kernels with the same expression
    give the same bits, and so do two releases of Triton with different defaults.
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


def block_and_warps(num_elements: int) -> tuple[int, int]:
    """Elements of a one-dimensional block and its number of warps: 8 elements a thread, at most 2048 in all.

    Both depend on the length of a row alone, so that a row's sums do not depend on how many rows there are.
    """
    block = max(16, min(2048, power_of_2(num_elements)))
    return block, max(1, block // (32 * ELEMENTS_PER_THREAD))


def dense(tensor: Tensor) -> tuple[Tensor, int, bool]:
    """`tensor` (B, *shape) with dense rows, the stride between rows, and whether rows, then (C, H, W), are in channels_last order.

    A slice of a batch is returned as it is. A layout that is neither contiguous nor channels_last is copied.
    """
    row = tensor[:1]
    if row.is_contiguous():
        return tensor, tensor.stride(0), False
    if row.dim() == 4 and row.is_contiguous(memory_format=torch.channels_last):
        return tensor, tensor.stride(0), True
    tensor = tensor.contiguous()
    return tensor, tensor.stride(0), False


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of the same shape with dense rows, in channels_last order if `tensor`'s rows are."""
    layout = torch.channels_last if dense(tensor)[2] else torch.contiguous_format
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device, memory_format=layout)


_COUNTERS, _STREAMS = 4096, 64
_slabs: dict[torch.device, Tensor] = {}
_slots: dict[tuple[torch.device, int], int] = {}


def reserve_counters(device: torch.device) -> None:
    """Allocates a device's counters, once, outside of every CUDA graph's memory pool."""
    if device not in _slabs:
        _slabs[device] = torch.zeros(_STREAMS, _COUNTERS, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams will use them


def counters(count: int, device: torch.device) -> Tensor:
    """At least `count` int32 zeros for `last_to_arrive`, which sets them back to zero, so that no launch is spent on clearing them.

    Each stream has its own counters, since kernels on one stream do not overlap. New counters are allocated while a CUDA graph is
    captured, where more counters or streams are used than were reserved, and where `reserve_counters` was not called.
    """
    if device.type == "cpu":
        reserve_counters(device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    slot = _slots.setdefault((device, stream), len(_slots))
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing or device not in _slabs or count > _COUNTERS or slot >= _STREAMS:
        return torch.zeros(count, dtype=torch.int32, device=device)
    return _slabs[device][slot]
