"""Device operations of ddpo_fast. They import torch and Triton only, and nothing else of the project.

`select` alone decides which implementation runs. `reference` says what every operation computes. The file named after an operation
has its Triton kernels, behind a function with the signature of the one in `reference`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation; `reference` documents them."""

    backend: str
    ddim_step: Callable
    ppo_loss: Callable
    group_norm_silu: Callable
    geglu: Callable


def select(backend: str, device: torch.device) -> Ops:
    """The operations of a backend on a device: auto is Triton on a GPU and PyTorch elsewhere.

    Raises ValueError if Triton is asked for but cannot run.
    """
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"kernels.backend={backend}: valid is auto, triton or reference")
    if backend == "reference" or (backend == "auto" and device.type != "cuda"):
        from ddpo_fast.kernels import reference

        return Ops("reference", reference.ddim_step, reference.ppo_loss, reference.group_norm_silu, reference.geglu)

    from ddpo_fast.kernels import ddim_step, geglu, group_norm_silu, launch, ppo_loss

    if device.type != "cuda" and not launch.interpreted():
        raise ValueError(
            f"kernels.backend=triton: valid on a GPU, or, for tests, on a CPU with TRITON_INTERPRET=1 set; this run is on {device.type}"
        )
    if torch.cuda.is_available():
        launch.reserve_counters(torch.empty(0, device=device).device)  # a tensor's device has its index, `device` may not
    return Ops("triton", ddim_step.ddim_step, ppo_loss.ppo_loss, group_norm_silu.group_norm_silu, geglu.geglu)
