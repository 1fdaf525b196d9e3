"""Several rewards as one."""

import math

import torch
from torch import Tensor

from ddpo_fast.places import is_address
from ddpo_fast.scoring.function import call, load_reward, needs_metadata
from ddpo_fast.scoring.remote import RemoteReward


class WeightedSum:
    """sum over rewards i of weight_i reward_i(images, prompts)."""

    def __init__(self, rewards: dict, timeout_s: float = 600.0):
        """rewards: names with weights, or with {weight: ..., kwargs: {...}} if a reward takes arguments. A server's name is its address.

        timeout_s: what a server may take. Raises ValueError, naming the reward at fault, for a reward that cannot be loaded, before any
        picture is made.
        """
        if not isinstance(rewards, dict) or not rewards:
            raise ValueError(f"reward.kwargs.rewards={rewards}: valid is {{name: weight, ...}} with at least one reward")
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
            raise ValueError(f"reward.kwargs.timeout_s={timeout_s}: valid is a finite number > 0")
        self.parts = []
        self.needs_metadata = None
        """The name of a part that cannot be called without metadata; None if there is no such part."""
        for name, part in rewards.items():
            if not isinstance(name, str):
                raise ValueError(f"reward.kwargs.rewards: {name} is no name of a reward")
            if is_address(name):
                self.parts.append((_weight("an address", part, with_arguments=False), RemoteReward(name, timeout_s)))
                continue
            weight, kwargs = _weight(name, part), part.get("kwargs", {}) if isinstance(part, dict) else {}
            try:
                reward = load_reward(name, kwargs)
            except ValueError as error:
                raise ValueError(f"reward.kwargs.rewards.{name}: {error}") from error
            self.parts.append((weight, reward))
            self.needs_metadata = self.needs_metadata or needs_metadata(reward, name)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> Tensor:
        """Returns (B,) fp64 on the CPU. A picture has no number if one of the rewards has none for it."""
        # a reward may change its images
        scores = [weight * call(reward, images.clone(), prompts, metadata) for weight, reward in self.parts]
        return torch.stack(scores).sum(0)


def _weight(name: str, part: object, with_arguments: bool = True) -> float:
    """The weight of one of the rewards. Raises ValueError if `rewards` has none, or has keys that do not exist."""
    keys = {"weight", "kwargs"} if with_arguments else {"weight"}
    given = part if isinstance(part, dict) else {"weight": part}
    weight = given.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"reward.kwargs.rewards.{name}={part}: valid is a finite weight, or {{weight: ..., kwargs: {{...}}}}")
    if not given.keys() <= keys or not isinstance(given.get("kwargs", {}), dict):
        valid = "{weight: ..., kwargs: {...}}" if with_arguments else "a weight alone; the server is given its arguments"
        raise ValueError(f"reward.kwargs.rewards.{name}={part}: valid is {valid}")
    return weight
