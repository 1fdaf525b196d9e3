"""Reward per device-hour: a recipe run under two or more settings, each with the same seeds.

    python -m bench.reward      # ours against TRL's DDPOTrainer, 5 seeds
    python -m bench.reward --setting ours --setting "lr 2e-3: --train.learning_rate 2e-3" --setting trl --target -1.8 --seeds 0 1 2

The reward of an iteration is that of training pictures drawn before its update. So it belongs to the samples, updates and hours of the
iterations before. Hours are training time, without evaluation and checkpoints. Runs have one rank, so a device-hour is an hour. A setting
with smaller iterations may have more of them: its options may give --run.iterations. Ours evaluates before its first iteration, so that
start-up work of the first pictures is in TRL's hours only.

A finished run is not run again. An interrupted run goes on (TRL's starts again), so the same command continues an interrupted comparison.
The device and every option must be what they were. A row has the commits that its runs were made with.

Intervals are Student's t of 95 % over the seeds. That of a ratio of hours is over the logarithms of the seeds' ratios.
"""

import argparse
import csv
import json
import math
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

from bench import ROOT, harness, rows
from ddpo_fast.config.command_line import parse
from ddpo_fast.config.options import Config
from ddpo_fast.files import write_text
from ddpo_fast.records.checkpoint import list_checkpoints
from ddpo_fast.records.metrics import read_metrics

NEVER = 1 << 30
"""The interval of evaluations with which there are only those before the first and after the last iteration."""
TARGETS = {"embedded_compressibility": -2.0}
"""Target rewards of recipes: about midway between the start and the end of their runs."""
SPREAD = {
    "hours_to_target": ("hours_low", "hours_high"),
    "final_reward": ("final_low", "final_high"),
    "eval_reward": ("eval_low", "eval_high"),
    "area_samples": ("area_low", "area_high"),
}
"""Columns of the table that have an interval over seeds, each with the columns of the interval's ends."""
SHOWN = (
    "seeds reached hours_to_target samples updates device_hours final_reward eval_reward area_samples area_hours reward_per_hour".split()
)
COLORS = ("#c2410c", "#33587a", "#4d7c0f", "#7e22ce", "#a16207", "#0f766e")


@dataclass(frozen=True)
class Setting:
    """A name, and options that are added to the recipe's. TRL runs the setting with the name `trl`."""

    name: str
    options: tuple[str, ...] = ()

    @staticmethod
    def parse(text: str) -> "Setting":
        """Makes a setting from the command line's text. Raises ValueError, which says what is valid."""
        name, colon, options = (part.strip() for part in text.partition(":"))
        if not name or not (colon or name in ("ours", "trl")):
            raise ValueError(f'--setting {text!r}: valid is ours, trl, or "NAME: --section.option value ..."')
        options = tuple(shlex.split(options))
        for option in options:
            if re.match(r"--(run\.(?!iterations)|resume|eval\.every)", option):
                raise ValueError(f"--setting {text!r}: {option} is set by the benchmark")
        return Setting(name, options)

    @property
    def slug(self) -> str:
        return re.sub(r"[^\w.]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Run:
    """A setting with a seed, and the folder of its metrics.jsonl."""

    setting: Setting
    seed: int
    argv: list[str]
    folder: Path

    @cached_property
    def config(self) -> Config:
        return parse(self.argv)

    @cached_property
    def asked(self) -> dict:
        """What must not change between a run and its continuation or reuse."""
        options = {f"{section}.{key}": value for section, pairs in asdict(self.config).items() for key, value in pairs.items()}
        return json.loads(json.dumps({"device": rows.device_name()} | options))

    def made(self) -> dict:
        """The folder's options.json: what was `asked`, and the `commits` that the run was made with. {} if there is no such file."""
        path = self.folder / "options.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def finished(self) -> bool:
        metrics = read_metrics(self.folder)
        return bool(metrics) and metrics[-1]["iteration"] == self.config.run.iterations

    def check(self) -> None:
        """Raises ValueError for a wrong option, or, naming the folder and what differs, if the folder has a run with other options."""
        asked, made = self.asked, self.made().get("asked", {})
        differ = [f"{key}={made.get(key)}, not {asked.get(key)}" for key in made | asked if made.get(key) != asked.get(key)]
        if differ and read_metrics(self.folder):
            difference = "; ".join(differ) if made else "no options.json"
            raise ValueError(f"{self.folder} holds a run with {difference}: remove it or give another --runs")

    def execute(self) -> None:
        """Starts or continues the run if it is not finished. If it fails, raises RuntimeError with the end of its output."""
        if self.finished():
            return
        resume = self.setting.name != "trl" and bool(list_checkpoints(self.folder))
        commits = {rows.commit(), *(self.made()["commits"] if resume else [])}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "options.json", json.dumps({"commits": sorted(commits), "asked": self.asked}, indent=1))
        if self.setting.name == "trl":
            run_trl(self)
        else:
            trainer = [sys.executable, str(ROOT / "ddpo_fast/train.py")]
            run_process([*trainer, *self.argv, "--run.dir", str(self.folder), *["--resume"] * resume])


def run_process(command: list[str]) -> None:
    """Runs a command to its end. If it fails, raises RuntimeError with its last lines of output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise RuntimeError(f"exit status {done.returncode}\n{tail}")


def run_trl(run: Run) -> None:
    """Runs TRL's trainer for the run's iterations and writes metrics.jsonl with the same keys as ours. Raises RuntimeError."""
    with (run.folder / "metrics.jsonl").open("w", encoding="utf-8") as file, harness.Worker("trl", run.argv) as worker:
        for iteration in range(1, run.config.run.iterations + 1):
            figures = worker.iterate()
            if not math.isfinite(figures["reward_mean"]):
                raise RuntimeError(f"iteration {iteration}: the mean reward is {figures['reward_mean']}")
            row = {
                "iteration": iteration, "samples": iteration * run.config.sample.num_samples, "reward_mean": figures["reward_mean"],
                "reward_std": figures["reward_std"], "time_total_s": figures["total_s"],
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
            file.flush()


@dataclass(frozen=True)
class Curve:
    """A run's mean reward by iteration, with the samples, updates and device-hours before it, (iterations,) each; then its evaluation."""

    seed: int
    samples: np.ndarray
    updates: np.ndarray
    hours: np.ndarray
    reward: np.ndarray
    evaluation: float = math.nan
    """Mean reward of the fixed evaluation set after the last update; NaN for TRL, which has none."""

    @staticmethod
    def read(run: Run) -> "Curve":
        """Reads the curve from a finished run's metrics.jsonl."""
        metrics = read_metrics(run.folder)
        trained = [row for row in metrics if row["reward_mean"] is not None]
        seconds = np.array([row["time_total_s"] - row.get("time_eval_s", 0.0) for row in trained])
        config, before = run.config, np.arange(len(trained))
        updates = before * config.train.updates_per_iteration
        hours = (np.cumsum(seconds) - seconds) / 3600
        reward, evaluation = np.array([row["reward_mean"] for row in trained]), metrics[-1].get("eval_reward_mean", math.nan)
        return Curve(run.seed, before * config.sample.num_samples, updates, hours, reward, evaluation)

    def hours_to(self, target: float) -> float:
        """Device-hours at which the curve, linear between its points, first reaches a reward; NaN if it never does."""
        above = np.flatnonzero(self.reward >= target)
        if not len(above):
            return math.nan
        around = slice(max(above[0] - 1, 0), above[0] + 1)
        return float(np.interp(target, self.reward[around], self.hours[around]))

    def area(self, x: np.ndarray, end: float) -> float:
        """The mean reward over x (`samples` or `hours`) from 0 to `end`, by the trapezoid rule."""
        inside = x < end
        xs, ys = np.append(x[inside], end), np.append(self.reward[inside], np.interp(end, x, self.reward))
        return float(np.trapezoid(ys, xs) / end)


def mean_curve(curves: list[Curve]) -> Curve:
    """The mean over seeds of reward and hours, iteration by iteration."""
    hours, reward, evaluation = (np.mean([getattr(curve, name) for curve in curves], 0) for name in ("hours", "reward", "evaluation"))
    return Curve(-1, curves[0].samples, curves[0].updates, hours, reward, evaluation)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of Student's 95 % interval of the mean over the first axis, the seeds; NaN if there is one seed or none."""
    if len(values) < 2:
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing
    mean, error = values.mean(0), stats.sem(values)
    margin = stats.t.ppf(0.975, len(values) - 1) * error
    return mean - margin, mean + margin


def mean_and_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, low and high over seeds; NaN if there is no value."""
    values = np.array(values)
    return (float(values.mean()) if len(values) else math.nan, *map(float, interval(values)))


def paired(ours: list[Curve], other: list[Curve]) -> list[tuple[Curve, Curve]]:
    """Pairs of curves, for the seeds that both have."""
    return [(one, two) for one in ours for two in other if one.seed == two.seed]


def verdict_on_target(names: tuple[str, str], ours: list[Curve], other: list[Curve], target: float) -> str:
    """Which runs reach the target sooner, and by what factor: the geometric mean over the seeds for which both reach it."""
    hours = np.array([[curve.hours_to(target) for curve in pair] for pair in paired(ours, other)]).reshape(-1, 2)
    hours = hours[np.isfinite(hours).all(1)]
    counts = f"{names[0]} in {reached(ours, target)} seeds, {names[1]} in {reached(other, target)}"
    if not len(hours):
        return f"no ratio of hours to {target:.4g}, which no seed reaches with both ({counts})"
    if hours.min() == 0:
        return f"no ratio of hours to {target:.4g}, which some runs have before any update ({counts})"
    ratios = np.log(hours[:, 1] / hours[:, 0])
    faster = ratios.mean() >= 0
    ratios = ratios if faster else -ratios
    spread = "one seed, no interval"
    if len(hours) > 1:
        low, high = map(float, np.exp(interval(ratios)))
        spread = f"{low:.2f} to {high:.2f}{', which includes no difference' * (low <= 1)}"
    over = f", over the {len(hours)} seeds with which both do ({counts})" * (len(hours) < max(len(ours), len(other)))
    means = hours.mean(0)
    return (
        f"{names[0]} reaches {target:.4g} in {means[0]:.3g} device-hours, {names[1]} in {means[1]:.3g}: "
        f"{math.exp(ratios.mean()):.2f}x {'faster' if faster else 'slower'} ({spread}){over}"
    )


def verdict_on_samples(names: tuple[str, str], ours: list[Curve], other: list[Curve]) -> str:
    """Whether the curves over samples agree: our mean is compared with the other's interval, and the paired differences with 0."""
    pairs = paired(ours, other)
    if min(len(pairs), len(other)) < 2:
        return "against samples nothing is said: one seed has no interval"
    at = other[0].samples[other[0].samples <= ours[0].samples[-1]]  # settings may differ in the samples of an iteration
    rewards = {id(curve): np.interp(at, curve.samples, curve.reward) for curve in [*ours, *other]}
    mean = np.mean([rewards[id(curve)] for curve in ours], 0)
    low, high = interval(np.stack([rewards[id(curve)] for curve in other]))
    below, above = interval(np.stack([rewards[id(one)] - rewards[id(two)] for one, two in pairs]))
    inside, zero = int(((low <= mean) & (mean <= high)).sum()), int(((below <= 0) & (0 <= above)).sum())
    verdict = "agree" if inside == len(at) else "are not told apart seed by seed" if zero == len(at) else "differ"
    return (
        f"against samples the curves {verdict}: {names[0]} lies inside {names[1]}'s 95 % interval at {inside} of {len(at)} points, "
        f"and the paired difference's interval contains 0 at {zero} of {len(at)}"
    )


def verdict_on_hours(names: tuple[str, str], ours: list[Curve], other: list[Curve]) -> str:
    """Whether our mean curve over hours is above the other's, for the hours that both have. Where both rise, that also means sooner."""
    mean, others = mean_curve(ours), mean_curve(other)
    end = min(mean.hours[-1], others.hours[-1])
    at = np.union1d(mean.hours, others.hours)
    at = at[(at > 0) & (at <= end)]
    ahead = int((np.interp(at, mean.hours, mean.reward) > np.interp(at, others.hours, others.reward)).sum())
    return (
        f"against device-hours {names[0]} is {'' if ahead == len(at) else 'not always '}ahead of {names[1]}: higher mean reward at "
        f"{ahead} of {len(at)} points up to {end:.3g} hours, which both have"
    )


def reached(curves: list[Curve], target: float) -> str:
    """How many runs reach the target, in words."""
    return f"{sum(math.isfinite(curve.hours_to(target)) for curve in curves)} of {len(curves)}"


def summarize(curves: list[Curve], target: float, end_hours: float) -> dict:
    """A setting's columns of the table `reward`. They count all points, but the area over hours ends at `end_hours`."""
    mean, to_target = mean_curve(curves), [curve.hours_to(target) for curve in curves]
    columns = {
        "hours_to_target": [hours for hours in to_target if math.isfinite(hours)],
        "final_reward": [curve.reward[-1] for curve in curves],
        "eval_reward": [curve.evaluation for curve in curves],
        "area_samples": [curve.area(curve.samples, curve.samples[-1]) for curve in curves],
    }
    figures = {name: value for key, values in columns.items() for name, value in zip((key, *SPREAD[key]), mean_and_interval(values))}
    figures["area_hours"] = float(np.mean([curve.area(curve.hours, end_hours) for curve in curves]))
    figures["reward_per_hour"] = float(np.mean([(curve.reward[-1] - curve.reward[0]) / curve.hours[-1] for curve in curves]))
    figures |= {"target": target, "device_hours": float(mean.hours[-1])}
    counts = {"seeds": len(curves), "reached": reached(curves, target), "samples": int(mean.samples[-1]), "updates": int(mean.updates[-1])}
    return counts | {name: None if math.isnan(value) else value for name, value in figures.items()}


def table(summaries: dict[str, dict]) -> str:
    """The summaries as text, a setting a column."""

    def cell(row: dict, name: str) -> str:
        if not isinstance(row[name], float):
            return "-" if row[name] is None else str(row[name])
        low, high = (row[end] for end in SPREAD.get(name, (name, name)))
        return f"{row[name]:.4g}" + (f" ({low:.4g} to {high:.4g})" if name in SPREAD and low is not None else "")

    lines = [["", *summaries], *([name, *(cell(row, name) for row in summaries.values())] for name in SHOWN)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def plot(curves: dict[str, list[Curve]], target: float, title: str, path: Path) -> None:
    """Writes a picture: reward against samples and against training time, mean and interval over seeds."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title)
    unit, scale = ("device-hours", 1) if torch.cuda.is_available() else ("device-minutes", 60)
    for axis, label in zip(figure.subplots(1, 2, sharey=True), ("samples", unit)):
        for (name, group), color in zip(curves.items(), COLORS * len(curves)):
            mean = mean_curve(group)
            x = mean.samples if label == "samples" else mean.hours * scale
            axis.plot(x, mean.reward, marker="o", markersize=4, color=color, label=name)
            axis.fill_between(x, *interval(np.stack([curve.reward for curve in group])), color=color, alpha=0.18, linewidth=0)
        axis.axhline(target, color="#6b7280", linestyle="--", linewidth=1, label=f"target {target:.4g}")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean reward of training samples")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def write_curves(curves: dict[str, list[Curve]], path: Path) -> None:
    """Writes every point of every run as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow("setting seed iteration samples updates device_hours reward_mean".split())
        for name, group in curves.items():
            for curve in group:
                for i, reward in enumerate(curve.reward):
                    point = curve.samples[i], curve.updates[i], f"{curve.hours[i]:.6g}", f"{reward:.6g}"
                    writer.writerow([name, curve.seed, i + 1, *point])


def plan(args: argparse.Namespace) -> list[Run]:
    """The runs, in the order in which to do them. Raises ValueError for what cannot be run or differs from what is on the disk."""
    settings = [Setting.parse(text) for text in args.setting or ("ours", "trl")]
    for what, values in (("--setting", [setting.slug for setting in settings]), ("--seeds", args.seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"{what}: valid is each only once; got {', '.join(map(str, values))}")
    if len(settings) < 2:
        raise ValueError("--setting: valid is two or more")
    iterations = [] if args.iterations is None else [f"--run.iterations={args.iterations}"]
    runs = []
    for turn, seed in enumerate(args.seeds):
        for setting in settings[:: (-1) ** turn]:  # they take turns, so that a machine's drift hits all alike
            argv = ["--config", str(args.config), *iterations, *setting.options, f"--run.seed={seed}", f"--eval.every={NEVER}"]
            folder = args.runs / args.config.stem / f"{setting.slug}-seed{seed}"
            runs.append(Run(setting, seed, argv, folder))
    for run in runs:
        if run.config.run.iterations < 2:
            raise ValueError(f"run.iterations={run.config.run.iterations}: valid is 2 or more: the first point is the untrained model's")
        run.check()
    if any(run.setting.name == "trl" and not run.finished() for run in runs):
        harness.trl_python()
    return runs


def report(args: argparse.Namespace, runs: list[Run], argv: list[str]) -> None:
    """Writes and prints what the finished runs say."""
    curves: dict[str, list[Curve]] = {}
    for run in runs:
        curves.setdefault(run.setting.name, []).append(Curve.read(run))
    name, (first, *others) = args.name or args.config.stem, curves
    target = TARGETS.get(args.config.stem) if args.target is None else args.target
    if target is None:
        target = float(mean_curve(curves[first]).reward[[0, -1]].mean())
        print(f"target {target:.4g}: midway between the first and the last point of {first}'s mean curve")
    end_hours = min(curve.hours[-1] for group in curves.values() for curve in group)
    summaries = {name: summarize(group, target, end_hours) for name, group in curves.items()}
    writer = rows.Writer("reward", args.out, argv)
    for setting, summary in summaries.items():
        commits = sorted({commit for run in runs if run.setting.name == setting for commit in run.made()["commits"]})
        writer.add(comparison=name, setting=setting, **summary | {"commit": "+".join(commits)})
    write_curves(curves, args.out / f"reward_{name}.csv")
    plot(curves, target, name, args.docs / f"reward_{name}.png")
    print(table(summaries))
    for other in others:
        names, groups = (first, other), (curves[first], curves[other])
        print("; ".join((verdict_on_target(names, *groups, target), verdict_on_samples(names, *groups), verdict_on_hours(names, *groups))))


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.reward", description=__doc__.partition("\n")[0])
    default = ROOT / "configs/embedded_compressibility.yaml"
    parser.add_argument("--config", type=lambda text: Path(text).resolve(), default=default, help="the recipe")
    parser.add_argument("--setting", action="append", help='ours, trl or "NAME: options"; the first is compared with the others')
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--iterations", type=int, help="default: the recipe's")
    parser.add_argument("--name", help="of the comparison, in its rows and its files' names; default: the recipe's")
    parser.add_argument("--target", type=float, help="reward to reach; default: the recipe's, or midway of the first setting's mean curve")
    parser.add_argument("--out", type=Path, default=rows.RESULTS, help="folder of the CSV files")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/bench_reward", help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the picture")
    args = parser.parse_args(argv)
    try:
        runs = plan(args)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    failed = []
    for run in (bar := tqdm(runs, desc="runs", unit="run", dynamic_ncols=True)):
        bar.set_postfix_str(run.folder.name)
        try:
            run.execute()
        except RuntimeError as error:
            failed.append(run)
            tqdm.write(f"{run.folder}: failed: {error}")
    bar.close()
    # in the settings' order, which is that of the first seed
    done = [run for setting in dict.fromkeys(run.setting for run in runs) for run in runs if run.setting == setting and run not in failed]
    if done:
        report(args, done, ["python", "-m", "bench.reward", *(sys.argv[1:] if argv is None else argv)])
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(run.folder.name for run in failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also ends the run in progress, which a continuation would meet in its folder
    sys.exit(main())
