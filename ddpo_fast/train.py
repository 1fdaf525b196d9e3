"""DDPO (arXiv:2305.13301): sample pictures, score them, raise the probability of the better ones.

    deepspeed ddpo_fast/train.py --config configs/X.yaml --section.key value ...

`train` is the whole algorithm, top to bottom. `update` is the PPO pass; `update_by_scores` replaces it when the gradient was already
taken while sampling. Shape letters: B samples of this rank, S denoising steps.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    found = (find_spec(name) for name in ("ddpo_fast", "ddpo_fast.kernels"))
    if not all(spec and Path(spec.origin).resolve().is_relative_to(root) for spec in found):
        print(f"error: this Python has not installed ddpo_fast from this folder: pip install -e {root}", file=sys.stderr)
        sys.exit(2)
    from ddpo_fast.config.options import parse_or_exit
    from ddpo_fast.distributed.preemption import die_with_launcher
    from ddpo_fast.terminal import steady_streams

    steady_streams()
    die_with_launcher()
    parse_or_exit(sys.argv[1:])  # --help and a wrong option are answered before the imports below take their seconds

import faulthandler
import logging
import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor
from tqdm import tqdm

from ddpo_fast.assemble import make_cache, make_engine, prepare
from ddpo_fast.claim import Claim
from ddpo_fast.config.options import Config, parse_or_exit, user_error
from ddpo_fast.distributed.engine import Engine, WrongCheckpoint, all_gather, all_reduce, any_rank, gather, is_lost_rank
from ddpo_fast.distributed.preemption import StopRequest
from ddpo_fast.planning.plan import make_plan, plan_text
from ddpo_fast.policy import Policy
from ddpo_fast.prompts import Prompts, draw_prompts
from ddpo_fast.records import checkpoint
from ddpo_fast.records.metrics import MetricsWriter, StageTimer, diversity, image_grid, peak_memory_mib, save_grid
from ddpo_fast.records.run_directory import (
    METRICS,
    CannotBegin,
    NotSaved,
    best_by,
    conclude,
    keep_best,
    line,
    open_run,
    publish,
    save,
)  # fmt: skip
from ddpo_fast.rollout import EVAL_SAMPLE_ID, HELDOUT_SAMPLE_ID, Rollout, generate
from ddpo_fast.run import Setup
from ddpo_fast.scoring.scorer import Scorer, last_failure
from ddpo_fast.terminal import steady_streams
from ddpo_fast.updates.activation_cache import NO_CACHE, Cache
from ddpo_fast.updates.advantages import PromptBaseline, make_baseline
from ddpo_fast.updates.losses import UpdateStatistics, kl_loss
from ddpo_fast.updates.rwr import denoising_loss, reward_weights
from ddpo_fast.updates.score_accumulation import ScoreAccumulator
from ddpo_fast.updates.transitions import MicroBatch, Pairs, micro_batches, passes

logger = logging.getLogger("ddpo_fast")


_one_run = threading.Lock()
"""Held by the run that is going on in this process."""


def main(argv: list[str] | None = None) -> None:
    """Runs a command line. A wrong option is one line on standard error and exit code 2; a fault is exit code 1."""
    if argv is None:
        steady_streams()
    config = parse_or_exit(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        if config.run.plan is not None:
            if os.environ.get("RANK", "0") == "0":
                print(plan_text(make_plan(config)), flush=True)
            return
    except ValueError as error:
        user_error(error)
    if not _one_run.acquire(blocking=False):
        user_error("a run is going on in this process, in another thread; valid is one after the other, or a process for each")
    try:
        with Claim() as claim:
            _run(config, claim)
    except SystemExit as end:
        if isinstance(end.code, str) and threading.current_thread() is not threading.main_thread():
            print(end.code, file=sys.stderr, flush=True)  # Python says nothing of a thread that ends so
        raise
    finally:
        _one_run.release()


def _run(config: Config, claim: Claim) -> None:
    try:
        setup = prepare(config, claim)
    except ValueError as error:
        user_error(error)
    try:
        with StopRequest() as stop:
            train(setup, stop)
    except (WrongCheckpoint, CannotBegin) as error:
        user_error(error)
    except (BadRewards, NotSaved) as error:
        sys.exit(f"error: {error}" if setup.rank == 0 else 1)
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        sys.exit(f"error (rank {setup.rank}): another rank is gone ({str(error).splitlines()[0]}); --resume continues the run")


class BadRewards(RuntimeError):
    """Too few samples have a reward to learn from."""


def train(setup: Setup, stop: StopRequest) -> None:
    """The run: iteration 0 evaluates the untrained model, every later one improves it; metrics, pictures and checkpoints as it goes.

    Asked to stop, it saves a checkpoint when the iteration is done and returns. Raises NotSaved for a result that could not be written.
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
    last = config.run.iterations
    cache_plan = cache.plan_text(updates(setup, max(1, state["iteration"] + 1)), setup.policy.dtype) if rank == 0 else ""
    writer = open_run(setup, engine.num_trainable, cache_plan, state["iteration"])
    bar = tqdm(total=last, initial=max(state["iteration"], 0), desc="iterations", unit="it", disable=rank != 0, dynamic_ncols=True)

    for iteration in range(state["iteration"] + 1, last + 1):
        timer, row = StageTimer(setup.policy.device), dict.fromkeys(METRICS)
        with timer("total"):
            if iteration > 0:
                try:
                    row |= improve(setup, engine, cache, baseline, timer, iteration)
                except BadRewards:
                    _save_unless_saved(setup, engine, baseline, state)
                    if rank == 0:
                        writer.close()
                    any_rank(False)  # a launcher ends all ranks once one has ended: none does before rank 0 has closed its records
                    raise
            if iteration % config.eval.every == 0 or iteration == last:
                with timer("eval"):
                    row |= evaluate(setup, writer, iteration, state)
        state["iteration"] = iteration
        state["bad_rewards"] += row["bad_rewards"] or 0
        state["device_hours"] += timer.seconds["total"] * setup.world_size / 3600
        row |= _totals(setup, state, timer)
        if rank == 0:
            writer.write(row)
            tqdm.write(line(row))
        stopping = any_rank(stop.requested)
        with timer("save"):
            if config.run.keep_best and iteration > 0 and row[f"{best_by(setup)}_reward_mean"] is not None:
                keep_best(setup, engine, state)  # before the checkpoint that says so
            if iteration % config.run.checkpoint_every == 0 or iteration == last or stopping:
                save(setup, engine, baseline, state)
                if iteration < last:
                    publish(setup, engine, iteration)
        state["device_hours"] += timer.seconds["save"] * setup.world_size / 3600
        bar.update(iteration > 0)
        if stopping and iteration < last:
            break
    bar.close()
    if rank == 0:
        writer.close()
    stopped = state["iteration"] < last
    if not stopped:
        publish(setup, engine, last)
    conclude(setup, state, writer, stopped)


def _save_unless_saved(setup: Setup, engine: Engine, baseline: PromptBaseline, state: dict) -> None:
    """Saves the state of the iteration before a failed one, in which nothing was updated, if that iteration left no checkpoint."""
    saved = setup.checkpoint is not None and setup.checkpoint.name == str(state["iteration"])
    lost = any_rank("the checkpoint" in setup.claim.unwritten)
    if (state["iteration"] % setup.config.run.checkpoint_every or lost) and not saved:
        save(setup, engine, baseline, state)


def _totals(setup: Setup, state: dict, timer: StageTimer) -> dict[str, float]:
    """The run so far, and where the iteration's time went."""
    return {
        "iteration": state["iteration"],
        "samples": state["iteration"] * setup.config.sample.num_samples,
        "bad_rewards": state["bad_rewards"],
        "device_hours": state["device_hours"],
        "peak_memory_mib": peak_memory_mib(setup.policy.device),
        **{f"time_{stage}_s": timer.seconds.get(stage, 0.0) for stage in ("sample", "reward", "train", "eval", "total")},
    }


def improve(setup: Setup, engine: Engine, cache: Cache, baseline: PromptBaseline, timer: StageTimer, iteration: int) -> dict[str, float]:
    """One iteration: sample under the current policy, score, turn rewards into advantages or weights, update. Returns its metrics.

    Raises BadRewards, before anything is updated, when too many samples have no reward.
    """
    config, num_samples = setup.config, setup.config.sample.num_samples
    samples_per_prompt = config.prompts.samples_per_prompt
    prompts = draw_prompts(setup.prompts, num_samples, samples_per_prompt, config.run.seed, iteration)
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
            f"reward.max_bad_fraction={config.reward.max_bad_fraction}{_why()}; mend the reward, then --resume continues from the newest "
            "checkpoint"
        )
    if setup.noising is None:
        limit = config.train.advantage_clip
        advantages = baseline.update(prompts.texts, rewards).clamp(-limit, limit)
    else:
        sparse, options = config.train.algorithm == "rwr_sparse", config.rwr
        by_prompt = options.population == "prompt"
        advantages = reward_weights(prompts.texts, rewards, sparse, options.inverse_temperature, options.percentile, by_prompt)
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
    prompts: Prompts,
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
            batch = prompts.texts[start : start + size]
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
                batch = prompts[rows]
                scorer.add(images, batch.texts, batch.metadata)
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
    statistics, grad_norms, texts = UpdateStatistics(num_steps, rollout.good), [], text_embeds(setup.policy, rollout)
    bar = tqdm(desc="  train", unit="transition", leave=False, disable=setup.rank != 0, dynamic_ncols=True)
    bar.total = options.inner_epochs * len(advantages) * max(1, round(fraction * num_steps))
    for epoch, index, pairs in updates(setup, iteration):
        if setup.noising is None:
            loss = partial(policy_loss, setup, rollout, texts, advantages, cache)
        else:
            loss = partial(regression_loss, setup, rollout, texts, advantages, iteration, epoch)
        gradient = partial(accumulate_gradient, setup, engine, cache, loss, pairs, bar.update)
        for part, figures in setup.room.attempt("train.micro_batch", min(options.micro_batch, len(pairs[0])), gradient):
            statistics.add(part.rows, part.steps, figures, first_minibatch=epoch == index == 0)
        grad_norms.append(engine.step())
    bar.close()
    return _update_metrics(engine, statistics, grad_norms, iteration)


def accumulate_gradient(
    setup: Setup,
    engine: Engine,
    cache: Cache,
    loss: Callable[..., tuple[Tensor, Tensor]],
    pairs: Pairs,
    progress: Callable[[int], object],
    size: int,
) -> list[tuple[MicroBatch, Tensor]]:
    """Gives the engine the gradient of one update's mean loss, and nothing else, in micro-batches of at most `size` transitions.

    loss(part, next_part, weight): weight times the sum of a micro-batch's losses, and their statistics; `policy_loss` or `regression_loss`.
    Returns the micro-batches, each with its statistics. `progress(n)` is told how many transitions are done.
    """
    done, weight = [], engine.loss_scale / len(pairs[0])
    timesteps = setup.schedule.timesteps.cpu() if setup.noising is None else torch.arange(setup.noising.num_levels)
    engine.forget_gradient()
    cache.forget_fetched()
    parts = list(micro_batches(*pairs, size, timesteps, setup.config.training_guidance != 1, setup.policy.device))
    for part, next_part in zip_longest(parts, parts[1:]):
        total, figures = loss(part, next_part, weight)
        engine.backward(total, last=next_part is None)
        done.append((part, figures))
        progress(len(part.rows))
    return done


def policy_loss(
    setup: Setup,
    rollout: Rollout,
    texts: list[Tensor],
    advantages: Tensor,
    cache: Cache,
    part: MicroBatch,
    next_part: MicroBatch | None,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """ddpo_is or ddpo_sf, and KL, of B transitions that sampling made, times `weight`; statistics (4, B), with KL (5, B).

    texts: see `text_embeds`.
    """
    config, policy, coefficients = setup.config, setup.policy, setup.schedule.coefficients
    guidance_scale, kl_coefficient = config.training_guidance, config.train.kl_coefficient
    latents = rollout.latents[part.unet_rows, part.unet_steps].to(policy.dtype)
    inputs = latents, part.timesteps, *(text[part.embed_rows] for text in texts)
    with cache.reading(part, next_part, lambda rows: policy.predict_noise(*(tensor[rows] for tensor in inputs))):
        reference_noise_pred = policy.predict_reference_noise(*inputs) if kl_coefficient else None
        noise_pred = policy.predict_noise(*inputs)
    loss, figures = setup.ops.ppo_loss(
        noise_pred, rollout.latents, rollout.log_probs, advantages, coefficients, part.rows, part.steps,
        guidance_scale, setup.clip_range, weight, config.train.algorithm == "ddpo_sf",
    )  # fmt: skip
    if kl_coefficient:
        kl, divergences = kl_loss(
            noise_pred, reference_noise_pred, rollout.latents, rollout.good, coefficients, part.rows, part.steps,
            guidance_scale, weight * kl_coefficient,
        )  # fmt: skip
        loss, figures = loss + kl, torch.cat([figures, divergences[None]])
    return loss, figures


def regression_loss(
    setup: Setup,
    rollout: Rollout,
    texts: list[Tensor],
    weights: Tensor,
    iteration: int,
    epoch: int,
    part: MicroBatch,
    _: MicroBatch | None,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """The denoising loss of B final latents, noised, each times its sample's weight and `weight`; statistics (1, B).

    weights: (B,) fp32, of this rank's samples. The transitions are (sample, training timestep).
    """
    policy, guidance_scale = setup.policy, setup.config.training_guidance
    x0, ids = rollout.latents[part.rows, -1], first_sample_id(setup, iteration) + part.rows
    x_t, target = setup.noising.noised(x0, part.steps, setup.config.run.seed, ids, epoch)
    unet_input = x_t.to(policy.dtype).repeat(len(part.timesteps) // len(part.rows), 1, 1, 1)
    noise_pred = policy.predict_noise(unet_input, part.timesteps, *(text[part.embed_rows] for text in texts))
    return denoising_loss(noise_pred, target, weights[part.rows], guidance_scale, weight)


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
    return setup.noising.num_levels, setup.config.rwr.num_timesteps / setup.noising.num_levels


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
            grid = image_grid(images[shown], prompts.texts[shown], rewards[shown])
            with setup.claim.writing("the pictures", iteration):
                setup.claim.hold()
                save_grid(grid, setup.run_dir / "images" / f"{'iteration' if name == 'eval' else name}_{iteration:05d}.png")
            writer.write_images(grid, "evaluation" if name == "eval" else name, iteration)
        finite = rewards.isfinite()
        good = rewards[finite]
        if not len(good):
            if iteration == 0:
                option = "eval.prompts" if name == "eval" else "eval.heldout"
                raise BadRewards(
                    f"the reward gave no finite number for any picture of the untrained model on the prompts of {option}{_why()}"
                )
            continue
        result = {"reward_mean": good.mean().item(), "reward_std": good.std(correction=0).item(), "samples": len(good)}
        result["diversity"] = diversity(images[finite])
        result = {f"{name}_{key}": value for key, value in result.items()}
        state.setdefault(f"{name}_before", result)
        state[f"{name}_after"] = result | {"iteration": iteration}
        row |= result
    return row


def _why() -> str:
    """What the first rank that knows says of its reward's last failure."""
    return next((f": {failure}" for failure in gather(last_failure()) if failure), "")


def _block(count: int, rank: int, world_size: int) -> slice:
    """The part of `count` samples that a rank makes."""
    return slice(rank * count // world_size, (rank + 1) * count // world_size)


def _warn_of_ratio_error(setup: Setup, row: dict) -> None:
    if setup.noising is None and setup.rank == 0 and not row["ratio_error"] <= 0.1 * setup.clip_range:
        step = row["ratio_error_step"]
        logger.warning(
            "ratio_error=%.3g before any update (worst at step %d, t=%d), more than a tenth of the clip range %.3g: rollout and "
            "update do not compute the same log-prob, so part of the gradient is clipped away; try model.dtype=fp32",
            row["ratio_error"], step, int(setup.schedule.timesteps[step]), setup.clip_range,
        )  # fmt: skip


if __name__ == "__main__":
    # a process that a reward starts by multiprocessing's spawn or forkserver imports the main module if it finds it: DeepSpeed and all
    __spec__ = None
    del __file__
    faulthandler.enable()  # a reward that crashes takes the run along: say at which line
    main()
