"""One algorithm a file: what an update trains on, and what a sample's reward makes of its loss.

A file holds one dataclass, a `PolicyGradient` or a `Regression`. Its fields are the options `algorithm.*`; its docstring is their heading
in --help. No file imports torch: where numbers are needed, they are tensors' own methods. So a wrong option costs no time.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Optional

CHOICES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""The names of the algorithms, those of the files."""

Rule = tuple[str, str, Callable[[object], bool]]
"""An option's name, what is valid in words, and whether a value is."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Options of the algorithm."""

    one_update: ClassVar[bool] = False
    """Whether an iteration can only have one update (train.num_minibatches=1, train.inner_epochs=1)."""
    RULES: ClassVar[tuple[Rule, ...]] = ()
    """What the options must be, beyond their types."""


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Algorithm):
    """Trains on the transitions that sampling made. A sample's advantage A comes from the options of baseline.

    rho = exp(log p - log p_old) of a transition. Its loss is, by `rule`,

        clip     max(-A rho, -A clip(rho, 1 - eps, 1 + eps))        eps: train.clip_range
        score    -A log p
    """

    guidance_scale: ClassVar[None] = None
    """The training loss has sampling's guidance."""
    rule: ClassVar[Literal["clip", "score"]]


@dataclass(frozen=True, kw_only=True)
class Regression(Algorithm):
    """Trains on finished samples, noised to levels of the forward process: loss = w mean((network's output - target)^2)."""

    population: Literal["prompt", "iteration"] = "prompt"
    """What a reward is compared with. prompt: the iteration's samples of the same prompt, or of all prompts where it has just one sample.
    iteration: all of the iteration's samples."""
    guidance_scale: Optional[float] = None
    """Guidance in the training loss. Default: sample.guidance_scale. Without guidance in training the paper saw collapse after the first
    round."""
    num_timesteps: int = 10
    """How many timesteps of each sample a pass trains on. They are drawn from the model's training timesteps, uniformly and without
    repetition, and every pass draws others. The paper draws one and makes more passes (train.inner_epochs)."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        ("num_timesteps", "a whole number >= 1 and < 2^63", lambda value: 1 <= value < 2**63),
        ("guidance_scale", "a finite number >= 0, or null", lambda value: value is None or 0 <= value < float("inf")),
    )

    def weigh(self, rewards, population):
        """The weights w (n,) of n samples.

        rewards: (n,), theirs. population: (m,), the rewards that they are compared with, theirs included, in ascending order. All fp64.
        """
        raise NotImplementedError


def find(name: str) -> type[Algorithm]:
    """The algorithm of a name, one of `CHOICES`."""
    module = importlib.import_module(f"{__name__}.{name}")
    return next(kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__)
