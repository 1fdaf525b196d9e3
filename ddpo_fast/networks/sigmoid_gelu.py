"""GELU by tanh, which flow transformers have, computed with a sigmoid: a CPU takes that in a third of the time of a tanh.

x (1 + tanh u) / 2 = x sigmoid(2 u) with 2 u = x (C1 + C3 x^2). A module keeps its parameters, its name and its place.
"""

import math

import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpo_fast.networks.patch import patch

C1 = math.sqrt(8 / math.pi)
C3 = 0.044715 * C1


class _SigmoidGELU(torch.autograd.Function):
    """y = x s with s = sigmoid(2 u); its derivative s + q - q s with q = y (C1 + 3 C3 x^2) is kept for backward instead of x."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        square = x * x
        if not ctx.needs_input_grad[0]:  # in place, so that sampling's peak memory stays
            return square.mul_(C3).add_(C1).mul_(x).sigmoid_().mul_(x)
        s = square.mul(C3).add_(C1).mul_(x).sigmoid_()
        y = x * s
        slope = square.mul_(3 * C3).add_(C1).mul_(y)
        ctx.save_for_backward(slope.addcmul_(slope, s, value=-1).add_(s))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        (derivative,) = ctx.saved_tensors
        return g * derivative


class SigmoidGELU(nn.GELU):
    """torch's module."""

    def forward(self, input: Tensor) -> Tensor:
        return _SigmoidGELU.apply(input)


class ProjectedSigmoidGELU(GELU):
    """diffusers' module, which begins with a linear layer."""

    def gelu(self, gate: Tensor) -> Tensor:
        return _SigmoidGELU.apply(gate)


def use_sigmoid(network: nn.Module) -> int:
    """Makes a network compute its GELUs by tanh with a sigmoid, the same to rounding in fp32. Returns how many."""
    kinds = {nn.GELU: SigmoidGELU, GELU: ProjectedSigmoidGELU}
    found = [module for module in network.modules() if type(module) in kinds and module.approximate == "tanh"]
    for module in found:
        patch(module, kinds[type(module)])
    return len(found)
