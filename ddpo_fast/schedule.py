"""The denoising process as levels of noise, and a sampler on them as a table of Gaussians, one a step.

Shape letters: S steps, T the model's training timesteps, B samples, (C, H, W) one sample's latents.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ddpo_fast import samplers
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


FIRST_NOISE_STEP = 1 << 31
"""The `step` of the counter-based noise from which on samples are noised: no denoising step of a rollout is there."""


@dataclass(frozen=True)
class Levels:
    """x_t = a x0 + b e with e ~ N(0, I), and the network's output o = p x0 + q e. All numbers are (S,) fp64.

    With d = a q - b p: x0 = (q x_t - b o) / d and e = (a o - p x_t) / d. Of cumulative alphas A, (a, b) = (sqrt A, sqrt(1 - A)), and (p, q)
    is (0, 1) for epsilon, (-b, a) for v (arXiv:2202.00512) and (1, 0) for sample prediction.
    """

    times: Tensor
    """What the network is given: timesteps, int64, from noise to picture."""
    a: Tensor
    b: Tensor
    p: Tensor
    q: Tensor
    next_a: Tensor
    """Of the level that a step goes to."""
    next_b: Tensor
    clip: float | None = None
    """x0 is clamped to +-clip, and e is left."""

    @property
    def process(self) -> str:
        """flow, where a + b = 1 at every level, or diffusion."""
        return "flow" if (self.a + self.b - 1).abs().max() < 1e-6 else "diffusion"

    @classmethod
    def of_steps(cls, scheduler, num_steps: int) -> "Levels":
        """Those of a run's `num_steps` steps, of any diffusers scheduler's config. Raises ValueError for steps that there are not."""
        if scheduler.config.get("thresholding", False):
            raise ValueError("scheduler_config.json: thresholding must be false for a latent diffusion model")
        scheduler = ddim_scheduler(scheduler.config)
        num_train_steps = scheduler.config.num_train_timesteps
        if not 1 <= num_steps <= num_train_steps:
            raise ValueError(f"sample.num_steps={num_steps}: valid is 1 to {num_train_steps}, the model's training steps")
        scheduler.set_timesteps(num_steps)
        times = scheduler.timesteps.long()
        if len(times) != num_steps or times.min() < 0 or times.max() >= num_train_steps:
            raise ValueError(
                f"sample.num_steps={num_steps}: valid is a number whose steps the model has; with timestep_spacing="
                f"{scheduler.config.timestep_spacing} it gives {len(times)} steps from t={times.max()} to t={times.min()}"
            )
        return cls._of(scheduler, times, num_train_steps // num_steps)

    @classmethod
    def of_training(cls, scheduler) -> "Levels":
        """Those that the model was trained on, level t being timestep t, of any diffusers scheduler's config."""
        scheduler = DDIMScheduler.from_config(scheduler.config)
        return cls._of(scheduler, torch.arange(scheduler.config.num_train_timesteps), 1)

    @classmethod
    def _of(cls, scheduler: DDIMScheduler, times: Tensor, stride: int) -> "Levels":
        alphas = torch.cumprod(1 - scheduler.betas.double(), 0)
        now, then = alphas[times], alphas[(times - stride).clamp(min=0)]
        a, b = now.sqrt(), (1 - now).sqrt()
        zero, one, kind = torch.zeros_like(a), torch.ones_like(a), scheduler.config.prediction_type
        outputs = {"epsilon": (zero, one), "v_prediction": (-b, a), "sample": (one, zero)}
        if kind not in outputs:
            raise ValueError(f"scheduler_config.json: prediction_type={kind}: valid are {', '.join(outputs)}")
        clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
        return cls(times, a, b, *outputs[kind], then.sqrt(), (1 - then).sqrt(), clip)


@dataclass(frozen=True)
class Schedule:
    """A sampler's steps x' = a' x0 + h e + s z = c_x x_t + c_out o + s z, with o the guided output of the network; see `Levels`.

        c_x = (a' q - h p) / d        c_out = (h a - a' b) / d        and of a' x0 alone: q_x = a' q / d, q_out = -a' b / d

    Where x0 is clamped to +-r, three more columns follow: q_x, q_out and the bound a' r (`kernels.reference.ddim_step`).
    """

    timesteps: Tensor
    """(S,) int64, from noise to picture."""
    coefficients: Tensor
    """(S, 4) fp32: c_x, c_out, s, log(s sqrt(2 pi)), 0 where s is 0; with clamping (S, 7): and q_x, q_out, a' r."""
    trained: np.ndarray
    """The steps with s > 0, which have a density: those that a policy gradient trains on. In ascending order."""
    guidance_scale: float = 1.0
    """w in o = uncond + w (cond - uncond); 1 is no guidance, and one branch."""

    @classmethod
    def of(
        cls, levels: Levels, sampler: str, eta: float, guidance_scale: float = 1.0, stochastic: slice = slice(None), device="cpu",
        dtype=torch.float32,
    ) -> "Schedule":  # fmt: skip
        """Builds the table, in fp64 and then rounded to `dtype`. Steps that are not `stochastic` are the ODE's: h = b', s = 0.

        Raises ValueError for steps that the sampler does not have.
        """
        chosen, num_steps = samplers.find(sampler), len(levels.a)
        if chosen.PROCESS not in ("any", levels.process):
            fit = ", ".join(name for name in samplers.CHOICES if samplers.find(name).PROCESS in ("any", levels.process))
            raise ValueError(
                f"sample.sampler={sampler}: it is for {chosen.PROCESS} models, and this is a {levels.process} model; valid is {fit}"
            )
        if not chosen.takes(eta):
            raise ValueError(f"sample.eta={eta}: valid is {chosen.VALID_ETA}")
        if (stays := (levels.next_a == levels.a).nonzero()).numel():
            place = f"step {int(stays[0])} (t={levels.times[stays[0]].item()})"
            raise ValueError(
                f"sample.num_steps={num_steps}: valid is fewer; {place} ends at the noise level where it begins, so it has no density"
            )
        h, s = chosen.noise(levels, eta)
        within = torch.zeros(num_steps, dtype=torch.bool)
        within[stochastic] = True
        h, s = torch.where(within, h, levels.next_b), torch.where(within, s, 0.0)
        d = levels.a * levels.q - levels.b * levels.p
        q_x, q_out = levels.next_a * levels.q / d, -levels.next_a * levels.b / d
        c_x, c_out = q_x - h * levels.p / d, q_out + h * levels.a / d
        if not c_x.isfinite().all():
            raise ValueError(
                "scheduler_config.json: rescale_betas_zero_snr needs prediction_type v_prediction or sample: "
                "at zero signal-to-noise epsilon says nothing of the picture"
            )
        columns = [c_x, c_out, s, torch.where(s > 0, s.log() + 0.5 * math.log(2 * math.pi), 0.0)]
        if levels.clip is not None:
            columns += [q_x, q_out, levels.next_a * levels.clip]
        table = torch.stack(columns, 1).to(device, dtype)
        return cls(levels.times.to(device), table, np.flatnonzero(s.numpy() > 0), guidance_scale)

    @property
    def num_branches(self) -> int:
        """Network rows of a sample, G: 2 with guidance, the unconditional one first."""
        return 1 if self.guidance_scale == 1 else 2

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def initial_latents(self, shape: tuple[int, int, int], seed: int, sample_ids: Tensor) -> Tensor:
        """x_T ~ N(0, I) of each sample: (B, C, H, W) in the table's dtype, a function of (seed, sample id) alone."""
        steps = torch.full_like(sample_ids, INITIAL_STEP)
        return normal_noise(seed, sample_ids, steps, math.prod(shape)).view(-1, *shape).to(self.coefficients.dtype)


@dataclass(frozen=True)
class Window:
    """`size` steps in a row among the first `among`, which draw noise. Their place is drawn again every `every` iterations."""

    size: int
    among: int
    every: int = 1

    @classmethod
    def of(cls, option: Mapping[str, int] | None, num_steps: int) -> "Window":
        """What the option sample.window asks for; null: all steps."""
        return cls(**{"size": num_steps, "among": num_steps} | dict(option or {}))

    def steps(self, seed: int, iteration: int) -> slice:
        """The window of an iteration, 1 or later: a function of (seed, iteration), the same on every rank."""
        generator = np.random.default_rng((3, seed, (iteration - 1) // self.every))
        start = int(generator.integers(self.among - self.size + 1))
        return slice(start, start + self.size)


@dataclass(frozen=True)
class Denoising:
    """How pictures are made: levels of noise, a sampler on them, guidance, and which steps draw noise."""

    levels: Levels
    sampler: str
    eta: float
    guidance_scale: float
    window: Window
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, options, scheduler, device="cpu") -> "Denoising":
        """The pictures that `options`, config.sample or config.evaluation, ask for, on any diffusers scheduler.

        Raises ValueError for steps that the model or the sampler does not have.
        """
        levels, window = Levels.of_steps(scheduler, options.num_steps), Window.of(options.window, options.num_steps)
        made = cls(levels, options.sampler, options.eta, options.guidance_scale, window, torch.device(device))
        made.schedule(0, 1)
        return made

    def schedule(self, seed: int, iteration: int) -> Schedule:
        """The steps of an iteration."""
        stochastic = self.window.steps(seed, iteration)
        return Schedule.of(self.levels, self.sampler, self.eta, self.guidance_scale, stochastic, self.device, self.dtype)


@dataclass(frozen=True)
class Noising:
    """The forward process that a regression trains on: x_t = a x0 + b e, of which the network is to predict p x0 + q e; see `Levels`."""

    coefficients: Tensor
    """(T, 4) fp32: a, b, p, q."""

    @classmethod
    def of(cls, levels: Levels, device="cpu", dtype=torch.float32) -> "Noising":
        return cls(torch.stack([levels.a, levels.b, levels.p, levels.q], 1).to(device, dtype))

    @property
    def num_levels(self) -> int:
        return len(self.coefficients)

    def noised(self, x0: Tensor, levels: Tensor, seed: int, sample_ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """x_t and target, (B, C, H, W) each, of samples x0 (B, C, H, W).

        Their noise is a function of (seed, sample id, epoch, level) alone. levels, sample_ids: (B,) int64.
        """
        steps = FIRST_NOISE_STEP + epoch * self.num_levels + levels
        noise = normal_noise(seed, sample_ids, steps, x0[0].numel()).view(x0.shape)
        a, b, p, q = self.coefficients[levels, :, None, None, None].unbind(1)
        return a * x0 + b * noise, p * x0 + q * noise
