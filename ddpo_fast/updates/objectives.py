"""An algorithm's loss: what the network is given of a transition, and what its output costs.

Shape letters: B transitions of a micro-batch, G network rows of one (2 with guidance), M samples of this rank, S denoising steps, T the
model's training timesteps, *shape one sample's latents.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ddpo_fast.algorithms import PolicyGradient, Regression
from ddpo_fast.kernels import Ops
from ddpo_fast.kernels.reference import guide, step_mean
from ddpo_fast.pipelines.template import Recording
from ddpo_fast.schedule import Noising, Schedule
from ddpo_fast.updates.credit import Credit
from ddpo_fast.updates.transitions import MicroBatch, Rollout

REFERENCE_LATENT_DIM = 4 * 64 * 64

Loss = Callable[[Tensor, dict[str, Tensor], float], tuple[Tensor, Tensor]]
"""(output (G B, *shape), the output under each anchor, weight) -> weight times the sum of B losses, and figures (len(figures), B)."""


class Objective(Protocol):
    """An algorithm on a model: what is trained on, and its loss."""

    figures: tuple[str, ...]
    """What is recorded of each transition, see `UpdateStatistics`."""
    keeps: Literal["trajectory", "final"]
    """What of a rollout the loss needs: the steps that are trained on, or the finished samples."""
    anchors: tuple[str, ...]
    """Names of other weights. The loss also needs the network's output under them. "reference": the model without LoRA."""
    credit: Credit
    """What a sample's reward counts in the loss."""

    def population(self, schedule: Schedule) -> np.ndarray:
        """The steps, or levels of noise, that transitions are drawn from."""

    def recording(self, schedule: Schedule) -> Recording:
        """How the pipeline calls its network, of which the loss takes the output."""

    def times(self, schedule: Schedule) -> Tensor:
        """What the network is told of each step or level."""

    def on(self, rollout: Rollout, part: MicroBatch, epoch: int, credit: Tensor) -> tuple[Tensor, Loss]:
        """The network's input (G B, *shape) for a micro-batch, at least fp32, and the loss of what it gives back. credit: (M,)."""

    def describe(self) -> str:
        """One line for the start of a run: the clip range, or how many timesteps are trained on."""

    def doubt(self, row: dict[str, float], times: Tensor) -> str:
        """A warning about an iteration with these metrics; empty if all is well. times: (S,) what the network is told of each step."""


def scaled_clip_range(clip_range: float, latent_dim: int) -> float:
    """The clip range on a mean log-prob over `latent_dim` elements that is the trust region of `clip_range` at SD's 16,384.

    |log rho| of the whole picture is latent_dim times that of the mean, so eps' = eps * 16384 / latent_dim keeps it.
    """
    return clip_range * REFERENCE_LATENT_DIM / latent_dim


def kl_divergence(out: Tensor, reference: Tensor, x_t: Tensor, coefficients: Tensor, steps: Tensor, guidance_scale: float) -> Tensor:
    """The KL divergence of each transition's policy from the reference policy, two Gaussians of one standard deviation.

        KL = mean over the latent's N elements of (mu - mu_ref)^2 / (2 s^2)        the whole latent's, over N, as the log-prob is

    out, reference: (G B, *shape), the network's output under either policy. x_t: (B, *shape) fp32, where the transitions start.
    coefficients: the schedule's; steps: (B,) int64, rows of it. Returns (B,), in nats per element.
    """
    mean, std, _ = step_mean(guide(out, len(x_t), guidance_scale), x_t, coefficients, steps)
    reference_mean, _, _ = step_mean(guide(reference, len(x_t), guidance_scale), x_t, coefficients, steps)
    return 0.5 * ((mean - reference_mean) / std).square().flatten(1).mean(1)


def denoising_loss(out: Tensor, target: Tensor, weights: Tensor, guidance_scale: float, weight: float) -> tuple[Tensor, Tensor]:
    """The weighted denoising loss of a micro-batch, weight * sum over its B transitions of w mean((guided output - target)^2).

    The guided output is uncond + scale (cond - uncond), the mean over the latent's elements. out: (G B, *shape), G = 2 with guidance, the
    unconditional rows first. target: (B, *shape). weights w: (B,), at least fp32. Returns the scalar loss, and (1, B) figures without a
    gradient: each transition's part.
    """
    errors = (guide(out, len(target), guidance_scale) - target).square().flatten(1).mean(1)
    losses = weights * errors
    return weight * losses.sum(), losses.detach()[None]


class OnTrajectory:
    """A policy gradient, on the transitions that sampling made; with kl_coefficient > 0 the KL divergence from the reference, too."""

    keeps = "trajectory"

    def __init__(
        self, algorithm: PolicyGradient, credit: Credit, ops: Ops, clip_range: float, latent_dim: int, kl_coefficient: float = 0.0
    ):
        """clip_range: at SD's 16,384 latent elements, see `scaled_clip_range`."""
        self.algorithm, self.credit, self.ops = algorithm, credit, ops
        self.clip_range, self.latent_dim, self.kl_coefficient = scaled_clip_range(clip_range, latent_dim), latent_dim, kl_coefficient
        self.anchors = ("reference",) if kl_coefficient else ()
        self.figures = ("loss", "ratio", "clip_fraction", "approx_kl", *(["kl_to_reference"] if kl_coefficient else []))

    def population(self, schedule: Schedule) -> np.ndarray:
        return schedule.trained

    def recording(self, schedule: Schedule) -> Recording:
        return schedule.recording

    def times(self, schedule: Schedule) -> Tensor:
        return schedule.times

    def on(self, rollout: Rollout, part: MicroBatch, epoch: int, credit: Tensor) -> tuple[Tensor, Loss]:
        guidance_scale = rollout.schedule.guidance_scale

        def loss(out: Tensor, anchors: dict[str, Tensor], weight: float) -> tuple[Tensor, Tensor]:
            total, figures = self.ops.ppo_loss(
                out, rollout.latents, rollout.log_probs, credit, rollout.coefficients, part.rows, part.kept,
                guidance_scale, self.clip_range, weight, self.algorithm.rule == "score",
            )  # fmt: skip
            if "reference" in anchors:
                x_t = rollout.latents[part.rows, part.kept]
                kl = kl_divergence(out, anchors["reference"], x_t, rollout.coefficients, part.kept, guidance_scale)
                kl = kl * rollout.good[part.rows]
                total, figures = total + weight * self.kl_coefficient * kl.sum(), torch.cat([figures, kl.detach()[None]])
            return total, figures

        return rollout.latents[part.x_rows, part.x_kept], loss

    def describe(self) -> str:
        return f"clip range {self.clip_range:.3g} at this model's {self.latent_dim:,} latent elements"

    def doubt(self, row: dict[str, float], times: Tensor) -> str:
        if row["ratio_error"] is None or row["ratio_error"] <= 0.1 * self.clip_range:
            return ""
        step = row["ratio_error_step"]
        place = f"worst at step {step}, t={times[step].item():g}"
        return (
            f"ratio_error={row['ratio_error']:.3g} before any update ({place}), more than a tenth of "
            f"the clip range {self.clip_range:.3g}: rollout and update do not compute the same log-prob, so part of the gradient is "
            "clipped away; try model.dtype=fp32"
        )


class OnNoised:
    """A regression, on finished samples noised to the levels that the model was trained on."""

    keeps, anchors, figures = "final", (), ("loss",)

    def __init__(self, algorithm: Regression, credit: Credit, noising: Noising, recording: Recording, seed: int):
        """recording: how the network is called in training, whose guidance may be another one than sampling's."""
        self.algorithm, self.credit, self.noising, self._recording, self.seed = algorithm, credit, noising, recording, seed

    def population(self, schedule: Schedule) -> np.ndarray:
        return np.arange(self.noising.num_levels)

    def recording(self, schedule: Schedule) -> Recording:
        return self._recording

    def times(self, schedule: Schedule) -> Tensor:
        return self.noising.times

    def on(self, rollout: Rollout, part: MicroBatch, epoch: int, credit: Tensor) -> tuple[Tensor, Loss]:
        x0 = rollout.latents[part.rows, -1]
        x_t, target = self.noising.noised(x0, part.steps, self.seed, rollout.sample_ids[part.rows], epoch)

        def loss(out: Tensor, anchors: dict[str, Tensor], weight: float) -> tuple[Tensor, Tensor]:
            return denoising_loss(out, target, credit[part.rows], self._recording.output_scale, weight)

        return x_t.repeat(self._recording.num_outputs, *[1] * (x_t.dim() - 1)), loss

    def describe(self) -> str:
        return f"{self.algorithm.num_timesteps} of {self.noising.num_levels} timesteps a sample and pass"

    def doubt(self, row: dict[str, float], times: Tensor) -> str:
        return ""
