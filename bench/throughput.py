"""How fast each part of an iteration is, and how the cost grows with the work.

    python -m bench.throughput                      # stages: the embedded model and, by machine, SD 1.5 and SDXL in full or scaled down
    python -m bench.throughput --scaling            # scaling with batch, steps, micro-batch, inner epochs and ranks

torch's FlopCounterMode counts FLOP during a whole iteration. 100 % is what a large matrix product reaches on this machine in the same
dtype. A run encodes each prompt once: `encode, first time` is the time for that, `encode` the time to find it again. No time is reported
if an iteration's ratio_error says that rollout and update disagree, or if the gradient is not the textbook loop's.
"""

import argparse
import math
import os
import statistics
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

from bench.contenders import STAGES
from bench.harness import GateError, Worker, gate, rank_variables, spread, start, start_oracle, take_turns, warm_up
from bench.models import WORKS, Work, default_models
from bench.rows import RESULTS, Writer
from ddpo_fast.dtypes import DTYPES
from ddpo_fast.planning.plan import matmul_flops

AXES = {
    "batch": ("sample__num_samples", "sample__batch_size"),
    "steps": ("sample__num_steps",),
    "micro_batch": ("train__micro_batch",),
    "inner_epochs": ("train__inner_epochs",),
}
"""An axis of scaling, and the options that take its value. For `batch`, all pictures of an iteration are one batch."""
VALUES = {
    "cpu": {"batch": (4, 12, 24), "steps": (2, 5, 10), "micro_batch": (4, 15, 60), "inner_epochs": (1, 2, 4)},
    "cuda": {"batch": (8, 16, 32, 64), "steps": (5, 10, 20, 50), "micro_batch": (1, 4, 16, 64), "inner_epochs": (1, 2, 4)},
}
START = {
    "cpu": {
        "sample__num_samples": 12,
        "sample__batch_size": 12,
        "sample__num_steps": 5,
        "train__num_minibatches": 1,
        "train__inner_epochs": 1,
        "train__micro_batch": 60,
    },
    "cuda": {
        "sample__num_samples": 16,
        "sample__batch_size": 16,
        "sample__num_steps": 10,
        "train__num_minibatches": 1,
        "train__inner_epochs": 1,
        "train__micro_batch": 16,
    },
}
"""By kind of device, the values of the options while their axis does not vary."""
STAGE_COLUMNS = (
    *"stage median_s images_per_s transitions_per_s tflop_per_image tflop_per_s percent_of_matmul".split(), "peak_memory_mib", "planned_mib"
)  # fmt: skip
"""Columns of the table for a terminal."""


def stages(work: Work, rounds: int, writer: Writer, deadline: float = math.inf) -> list[dict]:
    """Rows of one work's stages. Raises GateError before anything is timed. `deadline`: as for `take_turns`."""
    with ExitStack() as stack:
        workers = start(stack, {work.model: ("ours", work.argv())})
        for worker in workers.values():
            worker.send("planned_memory")  # counted while the textbook loop loads
        with ExitStack() as own:
            oracle = start_oracle(own, work.argv())
            planned = {label: worker.answer() for label, worker in workers.items()}
            gate(workers, oracle)
        counted = warm_up(workers, count_flop=True)
        turns = take_turns(workers, rounds, deadline)
    if work.model not in turns:
        raise RuntimeError("it failed")
    worker, counted, turns = workers[work.model], counted[work.model], turns[work.model]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peak, num_samples, rows = matmul_flops(DTYPES[worker.work["dtype"]], torch.device(device)), worker.work["num_samples"], []
    for stage in (*STAGES, "total"):
        median, low, high = spread([turn["seconds"][stage] for turn in turns])
        flop = counted["flop"][stage]
        row = dict(
            model=work.model, work=str(work), stage=stage, median_s=median, low_s=low, high_s=high, images_per_s=num_samples / median,
            tflop_per_image=flop / num_samples / 1e12, tflop_per_s=flop / median / 1e12, percent_of_matmul=100 * flop / median / peak,
        )  # fmt: skip
        if stage in ("update", "total"):
            row["transitions_per_s"] = counted["transitions"] / median
        if stage == "total":
            row |= {"peak_memory_mib": turns[-1]["peak_memory_mib"], **planned[work.model]}
        rows.append(writer.add(**row))
    cold = counted["seconds"]["encode"]
    return [writer.add(model=work.model, work=str(work), stage="encode, first time", median_s=cold, low_s=cold, high_s=cold), *rows]


def scaling(work: Work, rounds: int, writer: Writer) -> list[dict]:
    """Rows of every axis; the points of all axes take turns. Raises GateError before anything is timed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, points = START[device], [(axis, value) for axis, values in VALUES[device].items() for value in values]
    times: dict[tuple[str, int], list[dict]] = {point: [] for point in points}
    with Worker("ours", work.argv()) as worker:
        worker.wait()
        with ExitStack() as own:
            gate({"ours": worker}, start_oracle(own, work.argv()))
        for turn in tqdm(range(rounds + 1), desc="rounds of all axes", unit="round", dynamic_ncols=True):
            for axis, value in points:
                worker.call("resize", **base | dict.fromkeys(AXES[axis], value))
                result = worker.iterate()
                if turn:  # the first warms up
                    times[axis, value].append(result)
    rows = [_scaling_row(writer, work, base, axis, value, turns) for (axis, value), turns in times.items()]
    return rows + [_scaling_row(writer, work, base, "ranks", ranks, turns) for ranks, turns in rank_times(work, base, rounds).items()]


def _scaling_row(writer: Writer, work: Work, base: dict, axis: str, value: int, turns: list[dict]) -> dict:
    options = base | dict.fromkeys(AXES.get(axis, ()), value)
    median, low, high = spread([turn["total_s"] for turn in turns])
    sample, update = (
        statistics.median(sum(turn["seconds"][stage] for stage in group) for turn in turns)
        for group in (("encode", "denoise", "decode"), ("update", "optimizer"))
    )
    held = f"{base['sample__num_samples']} samples x {base['sample__num_steps']} steps, micro-batch {base['train__micro_batch']}"
    return writer.add(
        model=work.model, work=held, axis=axis, value=value, median_s=median, low_s=low, high_s=high, sample_s=sample, update_s=update,
        images_per_s=options["sample__num_samples"] / median, transitions_per_s=turns[0]["transitions"] / update,
        peak_memory_mib=turns[-1]["peak_memory_mib"],
    )  # fmt: skip


def rank_times(work: Work, base: dict, rounds: int) -> dict[int, list[dict]]:
    """The same iteration on 1, 2, 4, ... ranks, up to the number of GPUs; on a CPU, with one thread each, up to 2 ranks or the cores."""
    if torch.cuda.is_available():
        most, environment = torch.cuda.device_count(), {}
    else:
        most, environment = min(2, len(os.sched_getaffinity(0))), {"OMP_NUM_THREADS": "1"}
    options = [f"--{key.replace('__', '.')}={value}" for key, value in base.items()]
    times = {}
    for num_ranks in (2**power for power in range(most.bit_length())):
        with ExitStack() as stack:
            ranks = [
                stack.enter_context(Worker("ours", work.argv() + options, environment=environment | variables))
                for variables in rank_variables(num_ranks)
            ]
            turns = []
            for _ in range(rounds + 1):
                for worker in ranks:
                    worker.send("iterate")
                turns.append(max((worker.answer() for worker in ranks), key=lambda turn: turn["total_s"]))
        times[num_ranks] = turns[1:]
    return times


def table(rows: list[dict], columns: Iterable[str]) -> str:
    """Rows for a terminal."""
    columns = list(columns)
    cells = [columns, *([row[column] for column in columns] for row in rows)]
    widths = [max(len(str(line[i])) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(str(cell).rjust(width) for cell, width in zip(line, widths)) for line in cells)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(WORKS), default=default_models())
    parser.add_argument("--scaling", action="store_true", help="how the first model's cost grows, instead of the stages")
    parser.add_argument("--rounds", type=int, default=2, help="iterations of each, after one to warm up")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    options = parser.parse_args(argv)
    writer = Writer("scaling" if options.scaling else "throughput", options.out, ["python", "-m", "bench.throughput", *argv])
    status = 0
    for model in options.models[:1] if options.scaling else options.models:
        try:
            rows = (scaling if options.scaling else stages)(WORKS[model], options.rounds, writer)
        except (GateError, RuntimeError) as error:
            print(f"bench.throughput: {model}: {error}", file=sys.stderr)
            status = 1
            continue
        columns = "axis value median_s sample_s update_s images_per_s transitions_per_s peak_memory_mib".split()
        print(f"{model}: {rows[0]['work']}, {rows[0]['device']}\n{table(rows, columns if options.scaling else STAGE_COLUMNS)}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
