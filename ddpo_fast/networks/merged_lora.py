"""LoRA with one product a layer: the update is added to a copy of the layer's weight. The gradient stays of low rank.

A layer keeps its parameters, its name and its place; only its class changes, to a subclass with another `forward`. So state_dict
keys and peft's config stay, and `unmerge` leaves nothing behind.
"""

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpo_fast.networks.patch import patch, unpatch
from ddpo_fast.networks.quantized import QuantizedLinear

ADAPTER = "default"
"""The name that `network.add_adapter` gives an adapter."""


class _LinearFunction(torch.autograd.Function):
    """x (..., I), A (r, I), B (O, r), weight (O, I), bias (O,) or None -> (..., O)."""

    @staticmethod
    def forward(ctx, x, A, B, weight, bias, scaling):
        ctx.save_for_backward(x, A, B, weight)
        ctx.scaling = scaling
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, A, B, weight = ctx.saved_tensors
        needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
        with torch.autocast(x.device.type, enabled=False):
            rows, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
            x_grad = (g_rows @ weight).view(x.shape) if needs_x else None
            A_grad = ((g_rows @ (ctx.scaling * B).to(g.dtype)).T @ rows).to(A.dtype) if needs_A else None
            B_grad = (g_rows.T @ (rows @ A.to(g.dtype).T)).to(B.dtype) * ctx.scaling if needs_B else None
        return x_grad, A_grad, B_grad, None, None, None


class _Conv2dFunction(torch.autograd.Function):
    """x (N, I, H, W), A (r, I, k, k), B (O, r, 1, 1), weight (O, I, k, k), bias (O,) or None -> (N, O, H', W')."""

    @staticmethod
    def forward(ctx, x, A, B, weight, bias, scaling, stride, padding):
        ctx.save_for_backward(x, A, B, weight)
        ctx.scaling, ctx.stride, ctx.padding = scaling, stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, A, B, weight = ctx.saved_tensors
        needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
        place = ctx.stride, ctx.padding
        x_grad = A_grad = B_grad = None
        with torch.autocast(x.device.type, enabled=False):
            low_A, scaled_B = A.to(g.dtype), (ctx.scaling * B).to(g.dtype)
            if needs_x:
                x_grad, _ = convolution_backward(g, x, weight, *place, True, False)
            if needs_A or needs_B:
                h = F.conv2d(x, low_A, None, *place)  # recomputed: to save it would cost memory and gain no time
                h_grad, B_grad = convolution_backward(g, h, scaled_B, (1, 1), (0, 0), needs_A, needs_B)
            if needs_A:
                _, A_grad = convolution_backward(h_grad, x, low_A, *place, False, True)
                A_grad = A_grad.to(A.dtype)
            if needs_B:
                B_grad = B_grad.to(B.dtype) * ctx.scaling
        return x_grad, A_grad, B_grad, None, None, None, None, None


def convolution_backward(g, x, weight, stride, padding, needs_x: bool, needs_weight: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight if y = conv2d(x, weight, None, stride, padding) has the gradient g; None where not needed."""
    wanted = (needs_x, needs_weight, False)
    return torch.ops.aten.convolution_backward(g, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, wanted)[:2]


def lora_weights(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """W, A and B of a LoRA layer. Every forward calls this, so it reads dictionaries: nn.Module's look-up takes five times as long."""
    modules = layer._modules
    layers = modules["base_layer"], modules["lora_A"]._modules[ADAPTER], modules["lora_B"]._modules[ADAPTER]
    return tuple(part._parameters["weight"] for part in layers)


class _MergedLayer:
    """What a peft LoRA layer becomes: y = layer(x; W', bias) with W' = W + s B A. W' is computed again when W, s, B or A has changed."""

    def refresh(self) -> None:
        """Brings W' up to date, in place unless W has another dtype, device or memory format than before.

        A weight has changed if its address or version has. Code that writes through `.data` has to call
        `torch.autograd.graph.increment_version`, as the engine does for DeepSpeed.
        """
        weight, A, B = lora_weights(self)
        scaling = self.scaling[ADAPTER]
        state = (weight.data_ptr(), A.data_ptr(), B.data_ptr(), weight._version, A._version, B._version, scaling)
        if state == self.merged_state:
            return
        merged = self.merged_weight
        if merged is None or (merged.dtype, merged.device, merged.stride()) != (weight.dtype, weight.device, weight.stride()):
            self.merged_weight = merged = torch.empty_like(weight, requires_grad=False)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            torch.add(weight, (B.flatten(1) @ A.flatten(1)).view_as(weight), alpha=scaling, out=merged)
        self.merged_state = state

    def _apply(self, *args, **kwargs):
        """Called by `.to()` and the like. W' is computed again, as weights that have been to fp16 and back may have their old address."""
        self.merged_state = None
        return super()._apply(*args, **kwargs)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """What peft's layer computes. If more is needed than to apply one adapter, peft's own forward does it."""
        if args or kwargs or self.disable_adapters or self.merged or self.active_adapters != [ADAPTER]:
            return super().forward(x, *args, **kwargs)
        if not torch.compiler.is_compiling():
            self.refresh()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # now, so that x is saved in this dtype
        _, A, B = lora_weights(self)
        return self._compute(x, A, B, torch.is_grad_enabled() and (A.requires_grad or B.requires_grad))


class MergedLinear(_MergedLayer, lora.Linear):
    """With g the gradient of y: x_grad = g W', B_grad = s g^T (x A^T), A_grad = s (g B)^T x."""

    def _compute(self, x: Tensor, A: Tensor, B: Tensor, train: bool) -> Tensor:
        bias = self.base_layer.bias
        if train:
            return _LinearFunction.apply(x, A, B, self.merged_weight, bias, self.scaling[ADAPTER])
        return F.linear(x, self.merged_weight, bias)


class MergedConv2d(_MergedLayer, lora.Conv2d):
    """With h = conv(x, A) and g the gradient of y: B_grad = s sum g h, and A_grad follows from s B^T g, the gradient of h."""

    def _compute(self, x: Tensor, A: Tensor, B: Tensor, train: bool) -> Tensor:
        base = self.base_layer
        if train:
            return _Conv2dFunction.apply(x, A, B, self.merged_weight, base.bias, self.scaling[ADAPTER], base.stride, base.padding)
        return F.conv2d(x, self.merged_weight, base.bias, base.stride, base.padding)


_MERGED = {lora.Linear: MergedLinear, lora.Conv2d: MergedConv2d}
_BASES = {lora.Linear: nn.Linear, lora.Conv2d: nn.Conv2d}


def merge(network: nn.Module) -> list[nn.Module]:
    """Makes every LoRA layer of a network add its update to a copy of its weight instead of to its output: y = layer(x; W + s B A, bias).

    Exact to rounding in the weight's dtype: half precision rounds away an update that is less than about 1e-3 (fp16) or 1e-2 (bf16)
    of the weight. The copies need as much memory as the weights of those layers. The layers refresh their copies themselves, except
    inside a compiled region: the caller has to `refresh` each layer before it.

    Returns the layers. Raises ValueError for a network without LoRA, or with a layer that is more than a plain LoRA called 'default'.
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, lora.LoraLayer)}
    if not layers:
        raise ValueError("network: it has no LoRA layers to merge")
    for name, layer in layers.items():
        if isinstance(layer, _MergedLayer):
            raise ValueError(f"network: {name} cannot compute with merged weights: it does already; unmerge it first")
        if reason := misfit(layer):
            raise ValueError(f"network: {name} cannot compute with merged weights: {reason}")
    for layer in layers.values():
        patch(layer, _MERGED[type(layer)], merged_state=None)
        layer.register_buffer("merged_weight", None, persistent=False)
        layer.refresh()
    return list(layers.values())


def unmerge(network: nn.Module) -> None:
    """Undoes `merge`: classes and attributes are peft's again. A network that is not merged stays as it is.

    Raises ValueError if something else has changed a merged layer since.
    """
    for module in network.modules():
        for kind in _MERGED.values():
            if unpatch(module, kind):
                del module.merged_weight


def misfit(layer: nn.Module, quantized: bool = False) -> str | None:
    """Why a LoRA layer is not a plain one called 'default' on a frozen nn.Linear or nn.Conv2d; None if it is.

    quantized: whether a QuantizedLinear will do.
    """
    base = getattr(layer, "base_layer", None)
    if type(layer) not in _MERGED or not (type(base) is _BASES[type(layer)] or quantized and isinstance(base, QuantizedLinear)):
        return f"it is a {type(layer).__name__} on a {type(layer.base_layer).__name__}; valid is a LoRA on an nn.Linear or nn.Conv2d"
    if list(layer.lora_A) != [ADAPTER] or layer.merged:
        return f"its adapters are {list(layer.lora_A)}, of which {layer.merged_adapters} are merged; valid is 'default' alone, not merged"
    if layer.lora_variant or layer.lora_bias[ADAPTER] or not isinstance(layer.lora_dropout[ADAPTER], nn.Identity):
        return "its LoRA is of another kind, or has a bias or dropout; valid is a plain one"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "its own weights are trained too; valid are frozen ones"
    if isinstance(base, nn.Conv2d) and (base.groups, base.dilation, base.padding_mode, type(base.padding)) != (1, (1, 1), "zeros", tuple):
        return "it has groups, dilation or a padding other than a number of zeros"
    return None
