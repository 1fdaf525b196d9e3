"""What each technique gains: starts from the textbook loop and adds one technique a row to those above it.

    python -m bench.waterfall                   # the embedded model on a CPU, SD 1.5 at full size on a GPU
    python -m bench.waterfall --model sd15_small --rounds 6

A row that begins with "or" is an alternative: the rows after it build on the row above it. All rows take turns in one run. A row has the
speed, and also peak memory; ratio_error, the largest |ratio - 1| before an iteration's first update; and the gradient's
difference from the textbook loop's in fp32. It also has the reward of the first iteration and the mean reward of the last half of them,
since a row's iterations are real training on the same prompts.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.contenders import PLAIN
from bench.harness import GateError, gate, spread, start, start_oracle, take_turns, warm_up
from bench.models import WORKS, Work, default_models
from bench.rows import RESULTS, Writer

BASELINE = "textbook loop"


@dataclass(frozen=True)
class Technique:
    """A row: options of train.py and changes of bench.contenders.Ours that it adds to, or takes from, the rows above it."""

    name: str
    options: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()
    """Changes of Ours that the technique undoes."""
    adds: tuple[str, ...] = ()
    alternative: bool = False
    other_parameters: bool = False
    """Whether it trains other parameters than the baseline. If so, its gradient is compared with a separate textbook loop."""


def techniques(compiled: bool = True) -> list[Technique]:
    """The techniques that this machine can run. The compiled UNet is last: rows that build on it would have to be compiled again."""
    on_gpu = torch.cuda.is_available()
    rows = [Technique("transition batching", PLAIN, adds=("contiguous", "plain_norms"))]
    if on_gpu:
        rows += [
            Technique("fused DDIM step and loss", ("--kernels.backend=triton",)),
            Technique("fused GroupNorm+SiLU, GEGLU", removes=("plain_norms",)),
        ]
    rows.append(Technique("channels_last", removes=("contiguous",)))
    # an alternative in fp16, a GPU's default: it rounds small updates away, so the trainer does not choose it by itself
    rows.append(Technique("or merged LoRA" if on_gpu else "merged LoRA", ("--lora.forward=merged",), alternative=on_gpu))
    rows.append(Technique("shared guidance", ("--model.share_guidance=true",)))
    rows += [Technique(f"or {name} attention", (f"--attention.backend={name}",), alternative=True) for name in attention_kernels()]
    if importlib.util.find_spec("bitsandbytes"):
        rows.append(Technique("or 8-bit AdamW", ("--optimizer.name=adamw_8bit",), alternative=True))
    rows += [
        Technique("or LoRA in mid and up blocks", ("--lora.scope=mid_up",), alternative=True, other_parameters=True),
        Technique("or that, activations cached", ("--lora.scope=mid_up", "--cache.mode=on"), alternative=True, other_parameters=True),
    ]
    return rows + [Technique("compiled UNet", ("--model.compile=true",))] * compiled


def attention_kernels() -> list[str]:
    """The attention back ends that PyTorch does not choose by itself here."""
    return (
        ["flash", "efficient", "cudnn", *(["xformers"] if importlib.util.find_spec("xformers") else [])]
        if torch.cuda.is_available()
        else ["math"]
    )  # math needs 100 GB at SD 1.5's size


def contenders(work: Work, rows: list[Technique]) -> dict[str, tuple[str, list[str]]]:
    """Label -> (contender, command line), the baseline first."""
    result, options, changes = {BASELINE: ("textbook", work.argv())}, [], []
    for row in rows:
        mine = options + list(row.options)
        changed = [change for change in changes if change not in row.removes] + list(row.adds)
        result[row.name] = (":".join(["ours", *([",".join(changed)] if changed else [])]), work.argv() + mine)
        if not row.alternative:
            options, changes = mine, changed
    return result


def select(rows: list[Technique], wanted: Callable[[Technique], bool]) -> list[Technique]:
    """The rows that are wanted and the rows that they build on; none if none is wanted."""
    last = max((number for number, row in enumerate(rows) if wanted(row)), default=-1)
    return [row for row in rows[: last + 1] if wanted(row) or not row.alternative]


def measure(work: Work, rows: list[Technique], rounds: int, writer: Writer, deadline: float = math.inf) -> list[dict]:
    """Checks every row, then times it; returns the rows written. Raises GateError before anything is timed.

    `deadline`: as for `take_turns`.
    """
    with ExitStack() as stack:
        workers = start(stack, contenders(work, rows))
        errors = {}
        for row in rows:
            if row.other_parameters and row.name in workers:
                options = [option for option in row.options if option.startswith("--lora.scope")]
                with ExitStack() as own:
                    errors |= gate({row.name: workers[row.name]}, start_oracle(own, work.argv() + options))
        with ExitStack() as own:
            names = {row.name for row in rows if row.other_parameters}
            errors |= gate({label: worker for label, worker in workers.items() if label not in names}, start_oracle(own, work.argv()))
        workers = {label: worker for label, worker in workers.items() if label in errors}
        first = warm_up(workers)
        results = take_turns(workers, rounds, deadline)
    if BASELINE not in results:
        raise RuntimeError("the textbook loop failed, so there is nothing to compare with")
    num_samples = workers[BASELINE].work["num_samples"]
    baseline = [turn["total_s"] for turn in results[BASELINE]]
    written = []
    for label, turns in results.items():
        speed, low, high = spread([num_samples / turn["total_s"] for turn in turns])
        ratio, ratio_low, ratio_high = spread([base / turn["total_s"] for base, turn in zip(baseline, turns)])
        half = max(1, len(turns) // 2)
        written.append(
            writer.add(
                model=work.model, work=str(work), technique=label, images_per_s=speed, low=low, high=high, ratio_to_baseline=ratio,
                ratio_low=ratio_low, ratio_high=ratio_high, sample_s=seconds(turns, "encode", "denoise", "decode"),
                update_s=seconds(turns, "update", "optimizer"),
                peak_memory_mib=turns[-1]["peak_memory_mib"], ratio_error=max(turn["ratio_error"] for turn in [first[label], *turns]),
                gradient_error=errors[label], samples=num_samples * (1 + len(turns)), reward_before=first[label]["reward_mean"],
                reward_after=sum(turn["reward_mean"] for turn in turns[-half:]) / half,
            )
        )  # fmt: skip
    return written


def seconds(turns: list[dict], *stages: str) -> float:
    """The median over iterations of the total time of some stages."""
    return spread([sum(turn["seconds"][stage] for stage in stages) for turn in turns])[0]


def table(rows: list[dict]) -> str:
    """The rows for a terminal."""
    lines = [
        f"{'':30}{'images/s':>9}{'x baseline':>12}{'sample':>9}{'update':>9}{'MiB':>8}{'ratio_error':>13}{'gradient':>10}{'reward':>18}"
    ]
    for row in rows:
        lines.append(
            "{technique:30}{images_per_s:>9}{ratio_to_baseline:>12}{sample_s:>8}s{update_s:>8}s".format(**row)
            + f"{float(row['peak_memory_mib']):8.0f}{float(row['ratio_error']):13.1e}{float(row['gradient_error']):10.1e}"
            + f"{float(row['reward_before']):9.3f} ->{float(row['reward_after']):7.3f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.waterfall", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=list(WORKS), default="sd15" if "sd15" in default_models() else "embedded")
    parser.add_argument("--rounds", type=int, default=5, help="iterations of each row, after one to warm up")
    parser.add_argument("--compile", action="store_true", help="on a CPU, too, with the compiled UNet: four minutes of compiling")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only rows whose name contains one of these, and what they build on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    options = parser.parse_args(argv)
    rows = techniques(options.compile or torch.cuda.is_available())
    if options.only:
        if not (chosen := select(rows, lambda row: any(text in row.name for text in options.only))):
            parser.error(f"--only {' '.join(options.only)}: valid are {', '.join(row.name for row in rows)}")
        rows = chosen
    try:
        written = measure(
            WORKS[options.model], rows, options.rounds, Writer("waterfall", options.out, ["python", "-m", "bench.waterfall", *argv])
        )
    except (GateError, RuntimeError) as error:
        print(f"bench.waterfall: {error}", file=sys.stderr)
        return 1
    print(f"{options.model}: {written[0]['work']}, {written[0]['device']}\n{table(written)}")
    return int(len(written) != 1 + len(rows))


if __name__ == "__main__":
    sys.exit(main())
