"""What an iteration does, in numbers: one account, which the run and its plan both read."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ddpo_fast.algorithms import Regression
from ddpo_fast.config.conflicts import possible
from ddpo_fast.pipelines.families import Family
from ddpo_fast.pipelines.template import Asked, Recording
from ddpo_fast.schedule import Denoising, Levels, Schedule, Window


@dataclass(frozen=True)
class Calls:
    """How a config's pictures are made on its model, in numbers."""

    rows: int
    """Network rows of a sample, G: the branches of guidance that the pipeline has."""
    update_rows: int
    """Network rows of a transition in the update."""
    evaluation_rows: int
    """Network rows of an evaluation picture."""
    trainable_steps: int
    """Steps of a sample that have a density; 0 where sampling is the ODE's."""

    @classmethod
    def of(cls, config, record: Callable[[Asked], Recording], scheduler) -> "Calls":
        """Of a pipeline with this scheduler that is called as `record` says. Raises ValueError for steps that there are not."""
        asked = Asked.of(config.sample)
        calls = [record(each) for each in (asked, replace(asked, guidance_scale=config.training_guidance), Asked.of(config.evaluation))]
        trainable = Denoising.of(config.sample, calls[0], scheduler).num_trainable
        return cls(*(recording.num_branches for recording in calls), trainable)


@dataclass(frozen=True)
class Work:
    """How much work an iteration is. A field that is an option has the option's name.

    G: network rows of a sample, 2 with guidance. A transition is a sample and one of its steps, or of a regression's timesteps.
    """

    num_samples: int
    batch_size: int
    num_steps: int
    rows: int
    """Network rows of a sample, G."""
    num_minibatches: int
    inner_epochs: int
    micro_batch: int
    trained_steps: int
    """Steps of a sample that an epoch trains on."""
    optimizer: str
    zero_stage: int
    decode_batch: int = 16
    held: tuple[int, int] = (0, 0)
    """Transitions of a rank in the activation cache, on the device and on the host."""
    prompts: tuple[int, int] = (0, 0)
    """Texts that a rank keeps, in its own memory, if that is a CPU's, and on the host beside it."""
    score_accumulation: bool = False
    """Whether sampling does the update's network calls: train.estimator."""
    offload: str = "none"
    stochastic_steps: int | None = None
    """Steps of a sample that draw noise: sample.window; None: all. A rollout keeps their latents."""
    regression: bool = False
    """Whether the update trains on noised samples, of which nothing is cached, and not on the rollout's transitions: train.algorithm."""
    update_rows: int | None = None
    """Network rows of a transition in the update; None: G, as in sampling."""
    evaluation_rows: int = 1
    """Network rows of an evaluation picture, which is sampled in batches as large."""
    samples_per_prompt: int = 1

    @property
    def trained_rows(self) -> int:
        return self.update_rows or self.rows

    @property
    def population(self) -> int:
        """Steps of a sample that a pass may train on."""
        return self.stochastic_steps or self.num_steps

    @property
    def kept_latents(self) -> int:
        """Latents of a sample that the rollout keeps for the update."""
        if self.score_accumulation:
            return 0
        return 1 if self.regression else self.population + 1

    @classmethod
    def of(cls, config, calls: Calls | None = None) -> "Work":
        """The work of a config's iterations. calls: on its model; None: on a UNet."""
        sample, train, algorithm = config.sample, config.train, config.algorithm
        if calls is None:
            scales = sample.guidance_scale, config.training_guidance, config.evaluation.guidance_scale
            calls = Calls(*(1 if scale == 1 else 2 for scale in scales), Window.of(sample.window, sample.num_steps).size)
        regression, stochastic = isinstance(algorithm, Regression), calls.trainable_steps
        trained_steps = algorithm.num_timesteps if regression else max(1, round(train.timestep_fraction * stochastic))
        return cls(
            sample.num_samples, sample.batch_size, sample.num_steps, calls.rows,
            train.num_minibatches, train.inner_epochs, train.micro_batch, trained_steps, config.optimizer.name, config.zero.stage,
            sample.decode_batch, score_accumulation=train.estimator == "score_accumulation", offload=config.zero.offload,
            stochastic_steps=stochastic, regression=regression, update_rows=calls.update_rows,
            evaluation_rows=calls.evaluation_rows, samples_per_prompt=config.prompts.samples_per_prompt,
        )  # fmt: skip

    def share(self, num_devices: int) -> int:
        """Samples of a rank. Raises ValueError for a number of ranks that the trainer would refuse."""
        multiple = num_devices * self.num_minibatches
        if self.num_samples % multiple:
            raise ValueError(f"sample.num_samples={self.num_samples}: valid is a multiple of {multiple} with {num_devices} ranks")
        return self.num_samples // num_devices

    def texts(self, num_devices: int) -> int:
        """Texts that an update has on the device at most: each prompt's of the rank's samples once, and one without a prompt."""
        return -(-self.share(num_devices) // self.samples_per_prompt) + self.trained_rows - 1

    def update_transitions(self, num_devices: int) -> int:
        """Transitions of a rank that one update trains on."""
        return self.share(num_devices) // self.num_minibatches * self.trained_steps

    def trained_transitions(self, num_devices: int) -> int:
        """Of a rank, those that an iteration trains on at least once, on average."""
        missed = (1 - self.trained_steps / self.population) ** self.inner_epochs
        return round(self.share(num_devices) * self.population * (1 - missed))


def shares_guidance(config) -> bool:
    """Whether guidance's branches share what they have in common: every call has to have both."""
    scales = config.sample.guidance_scale, config.training_guidance, config.evaluation.guidance_scale
    return config.model.share_guidance and 1 not in scales


def merges_lora(config, dtype: torch.dtype) -> bool:
    """Whether a network of this compute dtype runs with LoRA's update merged into its weights: what lora.forward asks for.

    In fp16 and bf16 a small update would be rounded away.
    """
    return config.lora.forward == "merged" or config.lora.forward == "auto" and dtype == torch.float32 and possible("merged", config)


def check_calls(config, model) -> None:
    """Raises ValueError, naming the option, where a model's pipeline cannot be called as a config asks."""
    sampled, evaluated = Asked.of(config.sample), Asked.of(config.evaluation)
    model.check_call("sample", sampled)
    if evaluated != sampled:
        model.check_call("eval", evaluated)


def check_guidance(config, family: Family) -> None:
    """Raises ValueError, naming the option, for a guidance scale that means nothing to a family's pipeline."""
    scales = {f"{section}.guidance_scale": config[f"{section}.guidance_scale"] for section in ("sample", "eval", "algorithm")}
    for option, scale in scales.items():
        if scale is not None and scale < family.no_guidance:
            raise ValueError(f"{option}={scale}: valid for {family.title} is a finite number >= {family.no_guidance:g}")


def check_steps(config, scheduler, record: Callable[[Asked], Recording] | None = None) -> None:
    """Raises ValueError, naming the option, for denoising steps that a model with this scheduler does not have.

    record: how a flow model's pipeline is called, which has its levels of noise; None for a diffusion model.
    """
    num_levels = scheduler.config.num_train_timesteps
    if isinstance(config.algorithm, Regression) and config.algorithm.num_timesteps > num_levels:
        raise ValueError(
            f"algorithm.num_timesteps={config.algorithm.num_timesteps}: valid is 1 to {num_levels}, the model's training steps"
        )
    _check_steps(config.sample, scheduler, record)
    try:
        _check_steps(config.evaluation, scheduler, record)
    except ValueError as error:
        raise ValueError(re.sub(r"^sample\.(num_steps|sampler)", r"eval.\1", str(error))) from None  # sample's own are good


def _check_steps(options, scheduler, record: Callable[[Asked], Recording] | None) -> None:
    if record is not None:
        recording = record(Asked.of(options))
        try:
            Denoising.of(options, recording, scheduler)
        except ValueError as error:
            raise ValueError(re.sub(r"^(?!sample\.)", f"sample.num_steps={options.num_steps}: ", str(error))) from None
        return
    stochastic = Window.of(options.window, options.num_steps).steps(0, 1)
    Schedule.of(Levels.of_steps(scheduler, options.num_steps), options.sampler, options.eta, stochastic=stochastic)
