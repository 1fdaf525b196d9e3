"""Makes what README.md and docs/ show of the results, from the rows alone.

    python -m bench.headline            # rewrites the pages between their two markers, docs/waterfall.png and docs/scaling.png
    python -m bench.headline --check    # exit status 1 if they are not what the rows give

For every benchmark the last run counts, separately for each kind of machine, model and work. What has no rows is left out.
"""

import argparse
import difflib
import hashlib
import json
import math
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from PIL import Image

from bench import ROOT
from bench.rows import PEERS, RESULTS, read, runs

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
IDEAL = {"batch": 1, "steps": 1, "inner_epochs": 1, "micro_batch": 0, "ranks": -1}
"""The ideal exponent: an iteration's time grows with this power of the axis' value if all of its work, and nothing else, depends on it."""
IDEAL_NAMES = {1: "proportional", 0: "no change", -1: "inverse"}
BLUE, PALE, RED = "#33587a", "#9db2c9", "#c2410c"
LARGEST_BATCHES = "TRL and the textbook loop train batches as large as they can make them: a minibatch of samples at one timestep."
FLOW_BATCHES = (
    "The textbook loop is Flow-GRPO's. It trains samples at one timestep: as many rows a call as ours, or, as in its published settings, "
    "9 samples."
)
"""What a table of peers says of their batches."""
Row = dict[str, str]
Rows = list[Row]


def grouped(rows: Rows, *columns: str) -> dict[tuple[str, ...], Rows]:
    """Rows by the values of columns, in the order in which these first appear."""
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def number(text: str) -> str:
    """The number with three significant digits, whole from 100 on; "" for ""."""
    value = float(text or 0)
    if value == 0:
        return text and "0"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.1e}" if abs(value) < 1e-3 else f"{value:#.3g}"


def ratio(text: str) -> str:
    """A ratio such as 1.25; "" for ""."""
    return text and f"{float(text):.2f}"


def spread(row: Row, name: str, low: str, high: str, show: Callable[[str], str] = number, unit: str = "") -> str:
    """A number, with its low and high in parentheses if it has them; "" if there is no number."""
    return row[name] and show(row[name]) + unit + (f" ({show(row[low])} to {show(row[high])})" if row[low] and row[high] else "")


def reward_change(row: Row) -> str:
    """The reward before and after; "" if there is none."""
    return " -> ".join(number(row[name]) for name in ("reward_before", "reward_after") if row[name])


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table without empty columns."""
    kept = [i for i in range(len(header)) if i == 0 or any(line[i] for line in lines)]
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line[i].replace('|', chr(92) + '|') for i in kept)} |" for line in (header, rule, *lines))


def peers_section(rows: Rows) -> list[str]:
    """Images/s, the seconds of each stage, and a list of the notes. Raises ValueError for an unknown peer."""
    if unknown := {row["peer"] for row in rows} - set(PEERS):
        raise ValueError(f"peers: peer={min(unknown)}: valid is {', '.join(PEERS)}")
    cells = {(row["stage"], row["peer"]): row for row in rows if row["median_s"]}
    peers = [peer for peer in PEERS if any(peer == other for _, other in cells)]
    others = [peer for peer in peers if peer != "ours"]
    nothing = dict.fromkeys(rows[0], "")

    def line(label: str, stage: str, column: str) -> list[str]:
        times = (cells.get((stage, peer), nothing) for peer in others)
        ratios = [spread(row, "ours_is_faster_by", "ratio_low", "ratio_high", ratio, "x") for row in times]
        return [label, *(number(cells.get((stage, peer), nothing)[column]) for peer in peers), *ratios]

    blocks = []
    if cells:
        stages = [f"{stage}, s" for stage in dict.fromkeys(stage for stage, _ in cells) if stage != "total"]
        lines = [line("**images/s**", "total", "images_per_s"), *(line(name, name.removesuffix(", s"), "median_s") for name in stages)]
        blocks += [
            table(["", *(PEERS[peer] for peer in peers), *(f"{PEERS[peer]} / ours" for peer in others)], lines),
            "The rows are seconds of one iteration. The last columns are ratios: the other trainer's time divided by ours, so ours is "
            "faster where the ratio is above 1. Each ratio is a median over rounds that time all trainers in turn; the brackets hold the "
            f"middle 60 % of the rounds. {FLOW_BATCHES if any('Flow-GRPO' in peer for peer in peers) else LARGEST_BATCHES}",
        ]
    untimed = [row for row in rows if row["note"] and not row["median_s"]]
    notes = [(PEERS[row["peer"]], row["stage"], " ".join(row["note"].replace("`", "'").split())) for row in untimed]
    items = [f"- {peer}, {stage}: `{textwrap.shorten(note, 160, placeholder=' ...')}`" for peer, stage, note in notes]
    return [*blocks, "\n".join(items)] if items else blocks


def waterfall_section(rows: Rows) -> list[str]:
    """One technique a row, with its speed and what it does to the result."""
    lines = [
        [
            f"*{row['technique']}*" if row["technique"].startswith("or ") else row["technique"],
            spread(row, "images_per_s", "low", "high") or "-",
            spread(row, "ratio_to_baseline", "ratio_low", "ratio_high", ratio, "x"),
            *(number(row[name]) for name in ("peak_memory_mib", "ratio_error", "gradient_error")),
            reward_change(row),
        ]
        for row in rows
    ]
    samples = " or ".join(dict.fromkeys(row["samples"] for row in rows if row["samples"]))
    header = ["", "images/s", "over the first", "peak MiB", "ratio error", "gradient error", f"reward, {samples} samples"]
    return [
        table(header, lines),
        "Rows add up; one with *or* is an alternative to the row above it and no part of those below. Gradient error: relative to the "
        "textbook loop's gradient.",
    ]


def axes_of(rows: Rows) -> dict[str, Rows]:
    """The rows of every axis by rising value. Raises ValueError for an unknown axis."""
    axes = {axis: group for (axis,), group in grouped([row for row in rows if row["median_s"]], "axis").items()}
    if unknown := set(axes) - set(IDEAL):
        raise ValueError(f"scaling: axis={min(unknown)}: valid is {', '.join(IDEAL)}")
    return {axis: sorted(group, key=lambda row: int(row["value"])) for axis, group in axes.items()}


def growth(rows: Rows) -> str:
    """The exponent with which seconds grow with the value, from the smallest to the largest value; "" for a single value."""
    by_value, by_time = (math.log(float(rows[-1][name]) / float(rows[0][name])) for name in ("value", "median_s"))
    return f"{by_time / by_value:.2f}" if by_value else ""


def scaling_section(rows: Rows) -> list[str]:
    """An axis a row: seconds an iteration at each of its values."""
    axes = axes_of(rows)
    seconds = {axis: ", ".join(f"{row['value']}: {number(row['median_s'])}" for row in group) for axis, group in axes.items()}
    return [
        table(["", "value: seconds an iteration", "growth"], [[axis, seconds[axis], growth(group)] for axis, group in axes.items()]),
        "Growth: the exponent from the first value to the last; 1 is proportional, 0 no change, -1 half the time at twice the value.",
    ]


def reward_section(rows: Rows) -> list[str]:
    """A setting a row: the reward gained per hour, and the device-hours to the target."""
    header = ["", "reward an hour", "hours to target", "target", "reached", "last reward", "evaluation", "samples", "device-hours"]
    lines = [
        [
            PEERS.get(row["setting"], row["setting"]),
            number(row["reward_per_hour"]),
            spread(row, "hours_to_target", "hours_low", "hours_high") or "-",
            row["target"],
            row["reached"],
            spread(row, "final_reward", "final_low", "final_high"),
            spread(row, "eval_reward", "eval_low", "eval_high") or "-",
            *(number(row[name]) for name in ("samples", "device_hours")),
        ]
        for row in rows
    ]
    comparison = rows[0]["comparison"]
    return [table(header, lines), f"![reward against samples and against device-hours](docs/reward_{comparison}.png)"]


def algorithms_section(rows: Rows) -> list[str]:
    """An algorithm a row, all tasks below each other."""
    header = [
        "",
        "",
        "evaluation before",
        "after",
        "held-out before",
        "after",
        "diversity",
        "held-out diversity",
        "queries",
        "updates",
        "seeds",
    ]
    lines = [
        [
            f"**{row['task']}**" if place == 0 else "",
            row["algorithm"],
            number(row["eval_before"]),
            spread(row, "eval_after", "eval_low", "eval_high"),
            number(row["heldout_before"]),
            spread(row, "heldout_after", "heldout_low", "heldout_high"),
            *(row[f"{name}_diversity"] and f"{ratio(row[f'{name}_diversity'])}x" for name in ("eval", "heldout")),
            *(row[name] for name in ("queries", "updates", "seeds")),
        ]
        for group in grouped(rows, "task").values()
        for place, row in enumerate(group)
    ]
    return [
        table(header, lines),
        "Diversity: how much the evaluation's pictures differ from each other, over what it was before. A reward that rises while that "
        "falls towards 0 is no learning but a collapse: all pictures become alike.",
        "![reward against reward queries, by algorithm](docs/algorithms.png)",
    ]


@dataclass(frozen=True)
class Section:
    """A table of bench/rows.py as a page shows it."""

    page: str
    """The file, from the root."""
    title: str
    body: Callable[[Rows], list[str]]
    block: tuple[str, ...]
    """Columns. The page has a block for each combination of their values."""
    part: tuple[str, ...] = ()
    """Further columns. Rows of a block that differ in them may be from different runs."""

    def current(self, rows: Rows) -> Rows:
        """The rows that count: those of the last run, GPUs before CPUs."""
        last = [row for group in grouped(rows, "device", *self.block, *self.part).values() for row in runs(group)[-1]]
        return sorted(last, key=lambda row: on_cpu(row["device"]))


SECTIONS = {
    "peers": Section("README.md", "Against others", peers_section, ("model", "work")),
    "waterfall": Section("docs/performance.md", "What each technique is worth", waterfall_section, ("model", "work")),
    "scaling": Section("docs/performance.md", "Scaling", scaling_section, ("model", "work"), ("axis",)),
    "reward": Section("docs/performance.md", "Reward per device-hour", reward_section, ("comparison",), ("setting",)),
    "algorithms": Section("docs/algorithms.md", "Algorithms", algorithms_section, (), ("task", "algorithm")),
}


def on_cpu(device: str) -> bool:
    """Whether a device of the rows is a CPU."""
    return device.endswith("threads)")


def source(rows: Rows) -> str:
    """When, on which device, from which commit and how the rows were measured; a line for each run."""
    lines = (f"<sub>{row['date'][:10]}, {row['device']}, commit {row['commit']}: `{row['command']}`</sub>" for row in rows)
    return "<br>".join(dict.fromkeys(lines))


SHOWN_ON = {"waterfall": "README.md", "scaling": "docs/performance.md"}
"""The page that shows a picture of a table, and what it is a picture of."""
CAPTIONS = {"waterfall": "images per second, one technique a row", "scaling": "seconds an iteration along each axis"}
READING = {
    "waterfall": "A row adds one technique to the rows above it. A row that begins with 'or' is an alternative: the rows after it build "
    "on the row above it. The rewards are those of the first iteration and, as a mean, of the last ones. These runs measure speed: they "
    "are too short to show learning.",
}
"""How a picture is read, below it."""


def text(tables: dict[str, Rows], page: str) -> str:
    """The Markdown between a page's markers."""
    shown = [name for name, where in SHOWN_ON.items() if where == page and tables[name]]
    blocks = [block for name in shown for block in (f"![{CAPTIONS[name]}](docs/{name}.png)", READING.get(name)) if block]
    sections = {name: section for name, section in SECTIONS.items() if section.page == page}
    devices = dict.fromkeys(row["device"] for name in sections for row in tables[name])
    for device in sorted(devices, key=on_cpu):
        blocks.append(f"### {device}")
        for name, section in sections.items():
            rows = [row for row in tables[name] if row["device"] == device]
            for values, group in grouped(rows, *section.block).items():
                title = f"**{section.title}**{': ' * bool(values)}{', '.join(value for value in values if value != 'any')}"
                blocks += [title, *section.body(group), source(group)]
    content = "\n\n".join(blocks)
    return content.replace("](docs/", "](") if page.startswith("docs/") else content


def middle_and_whiskers(rows: Rows, metric: str, low: str, high: str) -> tuple[list[float], list[list[float]]]:
    """A metric, and how far its low and high are from it."""
    ends = [[float(row[name] or row[metric]) for name in (low, metric, high)] for row in rows]
    return [middle for _, middle, _ in ends], [[middle - low for low, middle, _ in ends], [high - middle for _, middle, high in ends]]


def draw_waterfall(rows: Rows) -> Figure:
    """Horizontal bars of images/s with the spread, their ratio and quality beside them."""
    groups = grouped([row for row in rows if row["images_per_s"]], "model", "work", "device")
    counts = [len(group) for group in groups.values()]
    figure = Figure(figsize=(10, 0.7 * len(counts) + 0.36 * sum(counts) + 0.3), layout="constrained")
    axes = figure.subplots(len(counts), 1, squeeze=False, height_ratios=[count + 1 for count in counts])[:, 0]
    for axis, (title, group) in zip(axes, groups.items()):
        middle, whiskers = middle_and_whiskers(group, "images_per_s", "low", "high")
        axis.barh(range(len(group)), middle, color=[PALE if row["technique"].startswith("or ") else BLUE for row in group], height=0.66)
        axis.errorbar(middle, range(len(group)), xerr=whiskers, fmt="none", ecolor=RED, capsize=2.5, linewidth=1)
        for place, row in enumerate(group):
            figures = [("{}x", ratio(row["ratio_to_baseline"])), ("gradient error {}", number(row["gradient_error"]))]
            quality = ", ".join(form.format(figure) for form, figure in [*figures, ("reward {}", reward_change(row))] if figure)
            end = middle[place] + whiskers[1][place], place
            axis.annotate(quality, end, (5, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_yticks(range(len(group)), [row["technique"] for row in group], fontsize=9)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.75 * max(middle))
        axis.set_title("{}, {}: {}".format(*title), loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("images/s")
    return figure


def draw_scaling(rows: Rows) -> Figure:
    """Small multiples: a panel an axis, seconds an iteration against the value, with the ideal as a dashed line."""
    groups = {title: axes_of(group) for title, group in grouped(rows, "model", "work", "device").items()}
    num_columns = max(map(len, groups.values()))
    figure = Figure(figsize=(2.5 * num_columns + 0.5, 2.6 * len(groups)), layout="constrained")
    for part, (title, axes) in zip(figure.subfigures(len(groups), 1, squeeze=False)[:, 0], groups.items()):
        part.suptitle("{}, {}: {}".format(*title), fontsize=10)
        panels = part.subplots(1, num_columns, squeeze=False)[0]
        for panel, (axis, group) in zip(panels, axes.items()):
            draw_axis(panel, axis, group)
        for panel in panels[len(axes) :]:
            panel.set_visible(False)
        panels[0].set_ylabel("seconds an iteration")
    return figure


def draw_axis(panel: Axes, axis: str, rows: Rows) -> None:
    """One panel of `draw_scaling`."""
    values, (middle, whiskers) = [int(row["value"]) for row in rows], middle_and_whiskers(rows, "median_s", "low_s", "high_s")
    ideal = [middle[0] * (value / values[0]) ** IDEAL[axis] for value in values]
    panel.plot(values, ideal, "--", color=PALE, label=IDEAL_NAMES[IDEAL[axis]])
    panel.errorbar(values, middle, yerr=whiskers, color=RED, marker="o", markersize=4, capsize=2.5, label="measured")
    panel.loglog()
    panel.xaxis.set_major_locator(FixedLocator(values))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    for side in (panel.xaxis, panel.yaxis):
        side.set_minor_locator(NullLocator())
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_xlabel(axis)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)


PICTURES = {"waterfall": draw_waterfall, "scaling": draw_scaling}


def fingerprint(rows: Rows) -> str:
    """A hash of the rows, which their picture carries."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def shows(path: Path, rows: Rows) -> bool:
    """Whether there is a picture that was drawn from these rows."""
    if not path.exists():
        return False
    with Image.open(path) as picture:
        return picture.info.get("Description") == fingerprint(rows)


def filled(path: Path, content: str) -> tuple[str, str]:
    """A file's text as it is, and with `content` between the markers. Raises ValueError unless each marker is there once, in order."""
    old = path.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{path}: it needs the markers {BEGIN} and {END}, once each and in this order")
    before, rest = old.split(BEGIN)
    return old, "\n".join(filter(None, [before + BEGIN, content, END + rest.split(END)[1]]))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.headline", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if anything would change")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs")
    args = parser.parse_args(argv)
    try:
        tables = {name: section.current(read(name, args.results)) for name, section in SECTIONS.items()}
        pages = {args.root / page: text(tables, page) for page in dict.fromkeys(section.page for section in SECTIONS.values())}
        pages = {path: filled(path, content) for path, content in pages.items()}
    except (OSError, ValueError) as error:
        print(f"bench.headline: {error}", file=sys.stderr)
        return 2
    files = {name: args.root / "docs" / f"{name}.png" for name in PICTURES}
    stale = [name for name, file in files.items() if tables[name] and not shows(file, tables[name])]
    if args.check:
        for path, (old, new) in pages.items():
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), path.name, "the rows"))
        sys.stdout.writelines(f"{files[name]}: it does not show the rows\n" for name in stale)
        return int(bool(stale) or any(old != new for old, new in pages.values()))
    for path, (_, new) in pages.items():
        path.write_text(new, encoding="utf-8")
    for name in stale:
        PICTURES[name](tables[name]).savefig(files[name], dpi=130, metadata={"Description": fingerprint(tables[name])})
    return 0


if __name__ == "__main__":
    sys.exit(main())
