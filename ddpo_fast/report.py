"""<run_dir>/report.html: a run as one self-contained page.  python -m ddpo_fast.report RUN_DIR"""

import base64
import html
import io
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ddpo_fast.files import write_text
from ddpo_fast.metrics import read_metrics

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
h1 { margin-bottom: 0 } .lead { font-size: 1.25rem; margin-top: .3rem } img { max-width: 100% }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } table { border-collapse: collapse }
td, th { padding: .15rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
pre { background: #f5f6f8; padding: 1rem; overflow-x: auto }
details { margin: 1rem 0 }
"""
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "deepspeed", "triton")


def environment() -> dict[str, str]:
    """The versions a run depends on."""
    return {"python": platform.python_version(), "machine": platform.machine(), **{name: version(name) for name in _PACKAGES}}


def write_report(run_dir: Path) -> Path:
    """Writes <run_dir>/report.html from metrics.jsonl, images/ and config.yaml. Returns its path."""
    rows = read_metrics(run_dir)
    images = sorted((run_dir / "images").glob("*.png"))
    trained, evaluated = [r for r in rows if r["reward_mean"] is not None], [r for r in rows if r["eval_reward_mean"] is not None]
    before, after = evaluated[0], evaluated[-1]
    page = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(run_dir.name)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(run_dir.name)}</h1>",
        f"<p class=lead>Evaluation reward <b>{before['eval_reward_mean']:.4g}</b> → <b>{after['eval_reward_mean']:.4g}</b> "
        f"in {after['iteration']} iterations, {after['samples']:,} samples, {after['device_hours']:.3g} device-hours.</p>",
        _figure(_curves(trained, evaluated)),
    ]
    if images:
        page.append("<h2>Same prompts, same noise: before and now</h2><div class=pair>")
        for path in (images[0], images[-1]):
            page.append(f"<div><b>{html.escape(path.stem)}</b><br>{_image(path.read_bytes(), path.stem)}</div>")
        page.append("</div>")
    if trained:
        page += ["<h2>Is it healthy?</h2>", _figure(_health(trained)), "<h2>Where the time goes</h2>", _times(trained)]
    page.append(f"<details><summary>Configuration</summary><pre>{html.escape((run_dir / 'config.yaml').read_text())}</pre></details>")
    page.append(f"<details><summary>Environment</summary><pre>{html.escape(json.dumps(environment(), indent=1))}</pre></details></html>")
    path = run_dir / "report.html"
    write_text(path, "\n".join(page))
    return path


def _curves(trained: list[dict], evaluated: list[dict]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", sharey=True)
    for axis, key, label in ((axes[0], "samples", "samples"), (axes[1], "device_hours", "device-hours")):
        axis.plot([r[key] for r in trained], [r["reward_mean"] for r in trained], color="#9db2c9", label="training samples")
        axis.errorbar(
            [r[key] for r in evaluated], [r["eval_reward_mean"] for r in evaluated], marker="o", capsize=3, color="#c2410c",
            yerr=[r["eval_reward_std"] / r["eval_samples"] ** 0.5 for r in evaluated], label="fixed evaluation ± s.e.",
        )  # fmt: skip
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("reward")
    axes[0].legend()
    return figure


def _health(trained: list[dict]) -> plt.Figure:
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.6), layout="constrained")
    for axis, key in zip(axes, ("ratio_error", "clip_fraction", "approx_kl", "grad_norm")):
        axis.plot([r["iteration"] for r in trained], [r[key] for r in trained], color="#33587a")
        axis.set_title(key)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    return figure


def _times(trained: list[dict]) -> str:
    total = sum(r["time_total_s"] for r in trained)
    cells = []
    for stage in ("sample", "reward", "train", "eval"):
        seconds = sum(r[f"time_{stage}_s"] for r in trained)
        cells.append(f"<tr><th>{stage}</th><td>{seconds:.1f} s</td><td>{100 * seconds / total:.1f} %</td></tr>")
    return f"<table>{''.join(cells)}<tr><th>total</th><td>{total:.1f} s</td><td></td></tr></table>"


def _figure(figure: plt.Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return _image(buffer.getvalue(), "curves")


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(write_report(Path(folder)))
