"""What is measured on a GPU machine, part by part, in a given time: `make gpu`.

    make gpu OUT=some/folder                # 8 minutes at most; rows go to the folder, each as soon as it is measured
    make gpu PART="waterfall sdxl"          # single parts
    python -m bench.gpu --rehearse          # the same parts at small sizes, on any machine

A part measures what has no row yet for this commit on this device, in OUT or bench/results. Called again, it goes on with what is missing.
What failed has no row, or one that says so, and is tried again. A part does not begin if less time is left than it needs, and is stopped
when its time is up. Each part is a separate process. Exit status: 0 if nothing is missing, 1 if something is, 2 for bad input.
"""

import time

BEGUN = time.time()

import argparse
import functools
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from bench import ROOT, rows
from bench.rows import RESULTS, Writer, measured, read

STOPPING_S = 15
"""Time that a part has for its last rows after it is told to stop."""
CLOSING_S = 10
"""Time that a part keeps to end its contenders and write."""
Row = dict[str, str]
Writers = Callable[[str], Writer]
"""A table's name -> the writer of its rows."""


@dataclass(frozen=True)
class Part:
    """What one process measures. A part imports what it needs when it runs, because every second counts."""

    table: str
    least_s: int
    """It does not begin with less time left; an estimate."""
    most_s: int
    """Time after which it is stopped, so that later parts have time, too."""

    def wanted(self) -> list[str]:
        """The names of what it measures, in order."""
        raise NotImplementedError

    def name(self, row: Row) -> str | None:
        """Which of these names a row of the table has; None if it has none of them."""
        raise NotImplementedError

    def run(self, missing: list[str], writers: Writers, deadline: float) -> None:
        """Measures what is missing, if possible by the deadline (of time.time). Raises what went wrong."""
        raise NotImplementedError

    def missing(self, out: Path) -> list[str]:
        """What has no row."""
        there = {self.name(row) for row in measured(self.table, out)}
        return [name for name in self.wanted() if name not in there]


@dataclass(frozen=True)
class Tests(Part):
    """Test files, one row a test function. The row counts if all of the function's cases passed or were skipped."""

    files: tuple[str, ...]

    def wanted(self) -> list[str]:
        return [f"{file}::{test}" for file in self.files for test in re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.M)]

    def name(self, row: Row) -> str | None:
        return row["step"] if row["failed"] == "0" else None

    def run(self, missing: list[str], writers: Writers, deadline: float) -> None:
        workers = min(8, len(os.sched_getaffinity(0)))  # compiling takes most of the time
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        options = ["--numprocesses", str(workers), "--benchmark-disable", "-p", "no:cacheprovider", "--tb=short"]
        status = pytest.main([*options, *missing], plugins=[TestRows(writers("gpu"))])
        if status:
            raise RuntimeError(f"pytest ended with {pytest.ExitCode(status).name}")


class TestRows:
    """Plugin of pytest that writes a test function's row when the last of its cases has ended, on any worker."""

    __test__ = False

    def __init__(self, writer: Writer):
        self.writer = writer
        self.waiting: dict[str, set[str]] = {}
        """Cases of each function that have not ended."""
        self.rows: dict[str, dict] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids: list[str]) -> None:
        if not self.waiting:  # the first worker; all collect the same
            for case in ids:
                function = case.partition("[")[0]
                self.waiting.setdefault(function, set()).add(case)
                self.rows[function] = {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "said": None}

    def pytest_runtest_logreport(self, report) -> None:
        function = report.nodeid.partition("[")[0]
        row = self.rows[function]
        if report.failed or (report.when == "call" and report.passed) or report.skipped:
            row[report.outcome] += 1
        row["seconds"] += report.duration
        if report.failed and row["said"] is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            row["said"] = f"{report.nodeid}: {crash.message if crash else report.longrepr}"[:300]
        if report.when not in ("setup", "call"):  # it is teardown, or something else if the worker died
            self.waiting[function].discard(report.nodeid)
            if not self.waiting[function]:
                self.writer.add(part="kernels", step=function, **row)


@dataclass(frozen=True)
class Stages(Part):
    """The stages of one work, with its peak memory beside that of the plan."""

    work: str
    rounds: int

    def wanted(self) -> list[str]:
        return [self.work]

    def name(self, row: Row) -> str | None:
        return self.work if row["stage"] == "total" and of_work(row, self.work) else None

    def run(self, missing: list[str], writers: Writers, deadline: float) -> None:
        from bench import models, throughput

        rows = throughput.stages(models.WORKS[self.work], self.rounds, writers("throughput"), deadline)
        print(throughput.table(rows, throughput.STAGE_COLUMNS))


@dataclass(frozen=True)
class Peers(Part):
    """Ours and peers, which take turns."""

    work: str
    peers: tuple[str, ...]
    rounds: int

    def wanted(self) -> list[str]:
        return list(self.peers)

    def name(self, row: Row) -> str | None:
        return row["peer"] if row["stage"] == "total" and of_work(row, self.work) else None

    def run(self, missing: list[str], writers: Writers, deadline: float) -> None:
        from bench import harness, models, peers

        if any(peer.startswith("trl") for peer in missing):
            harness.trl_python()
        print(peers.table(peers.compare(models.WORKS[self.work], missing, self.rounds, writers("peers"), deadline)))


@dataclass(frozen=True)
class Waterfall(Part):
    """What each technique is worth."""

    work: str
    rounds: int

    def techniques(self) -> list:
        from bench import waterfall

        return waterfall.techniques(torch.cuda.is_available())

    def wanted(self) -> list[str]:
        return [technique.name for technique in self.techniques()]

    def name(self, row: Row) -> str | None:
        return row["technique"] if of_work(row, self.work) else None

    def run(self, missing: list[str], writers: Writers, deadline: float) -> None:
        from bench import models, waterfall

        chosen = waterfall.select(self.techniques(), lambda technique: technique.name in missing)
        print(waterfall.table(waterfall.measure(models.WORKS[self.work], chosen, self.rounds, writers("waterfall"), deadline)))


@dataclass(frozen=True)
class Operations(Part):
    """Every fused operation by itself."""

    def wanted(self) -> list[str]:
        from bench import kernels

        return [" ".join(kernels.keys(*benchmark).values()) for benchmark in kernels.benchmarks()]

    def name(self, row: Row) -> str | None:
        return " ".join(row[key] for key in ("op", "direction", "provider", "shape", "dtype", "layout"))

    def run(self, missing: list[str], writers: Writers, deadline: float) -> None:
        from bench import kernels

        wanted = set(missing)
        status = kernels.measure(writers("kernels"), ["-p", "no:cacheprovider"], lambda keys: " ".join(keys.values()) in wanted, deadline)
        if status:
            raise RuntimeError(f"pytest ended with {pytest.ExitCode(status).name}")


def of_work(row: Row, name: str) -> bool:
    """Whether a row is of one of bench.models.WORKS."""
    from bench import models

    work = models.WORKS[name]
    return (row["model"], row["work"]) == (work.model, str(work))


FIRST = ("kernels", "stages", "peers", "ops")
"""What `make gpu` runs, the most valuable first."""
PARTS = {
    "kernels": Tests("gpu", 45, 150, ("tests/test_kernels.py", "tests/test_blocks.py", "tests/test_noise.py")),
    "stages": Stages("throughput", 100, 180, "sd15_short", 2),
    "peers": Peers("peers", 110, 220, "sd15_wide", ("trl",), 3),
    "ops": Operations("kernels", 25, 480),
    "waterfall": Waterfall("waterfall", 200, 480, "sd15_wide", 3),
    "sdxl": Stages("throughput", 150, 480, "sdxl", 2),
    "textbook": Peers("peers", 150, 480, "sd15_wide", ("textbook", "trl, its example's batches"), 3),
    "stages50": Stages("throughput", 150, 480, "sd15", 2),
    "peers50": Peers("peers", 200, 480, "sd15", ("trl",), 2),
}
REHEARSED = {
    "kernels": Tests("gpu", 10, 900, ("tests/test_noise.py",)),
    "stages": Stages("throughput", 10, 900, "tiny_small", 1),
    "peers": Peers("peers", 10, 900, "tiny_small", ("trl",), 1),
    "ops": Operations("kernels", 10, 900),
    "waterfall": Waterfall("waterfall", 10, 900, "tiny_small", 1),
    "sdxl": Stages("throughput", 10, 900, "sdxl_small", 1),
    "textbook": Peers("peers", 10, 900, "tiny_small", ("textbook", "trl, its example's batches"), 1),
    "stages50": Stages("throughput", 10, 900, "tiny_small", 1),
    "peers50": Peers("peers", 10, 900, "tiny_small", ("trl",), 1),
}
"""The same code without a GPU."""


def run_part(name: str, part: Part, out: Path, deadline: float, argv: list[str]) -> int:
    """What a part's process does; returns the exit status. The last row in the table `gpu` says how it ended."""
    missing, begun, said = part.missing(out), time.time(), ""
    writers = functools.cache(lambda table: Writer(table, out, argv))  # rows of one run share a date
    if missing:
        print(f"{name}: {len(missing)} to measure, of {len(part.wanted())}; {rows.commit()} on {rows.device_name()}", flush=True)
        try:
            part.run(missing, writers, deadline)
        except KeyboardInterrupt:
            said = "it was stopped"
        except Exception as error:  # whatever it is, the other parts go on
            said = f"{type(error).__name__}: {error}"
        missing = part.missing(out)
    if missing:
        said = "; ".join(filter(None, [said, f"{len(missing)} missing: {', '.join(missing)}"]))
    counts = {"passed": len(part.wanted()) - len(missing), "failed": len(missing)}
    writers("gpu").add(part=name, step="all", seconds=time.time() - begun, said=" ".join(said.split())[:2000], **counts)
    print(f"{name}: {said or 'complete'}", flush=True)
    return int(bool(missing))


def stop(process: subprocess.Popen) -> None:
    """Ends a part and what it has started: its contenders are in sessions of their own."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOPPING_S)
        return
    with suppress(psutil.NoSuchProcess):
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def supervise(name: str, part: Part, out: Path, deadline: float, rehearse: bool) -> str:
    """Runs a part's process and stops it when its time is up. Returns how it ended, "" if it is complete."""
    left = deadline - time.time() - STOPPING_S
    if left < part.least_s:
        return f"not begun: {max(0, left):.0f} s are left, it needs {part.least_s}"
    seconds = min(left, part.most_s)
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        name,
        "--run",
        f"--out={out}",
        f"--seconds={seconds - CLOSING_S}",
        *["--rehearse"] * rehearse,
    ]
    rows_before = len(read("gpu", out))
    # Ctrl-C reaches only this process, which passes it on once
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"{name}: its {seconds:.0f} s are up", flush=True)
        stop(process)
    except KeyboardInterrupt:
        stop(process)
        raise
    last = next((row for row in reversed(read("gpu", out)[rows_before:]) if row["step"] == "all"), None)
    if last is None:
        return f"it ended with status {process.returncode} and left no word"
    return last["said"]


def summary(results: dict[str, str], seconds: float) -> str:
    """The last lines: what is complete and what is not."""
    lines = [f"make gpu: {seconds:.0f} s"]
    for name, said in results.items():
        lines.append(f"  {name:10}{textwrap.shorten(said, 500, placeholder=' ...') or 'complete'}")
    missing = [name for name, said in results.items() if said]
    lines.append(
        f"make gpu: incomplete: {', '.join(missing)}; called again, it goes on with what is missing" if missing else "make gpu: complete"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: {' '.join(FIRST)}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--seconds", type=float, default=480, help="all parts together, from the start of this command")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, on any machine")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)  # the part's own process
    options = parser.parse_args(argv)
    parts, names, deadline = REHEARSED if options.rehearse else PARTS, options.parts or FIRST, BEGUN + options.seconds
    if unknown := [name for name in names if name not in parts]:
        print(f"make gpu: PART={unknown[0]}: valid is {', '.join(parts)}", file=sys.stderr)
        return 2
    if not (options.rehearse or torch.cuda.is_available()):
        print(f"make gpu: there is no GPU to measure: torch {torch.__version__} finds no CUDA device here", file=sys.stderr)
        return 1
    if options.run:
        command = ["python", "-m", "bench.gpu", "--rehearse", names[0]] if options.rehearse else ["make", "gpu", f"PART={names[0]}"]
        return run_part(names[0], parts[names[0]], options.out, deadline, command)
    results = dict.fromkeys(names, "interrupted")
    with suppress(KeyboardInterrupt):
        for name in names:
            results[name] = supervise(name, parts[name], options.out, deadline, options.rehearse)
    print(summary(results, time.time() - BEGUN))
    return int(any(results.values()))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT, too: a script's background job starts with it ignored
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
