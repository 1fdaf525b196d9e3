"""Compares the last run of every benchmark with an earlier run on the same kind of machine.

    python -m bench.compare                                   # every table in bench/results
    python -m bench.compare --table kernels --against 40d9d96

A change counts when the two spreads do not overlap and the medians differ by more than 5 %; anything less is `same`. Each row of ours
in the last run is compared with the last earlier row with the same keys. So a run of only a few benchmarks is compared in those. `gone`
is what the run before had and the last one has not. Exit status: 1 if anything is worse, 2 for bad input.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.rows import ENVIRONMENT, RESULTS, TABLES, Table, read, runs

NOISE = 0.05
"""Medians that differ by less count as the same: a machine's state changes them that much from run to run."""
Run = list[dict[str, str]]


@dataclass(frozen=True)
class Change:
    """How one measurement has changed. A number is empty if nothing was measured."""

    keys: str
    old: str
    new: str
    verdict: str

    def line(self, width: int) -> str:
        """The change as a line of text."""
        percent = f"{100 * (float(self.new) / float(self.old) - 1):+.1f} %" if self.old and self.new and float(self.old) else ""
        return f"  {self.keys:{width}}  {self.old or '-':>10}  {self.new or '-':>10}  {percent:>9}  {self.verdict}"


def lines(changes: list[Change]) -> list[str]:
    """The changes as lines of text, aligned."""
    return [change.line(max(len(each.keys) for each in changes)) for change in changes]


def spread(table: Table, row: dict[str, str]) -> tuple[float, float]:
    """Low and high. A single repetition has no spread, so both are the number itself."""
    return tuple(float(row.get(column) or row[table.metric]) for column in (table.low, table.high))


def verdict(table: Table, old: dict[str, str], new: dict[str, str]) -> str:
    """better, same or worse. If there is no number any more, such as for a reward that is not reached, that is worse."""
    if not (old[table.metric] and new[table.metric]):
        return "worse" if old[table.metric] else "better" if new[table.metric] else "same"
    before, now = float(old[table.metric]), float(new[table.metric])
    (old_low, old_high), (new_low, new_high) = spread(table, old), spread(table, new)
    if (new_low <= old_high and old_low <= new_high) or abs(now - before) <= NOISE * abs(before):
        return "same"
    return "better" if (now > before) == (table.better == "higher") else "worse"


def compare(table: Table, earlier: list[Run], last: Run) -> list[Change]:
    """The changes of every key that the last run or the run before it has."""

    def by_keys(rows: Run) -> dict[str, dict[str, str]]:
        return {" ".join(row[key] or "-" for key in table.keys): row for row in rows}

    before, now = by_keys([row for run in earlier for row in run]), by_keys(last)
    changes = []
    for keys, row in now.items():
        old, new = before.get(keys), row[table.metric]
        changes.append(Change(keys, old[table.metric], new, verdict(table, old, row)) if old else Change(keys, "", new, "new"))
    return changes + [Change(keys, row[table.metric], "", "gone") for keys, row in by_keys(earlier[-1]).items() if keys not in now]


def matches(run: Run, against: str) -> bool:
    """Whether a run is of the commit `against` (its first digits, or more digits than the row has), or its date starts with `against`."""
    commits = [commit.partition("-dirty")[0] for commit in run[0]["commit"].split("+")]
    return run[0]["date"].startswith(against) or any(commit.startswith(against) or against.startswith(commit) for commit in commits)


def heading(table: Table, before: dict[str, str], now: dict[str, str]) -> str:
    """What is compared, with the versions if they differ: they may have caused a change."""
    old, new = (f"{row['date'].removesuffix('+00:00')} ({row['commit']})" for row in (before, now))
    names = [name for name in ENVIRONMENT if name not in ("date", "commit", "device", "command") and before[name] != now[name]]
    versions = [f"{name} {before[name]} -> {now[name]}" for name in names]
    return "; ".join([f"{table.metric} ({table.better} is better), {old} -> {new}", *versions])


def of_others(row: dict[str, str]) -> bool:
    """Whether a row is of TRL or the textbook loop: if they get slower, that is not our regression."""
    return row.get("peer", "ours") != "ours" or row.get("technique") == "textbook loop"


def report(tables: list[str], folder: Path, against: str | None) -> bool:
    """Prints every comparison and then what is worse. Returns whether anything is worse. Raises ValueError for bad input."""
    if unknown := [name for name in tables if name not in TABLES]:
        raise ValueError(f"--table {unknown[0]}: valid is {', '.join(TABLES)}")
    if not folder.is_dir():
        raise ValueError(f"--results {folder}: there is no such folder")
    compared = {}
    for name in tables:
        rows = [row for row in read(name, folder) if not of_others(row)]
        if not rows:
            print(f"{name}: no rows")
        for device in dict.fromkeys(row["device"] for row in rows):
            *earlier, last = runs(rows, device)
            chosen = [run for run in earlier if against is None or matches(run, against)]
            if not chosen:
                print(f"{name} on {device}: " + (f"no run of {against} before the last one" if earlier else "only one run"))
                continue
            changes = compared[f"{name} on {device}"] = compare(TABLES[name], chosen, last)
            print("\n".join([f"{name} on {device}: {heading(TABLES[name], chosen[-1][0], last[0])}", *lines(changes)]))
    if against is not None and not compared:
        raise ValueError(f"--against {against}: no run before a last one is of that commit or date")
    worse = {title: [change for change in changes if change.verdict == "worse"] for title, changes in compared.items()}
    regressions = [line for title, changes in worse.items() if changes for line in (f"REGRESSIONS: {title}", *lines(changes))]
    print("\n".join(regressions or ["no regressions"]))
    return bool(regressions)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("--table", metavar="NAME", nargs="+", default=list(TABLES), help=f"{', '.join(TABLES)}; all of them by default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--against", metavar="COMMIT_OR_DATE", help="the run to compare with; the one before the last by default")
    args = parser.parse_args(argv)
    try:
        return int(report(args.table, args.results, args.against))
    except ValueError as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
