"""Result files: bench/results has one CSV file a benchmark. Every run appends rows with the environment that they were measured in."""

import csv
import datetime
import functools
import hashlib
import importlib.metadata
import math
import platform
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = "date commit device torch triton diffusers peft python command".split()
"""The columns that every row ends with. Rows of one run share `date`; `device` is the machine kind by which runs are compared."""


PEERS = {
    "ours": "ours",
    "textbook": "textbook loop",
    "textbook, Flow-GRPO's batches": "textbook loop, Flow-GRPO's batches",
    "trl": "TRL",
    "trl, its example's batches": "TRL, its example's batches",
}
"""The names of the peers in the table `peers`, and those for a reader."""


@dataclass(frozen=True)
class Table:
    """A CSV file of results."""

    name: str
    keys: tuple[str, ...]
    """Columns that say what was measured. Rows of two runs with the same keys are comparable."""
    metric: str
    """The column that is compared between runs."""
    better: str
    """Which way the metric improves: lower or higher."""
    low: str = ""
    high: str = ""
    """Columns with the spread of the metric over the repetitions of one run; empty if nothing is repeated."""
    others: tuple[str, ...] = ()
    """Further columns."""

    @property
    def numbers(self) -> list[str]:
        """The metric and its spread."""
        return [column for column in (self.metric, self.low, self.high) if column]

    @property
    def columns(self) -> list[str]:
        return [*self.keys, *self.numbers, *self.others, *ENVIRONMENT]


TABLES = {
    table.name: table
    for table in (
        Table(
            "kernels", ("op", "direction", "provider", "shape", "dtype", "layout"), "p50_us", "lower", "p20_us", "p80_us",
            ("bytes", "gb_per_s", "percent_of_copy"),
        ),
        Table(
            "throughput", ("model", "work", "stage"), "median_s", "lower", "low_s", "high_s",
            ("images_per_s", "transitions_per_s", "tflop_per_image", "tflop_per_s", "percent_of_matmul", "peak_memory_mib",
             "planned_mib"),
        ),
        Table(
            "scaling", ("model", "work", "axis", "value"), "median_s", "lower", "low_s", "high_s",
            ("sample_s", "update_s", "images_per_s", "transitions_per_s", "peak_memory_mib"),
        ),
        Table(
            "waterfall", ("model", "work", "technique"), "images_per_s", "higher", "low", "high",
            ("ratio_to_baseline", "ratio_low", "ratio_high", "sample_s", "update_s", "peak_memory_mib", "ratio_error", "gradient_error",
             "samples", "reward_before", "reward_after"),
        ),
        Table(
            "peers", ("model", "work", "peer", "stage"), "median_s", "lower", "low_s", "high_s",
            ("images_per_s", "ours_is_faster_by", "ratio_low", "ratio_high", "tflop_per_image", "peak_memory_mib", "note"),
        ),
        Table(
            "cache", ("model", "work", "scope", "cache"), "update_s", "lower", "low_s", "high_s",
            ("faster_than_off", "off_low", "off_high", "faster_than_all", "all_low", "all_high", "sampling_slower_than_off", "update_tflop",
             "peak_memory_mib", "weights_error"),
        ),
        Table(
            "score_accumulation", ("model", "work", "estimator"), "median_s", "lower", "low_s", "high_s",
            ("faster_than_ppo", "ratio_low", "ratio_high", "denoise_s", "update_s", "peak_memory_mib", "weights_error"),
        ),
        Table(
            "reward", ("comparison", "setting"), "hours_to_target", "lower", "hours_low", "hours_high",
            ("target", "seeds", "reached", "samples", "updates", "device_hours", "final_reward", "final_low", "final_high", "eval_reward",
             "eval_low", "eval_high", "area_samples", "area_low", "area_high", "area_hours", "reward_per_hour"),
        ),
        Table(
            "algorithms", ("task", "algorithm"), "eval_after", "higher", "eval_low", "eval_high",
            ("eval_before", "eval_diversity", "heldout_before", "heldout_after", "heldout_low", "heldout_high", "heldout_diversity",
             "seeds", "queries", "updates"),
        ),
        Table("gpu", ("part", "step"), "passed", "higher", others=("failed", "skipped", "seconds", "said")),
    )
}  # fmt: skip


@functools.cache
def device_name() -> str:
    """The GPU's name, or the CPU's and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.machine()} ({torch.get_num_threads()} threads)"


@functools.cache
def commit() -> str:
    """The checkout's commit; if its source is not what was committed, also "-dirty-" and a `fingerprint`. Results do not count as source.

    A copy without git has only the fingerprint: "source-12ab34cd".
    """
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root)]
    if not (root / ".git").exists():
        return f"source-{fingerprint(root)}"
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--", ".", ":!bench/results", ":!docs"], capture_output=True, text=True).stdout
    return head.stdout.strip() + (f"-dirty-{fingerprint(root)}" if changed.strip() else "")


def fingerprint(root: Path) -> str:
    """8 hex digits of the contents of the Python files of package, kernels and benchmarks. They are the same in a checkout and its copy."""
    digest = hashlib.sha256()
    for file in sorted(file for folder in ("bench", "ddpo_fast", "kernels") for file in (root / folder).rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:8]


def _text(value) -> str:
    """The text of a cell: "" for None; floats with 5 significant digits, and without an exponent if that is short."""
    return f"{float(f'{value:.5g}'):.12g}" if isinstance(value, float) else "" if value is None else str(value)


class Writer:
    """Appends the rows of one run to a table, each as soon as it is measured. Raises ValueError for a file that is not such a table."""

    def __init__(self, table: str, folder: Path, argv: list[str]):
        read(table, folder)  # so that an error comes before anything is measured
        self.table, self.path = TABLES[table], folder / f"{table}.csv"
        self.date = datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
        self.command = shlex.join(argv)

    def add(self, **values) -> dict:
        """Writes a row and returns it. Columns left out are empty; floats are rounded to 5 significant digits.

        Raises ValueError for a column that the table does not have and for a metric that is not finite.
        """
        if unknown := set(values) - set(self.table.columns):
            raise ValueError(f"{self.path}: it has no column {', '.join(sorted(unknown))}")
        version = importlib.metadata.version
        row = dict.fromkeys(self.table.columns, "") | dict(
            date=self.date, commit=commit(), device=device_name(), torch=torch.__version__, triton=triton.__version__,
            diffusers=version("diffusers"), peft=version("peft"), python=platform.python_version(), command=self.command,
        )  # fmt: skip
        row |= {key: _text(value) for key, value in values.items()}
        _check(self.table, row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.table.columns, lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)
        return row


def _check(table: Table, row: dict[str, str]) -> None:
    """Raises ValueError for a metric or a spread that is neither empty nor a finite number."""
    for column in table.numbers:
        if row[column] and not math.isfinite(float(row[column])):
            raise ValueError(f"{column}={row[column]}: valid is a finite number or nothing")


def read(table: str, folder: Path = RESULTS) -> list[dict[str, str]]:
    """A table's rows, oldest first; none if there is no file. Raises ValueError for a file that does not hold such rows."""
    path, columns, rows = folder / f"{table}.csv", TABLES[table].columns, []
    if not path.exists():
        return rows
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        if next(lines, None) != columns:
            raise ValueError(f"{path}: its columns are not those of the table {table}: {', '.join(columns)}")
        for line in lines:
            try:
                if len(line) != len(columns):
                    raise ValueError(f"{len(line)} cells, not {len(columns)}")
                rows.append(dict(zip(columns, line)))
                _check(TABLES[table], rows[-1])
            except ValueError as error:
                raise ValueError(f"{path}, line {lines.line_num}: {error}") from None
    return rows


def measured(table: str, folder: Path) -> list[dict[str, str]]:
    """The rows in `folder` and in bench/results for this commit and device, oldest first."""
    folders = {path.resolve(): None for path in (RESULTS, folder)}
    rows = [row for path in folders for row in read(table, path) if (row["commit"], row["device"]) == (commit(), device_name())]
    return sorted(rows, key=lambda row: row["date"])


def runs(rows: list[dict[str, str]], device: str | None = None) -> list[list[dict[str, str]]]:
    """Rows grouped into runs by their date, oldest first; only those of one device, if it is given."""
    dates: dict[str, list] = {}
    for row in rows:
        if device in (None, row["device"]):
            dates.setdefault(row["date"], []).append(row)
    return [dates[date] for date in sorted(dates)]
