"""The denoising process as a table of per-step Gaussians. Shape letters: S denoising steps, B samples, (C, H, W) one's latents."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ddpo_fast.kernels.reference import INITIAL_STEP, normal_noise

SD_STEPS = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
"""How Stable Diffusion's scheduler_config.json places the timesteps."""


def ddim_scheduler(config: Mapping) -> DDIMScheduler:
    """The DDIM scheduler of a model, of the config of whatever sampler is saved with it: its betas, what it predicts, its `clip_sample`.

    Its timesteps are those that the config states, if each has a density: "leading" with an offset of 1 or more, or "trailing". Others
    have a step at t = 0, from where there is no way to go; "trailing" takes their place for betas rescaled to zero signal-to-noise, which
    begin at the last timestep, and Stable Diffusion's own do for the rest. The last step always ends at the noise of t = 0: one that
    ended at the picture would have no density. What a config does not state is as Stable Diffusion has it.
    """
    spacing, offset = (_stated(config, key) for key in ("timestep_spacing", "steps_offset"))
    if spacing not in ("leading", "trailing") or spacing == "leading" and offset < 1:
        spacing, offset = ("trailing" if config.get("rescale_betas_zero_snr", False) else "leading"), SD_STEPS["steps_offset"]
    steps = {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": False}
    return DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False), **steps)


def changed_steps(config: Mapping, ours: DDIMScheduler) -> dict[str, object]:
    """What `ours` has otherwise than a scheduler's config states, of the keys of `SD_STEPS`."""
    return {key: ours.config[key] for key in SD_STEPS if key in config and _stated(config, key) != ours.config[key]}


def _stated(config: Mapping, key: str) -> object:
    """A scheduler's own default is not what its model was made for, so it does not count."""
    return config[key] if key in config and key not in config.get("_use_default_values", ()) else SD_STEPS[key]


@dataclass(frozen=True)
class DDIMSchedule:
    """Every step of stochastic DDIM (eta > 0) as x_p ~ N(c_x x_t + c_out out, s^2), `out` the guided UNet output.

    With a_t, a_p the cumulative alphas at t and t - T//S, or 0 where that is below (arXiv:2010.02502, eq. 12 and 16):
        s     = eta sqrt((1 - a_p) / (1 - a_t) (1 - a_t / a_p))
        mean  = sqrt(a_p) x0 + sqrt(1 - a_p - s^2) e
    x0 and e are affine in (x_t, out) for epsilon, v and sample prediction, hence so is the mean. A scheduler with `clip_sample` clamps
    x0 to +-r and leaves e; sqrt(a_p) x0 = q_x x_t + q_out out and its bound sqrt(a_p) r then stand behind (`kernels.reference.ddim_step`).
    """

    timesteps: Tensor
    """(S,) int64, from noise to picture."""
    coefficients: Tensor
    """(S, 4) fp32: c_x, c_out, s, log(s sqrt(2 pi)); with `clip_sample` (S, 7): and q_x, q_out, sqrt(a_p) r."""

    @classmethod
    def from_scheduler(cls, scheduler, num_steps: int, eta: float, device="cpu", dtype=torch.float32) -> "DDIMSchedule":
        """Builds the table, in fp64 and then rounded to `dtype`, from any diffusers scheduler's config.

        Raises ValueError where a step has no density.
        """
        config = scheduler.config
        if not 0 < eta <= 1:
            raise ValueError(f"sample.eta={eta}: valid is 0 < eta <= 1; at 0 DDIM is deterministic, so a step has no density")
        if config.get("thresholding", False):
            raise ValueError("scheduler_config.json: thresholding must be false for a latent diffusion model")
        scheduler = ddim_scheduler(config)
        num_train_steps = scheduler.config.num_train_timesteps
        if not 1 <= num_steps <= num_train_steps:
            raise ValueError(f"sample.num_steps={num_steps}: valid is 1 to {num_train_steps}, the model's training steps")
        scheduler.set_timesteps(num_steps)
        timesteps = scheduler.timesteps.long()
        if len(timesteps) != num_steps or timesteps.min() < 0 or timesteps.max() >= num_train_steps:
            raise ValueError(
                f"sample.num_steps={num_steps}: valid is a number whose steps the model has; with timestep_spacing="
                f"{scheduler.config.timestep_spacing} it gives {len(timesteps)} steps from t={timesteps.max()} to t={timesteps.min()}"
            )
        previous = timesteps - num_train_steps // num_steps

        alphas = torch.cumprod(1 - scheduler.betas.double(), 0)
        a_t, a_p = alphas[timesteps], alphas[previous.clamp(min=0)]
        s = eta * ((1 - a_p) / (1 - a_t) * (1 - a_t / a_p)).sqrt()
        if not (s > 0).all():
            step = int((~(s > 0)).nonzero()[0])
            raise ValueError(
                f"sample.num_steps={num_steps}: valid is fewer; step {step} (t={timesteps[step]}) has zero variance, so no density"
            )
        direction = (1 - a_p - s**2).clamp(min=0).sqrt()
        sa_t, sb_t, sa_p = a_t.sqrt(), (1 - a_t).sqrt(), a_p.sqrt()
        match scheduler.config.prediction_type:
            case "epsilon":  # x0 = (x_t - sqrt(1-a_t) e) / sqrt(a_t)
                q_x, q_out = sa_p / sa_t, -sa_p * sb_t / sa_t
                c_x, c_out = q_x, q_out + direction
            case "v_prediction":  # x0 = sqrt(a_t) x_t - sqrt(1-a_t) v,  e = sqrt(a_t) v + sqrt(1-a_t) x_t
                q_x, q_out = sa_p * sa_t, -sa_p * sb_t
                c_x, c_out = q_x + direction * sb_t, q_out + direction * sa_t
            case "sample":  # e = (x_t - sqrt(a_t) x0) / sqrt(1-a_t)
                q_x, q_out = torch.zeros_like(sa_p), sa_p
                c_x, c_out = direction / sb_t, q_out - direction * sa_t / sb_t
            case other:
                raise ValueError(f"scheduler_config.json: prediction_type={other}: valid are epsilon, v_prediction, sample")
        if not c_x.isfinite().all():
            raise ValueError(
                "scheduler_config.json: rescale_betas_zero_snr needs prediction_type v_prediction or sample: "
                "at zero signal-to-noise epsilon says nothing of the picture"
            )
        columns = [c_x, c_out, s, s.log() + 0.5 * math.log(2 * math.pi)]
        if scheduler.config.clip_sample:
            columns += [q_x, q_out, sa_p * scheduler.config.clip_sample_range]
        return cls(timesteps.to(device), torch.stack(columns, 1).to(device, dtype))

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def initial_latents(self, shape: tuple[int, int, int], seed: int, sample_ids: Tensor) -> Tensor:
        """x_T ~ N(0, I) of each sample: (B, C, H, W) in the table's dtype, a function of (seed, sample id) alone."""
        steps = torch.full_like(sample_ids, INITIAL_STEP)
        return normal_noise(seed, sample_ids, steps, math.prod(shape)).view(-1, *shape).to(self.coefficients.dtype)
