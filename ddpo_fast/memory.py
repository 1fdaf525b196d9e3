"""Running out of memory costs the call that it happens in, not the run."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Of allocators and libraries that have no class of error for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it was raised for want of memory, by an allocator or by a library that called one."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in MESSAGES)


class Room:
    """How many rows of a kind were found to fit into memory."""

    def __init__(self, retry: bool = True):
        """retry: whether a call may be made again; not where other ranks wait for each of its parts, as ZeRO 3's do."""
        self.retry = retry
        self.largest: dict[str, int] = {}
        """By option; those that have not run out of memory are not there."""

    def attempt(self, option: str, size: int, work: Callable[[int], Result]) -> Result:
        """`work(n)` for an option of value `size`: with half as many rows each time that memory runs out, and never more again.

        `work` must begin anew when it is called again. Raises the allocator's error where a single row does not fit, or without `retry`.
        """
        size = min(size, self.largest.get(option, size))
        while True:
            try:
                return work(size)
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not self.retry or not is_out_of_memory(error):
                    raise
            size //= 2
            self.largest[option] = size
            logger.warning("out of memory: %s=%d from here on; samples and gradients stay the same", option, size)
            gc.collect()  # a traceback may have held tensors
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
