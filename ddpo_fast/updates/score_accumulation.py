"""Backward during sampling: each sample's LoRA gradient of its log-probs is summed up while it is made.

With one update per rollout the importance ratio is 1, so that the update's gradient is linear in the advantages:

    gradient = sum over samples i of A_i G_i,    G_i = -weight * sum over i's trained steps k of d log p_ik / d (A, B)

G_i does not need the reward. When that is known, no second UNet pass and no trajectory is needed any more.

Shape letters: B samples of this rank, b those of a sampling batch that train on a step, R = G b their UNet rows (G = 2 with guidance,
row r belongs to sample r % b), S denoising steps, r LoRA's rank, I and O a layer's inputs and outputs.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpo_fast.kernels import Ops
from ddpo_fast.networks.merged_lora import ADAPTER, MergedConv2d, MergedLinear, convolution_backward, lora_weights, misfit
from ddpo_fast.networks.patch import patch, unpatch


def _leaf(total: Tensor) -> Tensor:
    """A leaf of a single number in memory, whose gradient is added to `total`."""
    leaf = total.new_empty_strided(total.shape, [0] * total.dim()).requires_grad_()
    leaf.grad = total
    return leaf


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

    folded: the weight is W + s B A already, and h = A x is first made in the backward pass.
    """

    @staticmethod
    def forward(ctx, x, A_leaf, B_leaf, A, B, weight, bias, scaling, folded):
        ctx.scaling, ctx.totals, ctx.num_samples = scaling, _totals(A_leaf, B_leaf), len(A_leaf)
        y, h = F.linear(x, weight, bias), None if folded else F.linear(x, A)
        ctx.save_for_backward(x, h, A, B, weight)
        return y if folded else y + F.linear(h, B) * scaling

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
                x_grad = g_rows @ weight if h is None else g_rows @ weight + h_grad @ low_A
                x_grad = x_grad.view(x.shape)
        return x_grad, A_grad, B_grad, *[None] * 6


class _Conv2dFunction(torch.autograd.Function):
    """x (R, I, H, W), leaves (b, k k r, I) and (b, r, O), A (r, I, k, k), B (O, r, 1, 1), weight (O, I, k, k), bias -> (R, O, H', W')."""

    @staticmethod
    def forward(ctx, x, A_leaf, B_leaf, A, B, weight, bias, scaling, folded, stride, padding):
        ctx.scaling, ctx.totals, ctx.num_samples, ctx.place = scaling, _totals(A_leaf, B_leaf), len(A_leaf), (stride, padding)
        y, h = F.conv2d(x, weight, bias, *ctx.place), None if folded else F.conv2d(x, A, None, *ctx.place)
        ctx.save_for_backward(x, h, A, B, weight)
        return y if folded else y + F.conv2d(h, B) * scaling

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


def score(unet: nn.Module) -> list[nn.Module]:
    """Makes every LoRA layer of a UNet, merged or not, one that can give each sample's gradient apart: where it has `leaves`.

    leaves: two tensors that require a gradient, (b, k k r, I) for A and (b, r, O) for B. A's is that of weight (k, k, r, I), reversed
    in both k, where A is (r, I, k, k); B's is transposed and lacks the factor s. Returns the layers, without leaves.
    Raises ValueError for a UNet without LoRA, or with a layer that is more than a plain LoRA called 'default'.
    """
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, lora.LoraLayer)}
    if not layers:
        raise ValueError("unet: it has no LoRA layers to take gradients of")
    for name, layer in layers.items():
        if reason := _misfit(layer):
            raise ValueError(f"unet: {name} cannot give each sample's gradient: {reason}")
    for layer in layers.values():
        patch(layer, _SCORED[type(layer)], leaves=None)
    return list(layers.values())


def unscore(unet: nn.Module) -> None:
    """Undoes `score`: classes and attributes are the former ones again. A UNet that is not scored stays as it is.

    Raises ValueError if something else has changed a scored layer since.
    """
    for module in unet.modules():
        for kind in _SCORED.values():
            unpatch(module, kind)


def _misfit(layer: nn.Module) -> str | None:
    """Why a LoRA layer is not one that `score` can take, None if it is."""
    if isinstance(layer, _ScoredLayer):
        return "it does already; unscore it first"
    reason = None if type(layer) in (MergedLinear, MergedConv2d) else misfit(layer)
    base = layer.base_layer
    if reason is None and isinstance(base, nn.Conv2d) and any(pad >= k for pad, k in zip(base.padding, base.kernel_size)):
        reason = "its padding is as wide as its kernel"
    return reason


class ScoreAccumulator:
    """Each sample's gradient G_i of a rollout, in the dtype of LoRA's weights (fp32): 4 B bytes for every trained weight.

    While a batch is sampled, the activations of all of its UNet rows that train on a step are held for the backward pass: of
    sample.batch_size samples times G. For a rollout: `begin`; for each of its batches `begin_batch`, then for each step `predict_noise`
    and `backward`, and `forget`; in the end `transitions` and `combine`.
    """

    def __init__(self, unet: nn.Module, ops: Ops, guidance_scale: float, clip_range: float):
        """Takes the LoRA layers of a UNet, merged or not, by `score`, and raises ValueError as that does."""
        self.layers, self.ops, self.guidance_scale, self.clip_range = score(unet), ops, guidance_scale, clip_range
        self.totals: list[Tensor] = []
        """A's and B's of every layer."""

    def begin(self, rows: np.ndarray, steps: np.ndarray, num_samples: int, num_steps: int, weight: float) -> None:
        """Forgets the last rollout. The next has B = num_samples samples, S = num_steps steps and trains on the transitions (rows, steps).

        rows, steps: (N,) whole numbers, every pair once. weight: 1 / N times the loss scale.
        """
        self.rows, self.steps, self.weight = rows, steps, weight
        self.is_trained = np.zeros((num_samples, num_steps), bool)
        self.is_trained[rows, steps] = True
        if not self.totals or len(self.totals[0]) != num_samples:
            self.totals = []
            for layer in self.layers:
                _, A, B = lora_weights(layer)
                rank, inputs, *kernel = A.shape
                self.totals += [A.new_empty(num_samples, math.prod(kernel) * rank, inputs), B.new_empty(num_samples, rank, len(B))]
        self.figures = self.totals[0].new_zeros(4, num_samples, num_steps)
        self.good = torch.ones(num_samples, dtype=torch.bool, device=self.figures.device)

    def begin_batch(self, start: int, size: int) -> None:
        """The next samples are rows `start` to `start + size` of the rollout, of which nothing is kept that was there."""
        self.batch = slice(start, start + size)
        self.noise_pred = self.parts = None  # a batch that ran out of memory has left its graph, which holds its activations
        for total in self.totals:
            total[self.batch].zero_()
        device, steps = self.figures.device, self.is_trained[self.batch].T
        indices = [np.flatnonzero(choice) for trained in steps for choice in (trained, ~trained)]
        indices = torch.from_numpy(np.concatenate(indices)).to(device).split([len(index) for index in indices])  # in one copy
        self.chosen = list(zip(indices[::2], indices[1::2]))
        """For each step, the batch's samples that train on it, and the others."""

    def predict_noise(self, predict: Callable[..., Tensor], step: int, *inputs: Tensor) -> Tensor:
        """`predict(*inputs)`, without a gradient; what a trained row saves is kept for `backward`.

        inputs: each (G batch size, ...), rows of the UNet. Where only some of a batch's samples train on the step, they are predicted
        apart, so that the others save nothing.
        """
        trained, others = self.chosen[step]
        if not len(trained):
            return predict(*inputs)
        if not len(others):
            with self._recording([total[self.batch] for total in self.totals]):
                self.noise_pred = predict(*inputs)
            return self.noise_pred.detach()
        size = len(trained) + len(others)
        trained_rows, other_rows = (torch.cat([index + start for start in range(0, len(inputs[0]), size)]) for index in (trained, others))
        self.parts = [total.new_zeros(len(trained), *total.shape[1:]) for total in self.totals]
        with self._recording(self.parts):
            self.noise_pred = predict(*(tensor[trained_rows] for tensor in inputs))
        noise_pred = self.noise_pred.new_empty(inputs[0].shape)
        noise_pred[trained_rows] = self.noise_pred.detach()
        noise_pred[other_rows] = predict(*(tensor[other_rows] for tensor in inputs))
        return noise_pred

    @contextmanager
    def _recording(self, totals: list[Tensor]) -> Iterator[None]:
        """Calls of the UNet inside of it have a graph, and its backward adds to `totals`."""
        leaves = map(_leaf, totals)
        for layer, pair in zip(self.layers, zip(leaves, leaves)):
            layer.leaves = pair
        try:
            with torch.enable_grad():
                yield
        finally:
            for layer in self.layers:
                layer.leaves = None

    def backward(self, step: int, latents: Tensor, next_latents: Tensor, log_probs: Tensor, coefficients: Tensor) -> None:
        """Adds the gradient of the step's log-probs, of the last `predict_noise`, and records its figures.

        latents x_t, next_latents x_p: (batch size, C, H, W). log_probs: (batch size,), of x_p. coefficients: (1, 4) or (1, 7), the step's.
        """
        trained, others = self.chosen[step]
        if not len(trained):
            return
        with torch.enable_grad():
            loss, figures = self.ops.ppo_loss(
                self.noise_pred, torch.stack([latents, next_latents], 1), log_probs[:, None], torch.ones_like(log_probs), coefficients,
                trained, torch.zeros_like(trained), self.guidance_scale, self.clip_range, self.weight, True,
            )  # fmt: skip
        loss.backward()
        self.noise_pred = None
        self.figures[:, self.batch, step].index_copy_(1, trained, figures.to(self.figures.dtype))
        if len(others):
            for total, part in zip(self.totals, self.parts):
                total[self.batch].index_add_(0, trained, part)

    def forget(self, bad: Tensor) -> None:
        """The batch's samples `bad` (batch size,) are no samples. Their advantage has to be 0, for which `combine` leaves them out."""
        self.good[self.batch] = ~bad

    def transitions(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rollout's: samples (N,), steps (N,), and figures (4, N), those of `ppo_loss` as of advantage 1: -log p, ratio, ..."""
        rows, steps = (torch.from_numpy(index).to(self.figures.device) for index in (self.rows, self.steps))
        return rows, steps, self.figures[:, rows, steps]

    def combine(self, advantages: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """LoRA's weights, each with its gradient sum_i A_i G_i. advantages: (B,); of a sample with 0, G_i is left out, whatever it is."""
        left_out = (advantages == 0).nonzero()[:, 0]
        result, totals = [], iter(self.totals)
        for layer in self.layers:
            _, *weights = lora_weights(layer)
            sums = [advantages.to(total.dtype) @ total.index_fill_(0, left_out, 0.0).flatten(1) for total in (next(totals), next(totals))]
            (A, A_grad), (B, B_grad) = zip(weights, sums)
            rank, wide, *kernel = A.shape
            A_grad = A_grad.view(*(kernel or (1, 1)), rank, wide).flip(0, 1).permute(2, 3, 0, 1)
            B_grad = B_grad.view(rank, -1).T * layer.scaling[ADAPTER]
            result += [(A, A_grad.reshape(A.shape)), (B, B_grad.reshape(B.shape))]
        return result
