"""What a run records: metrics.jsonl, TensorBoard and other trackers, stage times, grids of pictures."""

import json
import logging
import math
import os
import re
import resource
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ddpo_fast.claim import Claim
from ddpo_fast.files import DISK_FULL, new_file, write_text

logger = logging.getLogger("ddpo_fast")


def peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far: the device's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def check_installed(names: list[str]) -> None:
    """Raises ValueError for a tracker that is not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise ValueError(f"run.trackers={names}: {', '.join(missing)} is not installed; pip install {' '.join(missing)}")


def tracker_fault(names: list[str]) -> str | None:
    """Why a tracker cannot begin: wandb is switched off, or has no key. Only the rank that begins the trackers calls this."""
    if "wandb" not in names or os.environ.get("WANDB_MODE", "online") != "online":
        return None
    if (value := os.environ.get("WANDB_DISABLED", "")).lower() in ("1", "true", "yes", "on"):
        return (
            f"run.trackers={names}: WANDB_DISABLED={value} asks for no wandb, and is not wandb's own variable; "
            "valid is a list without wandb, WANDB_MODE=disabled, or WANDB_DISABLED unset"
        )
    try:
        import_module("wandb").login()
    except Exception as error:
        reason = " ".join(f"{error}".split())
        return f"run.trackers={names}: wandb: {reason}; valid is after `wandb login`, with WANDB_API_KEY, or with WANDB_MODE=offline"


class MetricsWriter:
    """Appends one row an iteration to <run_dir>/metrics.jsonl and to the trackers. Rows after `iteration` are dropped from the file first.

    tensorboard writes to <run_dir>/tensorboard/. wandb and trackio are imported when asked for. They begin a run with `config`, or go on
    with it if `iteration` is not -1. If one of them raises later, it is left out from then on, with a warning.
    Only the beginning raises: OSError, or ValueError for a tracker. `claim` has what cannot be written later.
    """

    def __init__(self, run_dir: Path, claim: Claim, iteration: int, trackers: list[str], config: dict):
        self.path, self.claim, self.trackers = run_dir / "metrics.jsonl", claim, trackers
        self.rows = [row for row in read_metrics(run_dir) if row["iteration"] <= iteration]
        self._write_all()
        self.tensorboard = self._open_tensorboard(purge_step=iteration + 1) if "tensorboard" in trackers else None
        self.remote = {}
        self._begin([name for name in trackers if name != "tensorboard"], run_dir, iteration, config)

    def write(self, row: dict) -> None:
        """A row that cannot be written is written with the next one, or by `close`."""
        row = {key: value if value is not None and math.isfinite(value) else None for key, value in row.items()}  # JSON has no NaN
        self.rows.append(row)
        self._write([row])
        values = {name: value for name, value in row.items() if value is not None and name != "iteration"}
        self._tell(lambda _, run: run.log(values, step=row["iteration"]))
        self._tell_tensorboard(
            lambda board: [board.add_scalar(name, value, row["iteration"]) for name, value in values.items()], row["iteration"]
        )

    def write_images(self, grid: Image.Image, name: str, iteration: int) -> None:
        self._tell(lambda tracker, run: run.log({name: import_module(tracker).Image(grid)}, step=iteration))
        self._tell_tensorboard(lambda board: board.add_image(name, np.asarray(grid), iteration, dataformats="HWC"), iteration)

    def close(self) -> None:
        """Tries once more to write what could not be written."""
        self._write([])
        if self.tensorboard is not None:
            self._tell_tensorboard(SummaryWriter.close, self._newest)
        self._tell(lambda _, run: run.finish())

    @property
    def _newest(self) -> int:
        """The iteration of the last row; -1 if there is none, as somebody may have deleted the rows of a finished run."""
        return self.rows[-1]["iteration"] if self.rows else -1

    def _write(self, new: list[dict]) -> None:
        """Appends the newest rows. If some rows are not in the file, which may have been deleted, it writes all of them."""
        whole = "the metrics" not in self.claim.unwritten
        with self.claim.writing("the metrics", self._newest):
            self.claim.hold()
            if not whole or not self.path.exists():
                self._write_all()
            elif new:
                with self.path.open("a") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in new))

    def _write_all(self) -> None:
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def _open_tensorboard(self, **options) -> SummaryWriter:
        if threading.excepthook is threading.__excepthook__:
            threading.excepthook = _say_what_nobody_else_does
        return SummaryWriter(self.path.with_name("tensorboard"), **options)

    def _tell_tensorboard(self, what: Callable[[SummaryWriter], object], iteration: int) -> None:
        """Calls what(writer) if TensorBoard is used. After a fault the writer's thread is dead, so the next call makes a new writer."""
        if "tensorboard" not in self.trackers:
            return
        with self.claim.writing("TensorBoard's file", iteration):
            self.claim.hold()
            board, self.tensorboard = self.tensorboard or self._open_tensorboard(), None
            what(board)
            board.flush()
            self.tensorboard = board

    def _tell(self, what: Callable[[str, Any], object]) -> None:
        """Calls what(tracker, run) for wandb's and trackio's runs."""
        for tracker, run in list(self.remote.items()):
            with self._unless_it_raises(tracker):
                what(tracker, run)

    @contextmanager
    def _unless_it_raises(self, tracker: str) -> Iterator[None]:
        """A context for what a tracker does: a service that fails must not end a run, since all rows are in metrics.jsonl."""
        try:
            yield
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if isinstance(error, OSError) and error.errno in DISK_FULL:  # not the tracker's fault: it gets the next row
                logger.warning("%s could not be told (%s); all numbers are in %s", tracker, reason, self.path)
                return
            self.remote.pop(tracker, None)
            logger.warning("%s failed (%s); the run goes on without it, with all of its numbers in %s", tracker, reason, self.path)

    def _begin(self, trackers: list[str], run_dir: Path, iteration: int, config: dict) -> None:
        """Begins, or goes on with, runs of wandb and trackio. From the first time on, <run_dir>/tracker_id has the run's name there."""
        id_file, name = run_dir / "tracker_id", run_dir.resolve().name
        if trackers and (iteration < 0 or not id_file.exists()):
            write_text(id_file, f"{re.sub(r'[^a-zA-Z0-9_-]', '-', name)}-{secrets.token_hex(4)}")
        for tracker in trackers:
            options = {"project": os.environ.get(f"{tracker.upper()}_PROJECT", "ddpo_fast"), "config": config, "resume": "allow"}
            if tracker == "wandb":
                options |= {"name": name, "id": id_file.read_text(), "dir": str(run_dir)}
            else:
                options["name"] = id_file.read_text()  # trackio identifies a run by its name
            try:
                self.remote[tracker] = import_module(tracker).init(**options)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise ValueError(f"run.trackers={self.trackers}: {tracker} cannot begin ({reason}); valid are those that can") from error


def _say_what_nobody_else_does(fault: threading.ExceptHookArgs) -> None:
    """`threading.excepthook`, silent if a disk fails TensorBoard's thread: the next call of its writer reports that in one line."""
    if not (isinstance(fault.exc_value, OSError) and type(fault.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(fault)


def read_metrics(run_dir: Path) -> list[dict]:
    """The rows of <run_dir>/metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    if not (run_dir / "metrics.jsonl").exists():
        return rows
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def image_grid(images: Tensor, prompts: list[str], rewards: Tensor, columns: int = 8) -> Image.Image:
    """`picture_grid` with rewards (B,) below the prompts.

    `info["grid"]` of the result says the same as JSON: columns, cell and line (a picture's size and the distance of two rows, in
    pixels), prompts, rewards (null where not finite).
    """
    grid = picture_grid(images, prompts, [f"{reward:.3f}" for reward in rewards.tolist()], columns)
    finite, cell = [reward if math.isfinite(reward) else None for reward in rewards.tolist()], grid.width // columns
    grid.info["grid"] = json.dumps({"columns": columns, "cell": cell, "line": cell + 28, "prompts": prompts, "rewards": finite})
    return grid


def picture_grid(images: Tensor, prompts: list[str], notes: list[str], columns: int = 8) -> Image.Image:
    """Pictures (B, 3, H, W), uint8, side by side, each with its prompt and a note below; each 128 to 256 pixels wide."""
    rows, cell = -(-len(prompts) // columns), min(max(images.shape[-1], 128), 256)
    grid = Image.new("RGB", (columns * cell, rows * (cell + 28)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    pixels = images.permute(0, 2, 3, 1).numpy()
    for i, (picture, prompt, note) in enumerate(zip(pixels, prompts, notes)):
        x, y = i % columns * cell, i // columns * (cell + 28)
        grid.paste(Image.fromarray(picture).resize((cell - 4, cell - 4), Image.Resampling.BICUBIC), (x + 2, y + 2))
        draw.text((x + 4, y + cell - 2), _fit(prompt, font, cell - 8), "black", font)
        draw.text((x + 4, y + cell + 11), note, "gray", font)
    return grid


def save_grid(grid: Image.Image, path: Path) -> None:
    """Writes a grid as PNG. The file also has `info["grid"]`, as a text with the name grid."""
    text = PngInfo()
    text.add_itxt("grid", grid.info["grid"])
    with new_file(path) as partial:  # otherwise a kill or a full disk could leave half a picture
        grid.save(partial, "PNG", pnginfo=text)


def diversity(images: Tensor) -> float | None:
    """How much pictures (B, 3, H, W), uint8, differ from each other: 0 where all are the same; None for a single one.

    The mean over all pairs of sqrt(mean (x_i - x_j)^2), with pictures in [0, 1] averaged down to at most 32 x 32, so that noise and
    fine texture, which no two pictures share, hardly count.
    """
    height, width = (min(32, size) for size in images.shape[-2:])
    small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, (height, width)).flatten(1)
    return (torch.pdist(small) / small.shape[1] ** 0.5).mean().item() if len(small) > 1 else None


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
