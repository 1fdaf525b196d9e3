"""What a run leaves in its directory, and says on the terminal."""

import dataclasses
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ddpo_fast.distributed.engine import any_rank, broadcast
from ddpo_fast.files import new_folder, write_text
from ddpo_fast.pipelines.ddim import SD_STEPS
from ddpo_fast.prompts import EVALUATIONS, Evaluation
from ddpo_fast.records import checkpoint
from ddpo_fast.records.metrics import MetricsWriter, peak_memory_mib
from ddpo_fast.records.model_card import write_card
from ddpo_fast.records.report import environment, write_report
from ddpo_fast.run import Run
from ddpo_fast.scoring.scorer import BadRewards
from ddpo_fast.timing import StageTimer

logger = logging.getLogger("ddpo_fast")

METRICS = (
    "iteration", "samples", "reward_mean", "reward_std",
    *(f"{name}_{key}" for name in EVALUATIONS for key in ("reward_mean", "reward_std", "samples", "diversity")),
    "loss", "ratio_error", "ratio_error_step", "clip_fraction", "approx_kl", "kl_to_reference", "grad_norm", "skipped_updates",
    "learning_rate", "time_sample_s", "time_reward_s", "time_train_s", "time_eval_s", "time_total_s", "images_per_s", "transitions",
    "transitions_per_s", "device_hours", "peak_memory_mib", "cache_hit_fraction", "bad_rewards",
)  # fmt: skip
"""The keys of a row of metrics.jsonl; those that an iteration has no value for are null."""

RESULTS = "the configuration", "the metrics", "the checkpoint", "the weights", "the best weights"
"""What of a run cannot be made again from what else it leaves behind."""


class CannotBegin(ValueError):
    """A run whose directory cannot be written to, or one of whose trackers does not begin."""


class NotSaved(RuntimeError):
    """A run that is over and has not left behind what it should have."""


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int = -1
    """The last that is done; -1 before the untrained model has been evaluated."""
    device_hours: float = 0.0
    bad_rewards: int = 0
    evaluations: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """By the evaluation set's name the first result, `before`, the last, `after`, and the `best` whose weights have been kept."""

    def evaluated(self, kind: Evaluation, iteration: int, result: dict[str, float]) -> None:
        """Takes note of a set's result: reward_mean, reward_std, samples, diversity."""
        results = self.evaluations.setdefault(kind.name, {})
        results["after"] = result | {"iteration": iteration}
        results.setdefault("before", results["after"])

    def state_dict(self) -> dict:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.iteration, self.bad_rewards = int(state["iteration"]), int(state["bad_rewards"])
        self.device_hours, self.evaluations = float(state["device_hours"]), {name: dict(of) for name, of in state["evaluations"].items()}


class Record:
    """A run's metrics, weights, checkpoints and report, from where it continues to its end; a context that all ranks enter.

    On entering it loads the checkpoint, if there is one, and writes what is known at the start: CannotBegin and WrongCheckpoint are
    raised there. On leaving it says what the run has come to, or, after BadRewards, saves what is not saved yet; NotSaved is raised
    there, for a result that could not be written.
    """

    def __init__(self, run: Run):
        self.run, self.config, self.directory, self.progress = run, run.config, run.directory, Progress()
        self.path, self.claim = run.directory.path, run.directory.claim
        self.stateful = {"progress": self.progress, "credit": run.objective.credit}
        """What a checkpoint has beside the engine's tensors: each with `state_dict` and `load_state_dict`."""
        self.last = self.config.run.iterations
        self.decides = run.task.evaluations[-1].kind
        """The evaluation by which weights are the best."""

    def __enter__(self) -> "Record":
        run = self.run
        if self.directory.resumed is not None:
            checkpoint.load(self.directory.resumed, run.engine, self.stateful)
        self.writer = self._open()
        self.bar = tqdm(
            total=self.last, initial=max(self.progress.iteration, 0), desc="iterations", unit="it", disable=not run.ranks.is_first,
            dynamic_ncols=True,
        )  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None and not issubclass(kind, BadRewards):
            return
        self.bar.close()
        if kind is not None:
            self._save_unless_saved()
        if self.run.ranks.is_first:
            self.writer.close()
        if kind is not None:
            any_rank(False)  # a launcher ends all ranks once one has ended: none does before rank 0 has closed its records
            return
        stopped = self.progress.iteration < self.last
        if not stopped:
            self._publish(self.last)
        self._conclude(stopped)

    def _open(self) -> MetricsWriter | None:
        """Writes what is known at the start, and says it. Returns what rank 0 writes the metrics with."""
        writer = fault = None
        if self.run.ranks.is_first:
            try:
                self._write_configuration()
                writer = MetricsWriter(
                    self.path, self.claim, self.progress.iteration, self.config.run.trackers, dataclasses.asdict(self.config)
                )  # fmt: skip
            except OSError as error:
                fault = f"run.dir={self.path}: cannot be written to ({error}); valid is a folder that can"
            except ValueError as error:
                fault = str(error)
        if fault := broadcast(fault):
            raise CannotBegin(fault)
        if self.run.ranks.is_first:
            self._say_beginning()
        return writer

    def _write_configuration(self) -> None:
        """Writes config.yaml, and environment.json, which has what the run has chosen and how diffusers has to be called to draw so."""
        policy, family = self.run.policy, self.run.policy.family
        write_text(self.path / "config.yaml", self.config.replace(run__resume=False).to_yaml())
        chosen = {"variant": policy.variant, "network": [family.network, type(policy.network).__name__], "guidance": family.guidance}
        negative = {} if family.negative_prompt is None else {"negative_prompt": family.negative_prompt}
        chosen["arguments"] = negative | policy.recorder.arguments
        if family.process == "diffusion":
            chosen["scheduler"] = {key: policy.pipe.scheduler.config[key] for key in (*SD_STEPS, "clip_sample")}
        write_text(self.path / "environment.json", json.dumps(environment(self.run.ranks.world_size) | chosen, indent=1))

    def _say_beginning(self) -> None:
        run, config, shown = self.run, self.config, self.directory.shown
        print(
            f"{shown(self.path)}: {config.train.algorithm} for {shown(config.reward.name)} on {shown(config.model.path)}\n"
            f"{run.engine.num_trainable:,} trainable parameters, {config.model.dtype}, {run.ranks.world_size} x {run.policy.device.type}, "
            f"{run.ops.backend} kernels, {config.sample.num_samples} samples x {config.sample.num_steps} steps an iteration, "
            f"{run.objective.describe()}",
            flush=True,
        )
        first = max(1, self.progress.iteration + 1)
        if plan := run.gradients.plan_text(run.updates(run.schedule(first), first)):
            print(plan, flush=True)
        if config.run.resume:
            print(f"resumed after iteration {self.progress.iteration}", flush=True)

    def write_images(self, grid: Image.Image, kind: Evaluation, iteration: int) -> None:
        """Gives the trackers an evaluation set's pictures. Called by rank 0."""
        self.writer.write_images(grid, "evaluation" if kind.name == "eval" else kind.name, iteration)

    def write(self, iteration: int, row: dict[str, float], timer: StageTimer) -> None:
        """An iteration is done, and these are its metrics."""
        progress, run = self.progress, self.run
        progress.iteration = iteration
        progress.bad_rewards += row.get("bad_rewards", 0)
        progress.device_hours += timer.seconds["total"] * run.ranks.world_size / 3600
        if not run.ranks.is_first:
            return
        row = dict.fromkeys(METRICS) | row | {
            "iteration": iteration,
            "samples": iteration * self.config.sample.num_samples,
            "bad_rewards": progress.bad_rewards,
            "device_hours": progress.device_hours,
            "peak_memory_mib": peak_memory_mib(run.policy.device),
            **{f"time_{stage}_s": timer.seconds.get(stage, 0.0) for stage in ("sample", "reward", "train", "eval", "total")},
        }  # fmt: skip
        self.writer.write(row)
        tqdm.write(line(row))
        if doubt := run.objective.doubt(row, run.denoising.levels.times):
            logger.warning(doubt)

    def save(self, iteration: int, timer: StageTimer, stopping: bool) -> None:
        """Keeps the weights in best/ if their evaluation is the highest so far. If a checkpoint is due, writes it, the newest weights and
        the report. Called by all ranks."""
        with timer("save"):
            if self.config.run.keep_best and iteration > 0:
                self._keep_best(iteration)  # before the checkpoint that says so
            if iteration % self.config.run.checkpoint_every == 0 or iteration == self.last or stopping:
                self._checkpoint()
                if iteration < self.last:
                    self._publish(iteration)
        self.progress.device_hours += timer.seconds["save"] * self.run.ranks.world_size / 3600
        self.bar.update(iteration > 0)

    def _keep_best(self, iteration: int) -> None:
        """Keeps the weights, as <run_dir>/best/, if none before had as high a reward in the evaluation that decides."""
        results = self.progress.evaluations.get(self.decides.name, {})
        now, best = results.get("after"), results.get("best")
        if now is None or now["iteration"] != iteration or best is not None and now["reward_mean"] <= best["reward_mean"]:
            return
        with self.run.engine.gathered(), self.claim.writing("the best weights", iteration):
            if self.run.ranks.is_first:
                self.claim.hold()
                with new_folder(self.path / "best") as folder:
                    self.run.policy.export(folder)
                    named = {key if key == "iteration" else f"{self.decides.name}_{key}": value for key, value in now.items()}
                    write_text(folder / "evaluation.json", json.dumps(named, indent=1))
        if not any_rank("the best weights" in self.claim.unwritten):
            results["best"] = now
            if self.run.ranks.is_first:
                with self.claim.writing("the model card of best/", iteration, Exception):
                    self.claim.hold()
                    write_card(self.path, part="best")

    def _checkpoint(self) -> None:
        everything = {"world_size": self.run.ranks.world_size, "fingerprints": self.run.fingerprints}
        everything |= {name: part.state_dict() for name, part in self.stateful.items()}
        iteration = self.progress.iteration
        with self.claim.writing("the checkpoint", iteration):
            checkpoint.on_every_rank(self.claim.hold)
            checkpoint.save(self.path, iteration, self.run.engine, everything, self.run.ranks.rank, self.config.run.keep_checkpoints)

    def _save_unless_saved(self) -> None:
        """Saves the state of the iteration before a failed one, in which nothing was updated, if that iteration left no checkpoint."""
        iteration, resumed = self.progress.iteration, self.directory.resumed
        saved = resumed is not None and resumed.name == str(iteration)
        lost = any_rank("the checkpoint" in self.claim.unwritten)
        if iteration >= 0 and (iteration % self.config.run.checkpoint_every or lost) and not saved:
            self._checkpoint()

    def _publish(self, iteration: int) -> None:
        """Writes the newest weights with their model card, and the report."""
        with self.run.engine.gathered(), self.claim.writing("the weights", iteration):
            if self.run.ranks.is_first:
                self.claim.hold()
                self.run.policy.export(self.path)
        if not self.run.ranks.is_first:
            return
        if not os.path.exists(self.path / "config.yaml"):  # somebody has deleted the directory
            with self.claim.writing("the configuration", iteration):
                self.claim.hold()
                self._write_configuration()
        # these only describe the run: no fault of theirs is a reason to end it
        if "the weights" not in self.claim.unwritten:
            with self.claim.writing("the model card", iteration, Exception):
                self.claim.hold()
                write_card(self.path)
        with self.claim.writing("the report", iteration, Exception):
            self.claim.hold()
            write_report(self.path)

    def _conclude(self, stopped: bool) -> None:
        """Prints the result and where it is, or, for a run that was stopped, how to continue it.

        Raises NotSaved, on all ranks, if a part of the result could not be written.
        """
        unsaved, iteration = None, self.progress.iteration
        if self.run.ranks.is_first:
            self._look_for_results()
            if lost := [what for what in RESULTS if what in self.claim.unwritten]:
                unsaved = self._unsaved(lost, iteration)
            if not stopped:
                self._say_result()
            elif unsaved is None:
                tqdm.write(f"stopped after iteration {iteration}; --run.dir={self.directory.shown(self.path)} --resume continues")
        if unsaved := broadcast(unsaved):
            raise NotSaved(unsaved)

    def _look_for_results(self) -> None:
        """What somebody has deleted since it was written is unwritten."""
        unwritten, newest = self.claim.unwritten, self.claim.newest
        places = {"the weights": self._weights}
        if "best" in self.progress.evaluations.get(self.decides.name, {}):
            places["the best weights"] = self.path / "best"
        if "the checkpoint" in newest:
            places["the checkpoint"] = self.path / "checkpoints" / str(newest["the checkpoint"])
        unwritten |= {what: "deleted" for what, place in places.items() if what not in unwritten and not os.path.exists(place)}

    def _unsaved(self, lost: list[str], iteration: int) -> str:
        """What a run says at its end of results that could not be written."""
        names = " and ".join(filter(None, (", ".join(lost[:-1]), lost[-1])))
        reasons = "; ".join(dict.fromkeys(self.claim.unwritten[what] for what in lost))
        text = f"iteration {iteration}: {names} could not be written ({reasons})"
        try:
            newest = int(checkpoint.list_checkpoints(self.path)[-1].name)
        except (OSError, IndexError):
            return f"{text}; there is no checkpoint to continue from"
        resume = f"--run.dir={self.directory.shown(self.path)} --resume"
        if newest < iteration:
            return f"{text}; {resume} continues from iteration {newest}"
        return f"{text}; {resume} writes them from checkpoint {newest}" if lost == ["the weights"] else text

    @property
    def _weights(self) -> Path:
        return self.path / self.run.policy.exported_as

    def _say_result(self) -> None:
        """Says what the run has come to, and where it is."""
        shown, evaluations = self.directory.shown, self.progress.evaluations
        for chosen in self.run.task.evaluations:
            before, after = (evaluations[chosen.kind.name][when] for when in ("before", "after"))
            old, new = before["reward_mean"], after["reward_mean"]
            error = sum(result["reward_std"] ** 2 / result["samples"] for result in (before, after)) ** 0.5
            percent = f"{100 * (new - old) / abs(old):+.1f} %, " if old else ""
            errors = f"{(new - old) / error:+.1f} standard errors" if error else "no spread"
            print(
                f"reward on {chosen.kind.words} after iteration {after['iteration']}: {old:.4f} -> {new:.4f} ({percent}{errors})",
                flush=True,
            )
        print(f"{self._say_report()}\n{self._say_weights(self.progress.iteration)}", flush=True)
        after = evaluations[self.decides.name]["after"]
        best = evaluations[self.decides.name].get("best", after)
        if best["iteration"] != after["iteration"]:
            key = f"{self.decides.name}_reward_mean"
            said = f"best: {best['reward_mean']:.4f} after iteration {best['iteration']}"
            others = [row for row in self.writer.rows if row["iteration"] > 0 and row[key] is not None and row[key] > best["reward_mean"]]
            if others:
                highest = max(others, key=lambda row: row[key])
                said += f" (the weights after iteration {highest['iteration']}, {highest[key]:.4f}, could not be written)"
            print(f"{said}: {shown(self.path / 'best')}", flush=True)

    def _say_report(self) -> str:
        shown = self.directory.shown
        if (reason := self.claim.unwritten.get("the report")) is None:
            return f"report: {shown(self.path / 'report.html')}"
        return f"report: could not be written ({reason}); ddpo-fast report {shown(self.path)} writes it"

    def _say_weights(self, iteration: int) -> str:
        """Says where the newest weights are. If they could not be written, says which weights are there instead."""
        weights, claim = self.directory.shown(self._weights), self.claim
        if "the weights" not in claim.unwritten:
            return f"weights: {weights}"
        said = f"weights: those of iteration {iteration} could not be written"
        if not os.path.exists(self._weights):
            return said
        whose = f"of iteration {claim.newest['the weights']}" if "the weights" in claim.newest else "older"
        return f"{said}; those in {weights} are {whose}" + ", not trained" * (claim.newest.get("the weights") == 0)


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
