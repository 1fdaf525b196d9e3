"""What is compared: our trainer, the textbook loop and TRL's DDPOTrainer, each able to run whole iterations of the same work on demand.

    python -m bench.contenders NAME [options of train.py]     # started by bench.harness; commands on stdin

All take the same command line, so the model folder, prompts, reward, numbers of samples, steps and updates, LoRA layers and rank, learning
rate, dtype and thread count are the same. A contender is timed by stage, each stage ending when the device has done its work.
"""

import atexit
import copy
import json
import math
import os
import re
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from accelerate import PartialState
from peft import LoraConfig
from torch import Tensor, nn

from bench.textbook import FlowGRPOLoop, Loop, TextbookLoop, Trajectories, group_advantages
from ddpo_fast import assemble
from ddpo_fast import train as trainer
from ddpo_fast.config.command_line import parse
from ddpo_fast.config.options import Config
from ddpo_fast.distributed.ranks import Ranks
from ddpo_fast.kernels.reference import INITIAL_STEP, normal_noise
from ddpo_fast.memory import free_mib
from ddpo_fast.pipelines.template import Asked
from ddpo_fast.planning.architectures import planned_model
from ddpo_fast.planning.counts import flop_counter
from ddpo_fast.planning.plan import calls_on, count_run, memory_mib, phases_mib, with_cache
from ddpo_fast.planning.work import Calls, Work
from ddpo_fast.policy import Policy
from ddpo_fast.prompts import draw_prompts
from ddpo_fast.rollout import generate
from ddpo_fast.run import Task
from ddpo_fast.timing import StageTimer
from ddpo_fast.updates.activation_cache import NO_CACHE
from ddpo_fast.updates.credit import Advantages
from ddpo_fast.updates.objectives import scaled_clip_range
from ddpo_fast.updates.replay import Replay
from ddpo_fast.updates.transitions import Rollout

STAGES = ("encode", "denoise", "decode", "reward", "update", "optimizer")
"""The stages of an iteration. The rest of a contender's total time is its bookkeeping."""
PLAIN = (
    "--kernels.backend=reference", "--attention.backend=sdpa", "--lora.forward=separate", "--model.share_guidance=false",
    "--model.offload_text_encoder=false", "--cache.mode=off",
)  # fmt: skip
"""A pipeline without our changes to diffusers and peft."""
UNCLIPPED = 1e3
"""The clip range while gradients are compared: rounding must not decide which transitions have a gradient."""
TIMED = ("encode", "sample", "decode", "reward", "train", "optimizer", "total")
"""What is timed to compute the STAGES: sample includes encode and decode, train includes optimizer."""


class Stages(StageTimer):
    """A StageTimer that also counts each stage's floating point operations, while `counter` is set."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.counter, self.flop = None, {}

    @contextmanager
    def __call__(self, stage: str):
        before = self.counter.get_total_flops() if self.counter else 0
        with super().__call__(stage):
            yield
        if self.counter:
            self.flop[stage] = self.flop.get(stage, 0) + self.counter.get_total_flops() - before

    def wrap(self, owner, name: str, stage: str, when: Callable[[], bool] = lambda: True) -> None:
        """Times every call of a method from now on, or only the calls for which `when` is true."""
        method = getattr(owner, name)

        def timed(*args, **kwargs):
            with self(stage) if when() else nullcontext():
                return method(*args, **kwargs)

        setattr(owner, name, timed)

    def split(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds and FLOP by stage of STAGES and in total. Stages inside sample and train are subtracted from these."""

        def divide(parts: dict[str, float]) -> dict[str, float]:
            encode, sample, decode, reward, train, optimizer, total = (parts.get(stage, 0) for stage in TIMED)
            return {
                "encode": encode, "denoise": sample - encode - decode, "decode": decode, "reward": reward, "update": train - optimizer,
                "optimizer": optimizer, "total": total,
            }  # fmt: skip

        return divide(self.seconds), divide(self.flop)


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak; on a CPU that needs Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """Most MiB since the reset: allocated on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


class Contender:
    """One way to run the work of a command line. `trainable` gives the network's trained parameters by name."""

    def __init__(self, config: Config, policy: Policy, task: Task, ranks: Ranks):
        self.config, self.policy, self.task, self.ranks = config, policy, task, ranks
        self.device, self.network = policy.device, policy.network
        self.clip_range = scaled_clip_range(config.train.clip_range, math.prod(policy.record(Asked.of(config.sample)).shape))
        self.iteration = 0
        self.start = {name: parameter.detach().clone() for name, parameter in self.trainable().items()}

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}

    def iterate(self, count_flop: bool = False) -> dict:
        """One iteration of DDPO: seconds by stage, reward, peak memory and, if counted, FLOP by stage."""
        self.iteration += 1
        reset_peak_memory(self.device)
        self.stages.seconds, self.stages.flop = {}, {}
        if count_flop:
            with flop_counter() as self.stages.counter:
                result = self.timed_iteration()
            self.stages.counter = None
        else:
            result = self.timed_iteration()
        seconds, flop = self.stages.split()
        result |= {"total_s": seconds["total"], "seconds": seconds, "peak_memory_mib": peak_memory(self.device)}
        return result | ({"flop": flop} if count_flop else {})

    def timed_iteration(self) -> dict:
        with self.stages("total"):
            return self.work()

    def prompts(self) -> list[str]:
        """This iteration's prompts, the same for every contender."""
        config = self.config
        return draw_prompts(
            self.task.prompts, config.sample.num_samples, config.prompts.samples_per_prompt, config.run.seed, self.iteration
        ).texts

    @contextmanager
    def perturbed(self):
        """Inside, the trained parameters differ from their start, where half of LoRA's gradient is 0, in all contenders alike."""
        saved = {name: parameter.data.clone() for name, parameter in self.trainable().items()}
        with torch.no_grad():
            for name, parameter in self.trainable().items():
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
        yield
        with torch.no_grad():
            for name, parameter in self.trainable().items():
                parameter.copy_(saved[name])
                parameter.grad = None

    def gradient(self, file: Path) -> None:
        """Computes the gradient of the mean loss of the trajectories in `file`, one minibatch, and saves it beside `file`."""
        data = torch.load(file, map_location=self.device)
        with self.perturbed():
            result = self.loss_gradient(data)
        torch.save({name: value.cpu() for name, value in result.items()}, file.with_suffix(f".{type(self).__name__}"))

    def changes(self, file: Path) -> None:
        """Saves how far the trained parameters are from where they started."""
        torch.save({name: (parameter.detach() - self.start[name]).cpu() for name, parameter in self.trainable().items()}, file)

    def collect(self) -> dict[str, Tensor]:
        gradient = {name: parameter.grad.detach().clone() for name, parameter in self.trainable().items() if parameter.grad is not None}
        self.network.zero_grad()
        return gradient


class Ours(Contender):
    """ddpo_fast's trainer, perhaps with CHANGES, which no option makes."""

    CHANGES = ("plain_norms", "contiguous")
    """plain_norms: GroupNorm and GEGLU are not fused. contiguous: tensors are not channels_last."""

    def __init__(self, argv: list[str], changes: tuple[str, ...] = ()):
        plain = patch.object(assemble, "fuse", lambda *_: {}) if "plain_norms" in changes else nullcontext()
        with plain:
            self.run = assemble.assemble(parse(argv))
        super().__init__(self.run.config, self.run.policy, self.run.task, self.run.ranks)
        if unknown := set(changes) - set(self.CHANGES):
            raise ValueError(f"{', '.join(unknown)}: valid changes are {', '.join(self.CHANGES)}")
        if "contiguous" in changes:
            for parameter in self.network.parameters():
                parameter.data = parameter.data.contiguous()
        self.stages = Stages(self.device)
        self.stages.wrap(self.policy, "_encode", "encode")
        self.stages.wrap(self.policy, "decode", "decode")
        self.stages.wrap(self.run.engine, "step", "optimizer")

    def work(self) -> dict:
        row = trainer.improve(self.run, self.stages, self.iteration)
        limit = self.clip_range * (0.1 if self.policy.dtype == torch.float32 else 1.0)
        if not row["ratio_error"] <= limit:
            raise RuntimeError(
                f"ratio_error={row['ratio_error']:.3g}, {limit:.3g} is tolerated: rollout and update do not agree, so no time is reported"
            )
        return {key: row[key] for key in ("reward_mean", "reward_std", "ratio_error", "transitions")}

    def planned_memory(self) -> dict[str, float]:
        """planned_mib: the peak memory of these iterations as --plan predicts it."""
        config, on_gpu = self.config, self.device.type == "cuda"
        model, world_size = planned_model(config.model), self.ranks.world_size
        counts, work = count_run(config, model, self.policy.dtype, on_gpu), Work.of(config, calls_on(model, config))
        work = with_cache(work, config, counts, free_mib(self.device, world_size), world_size, on_gpu)
        return {"planned_mib": max(phases_mib(memory_mib(counts, work, world_size)).values())}

    def resize(self, **options) -> None:
        """Changes the amount of work: `section__key=value` of a config, of the sections sample and train."""
        config = self.config.replace(**options)
        config.check()
        calls = Calls.of(config, self.policy.record, self.policy.pipe.scheduler)
        self.config, self.run = config, replace(self.run, config=config, denoising=self.policy.denoising(config.sample), calls=calls)
        self.run.gradients.micro_batch = config.train.micro_batch

    def differences(self, file: Path) -> dict[str, float]:
        """How far its pictures are from those in `file`, of values in [0, 1], and its advantages, relative to the largest."""
        data, credit = torch.load(file, map_location=self.device), copy.deepcopy(self.run.objective.credit)
        ids, seed = torch.arange(len(data["prompts"]), device=self.device), self.config.run.seed
        with self.perturbed():
            _, images = generate(self.policy, self.run.ops, self.run.schedule(1), seed, ids, data["prompts"])
        error = (credit.of(data["prompts"], data["rewards"].cpu()) - data["advantages"].cpu()).abs().max() / data["advantages"].abs().max()
        return {"pictures": (images - data["images"]).abs().max().item(), "advantages": error.item()}

    def loss_gradient(self, data: dict) -> dict[str, Tensor]:
        one_update = self.config.replace(
            train__num_minibatches=1, train__inner_epochs=1, train__timestep_fraction=1.0, sample__num_samples=len(data["latents"])
        )
        gradient, own = {}, self.run.engine
        engine = SimpleNamespace(loss_scale=own.loss_scale, adapts_scale=own.adapts_scale, backward=own.backward)
        engine.forget_gradient = lambda: None
        engine.step = lambda: gradient.update(self.collect()) or 0.0
        objective = copy.copy(self.run.objective)
        objective.clip_range = UNCLIPPED
        gradients = Replay(self.policy, engine, objective, NO_CACHE, self.run.room, self.config.train.micro_batch)
        run = replace(self.run, config=one_update, objective=objective, gradients=gradients, engine=engine)
        ids = torch.arange(len(data["prompts"]), device=self.device)
        good = torch.ones_like(ids, dtype=torch.bool)
        rollout = Rollout(data["prompts"], ids, data["latents"], data["log_probs"], good, run.schedule(1), 0)
        trainer.update(run, run.updates(run.schedule(1), 1), rollout, data["advantages"], 1)
        return gradient


def plain_parts(argv: list[str]) -> tuple[Config, Policy, Task, Ranks]:
    """What a contender is made of, without an engine; see PLAIN."""
    start = assemble.begin(parse([*argv, *PLAIN]))
    config, policy = assemble.load_policy(start.config, start.model, start.ranks, start.device, start.ops)
    return config, policy, start.task, start.ranks


def refuse(argv: list[str], **valid) -> None:
    """Raises ValueError for an option that a contender does not have: `section__key=the value it has`."""
    config = parse(argv)
    for option, value in valid.items():
        option = option.replace("__", ".")
        if config[option] != value:
            raise ValueError(f"{option}={config[option]}: this contender has {value} only")


class Textbook(Contender):
    """The textbook loop with torch's AdamW. Batches are as large as a minibatch of samples and train.micro_batch allow."""

    def __init__(self, argv: list[str]):
        refuse(argv, train__algorithm="ddpo_is", optimizer__name="adamw", train__timestep_fraction=1.0, train__kl_coefficient=0.0)
        super().__init__(*plain_parts(argv))
        config, policy = self.config, self.policy
        self.on_flow = policy.family.process == "flow"
        self.loop = self.flow_loop(argv) if self.on_flow else self.ddpo_loop(argv)
        self.parameters = policy.trainable_parameters()
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.train.learning_rate, tuple(options.betas), options.eps, options.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=policy.dtype == torch.float16)
        self.credit = Advantages.of_options(config.baseline, config.train.advantage_clip)
        self.generator = torch.Generator(self.device).manual_seed(config.run.seed)
        self.uncond = self.loop.encode([""])
        self.stages = Stages(self.device)

    def ddpo_loop(self, argv: list[str]) -> Loop:
        refuse(argv, sample__eta=1.0, sample__sampler="ddim", sample__window=None)
        return TextbookLoop(self.policy.pipe, self.config.sample.num_steps, self.config.sample.guidance_scale)

    def flow_loop(self, argv: list[str]) -> Loop:
        sample, arguments = self.config.sample, self.config.model.arguments
        trained = sample.num_steps - 1
        window = {"size": trained, "among": trained}
        refuse(argv, sample__sampler="flow_sde", sample__window=window, baseline__name="group", baseline__std="batch")
        return FlowGRPOLoop(
            self.policy.pipe, sample.num_steps, sample.guidance_scale, sample.eta, trained, arguments["max_sequence_length"]
        )

    def draw(self, count: int) -> Callable[[int], Tensor]:
        """The noise of so many samples."""
        return lambda step: torch.randn((count, *self.loop.shape), generator=self.generator, device=self.device)

    def advantages(self, prompts: list[str], rewards: Tensor) -> Tensor:
        """(N,) fp32, of a whole iteration's rewards."""
        if not self.on_flow:
            return self.credit.of(prompts, rewards).float().to(self.device)
        return torch.tensor(group_advantages(prompts, rewards.tolist(), self.config.train.advantage_clip), device=self.device)

    def work(self) -> dict:
        config, data, rewards, prompts = self.config, [], [], self.prompts()
        for start in range(0, len(prompts), config.sample.batch_size):
            batch = prompts[start : start + config.sample.batch_size]
            with self.stages("sample"):
                with self.stages("encode"), torch.no_grad():
                    texts = self.loop.encode(batch)
                part, latents = self.loop.rollout(texts, self.uncond, self.draw(len(batch)))
                data.append(part)
                with self.stages("decode"):
                    images = self.loop.decode(latents)
            with self.stages("reward"):
                rewards.append(self.task.reward(images, batch))
        data, rewards = Trajectories.cat(data), torch.cat(rewards)
        advantages = self.advantages(prompts, rewards)
        with self.stages("train"):
            ratios = self.update(data, advantages)
        return {
            "reward_mean": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            "ratio_error": (ratios - 1).abs().max().item(),
            "transitions": data.log_probs.numel() * config.train.inner_epochs,
        }

    def update(self, data: Trajectories, advantages: Tensor) -> Tensor:
        """An iteration's updates; returns the first one's ratios."""
        options, first = self.config.train, None
        for _ in range(options.inner_epochs):
            order = torch.randperm(len(advantages), generator=self.generator, device=self.device)
            for minibatch in order.chunk(options.num_minibatches):
                ratios = self.loop.backward(
                    data, minibatch, options.micro_batch, advantages, self.uncond, self.clip_range, self.scaler.scale
                )
                first = ratios if first is None else first
                with self.stages("optimizer"):
                    self.scaler.unscale_(self.optimizer)
                    nn.utils.clip_grad_norm_(self.parameters, options.max_grad_norm)
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                    self.optimizer.zero_grad()
        return first

    def trajectories(self, file: Path) -> dict[str, float]:
        """Saves trajectories of `perturbed` parameters with made-up rewards: what every contender is compared on.

        Their noise is ours, so that ours can draw the same pictures. Returns rounding: see `Loop.rounding`.
        """
        prompts = self.task.prompts.texts[:2] * 2
        ids, rewards = torch.arange(len(prompts)), torch.linspace(-1.5, 2.0, len(prompts))

        def draw(step: int) -> Tensor:
            steps = torch.full_like(ids, INITIAL_STEP if step < 0 else step)
            return normal_noise(self.config.run.seed, ids, steps, math.prod(self.loop.shape)).view(-1, *self.loop.shape).to(self.device)

        with self.perturbed(), torch.no_grad():
            data, last = self.loop.rollout(self.loop.encode(prompts), self.uncond, draw)
            images = self.loop.decode(last)
        latents = torch.cat([data.latents, data.next_latents[:, -1:]], 1)
        saved = {"prompts": prompts, "latents": latents, "log_probs": data.log_probs, "images": images, "rewards": rewards}
        torch.save(saved | {"advantages": self.advantages(prompts, rewards)}, file)
        return {"rounding": self.loop.rounding()}

    def loss_gradient(self, data: dict) -> dict[str, Tensor]:
        latents, rows = data["latents"], torch.arange(len(data["prompts"]), device=self.device)
        steps = Trajectories(latents[:, :-1], latents[:, 1:], data["log_probs"], self.loop.encode(data["prompts"]))
        scale = 2.0**16 if self.network.dtype == torch.float16 else 1.0
        self.loop.backward(
            steps, rows, self.config.train.micro_batch, data["advantages"], self.uncond, UNCLIPPED, lambda loss: scale * loss
        )
        return {name: value / scale for name, value in self.collect().items()}


class TRL(Contender):
    """TRL's DDPOTrainer (deleted in TRL 0.24), with our LoRA layers in place of its fixed ones; the rest is its own."""

    def __init__(self, argv: list[str]):
        refuse(argv, train__algorithm="ddpo_is", optimizer__name="adamw", baseline__std="prompt", baseline__name="history")
        refuse(argv, train__kl_coefficient=0.0, sample__sampler="ddim", sample__window=None)
        super().__init__(*plain_parts(argv))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
        config, policy = self.config, self.policy
        if policy.full:
            raise ValueError("lora.scope=none: the comparison with TRL is of LoRA")
        lora: LoraConfig = policy.network.peft_config["default"]

        class Pipeline(DefaultDDPOStableDiffusionPipeline):
            def get_trainable_layers(self):
                self.sd_pipeline.unet.add_adapter(lora)
                for parameter in self.sd_pipeline.unet.parameters():
                    if parameter.requires_grad:
                        parameter.data = parameter.data.float()
                return self.sd_pipeline.unet

        minibatch = config.sample.num_samples // config.train.num_minibatches
        sample_batch = math.gcd(config.sample.batch_size, config.sample.num_samples)
        train_batch = max(
            n for n in range(1, minibatch + 1) if minibatch % n == 0 and sample_batch % n == 0 and n <= max(1, config.train.micro_batch)
        )
        options = DDPOConfig(
            seed=config.run.seed, mixed_precision={"fp32": "no"}.get(config.model.dtype, config.model.dtype), allow_tf32=False,
            sample_num_steps=config.sample.num_steps, sample_eta=config.sample.eta, sample_guidance_scale=config.sample.guidance_scale,
            sample_batch_size=sample_batch, sample_num_batches_per_epoch=config.sample.num_samples // sample_batch,
            train_batch_size=train_batch, train_gradient_accumulation_steps=minibatch // train_batch,
            train_num_inner_epochs=config.train.inner_epochs, train_learning_rate=config.train.learning_rate,
            train_adam_beta1=config.optimizer.betas[0], train_adam_beta2=config.optimizer.betas[1],
            train_adam_weight_decay=config.optimizer.weight_decay, train_adam_epsilon=config.optimizer.eps,
            train_max_grad_norm=config.train.max_grad_norm, train_adv_clip_max=config.train.advantage_clip,
            train_clip_range=self.clip_range, train_cfg=config.sample.guidance_scale != 1,
            train_timestep_fraction=config.train.timestep_fraction, per_prompt_stat_tracking=True,
            per_prompt_stat_tracking_buffer_size=config.baseline.buffer_size,
            per_prompt_stat_tracking_min_count=config.baseline.min_count, save_freq=1 << 30,
        )  # fmt: skip
        if self.ranks.world_size == 1:  # as a user of one process has it: no wrapper that synchronises gradients
            torch.distributed.destroy_process_group()
            atexit.unregister(torch.distributed.destroy_process_group)
            os.environ.pop("LOCAL_RANK", None)
        PartialState(cpu=self.device.type == "cpu")  # TRL logs before it has made its own
        self.policy = None  # TRL loads the model itself
        pipeline = Pipeline(config.model.path, use_lora=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trl = DDPOTrainer(options, self.reward, lambda: (next(self.queue), {}), pipeline)
        pipeline.sd_pipeline.set_progress_bar_config(disable=True)
        self.network, self.rewards = pipeline.unet, []
        self.stages = Stages(self.device)
        self.stages.wrap(self.trl, "_generate_samples", "sample")
        self.stages.wrap(pipeline.text_encoder, "forward", "encode")
        self.stages.wrap(pipeline.vae, "decode", "decode")
        self.stages.wrap(self.trl, "compute_rewards", "reward")
        self.stages.wrap(self.trl, "_train_batched_samples", "train")
        for owner, name in ((self.trl.optimizer, "step"), (self.trl.optimizer, "zero_grad"), (self.trl.accelerator, "clip_grad_norm_")):
            # all calls of an update but the last do nothing, and timing them would make the device wait
            self.stages.wrap(owner, name, "optimizer", lambda: self.trl.accelerator.sync_gradients)
        with torch.random.fork_rng():  # warms up, as ours has by its evaluation before the first iteration
            self.queue = iter(self.prompts())
            self.trl._generate_samples(1, sample_batch)

    def reward(self, images: Tensor, prompts: tuple[str], metadata: tuple) -> tuple[Tensor, dict]:
        rewards = self.task.reward(images.float(), list(prompts))
        self.rewards.append(rewards)
        return rewards, {}

    def work(self) -> dict:
        self.rewards.clear()
        self.queue = iter(self.prompts())
        self.trl.step(self.iteration, self.iteration)
        rewards, config = torch.cat(self.rewards), self.config
        return {
            "reward_mean": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            "transitions": config.sample.num_samples * self.trl.num_train_timesteps * config.train.inner_epochs,
        }

    def loss_gradient(self, data: dict) -> dict[str, Tensor]:
        trl, latents = self.trl, data["latents"].to(self.network.dtype)
        tokens = trl.sd_pipeline.tokenizer(
            data["prompts"], return_tensors="pt", padding="max_length", truncation=True,
            max_length=trl.sd_pipeline.tokenizer.model_max_length,
        ).input_ids.to(self.device)  # fmt: skip
        with torch.no_grad():
            embeds = trl.sd_pipeline.text_encoder(tokens)[0]
        if trl.config.train_cfg:
            embeds = torch.cat([trl.neg_prompt_embed.expand_as(embeds), embeds])
        trl.sd_pipeline.scheduler.set_timesteps(self.config.sample.num_steps)
        timesteps = trl.sd_pipeline.scheduler.timesteps.to(self.device)
        scale = 2.0**16 if self.network.dtype == torch.float16 else 1.0
        trl.config.train_clip_range = UNCLIPPED
        for step, t in enumerate(timesteps):
            loss, _, _ = trl.calculate_loss(
                latents[:, step], t.expand(len(latents)), latents[:, step + 1], data["log_probs"][:, step], data["advantages"], embeds
            )
            (scale * loss / len(timesteps)).backward()
        trl.config.train_clip_range = self.clip_range
        return {name: value / scale for name, value in self.collect().items()}


CONTENDERS = {"ours": Ours, "textbook": Textbook, "trl": TRL}


def make(name: str, argv: list[str]) -> Contender:
    """`ours`, `ours:contiguous,plain_norms` (with those changes), `textbook` or `trl`."""
    name, _, changes = name.partition(":")
    return CONTENDERS[name](argv, *([tuple(changes.split(","))] if changes else []))


def main() -> None:
    """Answers each command {"call": method, ...arguments} with one line of JSON; what the libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        contender = make(sys.argv[1], sys.argv[2:])
        work = {"dtype": contender.config.model.dtype, "num_samples": contender.config.sample.num_samples}
        print(json.dumps(work), file=answers)
        for line in sys.stdin:
            command = json.loads(line)
            arguments = {key: Path(value) if key == "file" else value for key, value in command.items() if key != "call"}
            answer = getattr(contender, command["call"])(**arguments) or {}
            if contender.device.type == "cuda":
                torch.cuda.empty_cache()  # another contender's turn
            print(json.dumps(answer), file=answers)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)


if __name__ == "__main__":
    main()
