"""DeepSpeed: processes, gradient synchronisation, the optimizer step."""

import atexit
import json
import logging
import math
import os
import re
import warnings
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed guesses it, with a warning

import deepspeed
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from ddpo_fast.distributed import deepspeed_options
from ddpo_fast.distributed.launcher import check_launcher
from ddpo_fast.distributed.optimizer import MOMENTS, settle_state
from ddpo_fast.distributed.partition import whole_shape
from ddpo_fast.distributed.ranks import Ranks

MEETING_S = 600
"""Time for the ranks to find each other: some may have been started later, or import more slowly."""
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def init_distributed(timeout_s: float) -> tuple[Ranks, torch.device]:
    """Joins the processes that the launcher started, or makes a group of one. Returns this rank and its device.

    A rank may keep the others waiting for `timeout_s`, for example with a slow reward; after that the run is over. Raises ValueError if
    the environment is not that of a rank, or if the ranks do not find each other.
    """
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not dist.is_initialized():
        check_launcher(os.environ)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"LOCAL_RANK={device.index}: valid is below the {torch.cuda.device_count()} of GPUs that are visible")
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # DeepSpeed would compile a C++ all-reduce at the first start (half a minute); gloo is enough for LoRA's few megabytes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", 1))))
    # DeepSpeed's ZeRO calls a collective that torch 2.13 renamed
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    if not dist.is_initialized():
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_s)
        store, rank, world_size = _meet()
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        deepspeed.init_distributed(backend, timeout=timeout, verbose=False)
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def _meet() -> tuple[dist.Store, int, int]:
    """The store by which the ranks find each other, this rank's number, and the number of ranks."""
    rank, world_size = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
    if world_size == 1:  # in memory: another run may take a port that is free now
        return dist.HashStore(), 0, 1
    port = os.environ["MASTER_PORT"]
    try:
        store, rank, world_size = next(rendezvous("env://", rank, world_size, timeout=timedelta(seconds=MEETING_S)))
    except dist.DistError as error:
        reason = str(error).split("\n")[0]
        if "EADDRINUSE" in reason:
            raise ValueError(f"MASTER_PORT={port}: another program has it; valid is a free one (the launchers' --master_port)") from None
        raise ValueError(
            f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={port}: the {world_size} ranks did not find each other within "
            f"{MEETING_S} s ({reason}); valid is one process for each rank, and an address that all of them reach"
        ) from None
    return dist.PrefixStore("default_pg", store), rank, world_size


def broadcast(value):
    """Rank 0's picklable value, on every rank; the value itself in a process that has joined no group."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(value) -> list:
    """Every rank's picklable value, in rank order."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce(tensor: Tensor, op: str) -> None:
    """Reduces a tensor on this rank's device over all ranks, in place; op "sum" or "max"."""
    dist.all_reduce(tensor, _OPS[op])


def all_gather(tensor: Tensor) -> Tensor:
    """Every rank's tensor (same shape, any device), concatenated in rank order along the first dimension, on the CPU."""
    if dist.get_backend() == "nccl":
        tensor = tensor.cuda()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts).cpu()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank; all ranks get the same answer."""
    tensor = torch.tensor([flag], dtype=torch.int32, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    all_reduce(tensor, "max")
    return bool(tensor)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether this is how a collective fails when another rank has died."""
    return isinstance(error, dist.DistBackendError) or re.search(r"gloo.*(by peer|[Tt]imed out|pipe)", str(error)) is not None


class Engine:
    """A model and its optimizer under DeepSpeed. An update is one or more calls of `backward`, the last with `last=True`, then `step`.

    Trainable weights, their gradients and the optimizer state are fp32 whatever the compute dtype. In fp16 the loss is scaled up
    so that gradients of activations do not underflow. Each weight's gradient is scaled back as it arrives, so that DeepSpeed, its clipping
    and its shards see true gradients. (With torch_autocast, DeepSpeed 0.19 clips gradients at ZeRO 1 and 2 before it unscales them.)
    """

    FP16_LOSS_SCALE = 2.0**16
    """The first loss scale in fp16. An overflow halves it."""
    SCALE_GROWTH_UPDATES = 500
    """Updates in a row without overflow after which the loss scale is doubled."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        zero_stage: int,
        max_grad_norm: float,
        dtype: torch.dtype,
        offload: str = "none",
        options: dict | None = None,
    ):
        """offload: what the host holds: "none", "optimizer" (with its gradients, from stage 1 on) or "all" (weights, too, at stage 3).

        options: further options of DeepSpeed, which override those derived here, see `deepspeed_options.read`.
        """
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.num_trainable = sum(math.prod(whole_shape(p)) for p in self.parameters)
        self.optimizer, self.zero_stage, self.dtype = optimizer, zero_stage, dtype
        self.unfinished = False
        """Whether there have been `backward`s since the last `step`."""
        self.loss_scale, self.good_updates = (self.FP16_LOSS_SCALE if self.adapts_scale else 1.0), 0
        if self.adapts_scale:
            for parameter in self.parameters:
                parameter.register_hook(lambda grad: grad / self.loss_scale)
        # DeepSpeed allocates the whole bucket, by default 2 GB, however few parameters are trained
        zero = {"reduce_bucket_size": min(deepspeed_options.BUCKET_ELEMENTS, self.num_trainable)}
        if zero_stage == 3:
            zero |= dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), deepspeed_options.LIVE_ELEMENTS)
            zero |= {"stage3_param_persistence_threshold": deepspeed_options.PERSISTENT_ELEMENTS}
        config = deepspeed_options.stated(zero_stage, offload, max_grad_norm)
        config = deepspeed_options.merge(deepspeed_options.merge(config, {"zero_optimization": zero}), options or {})
        self.module, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self._tell_change()  # they are now those of rank 0

    @property
    def adapts_scale(self) -> bool:
        """Whether the loss is scaled up by a number that it finds by trying: in fp16."""
        return self.dtype == torch.float16

    def _tell_change(self) -> None:
        """Tells torch that the trainable weights have changed. It does not see this where DeepSpeed writes through `.data`."""
        torch.autograd.graph.increment_version(self.parameters)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds a loss's gradient to the update's. The loss is given times `loss_scale`. The `last` call takes the mean of the ranks."""
        self.unfinished = True
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss, scale_wrt_gas=False)

    def forget_gradient(self) -> None:
        """Clears the update's gradient after a `backward` that failed. Raises RuntimeError at ZeRO 1 to 3, which may have sent a part."""
        if self.unfinished and self.zero_stage > 0:
            raise RuntimeError(f"with zero.stage={self.zero_stage} an update cannot start again: lower train.micro_batch, then --resume")
        if self.unfinished:
            self.module.zero_grad()
        self.unfinished = False

    def step(self) -> float:
        """Clips the gradient, updates the weights, clears the gradient.

        Returns the gradient's norm before clipping. If it is not finite, no rank has updated its weights.
        """
        self.unfinished = False
        if self.zero_stage == 0:
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
            if math.isfinite(norm):
                self.module.step()
            else:
                self.module.zero_grad()
        else:
            self.module.step()  # ZeRO itself leaves out an update that is not finite
            norm = float(self.module.get_global_grad_norm())
        self._tell_change()
        if self.adapts_scale:
            self._adapt_loss_scale(math.isfinite(norm))
        return norm

    def _adapt_loss_scale(self, finite: bool) -> None:
        self.good_updates = self.good_updates + 1 if finite else 0
        if not finite:
            self.loss_scale /= 2
            if self.loss_scale < 1:
                raise FloatingPointError("fp16 gradients overflow even without loss scaling; try model.dtype=fp32 or bf16")
        elif self.good_updates % self.SCALE_GROWTH_UPDATES == 0:
            self.loss_scale *= 2

    def gathered(self, change: bool = False) -> AbstractContextManager:
        """Inside, the trainable weights are whole on every rank. All ranks have to enter. Below ZeRO 3 the weights are always whole.

        change: what rank 0 writes into the weights stays.
        """
        return deepspeed.zero.GatheredParameters(self.parameters, modifier_rank=0 if change else None, enabled=self.zero_stage == 3)

    def save(self, folder: Path) -> None:
        """Writes weights.safetensors, the trainable weights by name, and optimizer-<rank>.safetensors, a rank's shard of its state.

        DeepSpeed's own files are not used, because they are pickles. Below ZeRO 1 every rank has all of the state and rank 0 writes it.
        """
        with self.gathered():
            if dist.get_rank() == 0:
                scaling = {"loss_scale": self.loss_scale, "good_updates": self.good_updates}
                _save(folder / "weights.safetensors", self.weights, scaling)
        if dist.get_rank() == 0 or self.zero_stage > 0:
            state = {
                f"{index}.{key}": value for index, parameter in self._shards() for key, value in self.optimizer.state[parameter].items()
            }
            tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            numbers = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            _save(folder / f"optimizer-{dist.get_rank()}.safetensors", tensors, numbers)

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, bit for bit, on any number of ranks. Raises WrongCheckpoint for a checkpoint that does not fit."""
        weights, scaling = _load(folder / "weights.safetensors")
        with self.gathered():
            _check(weights, self.weights)
        with self.gathered(change=True), torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(weights[name])
        if self.zero_stage > 0:
            self.module.optimizer.refresh_fp32_params()
        self._tell_change()
        self.loss_scale, self.good_updates = scaling["loss_scale"], scaling["good_updates"]
        parts = []
        for rank in range(len(list(folder.glob("optimizer-*")))):
            tensors, numbers = _load(folder / f"optimizer-{rank}.safetensors")
            parts.append(tensors | numbers)
        if self.zero_stage == 0:
            mine = parts[0]
        elif len(parts) == dist.get_world_size():
            mine = parts[dist.get_rank()]
        else:
            mine = {key: self._my_shard([part[key] for part in parts]) for key in parts[0]}
        shards, state = list(self._shards()), {}
        for key, value in mine.items():
            index, _, name = key.partition(".")
            if not index.isdecimal() or int(index) >= len(shards):
                raise WrongCheckpoint(f"the optimizer has no {key}")
            size, expected = value.numel() if isinstance(value, Tensor) else 1, shards[int(index)][1].numel()
            if name in MOMENTS and size != expected:
                raise WrongCheckpoint(f"{key} has {size} elements, not {expected}")
            state.setdefault(int(index), {})[name] = value
        if self.zero_stage < 3:
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        for index, shard in shards:
            if self.zero_stage == 3:  # between steps ZeRO 3 leaves the optimizer's groups empty
                values = state.get(index, {}).items()
                self.optimizer.state[shard] = {k: v.to(shard.device) if isinstance(v, Tensor) and v.dim() else v for k, v in values}
            settle_state(self.optimizer, shard)

    def _shards(self):
        """What the optimizer updates on this rank, numbered: the weights themselves, or ZeRO's flat shards of them."""
        if self.zero_stage == 3:
            return enumerate(self.module.optimizer.fp32_partitioned_groups_flat)
        return enumerate(parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def _my_shard(self, parts: list):
        """This rank's shard of parts for another number of ranks. ZeRO 1 and 2 cut up all weights in a row, with zeros at the end."""
        if not isinstance(parts[0], Tensor) or parts[0].dim() == 0:
            return parts[0]
        ((_, shard),) = self._shards()
        whole = torch.cat(parts)[: sum(weight.numel() for weight in self.parameters)]
        whole = torch.nn.functional.pad(whole, (0, shard.numel() * dist.get_world_size() - len(whole)))
        return whole[shard.numel() * dist.get_rank() :][: shard.numel()].clone()


class WrongCheckpoint(ValueError):
    """A checkpoint whose tensors are not those of the run."""


def _check(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises WrongCheckpoint, naming the first tensor that is missing, is not expected, or has another shape or dtype."""
    if different := sorted(given.keys() ^ expected.keys()):
        raise WrongCheckpoint(f"{different[0]} is {'not a weight of this run' if different[0] in given else 'missing'}")
    for name, tensor in expected.items():
        (wrong, right) = ((tuple(t.shape), t.dtype) for t in (given[name], tensor))
        if wrong != right:
            raise WrongCheckpoint(f"{name} is {wrong[0]} {wrong[1]}, not {right[0]} {right[1]}")


def _save(path: Path, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
    tensors = {name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"numbers": json.dumps(numbers)})


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    with safe_open(path, "pt") as file:
        try:
            numbers = json.loads(file.metadata()["numbers"])
        except (TypeError, KeyError, ValueError) as error:
            raise WrongCheckpoint(f"{path.name} has no numbers in its header: {type(error).__name__}") from None
        return {name: file.get_tensor(name) for name in file.keys()}, numbers
