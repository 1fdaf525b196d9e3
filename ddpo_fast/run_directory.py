"""What a run leaves in its directory, and says on the terminal."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ddpo_fast import checkpoint
from ddpo_fast.advantages import PromptBaseline
from ddpo_fast.engine import Engine
from ddpo_fast.files import new_folder, unless_disk_full, write_text
from ddpo_fast.metrics import MetricsWriter
from ddpo_fast.model_card import write_card
from ddpo_fast.preparation import Setup
from ddpo_fast.report import environment, write_report

logger = logging.getLogger("ddpo_fast")

METRICS = (
    "iteration samples reward_mean reward_std eval_reward_mean eval_reward_std eval_samples eval_diversity heldout_reward_mean "
    "heldout_reward_std heldout_samples heldout_diversity loss ratio_error ratio_error_step clip_fraction approx_kl kl_to_reference "
    "grad_norm skipped_updates learning_rate time_sample_s time_reward_s time_train_s time_eval_s time_total_s images_per_s transitions "
    "transitions_per_s device_hours peak_memory_mib cache_hit_fraction bad_rewards"
).split()
"""The keys of a row of metrics.jsonl; those that an iteration has no value for are null."""


def open_run(setup: Setup, num_trainable: int, cache_plan: str, resumed_at: int) -> MetricsWriter:
    """Writes what is known at the start, and says it; the metrics begin after iteration `resumed_at`, -1 for a new run."""
    config, policy = setup.config, setup.policy
    bounds = f"clip range {setup.clip_range:.3g} at this model's {math.prod(policy.latent_shape):,} latent elements"
    if setup.noising is not None:
        bounds = f"{config.rwr.num_timesteps} of {setup.noising.num_steps} timesteps a sample and pass"
    (setup.run_dir / "images").mkdir(parents=True, exist_ok=True)
    write_text(setup.run_dir / "config.yaml", config.replace(run__resume=False).to_yaml())
    write_text(setup.run_dir / "environment.json", json.dumps(environment(setup.world_size), indent=1))
    folder, reward, model = map(setup.shown, (setup.run_dir, config.reward.name, config.model.path))
    print(
        f"{folder}: {config.train.algorithm} for {reward} on {model}\n"
        f"{num_trainable:,} trainable parameters, {config.model.dtype}, {setup.world_size} x {policy.device.type}, "
        f"{setup.ops.backend} kernels, {config.sample.num_samples} samples x {config.sample.num_steps} steps an iteration, {bounds}",
        flush=True,
    )
    if cache_plan:
        print(cache_plan, flush=True)
    if config.run.resume:
        print(f"resumed after iteration {resumed_at}", flush=True)
    return MetricsWriter(setup.run_dir, resumed_at, config.run.trackers, dataclasses.asdict(config))


def best_by(setup: Setup) -> str:
    """The evaluation that decides which weights are the best: by held-out prompts, where there are any."""
    return list(setup.evaluations)[-1]


def keep_best(setup: Setup, engine: Engine, state: dict) -> None:
    """Keeps the weights, as <run_dir>/best/, if none before had as high a reward in the evaluation that decides."""
    name = best_by(setup)
    now, best = state[f"{name}_after"], state.get(f"{name}_best")
    if best is not None and now[f"{name}_reward_mean"] <= best[f"{name}_reward_mean"]:
        return
    state[f"{name}_best"] = now
    with engine.gathered(), unless_disk_full("the best weights"):
        if setup.rank == 0:
            with new_folder(setup.run_dir / "best") as folder:
                setup.policy.export(folder)
                write_text(folder / "evaluation.json", json.dumps(now, indent=1))
            _describe("the model card of best/", partial(write_card, part="best"), setup.run_dir)


def publish(setup: Setup, engine: Engine) -> None:
    """Writes the newest weights with their model card, and the report. Called by all ranks."""
    with engine.gathered(), unless_disk_full("the weights"):
        if setup.rank == 0:
            setup.policy.export(setup.run_dir)
            _describe("the model card", write_card, setup.run_dir)
    if setup.rank == 0:
        _describe("the report", write_report, setup.run_dir)


def _describe(what: str, write: Callable[[Path], object], run_dir: Path) -> None:
    """Writes what only describes the run, and so can be made again from what else is there: no fault of it is a reason to end a run."""
    try:
        write(run_dir)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("%s could not be written (%s); the run goes on", what, reason, exc_info=True)


def save(setup: Setup, engine: Engine, baseline: PromptBaseline, state: dict) -> None:
    """Writes a checkpoint. Called by all ranks."""
    everything = state | {"world_size": setup.world_size, "baseline": baseline.state_dict(), "fingerprints": setup.fingerprints}
    checkpoint.save(setup.run_dir, state["iteration"], engine, everything, setup.rank, setup.config.run.keep_checkpoints)


def line(row: dict) -> str:
    """An iteration's metrics, in a line for people."""
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


def print_result(setup: Setup, state: dict) -> None:
    """Says what the run has come to, and where it is."""
    for name in setup.evaluations:
        before, after = state[f"{name}_before"], state[f"{name}_after"]
        old, new = before[f"{name}_reward_mean"], after[f"{name}_reward_mean"]
        error = sum(result[f"{name}_reward_std"] ** 2 / result[f"{name}_samples"] for result in (before, after)) ** 0.5
        percent = f"{100 * (new - old) / abs(old):+.1f} %, " if old else ""
        errors = f"{(new - old) / error:+.1f} standard errors" if error else "no spread"
        what = "the fixed evaluation set" if name == "eval" else "held-out prompts"
        print(f"reward on {what} after iteration {after['iteration']}: {old:.4f} -> {new:.4f} ({percent}{errors})", flush=True)
    weights = setup.run_dir / ("unet" if setup.policy.full else "lora")
    print(f"report: {setup.shown(setup.run_dir / 'report.html')}\nweights: {setup.shown(weights)}", flush=True)
    name = best_by(setup)
    best = state.get(f"{name}_best", state[f"{name}_after"])
    if best["iteration"] != state[f"{name}_after"]["iteration"]:
        said = f"best: {best[f'{name}_reward_mean']:.4f} after iteration {best['iteration']}"
        print(f"{said}: {setup.shown(setup.run_dir / 'best')}", flush=True)
