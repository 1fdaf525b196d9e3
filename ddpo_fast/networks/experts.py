"""HiDream's routed experts with a gradient: diffusers computes them without one in a network that is not in training mode."""

import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from torch import Tensor, nn

from ddpo_fast.networks.patch import patch


class ExpertsWithGradient(MOEFeedForwardSwiGLU):
    """The same sum over a token's experts, in the same order, so that outputs keep their bits."""

    def moe_infer(self, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
        """x (T, C) tokens, indices (T k,) and weights (T k, 1) of each token's k experts. Returns (T, C)."""
        order = flat_expert_indices.argsort()
        out = torch.zeros_like(x)
        for expert, slots in zip(self.experts, order.split(self.shares(flat_expert_indices))):
            if len(slots):
                tokens = slots // self.num_activated_experts
                out.index_add_(0, tokens, expert(x[tokens]) * flat_expert_weights[slots])
        return out

    def shares(self, flat_expert_indices: Tensor) -> list[int]:
        """How many tokens each expert is given."""
        return flat_expert_indices.bincount(minlength=len(self.experts)).tolist()


def give_experts_gradients(network: nn.Module) -> None:
    """Makes a network's routed experts differentiable where they are computed for inference, from now on."""
    for module in network.modules():
        if type(module) is MOEFeedForwardSwiGLU:
            patch(module, ExpertsWithGradient)
