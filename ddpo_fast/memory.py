"""How much memory is left, and that running out of it costs the call that it happens in, not the run."""

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
    """Ranks on this machine, as the launcher says."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))


def free_mib(device: torch.device, num_ranks: int) -> float:
    """MiB that one of this machine's `num_ranks` ranks may still take: of its GPU, or its part of the host's."""
    return torch.cuda.mem_get_info(device)[0] / MIB if device.type == "cuda" else free_host_mib() / num_ranks


def free_host_mib() -> float:
    """Memory that this machine, or the container that the process is in, has left."""
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
"""Of allocators and libraries that have no class of error for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it was raised for want of memory, by an allocator or by a library that called one."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in MESSAGES)


def release_memory() -> None:
    """Gives back what nothing holds any more, after memory ran out."""
    gc.collect()  # a traceback may have held tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
            release_memory()


PROMPT_EMBEDS_MIB = 512
"""Of the embeddings that a rank keeps on the host: in fp16 those of 4,500 prompts of SD 1.5, or of 1,600 of SDXL. A prompt that has been
dropped is encoded again, which is one pass of each text encoder beside the many of the UNet that its picture takes."""


def num_kept_prompts(prompt_bytes: int, num_needed: int) -> int:
    """Prompts whose embeddings, of `prompt_bytes` each, are kept at most: `PROMPT_EMBEDS_MIB` of them, or those needed at a time."""
    return max(num_needed, PROMPT_EMBEDS_MIB * MIB // prompt_bytes)
