"""Several rewards as one."""

import math

import torch
from torch import Tensor

from ddpo_fast.rewards.function import call, load_reward


class WeightedSum:
    """sum over rewards i of weight_i reward_i(images, prompts)."""

    def __init__(self, rewards: dict):
        """rewards: by its name, each one's weight, or {weight: ..., kwargs: {...}} for one that takes arguments.

        Raises ValueError, naming the reward at fault, for one that cannot be loaded, before any picture is made.
        """
        if not isinstance(rewards, dict) or not rewards:
            raise ValueError(f"reward.kwargs.rewards={rewards}: valid is {{name: weight, ...}} with at least one reward")
        self.parts = []
        for name, part in rewards.items():
            part = part if isinstance(part, dict) else {"weight": part}
            weight, kwargs = part.get("weight"), part.get("kwargs", {})
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ValueError(
                    f"reward.kwargs.rewards.{name}={rewards[name]}: valid is a finite weight, or {{weight: ..., kwargs: {{...}}}}"
                )
            if not isinstance(kwargs, dict) or not part.keys() <= {"weight", "kwargs"}:
                raise ValueError(f"reward.kwargs.rewards.{name}={rewards[name]}: valid is {{weight: ..., kwargs: {{...}}}}")
            try:
                self.parts.append((weight, load_reward(name, kwargs)))
            except ValueError as error:
                raise ValueError(f"reward.kwargs.rewards.{name}: {error}") from error

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) fp64 on the CPU; a picture that one of the rewards has no number for has none."""
        # a reward may change its images
        scores = [weight * call(reward, images.clone(), prompts) for weight, reward in self.parts]
        return torch.stack(scores).sum(0)
