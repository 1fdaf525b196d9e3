"""From a config to the parts of a run: options are checked, cheapest first, then the model is loaded, and the engine started."""

import logging
import math
import re
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ddpo_fast import dtypes, kernels
from ddpo_fast.algorithms import Regression
from ddpo_fast.claim import Claim
from ddpo_fast.config.conflicts import possible
from ddpo_fast.config.options import Config
from ddpo_fast.distributed import deepspeed_options
from ddpo_fast.distributed.engine import Engine, all_gather, broadcast, init_distributed
from ddpo_fast.distributed.optimizer import check_optimizer, make_optimizer
from ddpo_fast.distributed.partition import Partition
from ddpo_fast.distributed.ranks import Ranks
from ddpo_fast.kernels import Ops
from ddpo_fast.memory import Room, free_mib, local_ranks
from ddpo_fast.networks import attention_backends, quantized
from ddpo_fast.networks.fused_unet import fuse
from ddpo_fast.networks.initial_lora import start_from
from ddpo_fast.networks.scored_lora import score
from ddpo_fast.networks.sigmoid_gelu import use_sigmoid
from ddpo_fast.pipelines.folders import Model, find_model
from ddpo_fast.pipelines.skeleton import on_meta, tile
from ddpo_fast.pipelines.template import Asked
from ddpo_fast.planning.plan import resolve_sizes
from ddpo_fast.planning.work import Calls, Work, check_calls, check_guidance, check_steps, merges_lora, shares_guidance
from ddpo_fast.policy import Policy
from ddpo_fast.prompts import EvaluationSet, Prompts, evaluation_sets, load_prompts
from ddpo_fast.records import checkpoint, fingerprints
from ddpo_fast.records.metrics import check_installed, tracker_fault
from ddpo_fast.run import Directory, Run, Task
from ddpo_fast.schedule import Levels, Noising
from ddpo_fast.scoring.isolated import START_TIMEOUT_S
from ddpo_fast.scoring.scorer import open_reward
from ddpo_fast.updates import activation_cache
from ddpo_fast.updates.credit import Advantages, Weights
from ddpo_fast.updates.gradients import Gradients
from ddpo_fast.updates.objectives import Objective, OnNoised, OnTrajectory
from ddpo_fast.updates.replay import Replay
from ddpo_fast.updates.score_accumulation import ScoreAccumulation

logger = logging.getLogger("ddpo_fast")


@dataclass(frozen=True)
class Start:
    """What is known before the model's weights are read: where most wrong options are found."""

    config: Config
    """With the run's directory, its dtype and its sizes chosen."""
    model: Model
    task: Task
    deepspeed: dict
    """The user's own DeepSpeed options."""
    ranks: Ranks
    device: torch.device
    ops: Ops
    directory: Directory


def assemble(config: Config, claim: Claim | None = None) -> Run:
    """The parts of a config's run. Raises ValueError naming the option at fault.

    claim: takes the run's directory before the model is loaded; None if the parts are wanted without a run.
    """
    start = begin(config, claim)
    config, policy = load_policy(start.config, start.model, start.ranks, start.device, start.ops)
    all_ranks = policy.partition is not None  # each has a part of what is hashed
    made_of = _fingerprints(config, policy, start.task.prompts) if start.ranks.is_first or all_ranks else {}
    if config.run.resume and start.ranks.is_first:
        _say_changes(checkpoint.read_state(start.directory.resumed), made_of)
    objective, calls = _objective(config, policy, start.ops), Calls.of(config, policy.record, policy.pipe.scheduler)
    denoising, evaluating = policy.denoising(config.sample), policy.denoising(config.evaluation)
    layers = score(policy.network) if config.train.estimator == "score_accumulation" else []
    share_guidance(config, policy)
    split = activation_cache.split(config.cache.mode, policy) if possible("cache", config) else None
    room = Room(retry=config.zero.stage < 3)
    engine = _engine(config, policy, start.deepspeed)
    forward = policy.network if layers else engine.module  # score accumulation has its own backward
    policy.attach(forward, partitioned=config.zero.stage == 3)
    policy.check_output()
    if config.model.compile:
        (split or policy.network).compile()
    gradients: Gradients
    if layers:
        gradients = ScoreAccumulation(layers, engine, objective)
    else:
        longest = max(start.task.prompts.texts, key=len)
        cache = activation_cache.open_cache(split, policy, denoising.recording.num_branches, longest, config.cache)
        gradients = Replay(policy, engine, objective, cache, room, config.train.micro_batch)
    return Run(
        config, start.ranks, start.directory, start.task, policy, denoising, evaluating, calls, start.ops, objective, gradients, engine,
        room, made_of,
    )  # fmt: skip


def begin(config: Config, claim: Claim | None = None) -> Start:
    """Checks what parsing could not, cheapest first, and joins the ranks. Raises ValueError naming the option at fault."""
    started_in = Path.cwd()
    model = find(config)
    check_calls(config, model)
    check_steps(config, model.scheduler, model.record if model.family.process == "flow" else None)
    model.check_networks(Asked.of(config.sample))
    if config.model.vae_tiling:
        tile(on_meta(model.classes["vae"], model.configs["vae"]))
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
    ranks, device = init_distributed(timeout_s=1800 + call_s * (1 + num_calls))
    if fault := broadcast(tracker_fault(config.run.trackers) if ranks.is_first else None):
        raise ValueError(fault)
    ops = kernels.select(config.kernels.backend, device)
    attention_backends.require(config.attention.backend, device)
    quantized.require(config.model.quantize, device)
    lacking = _without_metadata(config, prompts, evaluations)
    Work.of(config).share(ranks.world_size)
    if config.eval.num_samples % ranks.world_size:
        raise ValueError(
            f"eval.num_samples={config.eval.num_samples}: valid is a multiple of {ranks.world_size} with {ranks.world_size} ranks"
        )
    config = config.replace(run__dir=_claim_directory(config, started_in, claim if ranks.is_first else None))
    reward = open_reward(config.reward.name, config.reward.kwargs, config.reward.timeout_s, config.reward.isolate, lacking)
    resumed = _checkpoint(config, ranks) if config.run.resume else None
    config = config.replace(model__dtype=dtypes.chosen(config.model.dtype, device.type == "cuda", model.family.dtype))
    free = all_gather(torch.tensor([free_mib(device, local_ranks())])).min().item()
    config = resolve_sizes(config, model, free, ranks.world_size, device.type == "cuda")
    directory = Directory(Path(config.run.dir), claim or Claim(), started_in, resumed)
    return Start(config, model, Task(prompts, evaluations, reward), deepspeed, ranks, device, ops, directory)


def find(config: Config) -> Model:
    """A config's model, of which the weights have not been read. Raises ValueError for one that cannot be trained as the config says."""
    options = config.model
    model = find_model(
        options.path, options.config, options.vae, options.variant, options.parts, options.arguments, options.quantize, options.unlisted
    )
    check_guidance(config, model.family)
    return model


def _without_metadata(config: Config, prompts: Prompts, evaluations: list[EvaluationSet]) -> str | None:
    """An option whose prompts have no metadata, which a reward may need; None if there is none."""
    if prompts.metadata is None:
        return next(f"prompts.{key}" for key in ("list", "file", "name") if config[f"prompts.{key}"] is not None)
    return next((chosen.kind.option for chosen in evaluations if chosen.prompts.metadata is None), None)


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


def _checkpoint(config: Config, ranks: Ranks) -> Path:
    """The checkpoint that a run continues from. Raises ValueError if none can be used, or if it needs another number of ranks."""
    found = checkpoint.find(Path(config.run.dir), ranks.rank)
    before = checkpoint.read_state(found)["world_size"]
    sharded = config.zero.stage == 3 or config.zero.stage > 0 and config.optimizer.name != "adamw"
    if sharded and ranks.world_size != before:
        raise ValueError(f"zero.stage={config.zero.stage}: the optimizer's state is sharded over {before} ranks; --resume wants as many")
    return found


def load_policy(config: Config, model: Model, ranks: Ranks, device: torch.device, ops: Ops) -> tuple[Config, Policy]:
    """The model as a run computes with it: LoRA, attention, fused operations; and the config with the attention chosen."""
    torch.manual_seed(config.run.seed)  # LoRA's initial weights
    lora = config.lora
    partition = Partition(config.zero.offload == "all", lora.scope == "none") if config.zero.stage == 3 else None
    encodes_on = torch.device("cpu") if config.model.encode_on_host else None
    policy = Policy(model, config.model.dtype, device, lora, encodes_on, partition)
    policy.decode_batch, policy.offload_text_encoder = config.sample.decode_batch, config.model.offload_text_encoder
    policy.offload_vae = config.model.offload_vae
    if policy.offload_vae:
        policy.pipe.vae.to("cpu")
    if config.model.vae_tiling:
        tile(policy.pipe.vae)
    policy.record(Asked.of(config.sample))
    if lora.init is not None and not config.run.resume:
        started = start_from(policy.pipe, lora.init, lora.scope)
        if ranks.is_first:
            print(started, flush=True)
    policy.remember_output()
    for note in policy.notes if ranks.is_first else ():
        print(note, flush=True)
    work = Work.of(config, Calls.of(config, policy.record, model.scheduler))
    num_rows = min(32, work.micro_batch, work.update_transitions(ranks.world_size)) * work.trained_rows
    call = partial(policy.example_call, 2)
    choice = attention_backends.resolve(config.attention.backend, policy.network, call, num_rows, policy.dtype, device)
    backend, measured = broadcast(choice)  # times differ from rank to rank
    attention_backends.set_attention(policy.network, backend)
    if measured and ranks.is_first:
        print(measured, flush=True)
    config = config.replace(attention__backend=backend)
    if ops.backend == "triton":
        fuse(policy.network, ops)
    elif config.kernels.backend == "auto" and policy.dtype == torch.float32:  # half precision would round what a sigmoid is given
        use_sigmoid(policy.network)
    if merges_lora(config, policy.dtype):
        policy.merge_lora()
    if config.train.gradient_checkpointing:
        policy.checkpoint_gradients()
    return config, policy


def share_guidance(config: Config, policy: Policy) -> None:
    """Shares what guidance's branches have in common, where every call has two.

    LoRA layers may be among the shared modules, so whatever else changes LoRA layers comes first.
    """
    if shares_guidance(config) and policy.family.network == "unet":  # in a transformer text meets the picture in the first block
        try:
            policy.share_guidance()
        except ValueError as error:
            raise ValueError(f"model.share_guidance=true: {error}; valid is false") from None


def _objective(config: Config, policy: Policy, ops: Ops) -> Objective:
    """The config's algorithm on this model."""
    algorithm, train = config.algorithm, config.train
    if isinstance(algorithm, Regression):
        scheduler, asked = policy.pipe.scheduler, replace(Asked.of(config.sample), guidance_scale=config.training_guidance)
        if policy.family.process == "flow":
            asked = replace(asked, num_steps=scheduler.config.num_train_timesteps)
        recording = policy.record(asked)
        noising = Noising.of(Levels.of_training(recording, scheduler), policy.device)
        return OnNoised(algorithm, Weights(algorithm), noising, recording, config.run.seed)
    credit = Advantages.of_options(config.baseline, train.advantage_clip)
    latent_dim = math.prod(policy.record(Asked.of(config.sample)).shape)
    return OnTrajectory(algorithm, credit, ops, train.clip_range, latent_dim, train.kl_coefficient)


def _engine(config: Config, policy: Policy, deepspeed: dict) -> Engine:
    zero, train = config.zero, config.train
    if policy.partition is not None:
        policy.partition.leave()
    optimizer = make_optimizer(config.optimizer, policy.trainable_parameters(), train.learning_rate, on_host=zero.offload != "none")
    return Engine(
        policy.network, optimizer, zero_stage=zero.stage, offload=zero.offload, options=deepspeed, max_grad_norm=train.max_grad_norm,
        dtype=policy.dtype,
    )  # fmt: skip


def _fingerprints(config: Config, policy: Policy, prompts: Prompts) -> dict[str, str]:
    """A hash of each thing that a run is made of, by the option and what of it."""
    option = next((name for name in ("list", "file") if config[f"prompts.{name}"] is not None), "name")
    found = fingerprints.of_text(f"prompts.{option} (the prompts)", vars(prompts))
    found |= fingerprints.of_reward(config.reward.name, config.reward.kwargs)
    if config.deepspeed.config is not None:
        found |= fingerprints.of_text("deepspeed.config (the file)", Path(config.deepspeed.config).read_text(encoding="utf-8"))
    found["model.path (how its pipeline calls its network)"] = policy.record(Asked.of(config.sample)).digest
    return found | fingerprints.of_model(policy.pipe, policy.family.network, config.model.vae is None)


def _say_changes(state: dict, now: dict[str, str]) -> None:
    """Warns, in a line each, of what the run is made of and was not up to the checkpoint that has this `state`."""
    for what in fingerprints.changes(now, state.get("fingerprints", {})):
        logger.warning("%s: it has changed since iteration %d; the run goes on with what is there now", what, state["iteration"])
