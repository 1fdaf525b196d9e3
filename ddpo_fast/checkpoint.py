"""Checkpoints: everything that an exact resume needs, written so that a kill at any moment leaves the last good one."""

import json
import os
import shutil
from pathlib import Path

from ddpo_fast.engine import Engine, barrier

STATE_FILE = "state.json"


def save(run_dir: Path, iteration: int, engine: Engine, state: dict, rank: int, keep: int) -> None:
    """Writes <run_dir>/checkpoints/<iteration>/: under another name first, renamed when all ranks have written, older ones removed."""
    folder = run_dir / "checkpoints"
    partial, final = folder / f".partial-{iteration}", folder / str(iteration)
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    engine.save(partial)
    if rank == 0:
        (partial / STATE_FILE).write_text(json.dumps(state))
    barrier()
    if rank == 0:
        for path in partial.rglob("*"):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(folder)
        for old in list_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    barrier()


def load(run_dir: Path, engine: Engine) -> dict:
    """Restores the newest checkpoint into the engine and returns the `state` it was saved with."""
    newest = list_checkpoints(run_dir)[-1]
    engine.load(newest)
    return json.loads((newest / STATE_FILE).read_text())


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path for path in (run_dir / "checkpoints").glob("[0-9]*") if path.name.isdigit()), key=lambda path: int(path.name))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
