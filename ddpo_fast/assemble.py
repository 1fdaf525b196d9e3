"""From a config to what a run is made of: options checked, cheapest first, then the model, engine and cache."""

import logging
import math
import re
import time
from functools import partial
from pathlib import Path

import torch

from ddpo_fast import dtypes, kernels
from ddpo_fast.claim import Claim
from ddpo_fast.config.options import Config
from ddpo_fast.distributed import deepspeed_options
from ddpo_fast.distributed.engine import Engine, all_gather, broadcast, init_distributed
from ddpo_fast.distributed.optimizer import check_optimizer, make_optimizer
from ddpo_fast.kernels import Ops
from ddpo_fast.memory import Room, free_mib, local_ranks
from ddpo_fast.networks import attention_backends
from ddpo_fast.networks.fused_unet import fuse
from ddpo_fast.networks.initial_lora import start_from
from ddpo_fast.networks.lora import merges
from ddpo_fast.pipelines.folders import find_model
from ddpo_fast.planning.plan import resolve_sizes
from ddpo_fast.policy import Policy
from ddpo_fast.prompts import Prompts, evaluation_sets, load_prompts
from ddpo_fast.records import checkpoint, fingerprints
from ddpo_fast.records.metrics import check_installed, tracker_fault
from ddpo_fast.run import Setup
from ddpo_fast.schedule import Levels, Noising, Schedule
from ddpo_fast.scoring.isolated import START_TIMEOUT_S
from ddpo_fast.scoring.scorer import open_reward
from ddpo_fast.updates import activation_cache
from ddpo_fast.updates.activation_cache import NO_CACHE, ActivationCache, Cache
from ddpo_fast.updates.losses import scaled_clip_range
from ddpo_fast.updates.score_accumulation import ScoreAccumulator

logger = logging.getLogger("ddpo_fast")


def prepare(config: Config, claim: Claim | None = None) -> Setup:
    """Checks what parsing could not, cheapest first, then loads the model. Raises ValueError naming the option at fault.

    claim: what takes the run's directory, before anything heavy is loaded; None for who wants the parts and no run.
    """
    started_in = Path.cwd()
    check_model(config)
    prompts = load_prompts(config.prompts.name, config.prompts.file, config.prompts.limit, config.prompts.list)
    evaluations = evaluation_sets(config.eval, prompts)
    check_optimizer(config.optimizer.name)
    check_installed(config.run.trackers)
    deepspeed = {}
    if config.deepspeed.config is not None:
        ours = deepspeed_options.stated(config.zero.stage, config.zero.offload, config.train.max_grad_norm)
        deepspeed = deepspeed_options.read(config.deepspeed.config, ours)
    num_calls = config.sample.num_samples if config.sample.batch_size == "auto" else config.sample.num_samples // config.sample.batch_size
    call_s = config.reward.timeout_s + config.reward.isolate * max(START_TIMEOUT_S, config.reward.timeout_s)
    rank, world_size, device = init_distributed(timeout_s=1800 + call_s * (1 + num_calls))
    if fault := broadcast(tracker_fault(config.run.trackers) if rank == 0 else None):
        raise ValueError(fault)
    ops = kernels.select(config.kernels.backend, device)
    attention_backends.require(config.attention.backend, device)
    lacking = without_metadata(config, prompts, evaluations)
    for option, multiple in (("sample.num_samples", world_size * config.train.num_minibatches), ("eval.num_samples", world_size)):
        if config[option] % multiple:
            raise ValueError(f"{option}={config[option]}: valid is a multiple of {multiple} with {world_size} ranks")
    config = config.replace(run__dir=_claim_directory(config, started_in, claim if rank == 0 else None))
    reward = open_reward(config.reward.name, config.reward.kwargs, config.reward.timeout_s, config.reward.isolate, lacking)
    resumed = checkpoint.find(Path(config.run.dir), rank) if config.run.resume else None
    if resumed and (config.zero.stage == 3 or config.zero.stage > 0 and config.optimizer.name != "adamw"):
        before = checkpoint.read_state(resumed)["world_size"]
        if world_size != before:
            raise ValueError(
                f"zero.stage={config.zero.stage}: the optimizer's state is sharded over {before} ranks; --resume wants as many"
            )
    config = config.replace(model__dtype=dtypes.chosen(config.model.dtype, device.type == "cuda"))
    free = all_gather(torch.tensor([free_mib(device, local_ranks())])).min().item()
    config = resolve_sizes(config, free, world_size, device.type == "cuda")
    config, policy = load_policy(config, rank, world_size, device, ops)
    made_of = _fingerprints(config, policy, prompts) if rank == 0 else {}
    if resumed and rank == 0:
        _say_changes(checkpoint.read_state(resumed), made_of)
    schedule = Schedule.of(
        Levels.of_steps(policy.pipe.scheduler, config.sample.num_steps), config.sample.sampler, config.sample.eta, device
    )
    clip_range = scaled_clip_range(config.train.clip_range, math.prod(policy.latent_shape))
    noising = Noising.of(Levels.of_training(policy.pipe.scheduler), device) if config.train.regression else None
    if noising is not None and config.rwr.num_timesteps > noising.num_levels:
        raise ValueError(f"rwr.num_timesteps={config.rwr.num_timesteps}: valid is 1 to {noising.num_levels}, the model's training steps")
    scores = None
    if config.train.estimator == "score_accumulation":
        scores = ScoreAccumulator(policy.unet, ops, config.sample.guidance_scale, clip_range)
    share_guidance(config, policy)
    cached = scores is None and noising is None and config.zero.stage < 3
    split = activation_cache.split(config.cache.mode, policy) if cached else None
    room = Room(retry=config.zero.stage < 3)
    return Setup(
        config, Path(config.run.dir), claim or Claim(), started_in, rank, world_size, prompts, evaluations, reward, policy,
        schedule, ops, split, clip_range, scores, noising, room, resumed, deepspeed, made_of,
    )  # fmt: skip


def _claim_directory(config: Config, started_in: Path, claim: Claim | None) -> str:
    """The run's directory, on every rank that which rank 0 has claimed. Raises ValueError on all of them where that is refused."""
    reward_name = re.sub(r"[^\w.-]+", "-", Path(config.reward.name).name)[:100]
    folder, refusal = Path(config.run.dir or started_in / f"runs/{reward_name}-{time.strftime('%Y%m%d-%H%M%S')}"), None
    if claim is not None:
        try:
            folder = claim.take(folder, new=config.run.dir is None)
        except ValueError as error:
            refusal = str(error)
    folder, refusal = broadcast((str(folder), refusal))
    if refusal is not None:
        raise ValueError(refusal)
    return folder


def _fingerprints(config: Config, policy: Policy, prompts: Prompts) -> dict[str, str]:
    """A hash of each thing that a run is made of, by the option and what of it."""
    option = next((name for name in ("list", "file") if config[f"prompts.{name}"] is not None), "name")
    found = fingerprints.of_text(f"prompts.{option} (the prompts)", vars(prompts))
    found |= fingerprints.of_reward(config.reward.name, config.reward.kwargs)
    if config.deepspeed.config is not None:
        found |= fingerprints.of_text("deepspeed.config (the file)", Path(config.deepspeed.config).read_text(encoding="utf-8"))
    return found | fingerprints.of_model(policy.pipe, config.model.vae is None)


def _say_changes(state: dict, now: dict[str, str]) -> None:
    """Warns, in a line each, of what the run is made of and was not up to the checkpoint that has this `state`."""
    for what in fingerprints.changes(now, state.get("fingerprints", {})):
        logger.warning("%s: it has changed since iteration %d; the run goes on with what is there now", what, state["iteration"])


def check_model(config: Config) -> None:
    """Raises ValueError for a model that cannot be trained, or not with so many steps, before its weights are read."""
    model = find_model(config.model.path, config.model.config, config.model.vae, config.model.variant)
    Schedule.of(Levels.of_steps(model.scheduler, config.sample.num_steps), config.sample.sampler, config.sample.eta)
    model.check_networks()


def without_metadata(config: Config, prompts: Prompts, evaluations: dict[str, Prompts]) -> str | None:
    """An option whose prompts have no metadata, which a reward may need; None if there is none."""
    if prompts.metadata is None:
        return next(f"prompts.{key}" for key in ("list", "file", "name") if config[f"prompts.{key}"] is not None)
    lacking = [name for name, chosen in evaluations.items() if chosen.metadata is None]
    return {"eval": "eval.prompts", "heldout": "eval.heldout"}[lacking[0]] if lacking else None


def load_policy(config: Config, rank: int, world_size: int, device: torch.device, ops: Ops) -> tuple[Config, Policy]:
    """The model as a run computes with it: LoRA, attention, fused operations; and the config with the attention chosen."""
    torch.manual_seed(config.run.seed)  # LoRA's initial weights
    lora, model = config.lora, config.model
    policy = Policy(
        model.path, model.dtype, device, lora.scope, lora.targets, lora.rank, lora.alpha, model.vae, model.config, model.variant
    )  # fmt: skip
    if lora.init is not None and not config.run.resume:
        started = start_from(policy.pipe, lora.init, lora.scope)
        if rank == 0:
            print(started, flush=True)
    policy.decode_batch, policy.offload_text_encoder = config.sample.decode_batch, config.model.offload_text_encoder
    for note in policy.notes if rank == 0 else ():
        print(note, flush=True)
    steps = config.rwr.num_timesteps if config.train.regression else config.sample.num_steps
    transitions = config.sample.num_samples // world_size // config.train.num_minibatches * steps
    num_rows = min(32, config.train.micro_batch, transitions) * (1 if config.training_guidance == 1 else 2)
    call = partial(policy.example_call, 2)
    choice = attention_backends.resolve(config.attention.backend, policy.unet, call, num_rows, policy.dtype, device)
    backend, measured = broadcast(choice)  # times differ from rank to rank
    attention_backends.set_attention(policy.unet, backend)
    if measured and rank == 0:
        print(measured, flush=True)
    config = config.replace(attention__backend=backend)
    if ops.backend == "triton":
        fuse(policy.unet, ops)
    if merges(lora.forward, lora.scope, policy.dtype, config.zero.stage):
        policy.merge_lora()
    if config.train.gradient_checkpointing:
        policy.checkpoint_gradients()
    return config, policy


def share_guidance(config: Config, policy: Policy) -> None:
    """Shares what guidance's branches have in common, where sampling and update both have two.

    LoRA layers may be among the shared modules, so whatever else changes LoRA layers comes first.
    """
    if config.model.share_guidance and config.sample.guidance_scale != 1 and config.training_guidance != 1:
        try:
            policy.share_guidance()
        except ValueError as error:
            raise ValueError(f"model.share_guidance=true: {error}; valid is false") from None


def make_engine(setup: Setup) -> Engine:
    """The engine of a run's optimizer, through which the policy's UNet runs from now on."""
    config, policy, zero = setup.config, setup.policy, setup.config.zero
    optimizer = make_optimizer(config.optimizer, policy.trainable_parameters(), config.train.learning_rate, on_host=zero.offload != "none")
    engine = Engine(
        policy.unet, optimizer, zero_stage=zero.stage, offload=zero.offload, options=setup.deepspeed,
        max_grad_norm=config.train.max_grad_norm, dtype=policy.dtype,
    )  # fmt: skip
    # backward in sampling is none of the engine's
    policy.attach(engine.module if setup.scores is None else policy.unet, partitioned=zero.stage == 3)
    if config.model.compile:
        (setup.split or policy.unet).compile()
    return engine


def make_cache(setup: Setup) -> Cache:
    """The run's activation cache; one that never holds anything if the UNet is not split."""
    if setup.split is None:
        return NO_CACHE
    config, policy = setup.config, setup.policy
    num_rows = 1 if config.sample.guidance_scale == 1 else 2
    device_mib, host_mib = activation_cache.budgets_mib(config.cache.device_mib, config.cache.host_mib, policy.device)
    return ActivationCache(setup.split, policy.example_call, num_rows, policy.device, device_mib, host_mib)
