"""LoRA layers that give each sample's gradient apart, for `updates.score_accumulation`.

Shape letters: b samples, R = G b their network rows (G = 2 with guidance, row r belongs to sample r % b), r LoRA's rank, I and O a layer's
inputs and outputs.
"""

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpo_fast.networks.merged_lora import ADAPTER, MergedConv2d, MergedLinear, convolution_backward, lora_weights, misfit
from ddpo_fast.networks.patch import patch, unpatch
from ddpo_fast.networks.quantized import QuantizedLinear


def _totals(*leaves: Tensor) -> list[Tensor | None]:
    """What `_add` is to add to at once; None in a compiled region, of which autograd adds the gradients."""
    return [None if torch.compiler.is_compiling() else leaf.grad for leaf in leaves]


def _add(total: Tensor | None, num_samples: int, low: Tensor, wide: Tensor) -> Tensor | None:
    """Adds low^T wide of every sample, low (R, L, m) and wide (R, L, n), to its row of `total` (b, m, n), or returns it.

    In place, because a gradient handed to autograd would be written and read once more.
    """
    pairs = list(zip(low.mT.split(num_samples), wide.split(num_samples)))
    if total is None:
        return sum(torch.bmm(*pair).float() for pair in pairs)
    for pair in pairs:
        if low.dtype == total.dtype:
            torch.baddbmm(total, *pair, out=total)
        else:  # the sum over steps stays in fp32
            total += torch.bmm(*pair)
    return None


class _LinearFunction(torch.autograd.Function):
    """x (R, ..., I), leaves (b, r, I) and (b, r, O), A (r, I), B (O, r), weight (O, I), bias (O,) or None -> (R, ..., O).

    folded: the weight is W + s B A already, and h = A x is first made in the backward pass. Without a weight it is LoRA's update alone.
    """

    @staticmethod
    def forward(ctx, x, A_leaf, B_leaf, A, B, weight, bias, scaling, folded):
        ctx.scaling, ctx.totals, ctx.num_samples = scaling, _totals(A_leaf, B_leaf), len(A_leaf)
        y, h = 0 if weight is None else F.linear(x, weight, bias), None if folded else F.linear(x, A.to(x.dtype))
        ctx.save_for_backward(x, h, A, B, weight)
        return y if folded else y + F.linear(h, B.to(h.dtype)) * scaling

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, h, A, B, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            low_A, scaled_B = A.to(g.dtype), (ctx.scaling * B).to(g.dtype)
            h_rows, x_rows, g_rows = (
                tensor.reshape(len(tensor), -1, tensor.shape[-1]) for tensor in (x @ low_A.T if h is None else h, x, g)
            )
            h_grad = g_rows @ scaled_B
            A_grad = _add(ctx.totals[0], ctx.num_samples, h_grad, x_rows)
            B_grad = _add(ctx.totals[1], ctx.num_samples, h_rows, g_rows)
            x_grad = None
            if ctx.needs_input_grad[0]:
                x_grad = 0 if weight is None else g_rows @ weight
                x_grad = (x_grad if h is None else x_grad + h_grad @ low_A).view(x.shape)
        return x_grad, A_grad, B_grad, *[None] * 6


class _Conv2dFunction(torch.autograd.Function):
    """x (R, I, H, W), leaves (b, k k r, I) and (b, r, O), A (r, I, k, k), B (O, r, 1, 1), weight (O, I, k, k), bias -> (R, O, H', W')."""

    @staticmethod
    def forward(ctx, x, A_leaf, B_leaf, A, B, weight, bias, scaling, folded, stride, padding):
        ctx.scaling, ctx.totals, ctx.num_samples, ctx.place = scaling, _totals(A_leaf, B_leaf), len(A_leaf), (stride, padding)
        y, h = F.conv2d(x, weight, bias, *ctx.place), None if folded else F.conv2d(x, A.to(x.dtype), None, *ctx.place)
        ctx.save_for_backward(x, h, A, B, weight)
        return y if folded else y + F.conv2d(h, B.to(h.dtype)) * scaling

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, h, A, B, weight = ctx.saved_tensors
        if x.is_contiguous(memory_format=torch.channels_last):
            g = g.contiguous(memory_format=torch.channels_last)  # once, which takes 3 to 20 % off this pass: each operation would do it
        with torch.autocast(x.device.type, enabled=False):
            low_A, scaled_B = A.to(g.dtype), (ctx.scaling * B).to(g.dtype)
            h_grad = g.permute(0, 2, 3, 1) @ scaled_B.flatten(1)
            A_grad = _add(ctx.totals[0], ctx.num_samples, _windows(h_grad, x.shape[2:], A.shape[2:], *ctx.place), _pixels(x))
            B_grad = _add(ctx.totals[1], ctx.num_samples, _pixels(F.conv2d(x, low_A, None, *ctx.place) if h is None else h), _pixels(g))
            x_grad = None
            if ctx.needs_input_grad[0]:
                x_grad, _ = convolution_backward(g, x, weight, *ctx.place, True, False)
                if h is not None:
                    x_grad = x_grad + convolution_backward(h_grad.permute(0, 3, 1, 2), x, low_A, *ctx.place, True, False)[0]
        return x_grad, A_grad, B_grad, *[None] * 8


def _pixels(x: Tensor) -> Tensor:
    """(R, C, H, W) as (R, H W, C), a view in either memory layout."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _windows(h_grad: Tensor, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """What each pixel of a convolution's input meets of the output's gradient h_grad (R, H', W', r): (R, H W, k k r).

    Then A's gradient is one product of matrices with the input as it is. (Unfolding the input instead would copy k k I numbers a pixel.)
    The window's offsets are those of a convolution with the kernel reversed.
    """
    margins = [k - 1 for k in kernel]
    padded = h_grad.new_zeros(len(h_grad), *(n + margin for n, margin in zip(size, margins)), h_grad.shape[3])
    rows, columns = (
        slice(margin - pad, margin - pad + step * (n - 1) + 1, step)
        for margin, pad, step, n in zip(margins, padding, stride, h_grad.shape[1:3])
    )
    padded[:, rows, columns] = h_grad
    windows = padded.unfold(1, kernel[0], 1).unfold(2, kernel[1], 1)
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)


class _ScoredLayer:
    """A LoRA layer that, while it has `leaves`, adds each sample's gradient to theirs instead of the batch's to A's and B's."""

    function: type[torch.autograd.Function]
    folded: bool
    """Whether LoRA's update is in `merged_weight`. (`merged` is peft's, and of its own merging.)"""
    geometry: tuple[str, ...] = ()
    """Attributes of the base layer that `function` takes."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The same output as without leaves, bit for bit."""
        if self.leaves is None:
            return super().forward(x, *args, **kwargs)
        if self.folded and not torch.compiler.is_compiling():
            self.refresh()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # before it is saved, not after
        base, (weight, A, B) = self.base_layer, lora_weights(self)
        return self.function.apply(
            x, *self.leaves, A.detach(), B.detach(), self.merged_weight if self.folded else weight, base.bias, self.scaling[ADAPTER],
            self.folded, *(getattr(base, name) for name in self.geometry),
        )  # fmt: skip


class ScoredLinear(_ScoredLayer, lora.Linear):
    """y = W x + b + s B A x."""

    function, folded = _LinearFunction, False


class ScoredQuantizedLinear(_ScoredLayer, lora.Linear):
    """y = W x + b + s B A x, where W is made of fewer bits: in the base layer, which keeps no whole W for backward."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.leaves is None:
            return super().forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        _, A, B = lora_weights(self)
        return self.base_layer(x) + _LinearFunction.apply(x, *self.leaves, A.detach(), B.detach(), None, None, self.scaling[ADAPTER], False)


class ScoredConv2d(_ScoredLayer, lora.Conv2d):
    """y = conv(x, W, b) + s conv(conv(x, A), B)."""

    function, folded, geometry = _Conv2dFunction, False, ("stride", "padding")


class ScoredMergedLinear(_ScoredLayer, MergedLinear):
    """y = (W + s B A) x + b."""

    function, folded = _LinearFunction, True


class ScoredMergedConv2d(_ScoredLayer, MergedConv2d):
    """y = conv(x, W + s B A, b)."""

    function, folded, geometry = _Conv2dFunction, True, ("stride", "padding")


_SCORED = {
    lora.Linear: ScoredLinear, lora.Conv2d: ScoredConv2d, MergedLinear: ScoredMergedLinear, MergedConv2d: ScoredMergedConv2d
}  # fmt: skip


def score(network: nn.Module) -> list[nn.Module]:
    """Makes every LoRA layer of a network, merged or not, one that can give each sample's gradient apart: where it has `leaves`.

    leaves: two tensors that require a gradient, (b, k k r, I) for A and (b, r, O) for B. A's is that of weight (k, k, r, I), reversed
    in both k, where A is (r, I, k, k); B's is transposed and lacks the factor s. Returns the layers, without leaves.
    Raises ValueError for a network without LoRA, or with one on a routed expert, or more than a plain LoRA called 'default'.
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, lora.LoraLayer)}
    if not layers:
        raise ValueError("network: it has no LoRA layers to take gradients of")
    if expert := next((name for name in layers if ".experts." in name), None):
        raise ValueError(
            f"train.estimator=score_accumulation: {expert} is an expert, which is given single tokens and not samples; valid is ppo, or "
            "lora.targets without feed_forward"
        )
    for name, layer in layers.items():
        if reason := _misfit(layer):
            raise ValueError(f"network: {name} cannot give each sample's gradient: {reason}")
    for layer in layers.values():
        quantized = isinstance(layer.base_layer, QuantizedLinear)
        patch(layer, ScoredQuantizedLinear if quantized else _SCORED[type(layer)], leaves=None)
    return list(layers.values())


def unscore(network: nn.Module) -> None:
    """Undoes `score`: classes and attributes are the former ones again. A network that is not scored stays as it is.

    Raises ValueError if something else has changed a scored layer since.
    """
    for module in network.modules():
        for kind in (*_SCORED.values(), ScoredQuantizedLinear):
            unpatch(module, kind)


def _misfit(layer: nn.Module) -> str | None:
    """Why a LoRA layer is not one that `score` can take, None if it is."""
    if isinstance(layer, _ScoredLayer):
        return "it does already; unscore it first"
    reason = None if type(layer) in (MergedLinear, MergedConv2d) else misfit(layer, quantized=True)
    base = layer.base_layer
    if reason is None and isinstance(base, nn.Conv2d) and any(pad >= k for pad, k in zip(base.padding, base.kernel_size)):
        reason = "its padding is as wide as its kernel"
    return reason
