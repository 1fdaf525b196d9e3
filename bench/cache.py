"""What the activation cache saves: the update of several inner epochs with it and without, for LoRA in all and in the later blocks.
Also what score accumulation saves: a whole iteration with one update, with it and with the ordinary update.

    python -m bench.cache                       # the embedded model and SD 1.5's blocks on a CPU, SD 1.5 at full size on a GPU
    python -m bench.cache --models sd15_small --rounds 9

All settings of a table take turns in one run. Before anything is timed, it is checked that the weights' change in the first iteration is
the same with the cache and without it, and with both estimators.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from bench.harness import GateError, Worker, gradient_error, spread, start, take_turns
from bench.models import WORKS, Work
from bench.rows import RESULTS, Writer

INNER_EPOCHS = 4
SCOPES = {
    "embedded": ("all", "mid_up", "up_blocks.1"),
    "sd15_small": ("all", "mid_up", "up_blocks.2,up_blocks.3"),
    "sd15": ("all", "mid_up", "up_blocks.2,up_blocks.3"),
    "sdxl_small": ("all", "mid_up", "up_blocks.1"),
    "sdxl": ("all", "mid_up", "up_blocks.1"),
    "embedded_flow": ("all", "last:0.5", "last:0.17"),
    "sd3_small": ("all", "last:0.5", "last:0.2"),
}
TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 2e-1}
"""The largest difference of the weights' change with and without the cache: norm(difference) / norm(change). Above it nothing is reported.

The rollout's calls may have other numbers of rows than the update's, and therefore other bits. Adam magnifies this where a gradient is
small. Measured: 2e-4 for sd15_small, whose rollout has 4 rows and its update 20; 0 for the embedded model.
"""
ESTIMATORS = 10
"""The tolerance is this much larger for two estimators, because they sum in another order. Measured: 1.8e-3 for sd15_small, whose
gradients agree to 1e-6."""


def contenders(work: Work) -> dict[tuple[str, str], tuple[str, list[str]]]:
    """(scope, off or on) -> (contender, command line)."""
    argv = [*work.argv(), f"--train.inner_epochs={INNER_EPOCHS}"]
    modes = {scope: ("off",) if scope == "all" else ("off", "on") for scope in SCOPES[work.model]}
    return {(scope, mode): ("ours", [*argv, f"--lora.scope={scope}", f"--cache.mode={mode}"]) for scope in modes for mode in modes[scope]}


def same_weights(workers: dict[tuple[str, str], Worker], reference: str, slack: float = 1.0) -> dict[tuple[str, str], float]:
    """How far each worker's change of the weights is from that of the reference, the worker whose key has `reference` as its second name.

    Raises GateError above TOLERANCE times `slack`.
    """
    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {key: Path(folder, f"{number}.pt") for number, key in enumerate(workers)}
        for key, worker in workers.items():
            worker.call("changes", file=str(files[key]))
        for key, worker in workers.items():
            if key[1] == reference:
                continue
            error = gradient_error(*(torch.load(files[k]) for k in (key, (key[0], reference))))
            tolerance = slack * TOLERANCE[worker.work["dtype"]]
            if not error <= tolerance:
                raise GateError(f"{', '.join(key)}: the weights move elsewhere, by {error:.2g}, {tolerance:.0e} is tolerated")
            errors[key] = error
    return errors


def measure(work: Work, rounds: int, writer: Writer) -> list[dict]:
    """Checks every setting, then times it; returns the rows written. Raises GateError before anything is timed."""
    with ExitStack() as stack:
        workers = start(stack, contenders(work))
        if missing := set(contenders(work)) - set(workers):
            raise RuntimeError(f"a setting failed: {missing}")
        flop = {key: worker.iterate(count_flop=True)["flop"] for key, worker in tqdm(workers.items(), desc="counting", leave=False)}
        errors = same_weights(workers, "off")
        results = take_turns(workers, rounds)
    update = {key: [turn["seconds"]["update"] + turn["seconds"]["optimizer"] for turn in turns] for key, turns in results.items()}
    sample = {key: [turn["seconds"]["denoise"] for turn in turns] for key, turns in results.items()}
    written = []
    for (scope, mode), turns in results.items():
        key, off, whole = (scope, mode), (scope, "off"), (SCOPES[work.model][0], "off")
        median, low, high = spread(update[key])
        row = dict(
            model=work.model, work=f"{work}, {INNER_EPOCHS} inner epochs", scope=scope, cache=mode, update_s=median, low_s=low, high_s=high
        )
        row["faster_than_off"], row["off_low"], row["off_high"] = spread([a / b for a, b in zip(update[off], update[key])])
        row["faster_than_all"], row["all_low"], row["all_high"] = spread([a / b for a, b in zip(update[whole], update[key])])
        row["sampling_slower_than_off"] = spread([a / b for a, b in zip(sample[key], sample[off])])[0]
        row["update_tflop"] = (flop[key]["update"] + flop[key].get("optimizer", 0)) / 1e12
        row["peak_memory_mib"] = turns[-1]["peak_memory_mib"]
        row["weights_error"] = errors.get(key)
        written.append(writer.add(**row))
    return written


def measure_estimators(work: Work, rounds: int, writer: Writer) -> list[dict]:
    """Checks, then times, whole iterations of one update with both estimators; returns the rows written. Raises GateError."""
    work = replace(work, options=(*work.options, "--train.num_minibatches=1"))
    estimators = {("all", name): ("ours", [*work.argv(), f"--train.estimator={name}"]) for name in ("ppo", "score_accumulation")}
    with ExitStack() as stack:
        workers = start(stack, estimators)
        if missing := set(estimators) - set(workers):
            raise RuntimeError(f"a setting failed: {missing}")
        for worker in workers.values():
            worker.iterate()
        errors = same_weights(workers, "ppo", ESTIMATORS)
        results = take_turns(workers, rounds)
    seconds = {key: [turn["total_s"] for turn in turns] for key, turns in results.items()}
    written = []
    for key, turns in results.items():
        median, low, high = spread(seconds[key])
        row = dict(model=work.model, work=str(work), estimator=key[1], median_s=median, low_s=low, high_s=high)
        row["faster_than_ppo"], row["ratio_low"], row["ratio_high"] = spread([a / b for a, b in zip(seconds["all", "ppo"], seconds[key])])
        for stage in ("denoise", "update"):
            row[f"{stage}_s"] = spread([turn["seconds"].get(stage, 0.0) for turn in turns])[0]
        row |= {"peak_memory_mib": turns[-1]["peak_memory_mib"], "weights_error": errors.get(key)}
        written.append(writer.add(**row))
    return written


def estimators_table(rows: list[dict]) -> str:
    """The rows of `measure_estimators` for a terminal."""
    lines = [f"{'estimator':26}{'iteration':>10}{'denoise':>9}{'update':>9}{'x ppo':>20}{'MiB':>8}{'weights':>12}"]
    for row in rows:
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*(float(row[name]) for name in ("faster_than_ppo", "ratio_low", "ratio_high")))
        lines.append(
            "{estimator:26}{median_s:>9}s{denoise_s:>8}s{update_s:>8}s".format(**row)
            + f"{ratio:>20}{float(row['peak_memory_mib']):8.0f}{row['weights_error']:>12}"
        )
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """The rows of `measure` for a terminal."""
    lines = [f"{'LoRA in':26}{'cache':>6}{'update':>9}{'TFLOP':>9}{'x off':>8}{'x all':>8}{'sampling':>10}{'MiB':>8}{'weights':>12}"]
    for row in rows:
        lines.append(
            "{scope:26}{cache:>6}{update_s:>8}s{update_tflop:>9}".format(**row)
            + f"{float(row['faster_than_off']):8.2f}{float(row['faster_than_all']):8.2f}{float(row['sampling_slower_than_off']):10.3f}"
            + f"{float(row['peak_memory_mib']):8.0f}{row['weights_error']:>12}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.cache", description=__doc__.partition("\n")[0])
    default = ["sd15"] if torch.cuda.is_available() else ["embedded", "sd15_small"]
    parser.add_argument("--models", nargs="+", choices=list(SCOPES), default=default)
    parser.add_argument("--rounds", type=int, default=5, help="iterations of each setting, after one to warm up")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    options = parser.parse_args(argv)
    tables = (("cache", measure, table), ("score_accumulation", measure_estimators, estimators_table))
    for model in options.models:
        for name, times, text in tables:
            try:
                rows = times(WORKS[model], options.rounds, Writer(name, options.out, ["python", "-m", "bench.cache", *argv]))
            except (GateError, RuntimeError) as error:
                print(f"bench.cache: {model}: {error}", file=sys.stderr)
                return 1
            print(f"{model}: {rows[0]['work']}, {rows[0]['device']}\n{text(rows)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
