"""Compares ours with TRL 0.23.1's DDPOTrainer and the textbook loop, on the same work, taking turns in one run.

    python -m bench.peers                       # the embedded model on a CPU, SD 1.5 at full size on a GPU
    python -m bench.peers --model sd15_small --rounds 5 --peers textbook
    python -m bench.peers --model embedded_flow sd3_small     # Flow-GRPO on Stable Diffusion 3: 6 minutes on 2 cores

TRL runs in an environment of its own (`make .venv-trl/installed`) with the same versions of everything else. Its batches are as large as
it can make them: it takes a forward and backward for every timestep of at most a minibatch of samples. `trl, its example's batches` is
TRL with the batch sizes of its example script, 6 samples denoised and 3 trained at a time. Of a flow model, which TRL does not have, the
textbook loop is Flow-GRPO's: with as many rows a call as ours, and with the batches of its published settings, 9 samples. A ratio compares
two iterations of the same round. The table gives the median and the 20 and 80 % quantile over the rounds.
"""

import argparse
import math
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from bench import ROOT
from bench.contenders import STAGES
from bench.harness import GateError, gate, spread, start, start_oracle, take_turns, trl_python, warm_up
from bench.limits import ATTEMPTS
from bench.models import WORKS, Work, default_models
from bench.rows import PEERS, RESULTS, Writer

OTHERS = [peer for peer in PEERS if peer != "ours"]
TEXTBOOK, PUBLISHED, TRL, EXAMPLE = OTHERS
BATCHES = {PUBLISHED: (9, 9), EXAMPLE: (6, 3)}
"""Samples denoised and trained at a time."""


def contenders(work: Work, peers: list[str]) -> dict[str, tuple[str, list[str]]]:
    """Label -> (contender, its command line)."""
    argv = work.argv()
    batches = {label: [f"--sample.batch_size={sampled}", f"--train.micro_batch={trained}"] for label, (sampled, trained) in BATCHES.items()}
    return {label: (label.partition(",")[0], argv + batches.get(label, [])) for label in ["ours", *peers]}


def peers_of(work: Work) -> list[str]:
    """What there is to compare ours with on this work."""
    return [TEXTBOOK, PUBLISHED] if work.on_flow else [TEXTBOOK, TRL, EXAMPLE]


def compare(work: Work, peers: list[str], rounds: int, writer: Writer, deadline: float = math.inf) -> list[dict]:
    """Checks every contender, then times it; returns the rows written. Raises GateError before anything is timed.

    `deadline`: as for `take_turns`.
    """
    with ExitStack() as stack:
        workers = start(stack, contenders(work, peers))
        if not workers.keys() - {"ours"}:
            raise RuntimeError(f"none of {', '.join(peers)} could be started")
        with ExitStack() as own:
            errors = gate(workers, start_oracle(own, work.argv()))
        flop = warm_up(workers, count_flop=True)
        results = take_turns(workers, rounds, deadline)
    if "ours" not in results:
        raise RuntimeError("ours failed, so there is nothing to compare with")
    rows = []
    for label, turns in results.items():
        for stage in ("total", *STAGES):
            seconds = [turn["seconds"][stage] for turn in turns]
            median, low, high = spread(seconds)
            row = dict(model=work.model, work=str(work), peer=label, stage=stage, median_s=median, low_s=low, high_s=high)
            if label != "ours":
                ours = [turn["seconds"][stage] for turn in results["ours"]]
                row["ours_is_faster_by"], row["ratio_low"], row["ratio_high"] = spread([p / o for p, o in zip(seconds, ours)])
            if stage == "total":
                num_samples = workers[label].work["num_samples"]
                row |= dict(
                    images_per_s=num_samples / median, tflop_per_image=flop[label]["flop"]["total"] / num_samples / 1e12,
                    peak_memory_mib=turns[-1]["peak_memory_mib"], note=f"gradient differs by {errors[label]:.1e}",
                )  # fmt: skip
            rows.append(writer.add(**row))
    return rows


def limits(peers: list[str], writer: Writer) -> list[dict]:
    """What ours and TRL cannot do, each with what happened in the attempt."""
    rows = []
    for label, python in {"ours": sys.executable, **({"trl": trl_python()} if "trl" in peers else {})}.items():
        for what in ATTEMPTS:
            done = subprocess.run([python, "-m", "bench.limits", label, what], cwd=ROOT, capture_output=True, text=True)
            said = done.stdout.strip() or f"it ended with status {done.returncode}"
            rows.append(writer.add(model="any", work="what it can do", peer=label, stage=what, note=said))
            print(f"{label}, {what}: {said}", flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """The rows of one work for a terminal."""
    lines = [f"{'':28}{'images/s':>9}" + "".join(f"{stage:>10}" for stage in ("total", *STAGES)) + "  ours is faster by"]
    for label in dict.fromkeys(row["peer"] for row in rows):
        mine = {row["stage"]: row for row in rows if row["peer"] == label}
        total = mine["total"]
        line = f"{label:28}{float(total['images_per_s']):9.3f}" + "".join(f"{float(mine[s]['median_s']):9.3f}s" for s in ("total", *STAGES))
        if total["ours_is_faster_by"]:
            line += "  {ours_is_faster_by} ({ratio_low} to {ratio_high})".format(**total)
        lines.append(line)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.partition("\n")[0])
    default = "sd15" if "sd15" in default_models() else "embedded"
    parser.add_argument("--model", nargs="+", choices=list(WORKS), default=[default])
    parser.add_argument("--peers", nargs="+", choices=OTHERS, help="default: all that have such a model")
    parser.add_argument("--rounds", type=int, default=5, help="iterations of each, after one to warm up")
    parser.add_argument("--no-limits", action="store_true", help="leave out what a peer cannot do (a minute and a half)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    options = parser.parse_args(argv)
    writer = Writer("peers", options.out, ["python", "-m", "bench.peers", *argv])
    chosen = {model: [peer for peer in peers_of(WORKS[model]) if peer in (options.peers or OTHERS)] for model in options.model}
    if any(peer in (TRL, EXAMPLE) for peers in chosen.values() for peer in peers):
        try:
            trl_python()
        except FileNotFoundError as error:
            parser.error(str(error))
    failed = False
    for model, peers in chosen.items():
        try:
            rows = compare(WORKS[model], peers, options.rounds, writer)
        except (GateError, RuntimeError) as error:
            print(f"bench.peers: {error}", file=sys.stderr)
            return 1
        print(f"{model}: {rows[0]['work']}, {rows[0]['device']}\n{table(rows)}", flush=True)
        failed |= {row["peer"] for row in rows} != {"ours", *peers}
    if not options.no_limits and any(TRL in peers for peers in chosen.values()):
        limits([TRL], writer)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
