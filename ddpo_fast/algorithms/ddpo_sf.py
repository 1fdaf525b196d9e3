from dataclasses import dataclass

from ddpo_fast.algorithms import PolicyGradient


@dataclass(frozen=True, kw_only=True)
class DDPO_SF(PolicyGradient):
    """DDPO with the score function, REINFORCE (arXiv:2305.13301, section 4.3). It is only unbiased on-policy: one update an iteration."""

    rule, one_update = "score", True
