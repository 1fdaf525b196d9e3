"""Reads a network weight by weight, each of which is quantised or partitioned at once: the network is never whole in memory."""

from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from safetensors import safe_open
from torch import nn

from ddpo_fast.distributed.partition import Partition
from ddpo_fast.networks.quantized import QuantizedLinear, quantize


def load(files: Iterable[Path], kind: type, config: dict, dtype: torch.dtype, device: torch.device, how: str | Partition) -> nn.Module:
    """A network of diffusers in `dtype` on the device.

    files: safetensors. how: one of `networks.quantized.KINDS`, or a partition. A weight that no file has stays on the meta device. Raises
    ValueError for weights of another shape.
    """
    with no_init_weights(), init_empty_weights():  # tables that are no weights are made
        network = kind.from_config(config)
    if isinstance(how, str):
        quantize(network, how)
    for file in files:
        _read(network, file, dtype, device, how)
    for module in network.modules():
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = value.to(device, dtype if value.is_floating_point() else None)
    return network.requires_grad_(False).eval()


def _read(network: nn.Module, file: Path, dtype: torch.dtype, device: torch.device, how: str | Partition) -> None:
    with safe_open(file, "pt") as opened:
        names = {name: name for name in opened.keys()}
        network._fix_state_dict_keys_on_load(names)  # names of earlier versions
        for name, stored in sorted(names.items()):
            place, _, leaf = name.rpartition(".")
            module, value = network.get_submodule(place), opened.get_tensor(stored).to(device, copy=True)  # the file's own pages would stay
            if isinstance(module, QuantizedLinear) and leaf == "weight":
                module.take(value)
                continue
            if value.shape != getattr(module, leaf).shape:
                raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(getattr(module, leaf).shape)}")
            value = value.to(dtype) if value.is_floating_point() else value
            if leaf in module._buffers:
                module._buffers[leaf] = value
                continue
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            if isinstance(how, Partition):
                how.take(module._parameters[leaf])
