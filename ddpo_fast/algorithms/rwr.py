from dataclasses import dataclass
from typing import ClassVar

from ddpo_fast.algorithms import Regression, Rule


@dataclass(frozen=True, kw_only=True)
class RWR(Regression):
    """Reward-weighted regression (a baseline of DDPO, arXiv:2305.13301): w = n softmax(beta r), so that the mean weight is 1."""

    inverse_temperature: float = 0.2
    """beta in the weights softmax(beta r), in 1 / the reward's units. Default: the paper's value."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        *Regression.RULES,
        ("inverse_temperature", "a finite number > 0", lambda value: 0 < value < float("inf")),
    )

    def weigh(self, rewards, population):
        log_sum = (self.inverse_temperature * population).logsumexp(0)
        return len(population) * (self.inverse_temperature * rewards - log_sum).exp()
