"""Networks without weights that answer all the same: with the right shapes, at next to no cost.

A pipeline with such text encoders shows what it would give its network before any weights are read.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

VOCABULARY = 1 << 15
"""Features of a linear layer from which on they are a vocabulary's: of no use here, and too many to be written."""


def on_meta(kind: type, config: dict) -> nn.Module:
    """A network of diffusers or transformers with this config, on the meta device. No random number is drawn."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = kind.from_config(config) if issubclass(kind, ModelMixin) else kind(kind.config_class.from_dict(config))
    return network.requires_grad_(False).eval()


def tile(vae: nn.Module) -> None:
    """Makes a VAE decode large pictures in tiles, from now on. Raises ValueError for one that cannot."""
    try:
        vae.enable_tiling()
    except (AttributeError, NotImplementedError):
        raise ValueError(f"model.vae_tiling=true: diffusers' {type(vae).__name__} has no tiles; valid is false") from None


def in_dtype(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A network in the dtype that it is loaded in: some text encoders keep some of their layers in fp32 where the others are fp16."""
    nn.Module.to(network, dtype)
    kept = getattr(network, "_keep_in_fp32_modules", None) if dtype == torch.float16 else None
    for name, parameter in network.named_parameters():
        if not {*(kept or ())}.isdisjoint(name.split(".")):
            parameter.data = parameter.data.float()
    return network


def filled(network: nn.Module) -> nn.Module:
    """Gives a network on the meta device ones for all of its numbers, on the CPU, which take no memory."""

    def ones(value: Tensor) -> Tensor:
        return torch.ones((), dtype=value.dtype).expand(value.shape) if value.is_meta else value

    return replaced(network, ones)


def replaced(network: nn.Module, made: Callable[[Tensor], Tensor]) -> nn.Module:
    """Gives a network other numbers: what `made` makes of each of its tensors."""
    parameters: dict[nn.Parameter, nn.Parameter] = {}  # some networks have one in two places
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None:
                if value not in parameters:
                    parameters[value] = nn.Parameter(made(value.data), requires_grad=value.requires_grad)
                module._parameters[name] = parameters[value]
        for held in (module._buffers, vars(module)):  # some networks have tables that are no buffers
            held |= {name: tree_map_only(Tensor, made, value) for name, value in held.items() if isinstance(value, Tensor | list | tuple)}
    return network


def lightened(network: nn.Module) -> nn.Module:
    """Makes a network on the meta device answer on the CPU, with the right shapes and finite numbers that depend on its tokens.

    A linear layer repeats its first feature, an embedding is a wave for each token, attention gives the first value, or, where a network
    computes it of products, their first terms. In a call, a block of a list answers what an equal one has answered to arguments of the
    same sizes. All else is computed. Raises ValueError where a layer is
    given other features than it takes.
    """
    answers: dict[tuple, object] = {}
    for name, module in filled(network).named_modules():
        light = next((light for kind, light in _LIGHT.items() if isinstance(module, kind)), None)
        if light is not None:
            module.forward = functools.partial(light, module, name)
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.forward = _once(block, answers)
    forward = network.forward

    @functools.wraps(forward)
    @torch.no_grad()
    def answer(*args, **kwargs):
        answers.clear()
        with _FirstValue():
            return forward(*args, **kwargs)

    network.forward = answer
    return network


def _linear(layer: nn.Linear, name: str, x: Tensor) -> Tensor:
    if x.shape[-1] != layer.in_features:
        raise ValueError(f"{name} takes {layer.in_features} features, not {x.shape[-1]}")
    out = x[..., :1].expand(*x.shape[:-1], layer.out_features)
    return out if layer.out_features >= VOCABULARY else out.contiguous()


def _embedding(layer: nn.Embedding, name: str, tokens: Tensor) -> Tensor:
    waves = torch.arange(1, layer.embedding_dim + 1) * (tokens[..., None] + 1)
    return torch.sin(waves).to(layer.weight.dtype)


_LIGHT = {nn.Linear: _linear, nn.Embedding: _embedding}


class _FirstValue(TorchFunctionMode):
    """Inside, attention costs nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        arguments = (*args, *(kwargs or {}).values())
        if func is F.scaled_dot_product_attention:
            query, _, value = arguments[:3]
            return value[..., :1, :1, :].expand(*query.shape[:-1], value.shape[-1])
        if func is torch.matmul and all(factor.dim() == 4 for factor in arguments[:2]):
            left, right = arguments[:2]
            return left[..., :1] * right[..., :1, :]
        return func(*args, **(kwargs or {}))


def _once(block: nn.Module, answers: dict[tuple, object]) -> Callable:
    """The block's forward, less what an equal block has answered already."""
    forward, kind = block.forward, (type(block), *(tuple(weight.shape) for weight in block.parameters()))

    @functools.wraps(forward)
    def answer(*args, **kwargs):
        key = kind, tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in tree_leaves((args, kwargs)))
        if key not in answers:
            answers[key] = forward(*args, **kwargs)
        return answers[key]

    return answer
