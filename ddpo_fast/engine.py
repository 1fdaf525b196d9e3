"""DeepSpeed: processes, gradient synchronisation, the optimizer step."""

import atexit
import logging
import math
import os
import socket
import warnings
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said here, DeepSpeed does not have to guess it, with a warning

import deepspeed
import torch.distributed as dist
from torch import Tensor, nn

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def init_distributed() -> tuple[int, int, torch.device]:
    """Joins the processes that the launcher started, or makes a group of one. Returns rank, world size and this rank's device."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # DeepSpeed would compile a C++ all-reduce at the first start (half a minute); gloo does for LoRA's few megabytes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", 1))))
    # DeepSpeed's ZeRO calls a collective that torch 2.13 renamed
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size(), device


def broadcast(value):
    """Rank 0's picklable value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def all_reduce(tensor: Tensor, op: str) -> None:
    """Reduces a tensor over all ranks in place; op "sum" or "max"."""
    dist.all_reduce(tensor, _OPS[op])


def all_gather(tensor: Tensor) -> Tensor:
    """Every rank's tensor (same shape), concatenated in rank order along the first dimension."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def barrier() -> None:
    dist.barrier()


class Engine:
    """A model and its optimizer under DeepSpeed. An update is some `backward`s, the last with `last=True`, then `step`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, zero_stage: int, max_grad_norm: float, dtype: torch.dtype):
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.zero_stage, self.dtype = zero_stage, dtype
        config = {
            # a micro-batch here is a set of transitions and their number varies, so DeepSpeed is not told: the loss is already a mean
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,
            # half precision by autocast: trainable weights, their gradients and the optimizer state stay fp32, fp16 is loss-scaled
            "torch_autocast": {
                "enabled": dtype != torch.float32,
                "dtype": str(dtype).removeprefix("torch."),
                "lower_precision_safe_modules": [],
            },
        }
        self.module, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds a loss's gradient to the update's; the ranks' mean is taken at the `last` one."""
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Clips, updates, clears. Returns the gradient's norm before clipping.

        Raises FloatingPointError when it is not finite; in fp16 that only means a smaller loss scale and no update this time.
        """
        if self.zero_stage == 0:
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
            if scaler := self.module.torch_autocast_z0_gradscaler:
                norm /= scaler.get_scale()
            self._check_finite(norm)
            self.module.step()
        else:
            self.module.step()
            norm = float(self.module.get_global_grad_norm())
            self._check_finite(norm)
        return norm

    def _check_finite(self, norm: float) -> None:
        if not math.isfinite(norm) and self.dtype != torch.float16:
            raise FloatingPointError(f"the gradient norm is {norm}; a lower train.learning_rate or another model.dtype may help")

    def save(self, folder: Path) -> None:
        """Writes trainable weights and optimizer state, every rank its own part."""
        self.module.save_checkpoint(str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, bit for bit."""
        self.module.load_checkpoint(str(folder), tag="engine", load_module_strict=False)
