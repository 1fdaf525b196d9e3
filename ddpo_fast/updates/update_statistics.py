"""What is recorded about the updates of an iteration. B transitions of a micro-batch, S denoising steps."""

import math

import torch
from torch import Tensor

from ddpo_fast.updates.gradients import Figures


class UpdateStatistics:
    """Figures of an iteration's transitions, kept on the device and summed up once: the loop never waits for them.

    A metric is a figure's mean over all transitions; but of "ratio", exp(log p - log p_old), it is `ratio_error`, the largest |ratio - 1|
    among the transitions of the first minibatch, where the policy is still the one that sampled, and the step that has it.
    """

    def __init__(self, figures: tuple[str, ...], num_steps: int, good: Tensor):
        """figures: their names. good: (samples,) bool. A transition of any other sample counts with ratio 1, otherwise with 0."""
        self.figures, self.num_steps, self.good = figures, num_steps, good
        self.rows, self.steps, self.values, self.num_first, self.norms = [], [], [], 0, []

    def add(self, figures: list[Figures], is_first: bool) -> None:
        """Those of an update's micro-batches; the first minibatch's come first."""
        for rows, steps, values in figures:
            self.rows.append(rows)
            self.steps.append(steps)
            self.values.append(values)
            self.num_first += is_first * len(steps)

    def stepped(self, norm: float) -> None:
        """An update has been made: the norm of its gradient, which if it is not finite changed nothing."""
        self.norms.append(norm)

    def summary(self, all_reduce) -> dict[str, float]:
        """The metrics, over all ranks' transitions; `all_reduce(tensor, op)` reduces in place, op "sum" or "max"."""
        rows, steps, values = torch.cat(self.rows), torch.cat(self.steps), torch.cat(self.values, 1).double()
        neutral = values.new_tensor([[1.0] if name == "ratio" else [0.0] for name in self.figures])
        values = dict(zip(self.figures, torch.where(self.good[rows], values, neutral), strict=True))
        ratios = values.pop("ratio", None)
        sums = torch.stack([torch.ones(len(rows), dtype=torch.float64, device=rows.device), *values.values()]).sum(1)
        all_reduce(sums, "sum")
        count, *totals = sums.tolist()
        row = {"transitions": int(count)} | {name: total / count for name, total in zip(values, totals)}
        if ratios is not None:
            row |= self._ratio_error(ratios, steps, all_reduce)
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        grad_norm = sum(finite) / len(finite) if finite else None
        return row | {"grad_norm": grad_norm, "skipped_updates": len(self.norms) - len(finite)}

    def _ratio_error(self, ratios: Tensor, steps: Tensor, all_reduce) -> dict[str, float]:
        # a NaN ratio must show: it becomes infinity, which amax keeps
        error = (ratios - 1).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        largest, first = error.new_zeros(self.num_steps), slice(self.num_first)
        largest.scatter_reduce_(0, steps[first], error[first], "amax")
        all_reduce(largest, "max")
        return {"ratio_error": largest.max().item(), "ratio_error_step": int(largest.argmax())}
