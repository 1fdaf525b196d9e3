"""Tells how much memory is left. Running out of memory ends only the call in which it happens, not the run."""

import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

MIB = 2**20

CGROUP = Path("/sys/fs/cgroup")
"""Where a container's limits are."""


def local_ranks() -> int:
    """The number of ranks on this machine, from the launcher."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))


def free_mib(device: torch.device, num_ranks: int) -> float:
    """MiB that one of this machine's `num_ranks` ranks may still take: what its GPU has left, or its part of what the host has."""
    return torch.cuda.mem_get_info(device)[0] / MIB if device.type == "cuda" else free_host_mib() / num_ranks


def free_host_mib() -> float:
    """MiB that this machine, or the container of this process, has left."""
    free = psutil.virtual_memory().available
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free / MIB


MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Messages of allocators and libraries that have no class of error for lack of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, or a library that called one, raised the error because memory ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in MESSAGES)


def release_memory() -> None:
    """Gives back memory that nothing holds any more, after memory ran out."""
    gc.collect()  # a traceback may have held tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Room:
    """How many rows of each kind fit into memory, as far as that is known."""

    def __init__(self, retry: bool = True):
        """retry: whether a call may be made again. It may not if other ranks wait for each part of it, as at ZeRO 3."""
        self.retry = retry
        self.largest: dict[str, int] = {}
        """The number by option. Options that have not run out of memory are missing."""

    def attempt(self, option: str, size: int, work: Callable[[int], Result]) -> Result:
        """`work(n)` for an option of value n = `size`. Each time that memory runs out, n is halved, for all later calls, too.

        `work` must start from the beginning when it is called again. Raises the allocator's error if a single row does not fit, or
        without `retry`.
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
            release_memory()


PROMPT_EMBEDS_MIB = 512
"""Most memory for the embeddings that a rank keeps on the host: in fp16 those of 4,500 prompts of SD 1.5, or of 1,600 of SDXL. A prompt
that has been dropped is encoded again. That takes one pass of each text encoder, while a picture takes many passes of the network."""


def num_kept_prompts(prompt_bytes: int, num_needed: int) -> int:
    """How many prompts' embeddings, of `prompt_bytes` each, are kept: what fits into PROMPT_EMBEDS_MIB, but at least `num_needed`."""
    return max(num_needed, PROMPT_EMBEDS_MIB * MIB // prompt_bytes)
