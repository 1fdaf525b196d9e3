"""Gradients taken after sampling: the network is called again on the transitions that an update trains on."""

from collections.abc import Callable
from functools import partial
from itertools import zip_longest

import numpy as np
from torch import Tensor

from ddpo_fast.distributed.engine import Engine
from ddpo_fast.memory import Room
from ddpo_fast.pipelines.template import Conditions
from ddpo_fast.policy import Policy
from ddpo_fast.schedule import Schedule
from ddpo_fast.updates.activation_cache import Cache
from ddpo_fast.updates.gradients import Figures
from ddpo_fast.updates.objectives import Objective
from ddpo_fast.updates.transitions import Rollout, Update, micro_batches


class Replay:
    """The gradient of any objective, in micro-batches; from the activation cache on, where it holds a transition. See `Gradients`."""

    stages = ("train",)

    def __init__(self, policy: Policy, engine: Engine, objective: Objective, cache: Cache, room: Room, micro_batch: int):
        self.policy, self.engine, self.objective, self.cache = policy, engine, objective, cache
        self.room, self.micro_batch, self.keeps = room, micro_batch, objective.keeps

    def begin(self, updates: list[Update], num_samples: int, schedule: Schedule) -> None:
        self.cache.begin(num_samples, schedule.num_steps, updates)

    def begin_batch(self, rows: slice) -> None:
        self.rows = rows

    def predict(self, step: int, call: Callable[[Tensor | slice], Tensor]) -> Tensor:
        with self.cache.filling(self.rows, step):
            return call(slice(None))

    def stepped(self, step: int, x_t: Tensor, next_x: Tensor, log_probs: Tensor) -> None:
        pass

    def drop(self, bad: Tensor) -> None:
        self.cache.forget(self.rows, bad)

    def add(self, update: Update, rollout: Rollout, credit: Tensor, progress: Callable[[int], object]) -> list[Figures]:
        size = min(self.micro_batch, len(update.rows))
        return self.room.attempt("train.micro_batch", size, partial(self._add, update, rollout, credit, progress))

    def _add(self, update: Update, rollout: Rollout, credit: Tensor, progress: Callable[[int], object], size: int) -> list[Figures]:
        """`add` in micro-batches of at most `size` transitions; begins with no gradient, so that it may be called again."""
        policy, objective = self.policy, self.objective
        recording = objective.recording(rollout.schedule)
        times, samples = objective.times(rollout.schedule), np.unique(update.rows)
        texts, found = policy.texts(recording, [rollout.prompts[i] for i in samples])
        prompts = np.zeros(len(rollout.prompts), np.int64)
        prompts[samples] = found
        self.engine.forget_gradient()
        self.cache.forget_fetched()
        done, weight = [], self.engine.loss_scale / len(update.rows)
        parts = list(micro_batches(update, size, rollout.first_kept, recording, prompts, times))
        for part, next_part in zip_longest(parts, parts[1:]):
            x, loss = objective.on(rollout, part, update.epoch, credit)
            inputs = x.to(policy.dtype), part.times, Conditions(texts, part.text_rows)
            with self.cache.reading(part, next_part, lambda rows: policy.predict(*(given[rows] for given in inputs))):  # noqa: B023
                anchors = {name: policy.predict_under(name, *inputs) for name in objective.anchors}
                out = policy.predict(*inputs)
            total, figures = loss(out, anchors, weight)
            self.engine.backward(total, last=next_part is None)
            done.append((part.rows, part.steps, figures))
            progress(len(part.rows))
        return done

    def metrics(self) -> dict[str, float]:
        return {"cache_hit_fraction": self.cache.hits / self.cache.reads if self.cache.reads else 0.0}

    def plan_text(self, updates: list[Update]) -> str:
        return self.cache.plan_text(updates, self.policy.dtype)
