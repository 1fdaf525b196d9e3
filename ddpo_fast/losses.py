"""The policy losses and what is recorded about them. Shape letters: B transitions of a micro-batch, S denoising steps."""

import torch
from torch import Tensor

from ddpo_fast.ddim import DDIMSchedule
from ddpo_fast.kernels import reference as ops

REFERENCE_LATENT_DIM = 4 * 64 * 64


def scaled_clip_range(clip_range: float, latent_dim: int) -> float:
    """The clip range on a mean log-prob over `latent_dim` elements that is the trust region of `clip_range` at SD's 16,384.

    |log rho| of the whole picture is latent_dim times that of the mean, so eps' = eps * 16384 / latent_dim keeps it.
    """
    return clip_range * REFERENCE_LATENT_DIM / latent_dim


def policy_loss(algorithm: str, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """Loss of each transition (B,) and its importance ratio rho (B,), DDPO (arXiv:2305.13301) section 4.3.

    ddpo_is: max(-A rho, -A clip(rho, 1 - eps, 1 + eps)).   ddpo_sf: -A log p, the score function, never clipped.
    """
    loss, ratio = ops.clipped_surrogate(log_prob, old_log_prob, advantages, clip_range)
    if algorithm == "ddpo_sf":
        loss = -advantages * log_prob
    return loss, ratio


class UpdateStatistics:
    """Sums over the transitions of an iteration's updates, kept on the device so that the loop never waits for it."""

    def __init__(self, schedule: DDIMSchedule):
        device, num_steps = schedule.coefficients.device, schedule.num_steps
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # transitions, loss, clipped, squared log-ratio
        self.ratio_error = torch.zeros(num_steps, device=device)

    @torch.no_grad()
    def add(self, steps: Tensor, loss: Tensor, ratio: Tensor, clip_range: float, first_minibatch: bool) -> None:
        """steps (B,) int64, loss (B,), ratio (B,): one micro-batch's transitions."""
        clipped = ((ratio - 1).abs() > clip_range).sum()
        self.sums += torch.stack([torch.full_like(loss[0], len(loss)), loss.sum(), clipped, ratio.log().square().sum()]).double()
        if first_minibatch:
            # a NaN ratio must show: it becomes infinity, which amax keeps
            error = (ratio - 1).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
            self.ratio_error.scatter_reduce_(0, steps, error.float(), "amax")

    def summary(self, all_reduce) -> dict[str, float]:
        """Means over all ranks' transitions; `all_reduce(tensor, op)` reduces in place, op "sum" or "max"."""
        all_reduce(self.sums, "sum")
        all_reduce(self.ratio_error, "max")
        count, loss, clipped, squared = self.sums.tolist()
        return {
            "transitions": int(count),
            "loss": loss / count,
            "clip_fraction": clipped / count,
            "approx_kl": 0.5 * squared / count,
            "ratio_error": self.ratio_error.max().item(),
            "ratio_error_step": int(self.ratio_error.argmax()),
        }
