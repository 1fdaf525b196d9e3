"""What a run leaves in its directory, and says on the terminal."""

import dataclasses
import json
import math
import os
from pathlib import Path

from tqdm import tqdm

from ddpo_fast.distributed.engine import Engine, any_rank, broadcast
from ddpo_fast.files import new_folder, write_text
from ddpo_fast.records import checkpoint
from ddpo_fast.records.metrics import MetricsWriter
from ddpo_fast.records.model_card import write_card
from ddpo_fast.records.report import environment, write_report
from ddpo_fast.run import Setup
from ddpo_fast.schedule import SD_STEPS
from ddpo_fast.updates.advantages import PromptBaseline

METRICS = (
    "iteration samples reward_mean reward_std eval_reward_mean eval_reward_std eval_samples eval_diversity heldout_reward_mean "
    "heldout_reward_std heldout_samples heldout_diversity loss ratio_error ratio_error_step clip_fraction approx_kl kl_to_reference "
    "grad_norm skipped_updates learning_rate time_sample_s time_reward_s time_train_s time_eval_s time_total_s images_per_s transitions "
    "transitions_per_s device_hours peak_memory_mib cache_hit_fraction bad_rewards"
).split()
"""The keys of a row of metrics.jsonl; those that an iteration has no value for are null."""


RESULTS = "the configuration", "the metrics", "the checkpoint", "the weights", "the best weights"
"""What of a run cannot be made again from what else it leaves behind."""


class CannotBegin(ValueError):
    """A run whose directory cannot be written to, or one of whose trackers does not begin."""


class NotSaved(RuntimeError):
    """A run that is over and has not left behind what it should have."""


def open_run(setup: Setup, num_trainable: int, cache_plan: str, resumed_at: int) -> MetricsWriter | None:
    """Writes what is known at the start, and says it; the metrics begin after iteration `resumed_at`, -1 for a new run.

    Called by all ranks; returns what rank 0 writes the metrics with. Raises CannotBegin on all of them.
    """
    writer = fault = None
    if setup.rank == 0:
        try:
            _write_configuration(setup)
            config = dataclasses.asdict(setup.config)
            writer = MetricsWriter(setup.run_dir, setup.claim, resumed_at, setup.config.run.trackers, config)
        except OSError as error:
            fault = f"run.dir={setup.run_dir}: cannot be written to ({error}); valid is a folder that can"
        except ValueError as error:
            fault = str(error)
    if fault := broadcast(fault):
        raise CannotBegin(fault)
    if setup.rank == 0:
        _say_beginning(setup, num_trainable, cache_plan, resumed_at)
    return writer


def _write_configuration(setup: Setup) -> None:
    """Writes config.yaml, and environment.json, which has the scheduler's steps and the variant of weights that the run has chosen."""
    write_text(setup.run_dir / "config.yaml", setup.config.replace(run__resume=False).to_yaml())
    scheduler = {key: setup.policy.pipe.scheduler.config[key] for key in (*SD_STEPS, "clip_sample")}
    chosen = {"scheduler": scheduler, "variant": setup.policy.variant}
    write_text(setup.run_dir / "environment.json", json.dumps(environment(setup.world_size) | chosen, indent=1))


def _say_beginning(setup: Setup, num_trainable: int, cache_plan: str, resumed_at: int) -> None:
    config, policy = setup.config, setup.policy
    bounds = f"clip range {setup.clip_range:.3g} at this model's {math.prod(policy.latent_shape):,} latent elements"
    if setup.noising is not None:
        bounds = f"{config.rwr.num_timesteps} of {setup.noising.num_levels} timesteps a sample and pass"
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


def best_by(setup: Setup) -> str:
    """The evaluation that decides which weights are the best: by held-out prompts, where there are any."""
    return list(setup.evaluations)[-1]


def keep_best(setup: Setup, engine: Engine, state: dict) -> None:
    """Keeps the weights, as <run_dir>/best/, if none before had as high a reward in the evaluation that decides."""
    name = best_by(setup)
    now, best = state[f"{name}_after"], state.get(f"{name}_best")
    if best is not None and now[f"{name}_reward_mean"] <= best[f"{name}_reward_mean"]:
        return
    with engine.gathered(), setup.claim.writing("the best weights", now["iteration"]):
        if setup.rank == 0:
            setup.claim.hold()
            with new_folder(setup.run_dir / "best") as folder:
                setup.policy.export(folder)
                write_text(folder / "evaluation.json", json.dumps(now, indent=1))
    if not any_rank("the best weights" in setup.claim.unwritten):
        state[f"{name}_best"] = now
        if setup.rank == 0:
            with setup.claim.writing("the model card of best/", now["iteration"], Exception):
                setup.claim.hold()
                write_card(setup.run_dir, part="best")


def publish(setup: Setup, engine: Engine, iteration: int) -> None:
    """Writes the newest weights with their model card, and the report. Called by all ranks."""
    with engine.gathered(), setup.claim.writing("the weights", iteration):
        if setup.rank == 0:
            setup.claim.hold()
            setup.policy.export(setup.run_dir)
    if setup.rank == 0 and not os.path.exists(setup.run_dir / "config.yaml"):  # somebody has deleted the directory
        with setup.claim.writing("the configuration", iteration):
            setup.claim.hold()
            _write_configuration(setup)
    if setup.rank == 0:  # these only describe the run: no fault of theirs is a reason to end it
        if "the weights" not in setup.claim.unwritten:
            with setup.claim.writing("the model card", iteration, Exception):
                setup.claim.hold()
                write_card(setup.run_dir)
        with setup.claim.writing("the report", iteration, Exception):
            setup.claim.hold()
            write_report(setup.run_dir)


def save(setup: Setup, engine: Engine, baseline: PromptBaseline, state: dict) -> None:
    """Writes a checkpoint. Called by all ranks."""
    everything = state | {"world_size": setup.world_size, "baseline": baseline.state_dict(), "fingerprints": setup.fingerprints}
    with setup.claim.writing("the checkpoint", state["iteration"]):
        checkpoint.on_every_rank(setup.claim.hold)
        checkpoint.save(setup.run_dir, state["iteration"], engine, everything, setup.rank, setup.config.run.keep_checkpoints)


def conclude(setup: Setup, state: dict, writer: MetricsWriter | None, stopped: bool) -> None:
    """Says what the run has come to, and where it is; of one that was stopped, how it goes on. Called by all ranks.

    Raises NotSaved, on all of them, if a part of the result after state's iteration could not be written.
    """
    unsaved = None
    if setup.rank == 0:
        _look_for_results(setup, state)
        if lost := [what for what in RESULTS if what in setup.claim.unwritten]:
            unsaved = _unsaved(setup, lost, state["iteration"])
        if not stopped:
            print_result(setup, state, writer.rows)
        elif unsaved is None:
            tqdm.write(f"stopped after iteration {state['iteration']}; --run.dir={setup.shown(setup.run_dir)} --resume continues")
    if unsaved := broadcast(unsaved):
        raise NotSaved(unsaved)


def _look_for_results(setup: Setup, state: dict) -> None:
    """What somebody has deleted since it was written is unwritten."""
    unwritten, newest = setup.claim.unwritten, setup.claim.newest
    places = {"the weights": _weights(setup)}
    if f"{best_by(setup)}_best" in state:
        places["the best weights"] = setup.run_dir / "best"
    if "the checkpoint" in newest:
        places["the checkpoint"] = setup.run_dir / "checkpoints" / str(newest["the checkpoint"])
    unwritten |= {what: "deleted" for what, place in places.items() if what not in unwritten and not os.path.exists(place)}


def _unsaved(setup: Setup, lost: list[str], iteration: int) -> str:
    """What a run says at its end of results that could not be written."""
    names = " and ".join(filter(None, (", ".join(lost[:-1]), lost[-1])))
    reasons = "; ".join(dict.fromkeys(setup.claim.unwritten[what] for what in lost))
    text = f"iteration {iteration}: {names} could not be written ({reasons})"
    try:
        newest = int(checkpoint.list_checkpoints(setup.run_dir)[-1].name)
    except (OSError, IndexError):
        return f"{text}; there is no checkpoint to continue from"
    resume = f"--run.dir={setup.shown(setup.run_dir)} --resume"
    if newest < iteration:
        return f"{text}; {resume} continues from iteration {newest}"
    return f"{text}; {resume} writes them from checkpoint {newest}" if lost == ["the weights"] else text


def _weights(setup: Setup) -> Path:
    return setup.run_dir / ("unet" if setup.policy.full else "lora")


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


def print_result(setup: Setup, state: dict, rows: list[dict]) -> None:
    """Says what the run has come to, and where it is. rows: its metrics."""
    for name in setup.evaluations:
        before, after = state[f"{name}_before"], state[f"{name}_after"]
        old, new = before[f"{name}_reward_mean"], after[f"{name}_reward_mean"]
        error = sum(result[f"{name}_reward_std"] ** 2 / result[f"{name}_samples"] for result in (before, after)) ** 0.5
        percent = f"{100 * (new - old) / abs(old):+.1f} %, " if old else ""
        errors = f"{(new - old) / error:+.1f} standard errors" if error else "no spread"
        what = "the fixed evaluation set" if name == "eval" else "held-out prompts"
        print(f"reward on {what} after iteration {after['iteration']}: {old:.4f} -> {new:.4f} ({percent}{errors})", flush=True)
    print(f"{_say_report(setup)}\n{_say_weights(setup, state['iteration'])}", flush=True)
    name = best_by(setup)
    best = state.get(f"{name}_best", state[f"{name}_after"])
    if best["iteration"] != state[f"{name}_after"]["iteration"]:
        key = f"{name}_reward_mean"
        said = f"best: {best[key]:.4f} after iteration {best['iteration']}"
        highest = max((row for row in rows if row["iteration"] > 0 and row[key] is not None), key=lambda row: row[key], default=best)
        if highest[key] > best[key]:
            said += f" (the weights after iteration {highest['iteration']}, {highest[key]:.4f}, could not be written)"
        print(f"{said}: {setup.shown(setup.run_dir / 'best')}", flush=True)


def _say_report(setup: Setup) -> str:
    if (reason := setup.claim.unwritten.get("the report")) is None:
        return f"report: {setup.shown(setup.run_dir / 'report.html')}"
    return f"report: could not be written ({reason}); ddpo-fast report {setup.shown(setup.run_dir)} writes it"


def _say_weights(setup: Setup, iteration: int) -> str:
    """Where the newest weights are; or that they are not there, and what is."""
    weights, claim = _weights(setup), setup.claim
    if "the weights" not in claim.unwritten:
        return f"weights: {setup.shown(weights)}"
    said = f"weights: those of iteration {iteration} could not be written"
    if not os.path.exists(weights):
        return said
    whose = f"of iteration {claim.newest['the weights']}" if "the weights" in claim.newest else "older"
    return f"{said}; those in {setup.shown(weights)} are {whose}" + ", not trained" * (claim.newest.get("the weights") == 0)
