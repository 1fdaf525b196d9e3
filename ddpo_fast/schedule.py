"""The denoising process as levels of noise, and a sampler on them as a table of Gaussians, one a step.

Shape letters: S steps, T the model's training timesteps, B samples, *shape one sample's latents.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ddpo_fast import samplers
from ddpo_fast.kernels.reference import INITIAL_STEP, normal_noise
from ddpo_fast.pipelines.ddim import ddim_scheduler
from ddpo_fast.pipelines.template import Recording

FIRST_NOISE_STEP = 1 << 31
"""The `step` of the counter-based noise from which on samples are noised: no denoising step of a rollout is there."""


@dataclass(frozen=True)
class Levels:
    """x_t = a x0 + b e with e ~ N(0, I), and the network's output o = p x0 + q e. All numbers are (S,) fp64.

    With d = a q - b p: x0 = (q x_t - b o) / d and e = (a o - p x_t) / d. Of cumulative alphas A, (a, b) = (sqrt A, sqrt(1 - A)), and (p, q)
    is (0, 1) for epsilon, (-b, a) for v (arXiv:2202.00512) and (1, 0) for sample prediction. Of a flow model's sigma, (a, b) =
    (1 - sigma, sigma), and (p, q) is (-1, 1) for its velocity e - x0 (arXiv:2210.02747), (1, -1) for the negated one.
    """

    times: Tensor
    """What the network is told of each, from noise to picture: a diffusion model's timesteps, int64, or a flow model's times."""
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
    def of(cls, recording: Recording, scheduler) -> "Levels":
        """Those of a recorded pipeline's steps; a diffusion model's are those of its scheduler's betas. Raises ValueError for others."""
        if recording.sigmas is not None:
            return cls.of_flow(recording.times, recording.sigmas, recording.sign)
        levels = cls.of_steps(scheduler, recording.asked.num_steps)
        if not torch.equal(levels.times.double(), recording.times.double()):
            raise ValueError("the pipeline tells its network of other timesteps than its scheduler has")
        return replace(levels, p=recording.sign * levels.p, q=recording.sign * levels.q)

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
    def of_flow(cls, times: Tensor, sigmas: Tensor, sign: float = 1.0) -> "Levels":
        """Those of a flow model. times: (S,). sigmas: (S + 1,) fp64, from 1 or less down to 0. sign: of the network's output."""
        if len(sigmas) != len(times) + 1 or not (sigmas.diff() < 0).all() or not 0 <= sigmas[-1] < sigmas[0] <= 1:
            raise ValueError(f"its scheduler's levels of noise are not falling ones from 1 to 0: {sigmas.tolist()[:4]} ...")
        a, b = 1 - sigmas, sigmas
        ones = torch.ones_like(a[1:])
        return cls(times, a[:-1], b[:-1], -sign * ones, sign * ones, a[1:], b[1:])

    @classmethod
    def of_training(cls, recording: Recording, scheduler) -> "Levels":
        """Those that the model was trained on: of a diffusion model level t is timestep t; a flow model is recorded at that many steps."""
        if recording.sigmas is not None:
            return cls.of(recording, scheduler)
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

    times: Tensor
    """(S,) what the network is told of each step, see `Levels`."""
    coefficients: Tensor
    """(S, 4) fp32: c_x, c_out, s, log(s sqrt(2 pi)), 0 where s is 0; with clamping (S, 7): and q_x, q_out, a' r."""
    trained: np.ndarray
    """The steps with s > 0, which have a density: those that a policy gradient trains on. In ascending order."""
    guidance_scale: float = 1.0
    """w in o = uncond + w (cond - uncond); 1 is no guidance, and one branch."""
    recording: Recording | None = None
    """How the pipeline calls its network at these steps."""

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
        """Outputs of a sample that `guide` takes, G: 2 with guidance, the unconditional one first."""
        return 1 if self.guidance_scale == 1 else 2

    @property
    def num_steps(self) -> int:
        return len(self.times)

    def initial_latents(self, shape: tuple[int, ...], seed: int, sample_ids: Tensor) -> Tensor:
        """x_T ~ N(0, I) of each sample: (B, *shape) in the table's dtype, a function of (seed, sample id) alone."""
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
    window: Window
    recording: Recording
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, options, recording: Recording, scheduler, device="cpu") -> "Denoising":
        """The pictures that `options`, config.sample or config.evaluation, ask for, of a pipeline recorded so, with its scheduler.

        Raises ValueError for steps that the model or the sampler does not have.
        """
        window = Window.of(options.window, options.num_steps)
        made = cls(Levels.of(recording, scheduler), options.sampler, options.eta, window, recording, torch.device(device))
        last = made._at(slice(window.among - window.size, window.among))
        if samplers.find(options.sampler).STOCHASTIC and not len(last.trained):
            if options.window is None:
                raise ValueError(f"sample.num_steps={options.num_steps}: no step has a density under {options.sampler}; valid is more")
            raise ValueError(
                f"sample.window={dict(options.window)}: its last place has no step with a density under {options.sampler}; valid is "
                f"{{size: {window.size}, among: {window.among - 1}}} or fewer"
            )
        return made

    def schedule(self, seed: int, iteration: int) -> Schedule:
        """The steps of an iteration."""
        return self._at(self.window.steps(seed, iteration))

    @property
    def num_trainable(self) -> int:
        """Steps that have a density, at the window's first place: the most of all places."""
        return len(self._at(slice(self.window.size)).trained)

    def _at(self, stochastic: slice) -> Schedule:
        made = Schedule.of(self.levels, self.sampler, self.eta, self.recording.output_scale, stochastic, self.device, self.dtype)
        return replace(made, recording=self.recording)


@dataclass(frozen=True)
class Noising:
    """The forward process that a regression trains on: x_t = a x0 + b e, of which the network is to predict p x0 + q e; see `Levels`."""

    times: Tensor
    """(T,) what the network is told of each level."""
    coefficients: Tensor
    """(T, 4) fp32: a, b, p, q."""

    @classmethod
    def of(cls, levels: Levels, device="cpu", dtype=torch.float32) -> "Noising":
        return cls(levels.times.to(device), torch.stack([levels.a, levels.b, levels.p, levels.q], 1).to(device, dtype))

    @property
    def num_levels(self) -> int:
        return len(self.coefficients)

    def noised(self, x0: Tensor, levels: Tensor, seed: int, sample_ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """x_t and target, (B, *shape) each, of samples x0 (B, *shape).

        Their noise is a function of (seed, sample id, epoch, level) alone. levels, sample_ids: (B,) int64.
        """
        steps = FIRST_NOISE_STEP + epoch * self.num_levels + levels
        noise = normal_noise(seed, sample_ids, steps, x0[0].numel()).view(x0.shape)
        a, b, p, q = self.coefficients[levels].view(-1, 4, *[1] * (x0.dim() - 1)).unbind(1)
        return a * x0 + b * noise, p * x0 + q * noise
