"""<run_dir>/report.html: a run as one self-contained page; several runs side by side on one.

ddpo-fast report RUN_DIR                           writes RUN_DIR/report.html
ddpo-fast report RUN_DIR RUN_DIR... [--output PAGE]    writes comparison.html, or PAGE
"""

import argparse
import base64
import hashlib
import html
import io
import json
import math
import platform
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import matplotlib
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ddpo_fast import samplers
from ddpo_fast.files import write_text
from ddpo_fast.places import typed_path
from ddpo_fast.prompts import EVALUATIONS
from ddpo_fast.records.metrics import read_metrics
from ddpo_fast.terminal import steady_streams

_STYLE = """
* { box-sizing: border-box } html { -webkit-text-size-adjust: 100% }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 0 auto; padding: 1rem; color: #1c2430; background: #f4f5f7 }
h1 { margin: 1rem 0 0; overflow-wrap: anywhere } h2 { margin: 2.2rem 0 .6rem; font-size: 1.3rem } p { max-width: 60rem }
.lead { font-size: 1.2rem; margin-top: .3rem } .note { color: #5a6675; font-size: .9rem } img { display: block; width: 100% }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem }
.tiles div, .plots > div, .sets > figure { background: #fff; border: 1px solid #e1e5ea; border-radius: 8px; padding: .6rem .8rem }
.tiles b { display: block; font-size: 1.2rem } .tiles span { color: #5a6675; font-size: .85rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .8rem; align-items: start }
.sets { display: grid; gap: .8rem; margin-top: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)) }
.sets > figure { margin: 0 } .sets figcaption { overflow-wrap: anywhere; font-weight: 600 }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: .4rem; font-size: .85rem }
.row > div > i { display: block; aspect-ratio: 1; background-repeat: no-repeat; border-radius: 4px }
.wide { overflow-x: auto; background: #fff; border: 1px solid #e1e5ea; border-radius: 8px; padding: .4rem; margin-bottom: .8rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #e1e5ea; text-align: right; white-space: nowrap }
tr > :first-child { text-align: left }
pre { background: #fff; border: 1px solid #e1e5ea; padding: 1rem; overflow-x: auto; font-size: .85rem }
details { margin: 1rem 0 } summary { cursor: pointer; font-weight: 600 }
"""
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "deepspeed", "triton")
_COLOURS = ("#c2410c", "#1d5fa8", "#15803d", "#7e22ce", "#a16207", "#0f766e", "#be185d", "#4b5563")
_PLOT = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.titlesize": 11, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True, "grid.alpha": 0.3,
}  # fmt: skip
_STAGES = {"sample": "#1d5fa8", "reward": "#a16207", "train": "#c2410c", "eval": "#15803d"}
_SHOWN = 12
"""Pictures that are open; the others unfold."""


def environment(world_size: int) -> dict[str, str | int]:
    """What a run runs on: device, number of them, versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    names = {name: version(name) for name in _PACKAGES}
    return {"device": device, "devices": world_size, "python": platform.python_version(), "platform": platform.platform()} | names


def _cpu_name() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class Run:
    """What a run directory says about a run."""

    name: str
    rows: list[dict]
    """Those of metrics.jsonl."""
    config: dict
    environment: dict
    """Empty where it was not recorded."""
    images: dict[str, list[Path]]
    """Grids of each evaluation set, oldest first."""

    @property
    def trained(self) -> list[dict]:
        return [row for row in self.rows if row["reward_mean"] is not None]

    def evaluations(self, name: str = "eval") -> list[dict]:
        """The rows with an evaluation of this name; 'eval' is the fixed evaluation set."""
        return [row for row in self.rows if row.get(f"{name}_reward_mean") is not None]

    @property
    def decides(self) -> str:
        """The evaluation by which weights are the best: the last that the run has."""
        return next((name for name in reversed(EVALUATIONS) if self.evaluations(name)), next(iter(EVALUATIONS)))

    @property
    def sampling(self) -> dict:
        """How its evaluation pictures are made: sampler, num_steps, guidance_scale, eta, as diffusers' DDIM takes them, and their size."""
        sample, evaluation = self.config["sample"], self.config.get("eval", {})
        names = "sampler", "num_steps", "guidance_scale"  # the run may be older than an option
        chosen = {name: sample.get(name, "ddim") if evaluation.get(name) is None else evaluation[name] for name in names}
        size = {name: evaluation.get(name) or sample.get(name) for name in ("height", "width")}
        return chosen | {"eta": sample["eta"] if samplers.find(chosen["sampler"]).STOCHASTIC else 0.0} | size

    @property
    def evaluation_names(self) -> list[str]:
        """'eval', and what else has a `<name>_reward_mean`."""
        names = dict.fromkeys(key.removesuffix("_reward_mean") for row in self.rows for key in row if key.endswith("_reward_mean"))
        return [name for name in names if self.evaluations(name)]


def read_run(run_dir: Path) -> Run:
    """Reads metrics.jsonl, config.yaml, environment.json and images/. Raises ValueError for what is no run directory."""
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run_dir / name).is_file():
            raise ValueError(f"RUN_DIR={run_dir}: there is no {name} in it; valid is the directory of a run")
    recorded, prefixes = run_dir / "environment.json", {name: evaluation.pictures for name, evaluation in EVALUATIONS.items()}
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"RUN_DIR={run_dir}: its config.yaml is damaged: {' '.join(str(error).split())}") from None
    return Run(
        run_dir.resolve().name,
        read_metrics(run_dir),
        config,
        json.loads(recorded.read_text()) if recorded.exists() else {},
        {name: sorted((run_dir / "images").glob(f"{prefix}_*.png")) for name, prefix in prefixes.items()},
    )


def write_report(run_dir: Path) -> Path:
    """Writes <run_dir>/report.html from what else is there. Returns its path. Raises ValueError, see `read_run`."""
    run, path = read_run(run_dir), run_dir / "report.html"
    page = [f"<p class=lead>{_result(run)}</p>", _tiles(run), "<h2>Reward</h2>", _plots(_rewards([run]))]
    page += [part for name in EVALUATIONS for part in _pictures([run], name)]
    if run.trained:
        page += ["<h2>Is it healthy?</h2>", _plots(_health([run])), "<h2>Where the time goes</h2>", _times(run)]
        page.append(_details("Every iteration", _table(_COLUMNS, [[_number(row.get(key)) for key in _COLUMNS] for row in run.rows])))
    recorded = html.escape(json.dumps(run.environment, indent=1)) if run.environment else "not recorded"
    page.append(_details("Configuration", f"<pre>{html.escape((run_dir / 'config.yaml').read_text(encoding='utf-8'))}</pre>"))
    page.append(_details("Environment", f"<pre>{recorded}</pre>"))
    write_text(path, _page(run.name, page))
    return path


def write_comparison(run_dirs: list[Path], path: Path) -> Path:
    """Writes one page about several runs: curves in one plot, results, what their configurations differ in, pictures. Returns its path.

    Raises ValueError, see `read_run`.
    """
    runs = [read_run(run_dir) for run_dir in run_dirs]
    names = [run.name for run in runs]
    runs = [
        run if names.count(run.name) == 1 else Run(str(run_dir), run.rows, run.config, run.environment, run.images)
        for run, run_dir in zip(runs, run_dirs)
    ]
    page = []
    for reward in dict.fromkeys(run.config["reward"]["name"] for run in runs):
        same = [run for run in runs if run.config["reward"]["name"] == reward]
        page += [
            f"<h2>Reward: {html.escape(reward)}</h2>",
            _results(same),
            _plots(_rewards(same)),
            *(part for name in EVALUATIONS for part in _pictures(same, name)),
        ]
    page += ["<h2>Are they healthy?</h2>", _plots(_health([run for run in runs if run.trained]))]
    page += ["<h2>What they differ in</h2>", _differences(runs)]
    write_text(path, _page(f"{len(runs)} runs", page))
    return path


_COLUMNS = (
    "iteration samples reward_mean eval_reward_mean heldout_reward_mean eval_diversity ratio_error clip_fraction approx_kl grad_norm "
    "time_sample_s time_reward_s time_train_s time_eval_s device_hours bad_rewards"
).split()


def _page(title: str, body: list[str]) -> str:
    head = '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">'
    icon = '<link rel=icon href="data:,">'  # or the browser asks a server for one
    title = html.escape(title)
    return "\n".join([f"{head}{icon}<title>{title}</title><style>{_STYLE}</style>", f"<h1>{title}</h1>", *body, "</html>"])


def _result(run: Run) -> str:
    evaluated = run.evaluations()
    if not evaluated:
        return "Nothing has been evaluated yet."
    before, after = evaluated[0], evaluated[-1]
    heldout = run.evaluations("heldout")
    ends = [f"<b>{row['heldout_reward_mean']:.4g}</b>" for row in heldout[:1] + heldout[-1:]]
    return (
        f"Evaluation reward <b>{before['eval_reward_mean']:.4g}</b> → <b>{after['eval_reward_mean']:.4g}</b>"
        f"{', on held-out prompts ' * bool(ends)}{' → '.join(ends)} "
        f"in {after['iteration']} iterations, {after['samples']:,} samples, {after['device_hours']:.3g} device-hours."
    )


def _change(run: Run, name: str = "eval") -> tuple[str, str]:
    """From the first to the last evaluation of this name, in percent and in standard errors of the difference."""
    evaluated = run.evaluations(name)
    if len(evaluated) < 2:
        return "–", "–"
    before, after = evaluated[0], evaluated[-1]
    old = before[f"{name}_reward_mean"]
    change = after[f"{name}_reward_mean"] - old
    error = math.hypot(*(row[f"{name}_reward_std"] / row[f"{name}_samples"] ** 0.5 for row in (before, after)))
    percent = f"{100 * change / abs(old):+.1f} %" if old else "–"
    return percent, f"{change / error:+.1f}" if error else "–"


def _tiles(run: Run) -> str:
    percent, errors = _change(run)
    tiles = {"change of the evaluation reward": percent, "the same in standard errors": errors}
    if run.decides == "heldout":
        percent, errors = _change(run, "heldout")
        tiles |= {"change on held-out prompts": percent, "that in standard errors": errors}
    if later := run.evaluations(run.decides)[1:]:
        best = max(later, key=lambda row: row[f"{run.decides}_reward_mean"])
        tiles[f"best, after iteration {best['iteration']}"] = f"{best[f'{run.decides}_reward_mean']:.4g}"
    if run.rows:
        last = run.rows[-1]
        tiles |= {"iterations": _number(last["iteration"]), "samples": _number(last["samples"])}
        tiles |= {"device-hours": _number(last["device_hours"]), "peak memory, MiB": _number(last["peak_memory_mib"])}
    if run.trained:
        tiles["largest ratio_error"] = _number(_largest(run, "ratio_error"))
        tiles["clip_fraction, last"] = _number(run.trained[-1]["clip_fraction"])
        tiles["images/s in sampling"] = _number(_mean(run, "images_per_s"))
        tiles["transitions/s in the update"] = _number(_mean(run, "transitions_per_s"))
        tiles["read from the cache"] = f"{100 * run.trained[-1]['cache_hit_fraction']:.0f} %"
        tiles["bad rewards"] = _number(run.rows[-1]["bad_rewards"])
    return f"<div class=tiles>{''.join(f'<div><b>{value}</b><span>{name}</span></div>' for name, value in tiles.items())}</div>"


def _results(runs: list[Run]) -> str:
    evaluations = [name for name in EVALUATIONS if any(run.evaluations(name) for run in runs)]
    names = ["run"]
    for name in evaluations:
        names += [f"{EVALUATIONS[name].title}: before", "after", "change", "standard errors"]
    names += ["samples", "device-hours", "images/s", "transitions/s", "largest ratio_error", "clip_fraction, mean", "peak MiB"]
    rows = []
    for run in runs:
        cells = [html.escape(run.name)]
        for name in evaluations:
            evaluated = run.evaluations(name)
            cells += [f"{row[f'{name}_reward_mean']:.4g}" for row in (evaluated[0], evaluated[-1])] if evaluated else ["–", "–"]
            cells += _change(run, name)
        last = run.rows[-1] if run.rows else {}
        figures = [last.get("samples"), last.get("device_hours"), _mean(run, "images_per_s"), _mean(run, "transitions_per_s")]
        figures += [_largest(run, "ratio_error"), _mean(run, "clip_fraction"), last.get("peak_memory_mib")]
        rows.append([*cells, *(_number(figure) for figure in figures)])
    return _table(names, rows)


def _differences(runs: list[Run]) -> str:
    flat = [
        {f"{section}.{key}": value for section, values in run.config.items() for key, value in values.items()}
        | {f"environment: {key}": value for key, value in run.environment.items()}
        for run in runs
    ]
    keys = [key for key in dict.fromkeys(key for options in flat for key in options) if key != "run.dir"]
    different = [key for key in keys if any(options.get(key) != flat[0].get(key) for options in flat)]
    if not different:
        return "<p>Nothing: the same configuration and environment.</p>"
    rows = [[html.escape(key), *(html.escape(str(options.get(key, "–"))) for options in flat)] for key in different]
    return _table(["option", *(html.escape(run.name) for run in runs)], rows)


def _rewards(runs: list[Run]) -> list[str]:
    """Plots of reward against samples and device-hours, and of diversity."""

    def draw(axis: Axes, x: str) -> None:
        for run, colour in zip(runs, _cycle(runs)):
            if run.trained:
                axis.plot(
                    *_series(run.trained, x, "reward_mean"), color="#9db2c9" if len(runs) == 1 else colour, alpha=0.45, lw=1, zorder=1
                )
            for name, marker in zip(run.evaluation_names, "osD^v"):
                line = _COLOURS[run.evaluation_names.index(name) % len(_COLOURS)] if len(runs) == 1 else colour
                rows = run.evaluations(name)
                x_values, means = _series(rows, x, f"{name}_reward_mean")
                label = _label(name) if len(runs) == 1 else f"{run.name}, {_label(name)}"
                errors = [row.get(f"{name}_reward_std", 0) / row.get(f"{name}_samples", 1) ** 0.5 for row in rows]
                axis.errorbar(x_values, means, errors, color=line, marker=marker, ms=4, capsize=2, lw=1.6, label=label)
        if len(runs) == 1:
            axis.plot([], [], color="#9db2c9", label="training samples")
        axis.set(title="reward", xlabel=x.replace("_", "-"))
        axis.legend(fontsize=8)

    plots = [_plot(lambda axis, x=x: draw(axis, x), f"reward against {x}") for x in ("samples", "device_hours")]
    if any(row.get("eval_diversity") is not None for run in runs for row in run.rows):
        plots.append(_plot(lambda axis: _lines(axis, runs, "eval_diversity", "diversity of the evaluation's pictures"), "diversity"))
    return plots


def _label(name: str) -> str:
    return f"{EVALUATIONS[name].title} ± s.e." if name in EVALUATIONS else name


def _health(runs: list[Run]) -> list[str]:
    names = [
        name
        for name in ("ratio_error", "clip_fraction", "approx_kl", "kl_to_reference", "grad_norm")
        if any(row.get(name) is not None for run in runs for row in run.rows)
    ]
    return [_plot(lambda axis, name=name: _lines(axis, runs, name, name), name) for name in names]


def _lines(axis: Axes, runs: list[Run], key: str, title: str) -> None:
    """A value of every run against its iterations."""
    for run, colour in zip(runs, _cycle(runs)):
        rows = [row for row in run.rows if row.get(key) is not None]
        axis.plot(*_series(rows, "iteration", key), color=colour, marker="o", ms=3, lw=1.4, label=run.name)
    axis.set(title=title, xlabel="iteration")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(runs) > 1:
        axis.legend(fontsize=8)


def _times(run: Run) -> str:
    """Seconds by stage: a stacked bar for each iteration, and the sums."""
    rows = run.trained

    def draw(axis: Axes) -> None:
        iterations, bottom = [row["iteration"] for row in rows], [0.0] * len(rows)
        for stage, colour in _STAGES.items():
            seconds = [row[f"time_{stage}_s"] for row in rows]
            axis.bar(iterations, seconds, 0.8, bottom, color=colour, label=stage)
            bottom = [below + height for below, height in zip(bottom, seconds)]
        axis.set(xlabel="iteration", ylabel="seconds")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)

    total = sum(row["time_total_s"] for row in rows)
    sums = {stage: sum(row[f"time_{stage}_s"] for row in rows) for stage in _STAGES}
    sums |= {"rest": total - sum(sums.values()), "total": total}
    table = [[stage, f"{s:.1f}", f"{s / len(rows):.2f}", f"{100 * s / total:.1f} %" if total else "–"] for stage, s in sums.items()]
    return f"{_plots([_plot(draw, 'seconds by stage'), _table(['stage', 's', 's an iteration', 'share'], table)])}"


def _pictures(runs: list[Run], name: str) -> list[str]:
    """Pictures of an evaluation set before and now, each beside those of the same prompt and noise; runs that differ in these apart."""
    drawn = {}
    for run in runs:
        paths = run.images[name]
        grids = [grid for path in (paths[:1] + paths[-1:]) if (grid := _Grid(path)).prompts]
        if len(paths) > 1 and len(grids) == 2:
            same = (tuple(grids[0].prompts), run.config["run"]["seed"], run.config["model"]["path"], *run.sampling.values())
            drawn.setdefault(same, []).append((run, grids))
    page = []
    for group in drawn.values():
        before, names = group[0][1][0], [run.name for run, _ in group]
        columns = [(before.iteration, before)]
        columns += [(now.iteration if len(runs) == 1 else run.name, now) for run, (_, now) in group]
        sets = [_set(before.prompts[i], [(label, grid, i) for label, grid in columns]) for i in range(len(before.prompts))]
        page.append(f"<h2>{EVALUATIONS[name].heading}: before and now{'' if len(runs) == 1 else ': ' + html.escape(', '.join(names))}</h2>")
        page.append(f"<style>{''.join(grid.style() for _, grid in columns)}</style><div class=sets>{''.join(sets[:_SHOWN])}</div>")
        if len(sets) > _SHOWN:
            page.append(_details(f"{len(sets) - _SHOWN} more", f"<div class=sets>{''.join(sets[_SHOWN:])}</div>"))
    return page


def _set(prompt: str, pictures: list[tuple[str, "_Grid", int]]) -> str:
    cells = []
    for label, grid, i in pictures:
        reward = grid.rewards[i]
        text = f"{label}: {'no reward' if reward is None else f'{reward:.3f}'}"
        cells.append(f"<div>{grid.picture(i, f'{prompt}, {text}')}{html.escape(text)}</div>")
    return f"<figure><figcaption>{html.escape(prompt)}</figcaption><div class=row>{''.join(cells)}</div></figure>"


class _Grid:
    """A file of images/, shown picture by picture though it is in the page once: a window over one background.

    One that does not say what is on it, see `metrics.save_grid`, or cannot be read, has no prompts.
    """

    def __init__(self, path: Path):
        try:
            with Image.open(path) as image:
                image.load()
        except OSError:  # a report is written in the middle of a run, which somebody's broken picture must not end
            image = Image.new("RGB", (1, 1))
        self.path, self.image = path, image
        self.iteration = re.sub(r"\D+0*(?=\d)", "iteration ", path.stem)
        self.name = f"g{hashlib.sha256(bytes(path.resolve())).hexdigest()[:12]}"
        said = json.loads(image.info.get("grid", "{}"))
        self.columns, self.cell, self.line = (said.get(key, 0) for key in ("columns", "cell", "line"))
        self.prompts, self.rewards = (said.get(key, []) for key in ("prompts", "rewards"))

    def style(self) -> str:
        """The rule of this grid's class, with the pictures as JPEG."""
        buffer, (width, height) = io.BytesIO(), self.image.size
        self.image.save(buffer, "JPEG", quality=92, subsampling=0)
        data = base64.b64encode(buffer.getvalue()).decode()
        size = f"{100 * width / self.cell:.4f}% {100 * height / self.cell:.4f}%"
        return f".{self.name} {{ background-image: url(data:image/jpeg;base64,{data}); background-size: {size} }}\n"

    def picture(self, i: int, alt: str) -> str:
        (width, height), cell = self.image.size, self.cell
        x = 100 * (i % self.columns * cell) / max(1, width - cell)
        y = 100 * (i // self.columns * self.line) / max(1, height - cell)
        where = f"background-position: {x:.4f}% {y:.4f}%"
        return f'<i class={self.name} role=img aria-label="{html.escape(alt)}" style="{where}"></i>'


def _series(rows: list[dict], x: str, y: str) -> tuple[list, list]:
    return [row[x] for row in rows], [math.nan if row[y] is None else row[y] for row in rows]


def _cycle(runs: list[Run]) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(len(runs))]


def _mean(run: Run, key: str) -> float | None:
    values = [row[key] for row in run.trained if row[key] is not None]
    return sum(values) / len(values) if values else None


def _largest(run: Run, key: str) -> float | None:
    return max((row[key] for row in run.trained if row[key] is not None), default=None)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _table(names: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>"


def _plots(plots: list[str]) -> str:
    return f"<div class=plots>{''.join(plot if plot.startswith('<div') else f'<div>{plot}</div>' for plot in plots)}</div>"


def _plot(draw, alt: str) -> str:
    """A picture in SVG of what `draw` puts on its axes."""
    with matplotlib.rc_context(_PLOT):
        figure = Figure(figsize=(4.8, 3.0))
        axis = figure.subplots(gridspec_kw={"left": 0.16, "right": 0.97, "bottom": 0.17, "top": 0.89})
        axis.ticklabel_format(scilimits=(-3, 4))
        draw(axis)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def main(argv: list[str] | None = None) -> None:
    if argv is None:
        steady_streams()
    parser = argparse.ArgumentParser(prog="ddpo-fast report", description="A run, or several beside each other, as one page.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", type=typed_path, help="Where to write a page about several runs. Default: comparison.html, here.")
    args = parser.parse_args(argv)
    try:
        if len(args.run_dirs) > 1:
            print(write_comparison(args.run_dirs, args.output or Path("comparison.html")))
        elif args.output is not None:
            raise ValueError(f"--output={args.output}: valid with several runs; the page of one is RUN_DIR/report.html")
        else:
            print(write_report(args.run_dirs[0]))
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
