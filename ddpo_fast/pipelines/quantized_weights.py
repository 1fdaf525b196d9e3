"""Reads a network whose layers are quantised one after the other, so that no more than one of them is ever whole."""

from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from safetensors import safe_open
from torch import nn

from ddpo_fast.networks.quantized import QuantizedLinear, quantize
from ddpo_fast.pipelines.hub import in_one_line
from ddpo_fast.pipelines.single_file import check_complete


def load(option: str, files: Iterable[Path], kind: type, config: dict, dtype: torch.dtype, device: torch.device, how: str) -> nn.Module:
    """A network of diffusers in `dtype` on the device, its weights quantised: `how` is one of `networks.quantized.KINDS`.

    files: safetensors. Raises ValueError, naming the option, for weights that are damaged or belong to another network.
    """
    with in_one_line(option):
        with no_init_weights(), init_empty_weights():  # tables that are no weights are made
            network = kind.from_config(config)
        quantize(network, how)
        for file in files:
            _read(network, file, dtype, device)
    check_complete(option, network)
    return nn.Module.to(network, device, dtype).requires_grad_(False).eval()


def _read(network: nn.Module, file: Path, dtype: torch.dtype, device: torch.device) -> None:
    with safe_open(file, "pt") as opened:
        names = {name: name for name in opened.keys()}
        network._fix_state_dict_keys_on_load(names)  # names of earlier versions
        for name, stored in names.items():
            place, _, leaf = name.rpartition(".")
            module, value = network.get_submodule(place), opened.get_tensor(stored).to(device)
            if isinstance(module, QuantizedLinear) and leaf == "weight":
                module.take(value)
                continue
            if value.shape != getattr(module, leaf).shape:
                raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(getattr(module, leaf).shape)}")
            value = value.to(dtype) if value.is_floating_point() else value
            held = module._parameters if leaf in module._parameters else module._buffers
            held[leaf] = nn.Parameter(value, requires_grad=False) if held is module._parameters else value
