"""The paper's comparison, scaled down: four algorithms, three rewards, the same number of reward queries for each, held-out prompts.

    python -m bench.algorithms              # 3 seeds; hours
    OMP_NUM_THREADS=1 python -m bench.algorithms --jobs 2    # two runs at a time, of one thread each

The paper (DDPO, arXiv:2305.13301, section 6.1) compares on Stable Diffusion and 51,200 queries. Here the embedded model's recipes are run,
each with every algorithm of `ALGORITHMS` and, for reward-weighted regression (RWR), the ablations of `ABLATIONS`. The reward after the
last update is compared, by the number of queries, not by hours, so that runs may share the machine. Each run is evaluated before and
after, on the recipe's fixed set and on `HELDOUT`. The diversity of the pictures is measured, too: if the reward rises while all pictures
become alike, that is a collapse and not learning.

A finished run is not run again, and an interrupted one goes on, as in bench.reward. The statistics are those of bench.reward, too.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from bench import ROOT, rows
from bench.reward import COLORS, NEVER, Run, Setting, interval
from ddpo_fast.records.metrics import read_metrics

HELDOUT = (
    "elephant giraffe penguin owl panda snail octopus crocodile lobster hippopotamus crab leopard "
    "apple banana car bus house guitar umbrella clock book cup chair tree"
).split()
"""12 animals and 12 things that the model can draw and the scorer knows, but that no recipe trains on."""
RWR = "--train.learning_rate=1e-4 --algorithm.inverse_temperature=8"
"""At learning rates of 4e-4 and above, the denoising loss on the model's own samples washes every picture out, whatever the reward. An
inverse temperature of 8 suits rewards that differ by about 0.4 (kB or probability) within a prompt; the paper's 0.2 suits some 20 kB."""
ALGORITHMS = {
    "DDPO_IS": "--train.algorithm=ddpo_is",
    "DDPO_SF": "--train.algorithm=ddpo_sf --train.num_minibatches=1",
    "RWR": f"--train.algorithm=rwr {RWR}",
    "RWR_sparse": "--train.algorithm=rwr_sparse --train.learning_rate=1e-4",
}
"""Options of each algorithm, the same for every recipe. DDPO's learning rate is the recipe's."""
ABLATIONS = {
    "compressibility": {
        "RWR at DDPO's rate": "--train.algorithm=rwr --algorithm.inverse_temperature=8",
        "the same with equal weights": "--train.algorithm=rwr --algorithm.inverse_temperature=1e-9",
    },
    "incompressibility": {
        "RWR, one round": f"--train.algorithm=rwr {RWR} --run.iterations=1 --sample.num_samples=336 --train.num_minibatches=28",
        "RWR, no guidance in training": f"--train.algorithm=rwr {RWR} --algorithm.guidance_scale=1",
    },
}
"""These show what RWR depends on: the learning rate, with the reward and without; new samples between updates; guidance in the loss."""
OPTIONS = {"compressibility": "", "incompressibility": "", "alignment": "--run.iterations=8"}
"""Tasks, which are the embedded model's recipes, and options that change them."""


@dataclass(frozen=True)
class Outcome:
    """The result of a finished run."""

    samples: np.ndarray
    """(I,) reward queries before each iteration."""
    reward: np.ndarray
    """(I,) mean reward of its training samples."""
    before: dict
    """The row of metrics.jsonl that evaluates the untrained model."""
    after: dict
    """The row that evaluates the model after the last update."""
    updates: int

    @staticmethod
    def read(run: Run) -> "Outcome":
        metrics = read_metrics(run.folder)
        trained = [row for row in metrics if row["reward_mean"] is not None]
        samples, reward = np.arange(len(trained)) * run.config.sample.num_samples, np.array([row["reward_mean"] for row in trained])
        return Outcome(samples, reward, metrics[0], metrics[-1], len(trained) * run.config.train.updates_per_iteration)


def plan(args: argparse.Namespace) -> list[Run]:
    """Every run, all runs of one seed before those of the next. Raises ValueError if a run on the disk has other options."""
    runs = []
    for seed in args.seeds:
        for task in args.tasks:
            for name, options in (ALGORITHMS | ABLATIONS.get(task, {})).items():
                setting = Setting(name, tuple(options.split()))
                argv = ["--config", str(ROOT / f"configs/embedded_{task}.yaml"), *OPTIONS[task].split(), *setting.options]
                argv += [f"--run.seed={seed}", f"--eval.every={NEVER}", f"--eval.heldout={json.dumps(HELDOUT)}"]
                runs.append(Run(setting, seed, argv, args.runs / task / f"{setting.slug}-seed{seed}"))
    for run in runs:
        run.check()
    return runs


def summarize(task: str, name: str, group: dict[int, Outcome]) -> dict:
    """A row of the table `algorithms`: means over the seeds, with their intervals."""
    outcomes = list(group.values())
    figures = {"task": task, "algorithm": name, "seeds": len(group)}
    figures |= {"queries": outcomes[0].after["samples"], "updates": outcomes[0].updates}
    for place in ("eval", "heldout"):
        for when in ("before", "after"):
            figures[f"{place}_{when}"] = float(np.mean([getattr(outcome, when)[f"{place}_reward_mean"] for outcome in outcomes]))
        if len(group) > 1:
            low, high = interval(np.array([outcome.after[f"{place}_reward_mean"] for outcome in outcomes]))
            figures |= {f"{place}_low": float(low), f"{place}_high": float(high)}
        diversity = [outcome.after[f"{place}_diversity"] / outcome.before[f"{place}_diversity"] for outcome in outcomes]
        figures[f"{place}_diversity"] = float(np.mean(diversity))
    return figures


def verdict(task: str, groups: dict[str, dict[int, Outcome]]) -> str:
    """The algorithms of a task in the order of their reward after the last update, each with its paired difference from the first."""
    means = {name: np.mean([outcome.after["eval_reward_mean"] for outcome in group.values()]) for name, group in groups.items()}
    first, *others = sorted(means, key=means.get, reverse=True)
    words = [f"{first} {means[first]:.4g}"]
    for name in others:
        seeds = groups[first].keys() & groups[name].keys()
        words.append(f"{name} {means[name]:.4g}")
        if len(seeds) > 1:
            after = [np.array([groups[which][seed].after["eval_reward_mean"] for seed in seeds]) for which in (name, first)]
            words[-1] += " ({:+.3g} to {:+.3g})".format(*interval(after[0] - after[1]))
    return f"{task}: {', '.join(words)}"


def plot(results: dict[str, dict[str, dict[int, Outcome]]], path: Path) -> None:
    """Writes a picture: for each task the reward of training samples against queries, then evaluation and held-out prompts at the end."""
    figure = Figure(figsize=(5 * len(results), 4.8), layout="constrained")
    for axis, (task, groups) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
        for place, (name, group) in enumerate(groups.items()):
            color, outcomes = COLORS[place % len(COLORS)], list(group.values())
            curves, samples, queries = np.stack([outcome.reward for outcome in outcomes]), outcomes[0].samples, outcomes[0].after["samples"]
            axis.plot(samples, curves.mean(0), marker="." * (len(samples) > 1), color=color, label=name)
            axis.fill_between(samples, *interval(curves), color=color, alpha=0.15, linewidth=0)
            for evaluation, marker, shift in (("eval", "o", 0), ("heldout", "D", 0.05)):
                ends = np.array([outcome.after[f"{evaluation}_reward_mean"] for outcome in outcomes])
                spread = np.maximum(0, [[ends.mean() - ends.min()], [ends.max() - ends.mean()]])
                x, face = queries * (1.04 + shift + 0.008 * place), color if evaluation == "eval" else "none"
                axis.errorbar(x, ends.mean(), spread, color=color, marker=marker, markerfacecolor=face, markersize=5, capsize=2)
        axis.set(title=task, xlabel="reward queries")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean reward")
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def report(args: argparse.Namespace, runs: list[Run], argv: list[str]) -> None:
    """Writes and prints what the finished runs say."""
    results: dict[str, dict[str, dict[int, Outcome]]] = {}
    commits: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        task = run.folder.parent.name
        results.setdefault(task, {}).setdefault(run.setting.name, {})[run.seed] = Outcome.read(run)
        commits.setdefault((task, run.setting.name), set()).update(run.made()["commits"])
    writer = rows.Writer("algorithms", args.out, argv)
    for task, groups in results.items():
        for name, group in groups.items():
            writer.add(**summarize(task, name, group) | {"commit": "+".join(sorted(commits[task, name]))})
        print(verdict(task, groups))
    plot(results, args.docs / "algorithms.png")


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.algorithms", description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=OPTIONS, default=list(OPTIONS), help="the embedded model's recipes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; with more than one, set OMP_NUM_THREADS")
    parser.add_argument("--out", type=Path, default=rows.RESULTS, help="folder of the CSV file")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/bench_algorithms", help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the picture")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: valid is 1 or more")
    try:
        runs = plan(args)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))

    def execute(run: Run) -> bool:
        try:
            run.execute()
        except RuntimeError as error:
            tqdm.write(f"{run.folder}: failed: {error}")
        bar.update()
        return run.finished() and all(read_metrics(run.folder)[-1][f"{place}_reward_mean"] is not None for place in ("eval", "heldout"))

    with tqdm(total=len(runs), desc="runs", unit="run", dynamic_ncols=True) as bar, ThreadPoolExecutor(args.jobs) as pool:
        finished = list(pool.map(execute, runs))
    if done := [run for run, ended in zip(runs, finished) if ended]:
        report(args, done, ["python", "-m", "bench.algorithms", *(sys.argv[1:] if argv is None else argv)])
    failed = [run.folder.name for run, ended in zip(runs, finished) if not ended]
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
