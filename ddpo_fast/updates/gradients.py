"""Where an update's gradient is taken; the interface, and the case where nothing is trained."""

from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor

from ddpo_fast.schedule import Schedule
from ddpo_fast.updates.transitions import Rollout, Update

Figures = tuple[Tensor, Tensor, Tensor]
"""Samples (B,) and steps (B,) of some transitions, and what is recorded of them, (figures, B)."""


class Gradients(Protocol):
    """Takes the gradient of an update: during sampling, or afterwards, when the network is called again.

    An iteration calls `begin`; for each batch of samples `begin_batch`, then for each step `predict` and `stepped`, then `drop`; and for
    each update `add`.
    """

    keeps: Literal["trajectory", "final", "nothing"]
    """Which latents a rollout keeps for `add`: those of the trained steps, the finished ones, or none."""
    stages: tuple[str, ...]
    """The timer's stages in which gradients are taken."""

    def begin(self, updates: list[Update], num_samples: int, schedule: Schedule) -> None:
        """Before an iteration's samples: the transitions that will be trained on."""

    def begin_batch(self, rows: slice) -> None:
        """These samples are the next batch. After memory has run out, the batch is begun again, perhaps with fewer samples."""

    def predict(self, step: int, call: Callable[[Tensor | slice], Tensor]) -> Tensor:
        """The network's output for the batch at a step. call(rows): that of some of its network rows."""

    def stepped(self, step: int, x_t: Tensor, next_x: Tensor, log_probs: Tensor) -> None:
        """The step is made: latents (B, *shape) before and after it, and its log-probs (B,)."""

    def drop(self, bad: Tensor) -> None:
        """Samples of the batch, (B,) bool, that are not finite: they are in no loss."""

    def add(self, update: Update, rollout: Rollout, credit: Tensor, progress: Callable[[int], object]) -> list[Figures]:
        """Gives the engine an update's gradient. credit: (M,) fp32. `progress(n)` is told how many transitions are done."""

    def metrics(self) -> dict[str, float]:
        """What is to be recorded of the iteration beside its losses."""

    def plan_text(self, updates: list[Update]) -> str:
        """What is kept for these updates, for people; empty where nothing is."""


class NoGradients:
    """Nothing is trained on these samples."""

    keeps = "nothing"

    def begin_batch(self, rows: slice) -> None:
        pass

    def predict(self, step: int, call: Callable[[Tensor | slice], Tensor]) -> Tensor:
        return call(slice(None))

    def stepped(self, step: int, x_t: Tensor, next_x: Tensor, log_probs: Tensor) -> None:
        pass

    def drop(self, bad: Tensor) -> None:
        pass


NO_GRADIENTS = NoGradients()
