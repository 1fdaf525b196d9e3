"""The clip range, the KL divergence and what is recorded about an update. B transitions of a micro-batch, S denoising steps."""

import torch
from torch import Tensor

from ddpo_fast.kernels.reference import guide, step_mean

REFERENCE_LATENT_DIM = 4 * 64 * 64


def scaled_clip_range(clip_range: float, latent_dim: int) -> float:
    """The clip range on a mean log-prob over `latent_dim` elements that is the trust region of `clip_range` at SD's 16,384.

    |log rho| of the whole picture is latent_dim times that of the mean, so eps' = eps * 16384 / latent_dim keeps it.
    """
    return clip_range * REFERENCE_LATENT_DIM / latent_dim


def kl_loss(
    noise_pred: Tensor,
    reference_noise_pred: Tensor,
    latents: Tensor,
    counted: Tensor,
    coefficients: Tensor,
    rows: Tensor,
    steps: Tensor,
    guidance_scale: float,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """The KL divergence of each transition's policy from the reference policy, two Gaussians of one standard deviation.

        KL   = mean over the latent's N elements of (mu - mu_ref)^2 / (2 s^2)        the whole latent's, over N, as the log-prob is
        loss = weight * sum over the B transitions of KL

    noise_pred, reference_noise_pred: (G B, C, H, W), the UNet's output under either policy; the gradient is the former's. latents:
    (M, S + 1, C, H, W) fp32. counted: (M,) bool, those of other samples are taken as 0. rows, steps: (B,) int64, the transitions.
    Returns the scalar loss, and (B,) the divergences in nats per element, without a gradient.
    """
    x_t = latents[rows, steps]
    mean, std, _ = step_mean(guide(noise_pred, len(rows), guidance_scale), x_t, coefficients, steps)
    reference, _, _ = step_mean(guide(reference_noise_pred, len(rows), guidance_scale), x_t, coefficients, steps)
    divergences = 0.5 * ((mean - reference) / std).square().flatten(1).mean(1) * counted[rows]
    return weight * divergences.sum(), divergences.detach()


class UpdateStatistics:
    """What `ppo_loss` says of an iteration's transitions, kept on the device and summed up once: the loop never waits for it."""

    def __init__(self, num_steps: int, good: Tensor):
        """good: (samples,) bool, whether a sample's transitions count: a ratio of 1, and 0 for the rest, is put for those that do not."""
        self.num_steps, self.good = num_steps, good
        self.rows, self.steps, self.statistics, self.num_first = [], [], [], 0

    def add(self, rows: Tensor, steps: Tensor, statistics: Tensor, first_minibatch: bool) -> None:
        """rows, steps (B,) int64: one micro-batch's samples and steps; those of the first minibatch come first.

        statistics: (4, B), those of `ppo_loss`; (5, B), and those of `kl_loss`; or (1, B), the losses alone, of an estimator that has
        no ratios.
        """
        self.rows.append(rows)
        self.steps.append(steps)
        self.statistics.append(statistics)
        self.num_first += first_minibatch * len(steps)

    def summary(self, all_reduce) -> dict[str, float]:
        """Means over all ranks' transitions; `all_reduce(tensor, op)` reduces in place, op "sum" or "max"."""
        rows, steps, statistics = torch.cat(self.rows), torch.cat(self.steps), torch.cat(self.statistics, 1).double()
        unchanged = statistics.new_tensor([[0.0], [1.0], [0.0], [0.0], [0.0]])[: len(statistics)]
        statistics = torch.where(self.good[rows], statistics, unchanged)
        if len(statistics) == 1:
            sums = torch.stack([torch.ones_like(statistics[0]), statistics[0]]).sum(1)
            all_reduce(sums, "sum")
            count, loss = sums.tolist()
            return {"transitions": int(count), "loss": loss / count}
        loss, ratio, clipped, kl, *to_reference = statistics
        sums = torch.stack([torch.ones_like(loss), loss, clipped, kl, *to_reference]).sum(1)
        # a NaN ratio must show: it becomes infinity, which amax keeps
        error = (ratio - 1).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        ratio_error, first = error.new_zeros(self.num_steps), slice(self.num_first)
        ratio_error.scatter_reduce_(0, steps[first], error[first], "amax")
        all_reduce(sums, "sum")
        all_reduce(ratio_error, "max")
        count, loss, clipped, kl, *to_reference = sums.tolist()
        return {
            "transitions": int(count),
            "loss": loss / count,
            "clip_fraction": clipped / count,
            "approx_kl": kl / count,
            "ratio_error": ratio_error.max().item(),
            "ratio_error_step": int(ratio_error.argmax()),
            **({"kl_to_reference": to_reference[0] / count} if to_reference else {}),
        }
