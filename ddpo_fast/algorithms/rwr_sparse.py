from dataclasses import dataclass
from typing import ClassVar

from ddpo_fast.algorithms import Regression, Rule


@dataclass(frozen=True, kw_only=True)
class RWRSparse(Regression):
    """Sparse reward-weighted regression (a baseline of DDPO, arXiv:2305.13301): w = 1 from a quantile of the rewards on, 0 below."""

    percentile: float = 0.9
    """Samples whose reward is at or above this quantile have weight 1, the others 0."""

    RULES: ClassVar[tuple[Rule, ...]] = (*Regression.RULES, ("percentile", "0 <= percentile < 1", lambda value: 0 <= value < 1))

    def weigh(self, rewards, population):
        return (rewards >= population.quantile(self.percentile)).double()  # between two rewards the quantile is interpolated
