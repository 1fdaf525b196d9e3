"""Short runs in this process, their parts and the gradient of their first update: what many tests are about."""

from dataclasses import dataclass, replace
from pathlib import Path

import bounds
import torch
from runs import TIMES
from safetensors.torch import load_file
from torch import Tensor

from ddpo_fast import train as trainer
from ddpo_fast.assemble import assemble
from ddpo_fast.config.command_line import parse
from ddpo_fast.config.options import LoraConfig
from ddpo_fast.pipelines.folders import find_model
from ddpo_fast.pipelines.template import Asked, Conditions, Recording
from ddpo_fast.policy import Policy
from ddpo_fast.prompts import Prompts
from ddpo_fast.rollout import collect
from ddpo_fast.run import Run
from ddpo_fast.schedule import Levels, Noising
from ddpo_fast.timing import StageTimer
from ddpo_fast.updates.activation_cache import NO_CACHE
from ddpo_fast.updates.gradients import NO_GRADIENTS
from ddpo_fast.updates.replay import Replay
from ddpo_fast.updates.transitions import Rollout

CPU = torch.device("cpu")
REDNESS = "def redness(images, prompts):\n    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))\n"


AS_EMBEDDED = {
    "sample.num_samples": 48, "sample.batch_size": 48, "train.micro_batch": 48,
    "sample.guidance_scale": 3.0, "lora.alpha": 16.0, "lora.targets": '["attention", "feed_forward", "convolution", "projection"]',
    "train.clip_range": 3e-4,
}  # fmt: skip
"""What short runs of tiny models have instead of what was published of their families."""


def command_line(values: dict, changed: dict) -> list[str]:
    """Options by name, and changes of them with __ for the dot, as a command line."""
    values = AS_EMBEDDED | values | {key.replace("__", "."): value for key, value in changed.items()}
    return [f"--{key}={value}" for key, value in values.items()]


def run_dir(argv: list[str]) -> Path:
    return next(Path(argument.split("=")[1]) for argument in argv if argument.startswith("--run.dir="))


def run(argv: list[str]) -> Path:
    """Makes a run in this process; returns its directory."""
    trainer.main(argv)
    return run_dir(argv)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "lora" / "pytorch_lora_weights.safetensors")


def joined(tensors: dict[str, Tensor]) -> Tensor:
    """All elements, in fp64, in the order of the names."""
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def untimed(rows: list[dict]) -> list[dict]:
    """Metrics without those that depend on the machine's speed."""
    return [{key: value for key, value in row.items() if not TIMES.search(key)} for row in rows]


def relative_error(gradient: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, of all parameters together."""
    assert gradient.keys() == expected.keys()
    a, b = (torch.cat([g[name].flatten().double() for name in expected]) for g in (gradient, expected))
    assert b.norm() > 1e-3
    return ((a - b).norm() / b.norm()).item()


def policy_of(path: Path | str, dtype: str = "fp32", *where: str | None, **lora) -> Policy:
    """The model of a folder as a policy, without a run. where: config, vae, variant, as `find_model` takes them."""
    policy = Policy(find_model(str(path), *where), dtype, CPU, LoraConfig(**lora))
    policy.record(Asked(10, 3.0))
    return policy


def sampled(run: Run, prompts: list[str], first_id: int = 0, gradients=NO_GRADIENTS) -> tuple[Rollout, Tensor, Tensor]:
    """Samples of these prompts as the run's first iteration makes them: rollout, rewards, images."""
    return collect(run, run.schedule(1), first_id, Prompts(prompts), StageTimer(CPU), "sample", gradients)


def kept(run: Run, prompts: list[str], first_id: int = 0) -> Rollout:
    """The same with all that an update would need, without beginning one."""
    schedule = run.schedule(1)
    run.gradients.begin(run.updates(schedule, 1), len(prompts), schedule)
    return sampled(run, prompts, first_id, run.gradients)[0]


def conditions(policy: Policy, prompts: list[str], guidance_scale: float = 1.0) -> Conditions:
    """What the network is given of these prompts; without guidance a row each, otherwise as many unconditional rows first."""
    texts, rows = policy.texts(policy.record(Asked(10, guidance_scale)), prompts)
    return texts.conditions(rows)


def recorded(num_branches: int) -> Recording:
    """A recording of so many branches, and of nothing else."""
    branches = tuple((0, number) for number in range(num_branches))
    return Recording(Asked(1, 1.0), None, branches, torch.zeros(1), None, 1.0, 2.0, False, (4, 1, 1))


def latent_shape(policy: Policy) -> tuple[int, ...]:
    return policy.record(Asked(10, 1.0)).shape


def in_precision(run: Run, dtype: torch.dtype) -> Run:
    """A run in another precision: networks, schedule, levels; without the engine, since DeepSpeed has no fp64."""
    policy, objective = run.policy, run.objective
    policy.dtype, policy.forward = dtype, policy.network
    for module in (policy.network, *policy.text_encoders, policy.pipe.vae):
        module.to(dtype)
    for kept in (policy._texts, policy._unconditional, policy._recordings):
        kept.clear()
    recording = policy.record(run.denoising.recording.asked)
    if hasattr(objective, "noising"):
        objective._recording = policy.record(objective._recording.asked)
        levels = Levels.of_training(objective._recording, policy.pipe.scheduler)
        objective.noising = Noising.of(levels, dtype=dtype)
    if isinstance(run.gradients, Replay):
        run.gradients.cache = NO_CACHE  # whose slots are of the precision that there was
    run.engine.backward, run.engine.forget_gradient = lambda loss, last: loss.backward(), lambda: None
    return replace(run, denoising=replace(run.denoising, recording=recording, dtype=dtype))


def textbook_log_prob(pipe, prompts: list[str], x_t: Tensor, next_x: Tensor, times: tuple[int, int], guidance_scale: float) -> Tensor:
    """log p (B,) of a DDIM step at eta 1 from t to t', formulas written out anew from the cumulative alphas; t' < 0 ends at t = 0."""
    embeds, uncond = (pipe.encode_prompt(p, "cpu", 1, False)[0] for p in (prompts, [""] * len(prompts)))
    alphas = (1 - pipe.scheduler.betas.double()).cumprod(0)
    a_t, a_p = (alphas[max(t, 0)] for t in times)
    e = pipe.unet(x_t, times[0], encoder_hidden_states=embeds).sample
    if guidance_scale != 1:
        e_uncond = pipe.unet(x_t, times[0], encoder_hidden_states=uncond).sample
        e = e_uncond + guidance_scale * (e - e_uncond)
    s = ((1 - a_p) / (1 - a_t) * (1 - a_t / a_p)).sqrt()
    x0 = (x_t - (1 - a_t).sqrt() * e) / a_t.sqrt()
    density = torch.distributions.Normal(a_p.sqrt() * x0 + (1 - a_p - s**2).sqrt() * e, s)
    return density.log_prob(next_x.double()).mean((1, 2, 3))


def random_lora(policy: Policy, std: float = 0.02) -> None:
    """LoRA begins with B = 0, where half of the gradient is 0; the same numbers in every dtype."""
    torch.manual_seed(1)
    for parameter in policy.trainable_parameters():
        parameter.data.copy_(std * torch.randn(parameter.shape))


@dataclass
class First:
    """The first update of a run, and what it came from."""

    gradient: dict[str, Tensor]
    """By parameter name."""
    run: Run
    prompts: list[str]
    rollout: Rollout
    credit: Tensor
    row: dict[str, float]
    """Its metrics."""


def first_gradient(
    argv: list[str],
    dtype: torch.dtype = torch.float64,
    credit: Tensor | None = None,
    std: float = 0.02,
    clip_range: float = 5e-2,
    prompts: list[str] | None = None,
    ratio: float | None = None,
) -> First:
    """The gradient of a run's first update, of samples whose credit is given, at LoRA's weights drawn at random.

    In fp32 it comes from DeepSpeed's engine. What the engine does to a gradient is tested so and in test_launch.py. ratio: what rounding
    may do to the importance ratio before an update; None: what it may on a UNet.
    """
    run, found = assemble(parse(argv)), {}
    if dtype != torch.float32:
        run = in_precision(run, dtype)
    run.objective.clip_range = clip_range
    random_lora(run.policy, std)
    run.engine._tell_change()

    def step() -> float:
        if not found:
            found.update({n: p.grad.clone() for n, p in run.policy.network.named_parameters() if p.grad is not None})
        run.policy.network.zero_grad()
        return 0.0

    run.engine.step = step
    prompts = prompts or run.draw(1).texts
    rollout = kept(run, prompts)
    updates = run.updates(rollout.schedule, 1)
    credit = torch.linspace(-2, 3, len(prompts), dtype=dtype) if credit is None else credit.to(dtype)
    row = trainer.update(run, updates, rollout, credit, 1)
    assert row.get("ratio_error", 0) <= (bounds.of(run.config, dtype).ratio if ratio is None else ratio)
    return First(found, run, prompts, rollout, credit, row)
