"""The optimizer: AdamW with its state in fp32, in 8 bits, or in 8 bits and paged."""

import importlib.util
import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from ddpo_fast.distributed.partition import whole_shape

MIN_8BIT_ELEMENTS = 4096
"""bitsandbytes keeps the state of smaller tensors in fp32."""
BLOCK_ELEMENTS = 256
"""Elements of 8-bit state that share a scale."""
MIN_PAGED_ELEMENTS = 100_000
"""bitsandbytes keeps the state of smaller tensors in the device's memory."""

MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")
"""Names of the two moments in a parameter's state: torch's, then bitsandbytes's."""


def keeps_fp32_state(shape: Iterable[int]) -> bool:
    """Whether an 8-bit optimizer keeps a trained tensor's state in fp32: biases, norms and what has less than 4,096 elements.

    A block of 8-bit state has one scale, its largest element, so its elements should be of similar size. (Dettmers et al. 2022, "8-bit
    Optimizers via Block-wise Quantization", keep small tensors and embeddings in 32 bits.) Biases and norms are few, and their gradients
    are of another size than a matrix's. A ZeRO shard, which is one flat tensor, would put them into a block with a matrix's end.
    """
    shape = tuple(shape)
    return len(shape) < 2 or math.prod(shape) < MIN_8BIT_ELEMENTS


def check_optimizer(name: str) -> None:
    """Raises ValueError for an optimizer that this machine cannot run."""
    if name != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"optimizer.name={name}: it needs bitsandbytes, which is not installed; valid is adamw, or install bitsandbytes")
    if name == "paged_adamw_8bit" and not torch.cuda.is_available():
        raise ValueError(
            f"optimizer.name={name}: it pages its state between GPU and host through CUDA's managed memory, and torch sees no GPU here; "
            "valid is adamw or adamw_8bit"
        )


def make_optimizer(options, parameters: list[nn.Parameter], learning_rate: float, on_host: bool) -> Optimizer:
    """AdamW as `options` (name, betas, eps, weight_decay) ask for it.

    on_host: whether the step runs on the CPU, where the fused implementation is the fast one.
    """
    adam = dict(lr=learning_rate, betas=tuple(options.betas), eps=options.eps, weight_decay=options.weight_decay)
    if options.name == "adamw":
        return torch.optim.AdamW(parameters, **adam, fused=on_host or None)
    from bitsandbytes.optim import AdamW  # here, so that only its users need a build that fits the GPU

    class AdamW8bit(AdamW):
        """bitsandbytes chooses 8 or 32 bits by tensor, which it cannot see in a ZeRO shard. We choose by parameter group, which sharding
        keeps."""

        def get_config(self, gindex: int, pindex: int, group: dict) -> dict:
            return super().get_config(gindex, pindex, group) | {"optim_bits": group["optim_bits"]}

    groups = [
        {"params": [p for p in parameters if keeps_fp32_state(whole_shape(p)) == fp32], "optim_bits": 32 if fp32 else 8}
        for fp32 in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW8bit(groups, **adam, optim_bits=8, is_paged=options.name == "paged_adamw_8bit")


def settle_state(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Moves state that was loaded for a parameter into a buffer that the optimizer makes, which is paged if the optimizer pages."""
    state = optimizer.state[parameter]
    for key in MOMENTS[2:]:
        if key in state:
            state[key] = optimizer.get_state_buffer(parameter, dtype=state[key].dtype).copy_(state[key])


def state_bytes(optimizer: str, shapes: Iterable[tuple[int, ...]], num_shards: int = 1) -> int:
    """Bytes of a device that the optimizer state for tensors of these shapes takes, or one of `num_shards` ZeRO shards of that state.

    The two moments take 8 bytes an element in fp32. In 8 bits they take 2 bytes, and each an fp32 scale for every 256 elements. What is
    paged does not count.
    """
    if optimizer not in ("adamw", "adamw_8bit", "paged_adamw_8bit"):
        raise ValueError(f"optimizer.name={optimizer}: valid is adamw, adamw_8bit or paged_adamw_8bit")
    in_fp32, in_8bit = 0, []
    for shape in shapes:
        if optimizer == "adamw" or keeps_fp32_state(shape):
            in_fp32 += math.prod(shape)
        else:
            in_8bit.append(math.prod(shape))
    if num_shards > 1:  # a shard is one flat tensor of each group
        in_fp32, in_8bit = math.ceil(in_fp32 / num_shards), [math.ceil(sum(in_8bit) / num_shards)]
    total = 8 * in_fp32
    for size in in_8bit:
        paged = optimizer == "paged_adamw_8bit" and size >= MIN_PAGED_ELEMENTS
        total += 8 * size if size < MIN_8BIT_ELEMENTS else 2 * ((not paged) * size + 4 * math.ceil(size / BLOCK_ELEMENTS))
    return total
