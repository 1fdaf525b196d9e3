from dataclasses import dataclass

from ddpo_fast.algorithms import PolicyGradient


@dataclass(frozen=True, kw_only=True)
class DDPO_IS(PolicyGradient):
    """DDPO with importance sampling and PPO's clip (arXiv:2305.13301, section 4.3)."""

    rule = "clip"
