"""Linear layers whose frozen weights have 4 or 8 bits and are made whole again for every call.

Only weights are quantised. LLM.int8 would also round activations, by outliers of the whole batch: a row's output would then depend on the
other rows, and the importance ratio before an update would not be 1.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpo_fast.networks.lora import block_names

BLOCK_WEIGHTS = 64
"""Weights that share a scale in nf4: bitsandbytes' default."""


class _Product(torch.autograd.Function):
    """x (..., I), a layer, bias (O,) or None -> (..., O). It keeps nothing for backward, which makes W again."""

    @staticmethod
    def forward(ctx, x, layer, bias):
        ctx.layer = layer
        return F.linear(x, layer.whole(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        with torch.autocast(g.device.type, enabled=False):
            return g @ ctx.layer.whole(g.dtype), None, None


class QuantizedLinear(nn.Linear, ABC):
    """y = x W^T + bias, where W is made of the codes in `weight` and of `scales`.

    Scales are fp32, kept as their bytes: what casts a network's floating-point numbers leaves them as they are.
    """

    def __init__(self, layer: nn.Linear):
        """The form of a layer, and its bias; its weights come with `take`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        for name, size in (("weight", self.num_code_bytes), ("scales", 4 * self.num_scales)):
            empty = torch.empty(size, dtype=torch.uint8, device=layer.weight.device)
            setattr(self, name, nn.Parameter(empty, requires_grad=False))
        self.train(layer.training)

    @property
    @abstractmethod
    def num_code_bytes(self) -> int:
        """Bytes of W's codes."""

    @property
    @abstractmethod
    def num_scales(self) -> int:
        """Numbers that the codes are multiplied by."""

    @abstractmethod
    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The codes and the scales, fp32, of W (O, I)."""

    @abstractmethod
    def whole(self, dtype: torch.dtype) -> Tensor:
        """W (O, I) in fp32, fp16 or bf16."""

    def take(self, weight: Tensor) -> None:
        """Quantises W (O, I), fp32, fp16 or bf16, on its device, where the layer then has it."""
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(f"a weight is {tuple(weight.shape)}, not {(self.out_features, self.in_features)}")
        codes, scales = self.quantized(weight.detach())
        for name, made in (("weight", codes), ("scales", scales)):
            setattr(self, name, nn.Parameter(made.contiguous().view(torch.uint8).flatten(), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Product.apply(x, self, self.bias)


class Nf4Linear(QuantizedLinear):
    """4 bits a weight: the 16 quantiles of a normal distribution, times a scale for every 64 weights (QLoRA, arXiv:2305.14314)."""

    @property
    def num_code_bytes(self) -> int:
        return -(-self.out_features * self.in_features // 2)

    @property
    def num_scales(self) -> int:
        return -(-self.out_features * self.in_features // BLOCK_WEIGHTS)

    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.bitsandbytes.quantize_4bit(weight.contiguous(), BLOCK_WEIGHTS, "nf4", torch.uint8)

    def whole(self, dtype: torch.dtype) -> Tensor:
        scales, shape = self.scales.view(torch.float32), (self.out_features, self.in_features)
        return torch.ops.bitsandbytes.dequantize_4bit(self.weight, scales, BLOCK_WEIGHTS, "nf4", shape, dtype)


class Int8Linear(QuantizedLinear):
    """8 bits a weight: a whole number of at most 127, times a scale for every row (LLM.int8, arXiv:2208.07339, of the weights alone)."""

    @property
    def num_code_bytes(self) -> int:
        return self.out_features * self.in_features

    @property
    def num_scales(self) -> int:
        return self.out_features

    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        largest = weight.abs().amax(1, keepdim=True).float()
        scales = torch.where(largest > 0, largest / 127, 1)  # a row of zeros stays one
        return (weight / scales).round().to(torch.int8), scales.flatten()

    def whole(self, dtype: torch.dtype) -> Tensor:
        codes = self.weight.view(torch.int8).view(self.out_features, self.in_features)
        return codes.to(dtype).mul_(self.scales.view(torch.float32)[:, None])  # bf16 and fp16 have all of the codes


KINDS = {"nf4": Nf4Linear, "int8": Int8Linear}
"""model.quantize, but for none."""


def quantize(network: nn.Module, kind: str) -> None:
    """Makes the linear layers in a network's blocks ones of this kind, of KINDS; they are on its device, and have no weights yet.

    Whatever is outside of the blocks stays, as do convolutions, norms, embeddings and biases.
    """
    _prepare(kind)
    for block in map(network.get_submodule, block_names(network)):
        for module in list(block.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    setattr(module, name, KINDS[kind](child))


def require(kind: str, device: torch.device) -> None:
    """Raises ValueError for a kind, one of KINDS or none, that does not run here: bitsandbytes may lack a build that fits the GPU."""
    if kind == "none":
        return
    layer = nn.Linear(BLOCK_WEIGHTS, 1, bias=False, device=device)
    try:
        _prepare(kind)
        made = KINDS[kind](layer)
        made.take(layer.weight)
        made.whole(torch.bfloat16)
    except Exception as error:  # of any kind: a library that is missing, a kernel that is
        what = f"model.quantize={kind}: it does not run on this {device.type}: {type(error).__name__}: {error}; valid is none"
        raise ValueError(" ".join(what.split())) from None


def _prepare(kind: str) -> None:
    if kind == "nf4":
        import bitsandbytes  # noqa: F401  # its operations; here, so that only its users need a build that fits the GPU
