"""Backward during sampling: each sample's LoRA gradient of its log-probs is summed up while it is made.

With one update per rollout the importance ratio is 1, so that the update's gradient is linear in the advantages:

    gradient = sum over samples i of A_i G_i,    G_i = -weight * sum over i's trained steps k of d log p_ik / d (A, B)

G_i does not need the reward. When that is known, no second call of the network and no trajectory is needed any more.

Shape letters: M samples of this rank, B those of a sampling batch, b samples of the batch that train on a step, G network rows of a
sample (2 with guidance, row r belongs to sample r % B), S denoising steps, r LoRA's rank.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ddpo_fast.distributed.engine import Engine
from ddpo_fast.networks.merged_lora import ADAPTER, lora_weights
from ddpo_fast.schedule import Schedule
from ddpo_fast.updates.gradients import Figures
from ddpo_fast.updates.objectives import OnTrajectory
from ddpo_fast.updates.transitions import Rollout, Update


def _leaf(total: Tensor) -> Tensor:
    """A leaf of a single number in memory, whose gradient is added to `total`."""
    leaf = total.new_empty_strided(total.shape, [0] * total.dim()).requires_grad_()
    leaf.grad = total
    return leaf


class ScoreAccumulation:
    """Each sample's gradient G_i of a rollout, in the dtype of LoRA's weights (fp32): 4 M bytes for every trained weight.

    While a batch is sampled, the activations of all of its network rows that train on a step are held for the backward pass: of
    sample.batch_size samples times G. See `Gradients`; an iteration has one update.
    """

    keeps = "nothing"
    stages = "train", "sample"

    def __init__(self, layers: list[nn.Module], engine: Engine, objective: OnTrajectory):
        """layers: see `networks.scored_lora.score`."""
        self.layers, self.engine, self.objective = layers, engine, objective
        self.totals: list[Tensor] = []
        """A's and B's of every layer."""

    def begin(self, updates: list[Update], num_samples: int, schedule: Schedule) -> None:
        """Forgets the last rollout."""
        (self.update,) = updates
        self.schedule, self.weight = schedule, self.engine.loss_scale / len(self.update.rows)
        self.is_trained = np.zeros((num_samples, schedule.num_steps), bool)
        self.is_trained[self.update.rows, self.update.steps] = True
        if not self.totals or len(self.totals[0]) != num_samples:
            self.totals = []
            for layer in self.layers:
                _, A, B = lora_weights(layer)
                rank, inputs, *kernel = A.shape
                self.totals += [A.new_empty(num_samples, math.prod(kernel) * rank, inputs), B.new_empty(num_samples, rank, len(B))]
        self.figures = self.totals[0].new_zeros(len(self.objective.figures), num_samples, schedule.num_steps)

    def begin_batch(self, rows: slice) -> None:
        """Clears what an earlier attempt left of these samples."""
        self.batch = rows
        self.out = self.parts = None  # a batch that ran out of memory has left its graph, which holds its activations
        for total in self.totals:
            total[self.batch].zero_()
        device, steps = self.figures.device, self.is_trained[self.batch].T
        indices = [np.flatnonzero(choice) for trained in steps for choice in (trained, ~trained)]
        indices = torch.from_numpy(np.concatenate(indices)).to(device).split([len(index) for index in indices])  # in one copy
        self.chosen = list(zip(indices[::2], indices[1::2]))
        """For each step, the batch's samples that train on it, and the others."""

    def predict(self, step: int, call: Callable[[Tensor | slice], Tensor]) -> Tensor:
        """The output without a gradient; what a trained row saves is kept for `stepped`.

        Where only some of a batch's samples train on the step, the network is called on them apart, so that the others save nothing.
        """
        trained, others = self.chosen[step]
        if not len(trained):
            return call(slice(None))
        if not len(others):
            with self._recording([total[self.batch] for total in self.totals]):
                self.out = call(slice(None))
            return self.out.detach()
        size, num_branches = len(trained) + len(others), self.schedule.num_branches
        trained_rows, other_rows = (torch.cat([index + size * branch for branch in range(num_branches)]) for index in (trained, others))
        self.parts = [total.new_zeros(len(trained), *total.shape[1:]) for total in self.totals]
        with self._recording(self.parts):
            self.out = call(trained_rows)
        out = self.out.new_empty(size * num_branches, *self.out.shape[1:])
        out[trained_rows] = self.out.detach()
        out[other_rows] = call(other_rows)
        return out

    @contextmanager
    def _recording(self, totals: list[Tensor]) -> Iterator[None]:
        """Calls of the network inside of it have a graph, and its backward adds to `totals`."""
        leaves = map(_leaf, totals)
        for layer, pair in zip(self.layers, zip(leaves, leaves)):  # A's and B's in turn
            layer.leaves = pair
        try:
            with torch.enable_grad():
                yield
        finally:
            for layer in self.layers:
                layer.leaves = None

    def stepped(self, step: int, x_t: Tensor, next_x: Tensor, log_probs: Tensor) -> None:
        """Adds the gradient of the step's log-probs, of the last `predict`, and records its figures."""
        trained, others = self.chosen[step]
        if not len(trained):
            return
        objective = self.objective
        with torch.enable_grad():
            loss, figures = objective.ops.ppo_loss(
                self.out, torch.stack([x_t, next_x], 1), log_probs[:, None], torch.ones_like(log_probs),
                self.schedule.coefficients[step : step + 1], trained, torch.zeros_like(trained), self.schedule.guidance_scale,
                objective.clip_range, self.weight, True,
            )  # fmt: skip
        loss.backward()
        self.out = None
        self.figures[:, self.batch, step].index_copy_(1, trained, figures.to(self.figures.dtype))
        if len(others):
            for total, part in zip(self.totals, self.parts):
                total[self.batch].index_add_(0, trained, part)

    def drop(self, bad: Tensor) -> None:
        """Does nothing: a bad sample has credit 0, and `add` leaves out samples with credit 0."""

    def add(self, update: Update, rollout: Rollout, credit: Tensor, progress: Callable[[int], object]) -> list[Figures]:
        """Gives the engine sum_i A_i G_i, the gradient of `Replay` with one minibatch and one epoch, where every ratio is 1."""
        rows, steps = (torch.from_numpy(index).to(self.figures.device) for index in (update.rows, update.steps))
        scores, ratios, *others = self.figures[:, rows, steps]  # as of advantage 1, of which -log p is the score's loss
        losses = credit[rows] * (scores if self.objective.algorithm.rule == "score" else -ratios)
        # the weights' gradient goes to the engine as that of a loss: sum p g
        self.engine.backward(sum((weight * gradient).sum() for weight, gradient in self.combine(credit)), last=True)
        progress(len(rows))
        return [(rows, steps, torch.stack([losses, ratios, *others]))]

    def combine(self, advantages: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """LoRA's weights, each with its gradient sum_i A_i G_i. advantages: (M,); of a sample with 0, G_i is left out, whatever it is."""
        left_out = (advantages == 0).nonzero()[:, 0]
        result, totals = [], iter(self.totals)
        for layer in self.layers:
            _, *weights = lora_weights(layer)
            sums = [advantages.to(total.dtype) @ total.index_fill_(0, left_out, 0.0).flatten(1) for total in (next(totals), next(totals))]
            (A, A_grad), (B, B_grad) = zip(weights, sums)
            rank, wide, *kernel = A.shape
            # A's totals are (k, k, r, I), reversed in both k; B's are transposed, without the factor s: see `score`
            A_grad = A_grad.view(*(kernel or (1, 1)), rank, wide).flip(0, 1).permute(2, 3, 0, 1)
            B_grad = B_grad.view(rank, -1).T * layer.scaling[ADAPTER]
            result += [(A, A_grad.reshape(A.shape)), (B, B_grad.reshape(B.shape))]
        return result

    def metrics(self) -> dict[str, float]:
        return {"cache_hit_fraction": 0.0}

    def plan_text(self, updates: list[Update]) -> str:
        return ""
