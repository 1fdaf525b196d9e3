"""DDPO (arXiv:2305.13301): sample pictures, score them, raise the probability of the better ones.

    deepspeed ddpo_fast/train.py --config configs/X.yaml --section.key value ...

`train` is the whole algorithm, top to bottom; `update` is its PPO pass, `update_by_scores` what is left of it where sampling has taken
the gradient. Shape letters: B samples of this rank, S denoising steps.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a file: sys.path[0] is this folder, whose module names are not meant for the top level
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from ddpo_fast.config import parse_or_exit
    from ddpo_fast.preemption import die_with_launcher

    die_with_launcher()
    parse_or_exit(sys.argv[1:])  # --help and a wrong option are answered before the imports below take their seconds

import dataclasses
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

# on a CPU with AVX512-BF16 it warns that a 4-bit kernel cannot be downloaded, which nothing here uses
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import torch
from torch import Tensor
from tqdm import tqdm

from ddpo_fast import activation_cache, attention_backends, checkpoint, deepspeed_options, kernels
from ddpo_fast.activation_cache import NO_CACHE, ActivationCache, Cache
from ddpo_fast.advantages import PromptBaseline, make_baseline
from ddpo_fast.config import Config, parse_or_exit, user_error
from ddpo_fast.ddim import DDIMSchedule
from ddpo_fast.engine import Engine, WrongCheckpoint, all_gather, all_reduce, any_rank, broadcast, init_distributed, is_lost_rank
from ddpo_fast.files import new_folder, unless_disk_full, write_text
from ddpo_fast.fused_unet import fuse
from ddpo_fast.kernels import Ops
from ddpo_fast.lora import merges
from ddpo_fast.losses import UpdateStatistics, kl_loss, scaled_clip_range
from ddpo_fast.memory import Room, free_mib, local_ranks
from ddpo_fast.metrics import MetricsWriter, StageTimer, check_trackers, diversity, image_grid, peak_memory_mib, save_grid
from ddpo_fast.model_card import write_card
from ddpo_fast.optimizer import check_optimizer, make_optimizer
from ddpo_fast.pipelines import check_model
from ddpo_fast.plan import make_plan, plan_text, resolve_sizes
from ddpo_fast.policy import Policy
from ddpo_fast.preemption import StopRequest
from ddpo_fast.prompts import draw_prompts, evaluation_prompts, load_prompts
from ddpo_fast.report import environment, write_report
from ddpo_fast.rewards import Reward, Scorer, open_reward
from ddpo_fast.rewards.isolated import START_TIMEOUT_S
from ddpo_fast.rollout import EVAL_SAMPLE_ID, HELDOUT_SAMPLE_ID, MicroBatch, Pairs, Rollout, generate, micro_batches, passes
from ddpo_fast.rwr import NoisingSchedule, denoising_loss, reward_weights
from ddpo_fast.score_accumulation import ScoreAccumulator
from ddpo_fast.split_unet import SplitUNet

logger = logging.getLogger("ddpo_fast")


@dataclass(frozen=True)
class Setup:
    """What a run is made of once the options have been found good."""

    config: Config
    run_dir: Path
    rank: int
    world_size: int
    prompts: list[str]
    prompt_weights: list[float] | None
    """How often each is drawn, relative to the others; None if all are alike."""
    evaluations: dict[str, list[str]]
    """The prompts of each picture of the fixed evaluation sets: `eval` and, with eval.heldout, `heldout`."""
    reward: Reward
    policy: Policy
    schedule: DDIMSchedule
    ops: Ops
    split: SplitUNet | None
    """Where the activation cache takes up the UNet; None without one."""
    clip_range: float
    """`train.clip_range` scaled to this model's latents."""
    scores: ScoreAccumulator | None
    """What takes the gradient during sampling; None where `update` does."""
    noising: NoisingSchedule | None
    """What reward-weighted regression trains on; None for the policy gradient."""
    room: Room
    """What has been found to fit into memory."""
    checkpoint: Path | None
    """What to continue from; None for a new run."""
    deepspeed: dict
    """The user's own DeepSpeed options."""


def main(argv: list[str] | None = None) -> None:
    """Runs a command line. A wrong option is one line on standard error and exit code 2; a fault is exit code 1."""
    config = parse_or_exit(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        if config.run.plan is not None:
            if os.environ.get("RANK", "0") == "0":
                check_model(config.model.path, config.model.config, config.model.vae)
                print(plan_text(make_plan(config)), flush=True)
            return
        setup = prepare(config)
    except ValueError as error:
        user_error(error)
    try:
        with StopRequest() as stop:
            train(setup, stop)
    except WrongCheckpoint as error:
        user_error(error)
    except BadRewards as error:
        sys.exit(f"error: {error}" if setup.rank == 0 else 1)
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        sys.exit(f"error (rank {setup.rank}): another rank is gone ({str(error).splitlines()[0]}); --resume continues the run")


class BadRewards(RuntimeError):
    """Too few samples have a reward to learn from."""


def prepare(config: Config) -> Setup:
    """Checks what parsing could not, cheapest first, then loads the model. Raises ValueError naming the option at fault."""
    check_model(config.model.path, config.model.config, config.model.vae)
    prompts, prompt_weights = load_prompts(config.prompts.name, config.prompts.file, config.prompts.limit, config.prompts.list)
    count, heldout = config.eval.num_samples, config.eval.heldout
    evaluations = {"eval": evaluation_prompts(config.eval.prompts or prompts, count)}
    if heldout is not None:
        evaluations["heldout"] = evaluation_prompts(heldout, count)
        if seen := sorted(set(evaluations["heldout"]) & set(prompts)):
            raise ValueError(f"eval.heldout={heldout}: {seen[0]!r} is a training prompt; valid are prompts that are none")
    check_optimizer(config.optimizer.name)
    check_trackers(config.run.trackers)
    deepspeed = {}
    if config.deepspeed.config is not None:
        ours = deepspeed_options.stated(config.zero.stage, config.zero.offload, config.train.max_grad_norm)
        deepspeed = deepspeed_options.read(config.deepspeed.config, ours)
    num_calls = config.sample.num_samples if config.sample.batch_size == "auto" else config.sample.num_samples // config.sample.batch_size
    call_s = config.reward.timeout_s + config.reward.isolate * max(START_TIMEOUT_S, config.reward.timeout_s)
    rank, world_size, device = init_distributed(timeout_s=1800 + call_s * (1 + num_calls))
    ops = kernels.select(config.kernels.backend, device)
    reward = open_reward(config.reward.name, config.reward.kwargs, config.reward.timeout_s, config.reward.isolate)
    for option, multiple in (("sample.num_samples", world_size * config.train.num_minibatches), ("eval.num_samples", world_size)):
        if config[option] % multiple:
            raise ValueError(f"{option}={config[option]}: valid is a multiple of {multiple} with {world_size} ranks")
    resumed = checkpoint.find(Path(config.run.dir), rank) if config.run.resume else None
    if resumed and (config.zero.stage == 3 or config.zero.stage > 0 and config.optimizer.name != "adamw"):
        before = checkpoint.read_state(resumed)["world_size"]
        if world_size != before:
            raise ValueError(
                f"zero.stage={config.zero.stage}: the optimizer's state is sharded over {before} ranks; --resume wants as many"
            )
    if config.model.dtype == "auto":
        config = config.replace(model__dtype="fp16" if device.type == "cuda" else "fp32")
    free = all_gather(torch.tensor([free_mib(device, local_ranks())])).min().item()
    config = resolve_sizes(config, free, world_size, device.type == "cuda")
    reward_name = re.sub(r"[^\w.-]+", "-", Path(config.reward.name).name)[:100]
    run_dir = config.run.dir or f"runs/{reward_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = config.replace(run__dir=broadcast(run_dir))
    torch.manual_seed(config.run.seed)  # LoRA's initial weights
    lora = config.lora
    model = config.model
    policy = Policy(model.path, model.dtype, device, lora.scope, lora.targets, lora.rank, lora.alpha, model.vae, model.config)
    policy.decode_batch, policy.offload_text_encoder = config.sample.decode_batch, config.model.offload_text_encoder
    regression = config.train.algorithm in ("rwr", "rwr_sparse")
    steps = config.rwr.num_timesteps if regression else config.sample.num_steps
    transitions = config.sample.num_samples // world_size // config.train.num_minibatches * steps
    num_rows = min(32, config.train.micro_batch, transitions) * (1 if training_guidance(config) == 1 else 2)
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
    schedule = DDIMSchedule.from_scheduler(policy.pipe.scheduler, config.sample.num_steps, config.sample.eta, device)
    clip_range = scaled_clip_range(config.train.clip_range, math.prod(policy.latent_shape))
    noising = NoisingSchedule.from_scheduler(policy.pipe.scheduler, device) if regression else None
    if regression and config.rwr.num_timesteps > noising.num_steps:
        raise ValueError(f"rwr.num_timesteps={config.rwr.num_timesteps}: valid is 1 to {noising.num_steps}, the model's training steps")
    scores = None
    if config.train.estimator == "score_accumulation":
        scores = ScoreAccumulator(policy.unet, ops, config.sample.guidance_scale, clip_range)
    if config.model.share_guidance and config.sample.guidance_scale != 1 and training_guidance(config) != 1:
        try:
            policy.share_guidance()
        except ValueError as error:
            raise ValueError(f"model.share_guidance=true: {error}; valid is false") from None
    cached = scores is None and not regression and config.zero.stage < 3
    split = activation_cache.split(config.cache.mode, policy) if cached else None
    room = Room(retry=config.zero.stage < 3)
    return Setup(
        config, Path(config.run.dir), rank, world_size, prompts, prompt_weights, evaluations, reward, policy, schedule, ops, split,
        clip_range, scores, noising, room, resumed, deepspeed,
    )  # fmt: skip


def train(setup: Setup, stop: StopRequest) -> None:
    """The run: iteration 0 evaluates the untrained model, every later one improves it; metrics, pictures and checkpoints as it goes.

    Asked to stop, it saves a checkpoint when the iteration is done and returns.
    """
    config, rank = setup.config, setup.rank
    options = config.baseline
    baseline = make_baseline(options.name, options.buffer_size, options.min_count, options.std)
    engine = make_engine(setup)
    cache = make_cache(setup)
    state = {"iteration": -1, "device_hours": 0.0, "bad_rewards": 0}
    if setup.checkpoint is not None:
        state = checkpoint.load(setup.checkpoint, engine)
        baseline.load_state_dict(state["baseline"])
    writer = _open_run(setup, engine, cache, state["iteration"]) if rank == 0 else None
    last = config.run.iterations
    bar = tqdm(total=last, initial=max(state["iteration"], 0), desc="iterations", unit="it", disable=rank != 0, dynamic_ncols=True)

    for iteration in range(state["iteration"] + 1, last + 1):
        timer, row = StageTimer(setup.policy.device), dict.fromkeys(METRICS)
        with timer("total"):
            if iteration > 0:
                try:
                    row |= improve(setup, engine, cache, baseline, timer, iteration)
                except BadRewards:  # nothing has been updated: the state is still that after the iteration before
                    saved = setup.checkpoint is not None and setup.checkpoint.name == str(state["iteration"])
                    if state["iteration"] % config.run.checkpoint_every and not saved:
                        _save(setup, engine, baseline, state)
                    raise
            if iteration % config.eval.every == 0 or iteration == last:
                with timer("eval"):
                    row |= evaluate(setup, writer, iteration, state)
        state["iteration"] = iteration
        state["bad_rewards"] += row["bad_rewards"] or 0
        state["device_hours"] += timer.seconds["total"] * setup.world_size / 3600
        row |= {
            "iteration": iteration,
            "samples": iteration * config.sample.num_samples,
            "bad_rewards": state["bad_rewards"],
            "device_hours": state["device_hours"],
            "peak_memory_mib": peak_memory_mib(setup.policy.device),
            **{f"time_{stage}_s": timer.seconds.get(stage, 0.0) for stage in ("sample", "reward", "train", "eval", "total")},
        }
        if rank == 0:
            with unless_disk_full("the metrics"):
                writer.write(row)
            tqdm.write(_line(row))
        stopping = any_rank(stop.requested)
        with timer("save"):
            if config.run.keep_best and iteration > 0 and row[f"{_best_by(setup)}_reward_mean"] is not None:
                _keep_best(setup, engine, state)  # before the checkpoint that says so
            if iteration % config.run.checkpoint_every == 0 or iteration == last or stopping:
                _save(setup, engine, baseline, state)
                if iteration < last:
                    _publish(setup, engine)
        state["device_hours"] += timer.seconds["save"] * setup.world_size / 3600
        bar.update(iteration > 0)
        if stopping and iteration < last:
            if rank == 0:
                writer.close()
                tqdm.write(f"stopped after iteration {iteration}; --run.dir={config.run.dir} --resume continues")
            bar.close()
            return
    bar.close()
    _publish(setup, engine)
    if rank == 0:
        writer.close()
        _print_result(setup, state)


def _save(setup: Setup, engine: Engine, baseline: PromptBaseline, state: dict) -> None:
    everything = state | {"world_size": setup.world_size, "baseline": baseline.state_dict()}
    checkpoint.save(setup.run_dir, state["iteration"], engine, everything, setup.rank, setup.config.run.keep_checkpoints)


def improve(setup: Setup, engine: Engine, cache: Cache, baseline: PromptBaseline, timer: StageTimer, iteration: int) -> dict[str, float]:
    """One iteration: sample under the current policy, score, turn rewards into advantages or weights, update. Returns its metrics.

    Raises BadRewards, before anything is updated, when too many samples have no reward.
    """
    config, num_samples = setup.config, setup.config.sample.num_samples
    samples_per_prompt = config.prompts.samples_per_prompt
    prompts = draw_prompts(setup.prompts, num_samples, samples_per_prompt, config.run.seed, iteration, setup.prompt_weights)
    mine = _block(num_samples, setup.rank, setup.world_size)
    first_id = first_sample_id(setup, iteration)
    cache.begin(len(prompts[mine]), setup.schedule.num_steps, updates(setup, iteration))
    if setup.scores is not None:
        begin_scores(setup, engine, iteration)
    rollout, rewards, _ = sample(setup, timer, first_id, prompts[mine], "sample", cache, setup.scores)

    rewards = all_gather(rewards)
    good = rewards[rewards.isfinite()]
    bad_rewards = num_samples - len(good)
    if bad_rewards > config.reward.max_bad_fraction * num_samples or not len(good):
        raise BadRewards(
            f"iteration {iteration}: {bad_rewards} of {num_samples} samples got no finite reward, and "
            f"reward.max_bad_fraction={config.reward.max_bad_fraction}; mend the reward, then --resume continues from the newest checkpoint"
        )
    if setup.noising is None:
        limit = config.train.advantage_clip
        advantages = baseline.update(prompts, rewards).clamp(-limit, limit)
    else:
        sparse, options = config.train.algorithm == "rwr_sparse", config.rwr
        by_prompt = options.population == "prompt"
        advantages = reward_weights(prompts, rewards, sparse, options.inverse_temperature, options.percentile, by_prompt)
    advantages = advantages[mine].float().to(setup.policy.device)
    if rollout is not None:
        rollout.good &= rewards[mine].isfinite().to(rollout.good.device)  # what has no reward is in no part of the loss

    with timer("train"):
        if setup.scores is None:
            row = update(setup, engine, rollout, advantages, iteration, cache)
        else:
            row = update_by_scores(setup, engine, advantages, iteration)
    _warn_of_ratio_error(setup, row)
    return row | {
        "reward_mean": good.mean().item(),
        "reward_std": good.std(correction=0).item(),
        "bad_rewards": bad_rewards,
        "images_per_s": num_samples / timer.seconds["sample"],
        "transitions_per_s": row["transitions"] / (timer.seconds["train"] + (setup.scores is not None) * timer.seconds["sample"]),
        "learning_rate": config.train.learning_rate,
        "cache_hit_fraction": cache.hits / max(1, cache.reads),
    }


def sample(
    setup: Setup,
    timer: StageTimer,
    first_id: int,
    prompts: list[str],
    stage: str,
    cache: Cache = NO_CACHE,
    scores: ScoreAccumulator | None = None,
) -> tuple[Rollout | None, Tensor, Tensor]:
    """Pictures for `prompts`, numbered from `first_id`, and their rewards; what the update will need of the UNet goes into the cache.

    A batch is scored while the next one is denoised; the timer's "reward" is what the loop waited for that.
    Returns the Rollout, rewards (B,) fp64 and images (B, 3, H, W) uint8, the latter two on the CPU. A sample that is not good gets no
    reward. With `scores`, which take the gradient at once, no trajectory is kept and the Rollout is None.
    """
    config, policy, schedule = setup.config, setup.policy, setup.schedule
    seed, guidance_scale = config.run.seed, config.sample.guidance_scale
    rollouts, pictures, good, scorer, start = [], [], [], Scorer(setup.reward), 0
    total = len(prompts) * config.sample.num_steps
    with tqdm(total=total, desc=f"  {stage}", unit="step", leave=False, disable=setup.rank != 0, dynamic_ncols=True) as bar:

        def denoise(size: int) -> tuple[Rollout, Tensor]:
            batch = prompts[start : start + size]
            ids = torch.arange(first_id + start, first_id + start + len(batch), device=policy.device)
            if scores is not None:
                scores.begin_batch(start, len(batch))
            filling = partial(cache.filling, slice(start, start + len(batch)))
            return generate(policy, schedule, setup.ops, ids, batch, seed, guidance_scale, bar.update, filling, scores)

        while start < len(prompts):
            with timer("sample"):
                rollout, images = setup.room.attempt("sample.batch_size", min(config.sample.batch_size, len(prompts) - start), denoise)
                rows = slice(start, start + len(images))
                if scores is None:
                    cache.forget(rows, ~rollout.good)
                    rollouts.append(rollout)
                else:
                    scores.forget(~rollout.good)
                pictures.append((images.nan_to_num() * 255).round().to("cpu", torch.uint8))
                good.append(rollout.good.cpu())
            with timer("reward"):
                scorer.add(images, prompts[rows])
            start = rows.stop
    with timer("reward"):
        rewards = scorer.rewards().masked_fill(~torch.cat(good), torch.nan)
    return Rollout.cat(rollouts) if scores is None else None, rewards, torch.cat(pictures)


def update(setup: Setup, engine: Engine, rollout: Rollout, advantages: Tensor, iteration: int, cache: Cache = NO_CACHE) -> dict[str, float]:
    """One iteration's optimizer updates: inner epochs x minibatches of samples x micro-batches of transitions.

    The gradient of an update is the mean over all of its minibatch's transitions on all ranks. advantages: (B,) fp32; of reward-weighted
    regression the weights, its transitions are (sample, training timestep).
    """
    options, (num_steps, fraction) = setup.config.train, trained_steps(setup)
    statistics, grad_norms = UpdateStatistics(num_steps, rollout.good), []
    bar = tqdm(desc="  train", unit="transition", leave=False, disable=setup.rank != 0, dynamic_ncols=True)
    bar.total = options.inner_epochs * len(advantages) * max(1, round(fraction * num_steps))
    for epoch, index, pairs in updates(setup, iteration):
        if setup.noising is None:
            gradient = partial(accumulate_gradient, setup, engine, rollout, advantages, cache, pairs, bar.update)
        else:
            gradient = partial(accumulate_denoising_gradient, setup, engine, rollout, advantages, iteration, epoch, pairs, bar.update)
        for part, figures in setup.room.attempt("train.micro_batch", min(options.micro_batch, len(pairs[0])), gradient):
            statistics.add(part.rows, part.steps, figures, first_minibatch=epoch == index == 0)
        grad_norms.append(engine.step())
    bar.close()
    return _update_metrics(engine, statistics, grad_norms, iteration)


def accumulate_gradient(
    setup: Setup,
    engine: Engine,
    rollout: Rollout,
    advantages: Tensor,
    cache: Cache,
    pairs: Pairs,
    progress: Callable[[int], object],
    size: int,
) -> list[tuple[MicroBatch, Tensor]]:
    """Gives the engine the gradient of one update's mean loss, and nothing else, in micro-batches of at most `size` transitions.

    Returns the micro-batches, each with the statistics (4, B) of its transitions. `progress(n)` is told how many are done.
    """
    config, policy, schedule, done = setup.config, setup.policy, setup.schedule, []
    guidance_scale, texts = config.sample.guidance_scale, text_embeds(policy, rollout)
    weight, kl_coefficient = engine.loss_scale / len(pairs[0]), config.train.kl_coefficient
    engine.forget_gradient()
    cache.forget_fetched()
    parts = list(micro_batches(*pairs, size, schedule.timesteps.cpu(), guidance_scale != 1, policy.device))
    for part, next_part in zip_longest(parts, parts[1:]):
        latents = rollout.latents[part.unet_rows, part.unet_steps].to(policy.dtype)
        inputs = latents, part.timesteps, *(text[part.embed_rows] for text in texts)
        with cache.reading(part, next_part, lambda rows: policy.predict_noise(*(tensor[rows] for tensor in inputs))):  # noqa: B023
            reference_noise_pred = policy.predict_reference_noise(*inputs) if kl_coefficient else None
            noise_pred = policy.predict_noise(*inputs)
        loss, figures = setup.ops.ppo_loss(
            noise_pred, rollout.latents, rollout.log_probs, advantages, schedule.coefficients, part.rows, part.steps,
            guidance_scale, setup.clip_range, weight, config.train.algorithm == "ddpo_sf",
        )  # fmt: skip
        if kl_coefficient:
            kl, divergences = kl_loss(
                noise_pred, reference_noise_pred, rollout.latents, rollout.good, schedule.coefficients, part.rows, part.steps,
                guidance_scale, weight * kl_coefficient,
            )  # fmt: skip
            loss, figures = loss + kl, torch.cat([figures, divergences[None]])
        engine.backward(loss, last=next_part is None)
        done.append((part, figures))
        progress(len(part.rows))
    return done


def accumulate_denoising_gradient(
    setup: Setup,
    engine: Engine,
    rollout: Rollout,
    weights: Tensor,
    iteration: int,
    epoch: int,
    pairs: Pairs,
    progress: Callable[[int], object],
    size: int,
) -> list[tuple[MicroBatch, Tensor]]:
    """`accumulate_gradient` of reward-weighted regression: final latents, noised, are to be denoised. The statistics are (1, B).

    pairs: samples and training timesteps. weights: (B,) fp32, of this rank's samples.
    """
    policy, noising, guidance_scale, done = setup.policy, setup.noising, training_guidance(setup.config), []
    texts, guided = text_embeds(policy, rollout), guidance_scale != 1
    first_id = first_sample_id(setup, iteration)
    engine.forget_gradient()
    parts = list(micro_batches(*pairs, size, torch.arange(noising.num_steps), guided, policy.device))
    for number, part in enumerate(parts):
        x0, ids = rollout.latents[part.rows, -1], first_id + part.rows
        x_t, target = noising.noised(x0, part.steps, setup.config.run.seed, ids, epoch)
        unet_input = x_t.to(policy.dtype).repeat(1 + guided, 1, 1, 1)
        noise_pred = policy.predict_noise(unet_input, part.timesteps, *(text[part.embed_rows] for text in texts))
        scale = engine.loss_scale / len(pairs[0])
        loss, figures = denoising_loss(noise_pred, target, weights[part.rows], guidance_scale, scale)
        engine.backward(loss, last=number == len(parts) - 1)
        done.append((part, figures))
        progress(len(part.rows))
    return done


def text_embeds(policy: Policy, rollout: Rollout) -> list[Tensor]:
    """What the UNet is given of the empty prompt and, after it, of each sample's: embeddings and, of SDXL, pooled ones."""
    texts = [torch.cat([policy.uncond_embeds, rollout.prompt_embeds])]
    if rollout.pooled_embeds is not None:
        texts.append(torch.cat([policy.uncond_pooled_embeds, rollout.pooled_embeds]))
    return texts


def begin_scores(setup: Setup, engine: Engine, iteration: int) -> None:
    """Readies `setup.scores` for the iteration's samples: the transitions that `update` would train on in its first and only pass."""
    ((_, _, pairs),) = updates(setup, iteration)
    num_samples = setup.config.sample.num_samples // setup.world_size
    setup.scores.begin(*pairs, num_samples, setup.schedule.num_steps, engine.loss_scale / len(pairs[0]))


def update_by_scores(setup: Setup, engine: Engine, advantages: Tensor, iteration: int) -> dict[str, float]:
    """An iteration's only optimizer update, of the gradient that sampling has summed up in `setup.scores`; no UNet call.

    The gradient is that of `update` with one minibatch and one epoch, where every ratio is 1. advantages: (B,) fp32.
    """
    statistics = UpdateStatistics(setup.schedule.num_steps, setup.scores.good)
    samples, steps, figures = setup.scores.transitions()
    losses = figures[0] if setup.config.train.algorithm == "ddpo_sf" else -figures[1]
    statistics.add(samples, steps, torch.stack([advantages[samples] * losses, *figures[1:]]), first_minibatch=True)
    # the weights' gradient goes to the engine as that of a loss: sum p g
    engine.backward(sum((weight * gradient).sum() for weight, gradient in setup.scores.combine(advantages)), last=True)
    return _update_metrics(engine, statistics, [engine.step()], iteration)


def _update_metrics(engine: Engine, statistics: UpdateStatistics, grad_norms: list[float], iteration: int) -> dict[str, float]:
    """What the updates of an iteration were like. Raises FloatingPointError if none had a finite gradient."""
    finite = [norm for norm in grad_norms if math.isfinite(norm)]
    if not finite and engine.dtype != torch.float16:  # fp16 may need some updates to find its loss scale
        raise FloatingPointError(f"iteration {iteration}: no update had a finite gradient; a lower train.learning_rate may help")
    return statistics.summary(all_reduce) | {
        "grad_norm": sum(finite) / len(finite) if finite else None,
        "skipped_updates": len(grad_norms) - len(finite),
    }


def updates(setup: Setup, iteration: int) -> Iterator[tuple[int, int, Pairs]]:
    """This rank's part of every update of an iteration, see `passes`."""
    options, num_samples, (num_steps, fraction) = setup.config.train, setup.config.sample.num_samples, trained_steps(setup)
    return passes(
        num_samples, num_steps, options.inner_epochs, options.num_minibatches, fraction, setup.rank, setup.world_size,
        (setup.config.run.seed, iteration),
    )  # fmt: skip


def trained_steps(setup: Setup) -> tuple[int, float]:
    """How many steps, or of reward-weighted regression training timesteps, a sample has, and the share that a pass trains on."""
    if setup.noising is None:
        return setup.schedule.num_steps, setup.config.train.timestep_fraction
    return setup.noising.num_steps, setup.config.rwr.num_timesteps / setup.noising.num_steps


def training_guidance(config: Config) -> float:
    """The guidance scale of the update's loss; 1 is none."""
    own = config.rwr.guidance_scale if config.train.algorithm in ("rwr", "rwr_sparse") else None
    return config.sample.guidance_scale if own is None else own


def first_sample_id(setup: Setup, iteration: int) -> int:
    """The number of this rank's first sample of an iteration; the others follow."""
    num_samples = setup.config.sample.num_samples
    return (iteration - 1) * num_samples + _block(num_samples, setup.rank, setup.world_size).start


def evaluate(setup: Setup, writer: MetricsWriter, iteration: int, state: dict) -> dict[str, float]:
    """Rewards of the fixed evaluation sets (same prompts and noise every time); their pictures go to <run_dir>/images/.

    Raises BadRewards when no picture of a set gets a number from the untrained model.
    """
    row = {}
    for name, prompts in setup.evaluations.items():
        mine = _block(len(prompts), setup.rank, setup.world_size)
        first_id = {"eval": EVAL_SAMPLE_ID, "heldout": HELDOUT_SAMPLE_ID}[name] + mine.start
        _, rewards, images = sample(setup, StageTimer(setup.policy.device), first_id, prompts[mine], name)
        rewards, images = all_gather(rewards), all_gather(images)
        if setup.rank == 0:
            shown = slice(48)
            grid = image_grid(images[shown], prompts[shown], rewards[shown])
            with unless_disk_full("the pictures"):
                save_grid(grid, setup.run_dir / "images" / f"{'iteration' if name == 'eval' else name}_{iteration:05d}.png")
                writer.write_images(grid, "evaluation" if name == "eval" else name, iteration)
        finite = rewards.isfinite()
        good = rewards[finite]
        if not len(good):
            if iteration == 0:
                raise BadRewards(f"the reward gave no finite number for any picture of the untrained model ({name} prompts)")
            continue
        result = {"reward_mean": good.mean().item(), "reward_std": good.std(correction=0).item(), "samples": len(good)}
        result["diversity"] = diversity(images[finite])
        result = {f"{name}_{key}": value for key, value in result.items()}
        state.setdefault(f"{name}_before", result)
        state[f"{name}_after"] = result | {"iteration": iteration}
        row |= result
    return row


METRICS = (
    "iteration samples reward_mean reward_std eval_reward_mean eval_reward_std eval_samples eval_diversity heldout_reward_mean "
    "heldout_reward_std heldout_samples heldout_diversity loss ratio_error ratio_error_step clip_fraction approx_kl kl_to_reference "
    "grad_norm skipped_updates learning_rate time_sample_s time_reward_s time_train_s time_eval_s time_total_s images_per_s transitions "
    "transitions_per_s device_hours peak_memory_mib cache_hit_fraction bad_rewards"
).split()
"""The keys of a row of metrics.jsonl; those that an iteration has no value for are null."""


def _block(count: int, rank: int, world_size: int) -> slice:
    """The part of `count` samples that a rank makes."""
    return slice(rank * count // world_size, (rank + 1) * count // world_size)


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


def _open_run(setup: Setup, engine: Engine, cache: Cache, resumed_at: int) -> MetricsWriter:
    config, policy = setup.config, setup.policy
    bounds = f"clip range {setup.clip_range:.3g} at this model's {math.prod(policy.latent_shape):,} latent elements"
    if setup.noising is not None:
        bounds = f"{config.rwr.num_timesteps} of {setup.noising.num_steps} timesteps a sample and pass"
    (setup.run_dir / "images").mkdir(parents=True, exist_ok=True)
    write_text(setup.run_dir / "config.yaml", config.replace(run__resume=False).to_yaml())
    write_text(setup.run_dir / "environment.json", json.dumps(environment(setup.world_size), indent=1))
    print(
        f"{config.run.dir}: {config.train.algorithm} for {config.reward.name} on {config.model.path}\n"
        f"{engine.num_trainable:,} trainable parameters, {config.model.dtype}, {setup.world_size} x {policy.device.type}, "
        f"{setup.ops.backend} kernels, {config.sample.num_samples} samples x {config.sample.num_steps} steps an iteration, {bounds}",
        flush=True,
    )
    if cache is not NO_CACHE:
        print(cache.plan_text(updates(setup, max(1, resumed_at + 1)), policy.dtype), flush=True)
    if config.run.resume:
        print(f"resumed after iteration {resumed_at}", flush=True)
    return MetricsWriter(setup.run_dir, resumed_at, config.run.trackers, dataclasses.asdict(config))


def _best_by(setup: Setup) -> str:
    """The evaluation that decides which weights are the best: by held-out prompts, where there are any."""
    return list(setup.evaluations)[-1]


def _keep_best(setup: Setup, engine: Engine, state: dict) -> None:
    """Keeps the weights, as <run_dir>/best/, if none before had as high a reward in the evaluation that decides."""
    name = _best_by(setup)
    now, best = state[f"{name}_after"], state.get(f"{name}_best")
    if best is not None and now[f"{name}_reward_mean"] <= best[f"{name}_reward_mean"]:
        return
    state[f"{name}_best"] = now
    with engine.gathered(), unless_disk_full("the best weights"):
        if setup.rank == 0:
            with new_folder(setup.run_dir / "best") as folder:
                setup.policy.export(folder)
                write_text(folder / "evaluation.json", json.dumps(now, indent=1))


def _publish(setup: Setup, engine: Engine) -> None:
    with engine.gathered(), unless_disk_full("the weights"):
        if setup.rank == 0:
            setup.policy.export(setup.run_dir)
            write_card(setup.run_dir)
    if setup.rank == 0:
        with unless_disk_full("the report"):
            write_report(setup.run_dir)


def _warn_of_ratio_error(setup: Setup, row: dict) -> None:
    if setup.noising is None and setup.rank == 0 and not row["ratio_error"] <= 0.1 * setup.clip_range:
        step = row["ratio_error_step"]
        logger.warning(
            "ratio_error=%.3g before any update (worst at step %d, t=%d), more than a tenth of the clip range %.3g: rollout and "
            "update do not compute the same log-prob, so part of the gradient is clipped away; try model.dtype=fp32",
            row["ratio_error"], step, int(setup.schedule.timesteps[step]), setup.clip_range,
        )  # fmt: skip


def _line(row: dict) -> str:
    text = f"iteration {row['iteration']:>4}"
    if row["reward_mean"] is not None:
        text += f"  reward {row['reward_mean']:.4f}"
        if row["ratio_error"] is None:
            text += f"  loss {row['loss']:.4g}"
        else:
            text += f"  clip {row['clip_fraction']:.3f}  ratio_error {row['ratio_error']:.1e}"
        text += f"  sample {row['time_sample_s']:.1f} s  train {row['time_train_s']:.1f} s"
        text += f"  {row['skipped_updates']} updates skipped: not finite" if row["skipped_updates"] else ""
    for name, word in (("eval", "evaluation"), ("heldout", "held-out")):
        if row[f"{name}_reward_mean"] is not None:
            text += f"  {word} {row[f'{name}_reward_mean']:.4f} ± {row[f'{name}_reward_std'] / row[f'{name}_samples'] ** 0.5:.4f}"
    return text


def _print_result(setup: Setup, state: dict) -> None:
    for name in setup.evaluations:
        before, after = state[f"{name}_before"], state[f"{name}_after"]
        old, new = before[f"{name}_reward_mean"], after[f"{name}_reward_mean"]
        error = sum(result[f"{name}_reward_std"] ** 2 / result[f"{name}_samples"] for result in (before, after)) ** 0.5
        percent = f"{100 * (new - old) / abs(old):+.1f} %, " if old else ""
        errors = f"{(new - old) / error:+.1f} standard errors" if error else "no spread"
        what = "the fixed evaluation set" if name == "eval" else "held-out prompts"
        print(f"reward on {what} after iteration {after['iteration']}: {old:.4f} -> {new:.4f} ({percent}{errors})", flush=True)
    weights = setup.run_dir / ("unet" if setup.policy.full else "lora")
    print(f"report: {setup.run_dir / 'report.html'}\nweights: {weights}", flush=True)
    name = _best_by(setup)
    best = state.get(f"{name}_best", state[f"{name}_after"])
    if best["iteration"] != state[f"{name}_after"]["iteration"]:
        said = f"best: {best[f'{name}_reward_mean']:.4f} after iteration {best['iteration']}"
        print(f"{said}: {setup.run_dir / 'best'}", flush=True)


if __name__ == "__main__":
    main()
