"""Checkpoints: everything that an exact resume needs, written so that a kill at any moment leaves the last good one."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

from ddpo_fast.engine import Engine, barrier
from ddpo_fast.files import new_folder

STATE_FILE = "state.json"


def save(run_dir: Path, iteration: int, engine: Engine, state: dict, rank: int, keep: int) -> None:
    """Writes <run_dir>/checkpoints/<iteration>/, every rank its part, and removes all but the newest `keep`."""
    final = run_dir / "checkpoints" / str(iteration)
    with new_folder(final) if rank == 0 else nullcontext(final.with_name(f".{final.name}.partial")) as folder:
        barrier()  # the folder is there
        engine.save(folder)
        if rank == 0:
            (folder / STATE_FILE).write_text(json.dumps(state))
        barrier()  # all ranks have written
    if rank == 0:
        for old in list_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)


def load(run_dir: Path, engine: Engine) -> dict:
    """Restores the newest checkpoint into the engine and returns the `state` it was saved with."""
    engine.load(list_checkpoints(run_dir)[-1])
    return read_state(run_dir)


def read_state(run_dir: Path) -> dict:
    """The `state` that the newest checkpoint was saved with."""
    return json.loads((list_checkpoints(run_dir)[-1] / STATE_FILE).read_text())


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path for path in (run_dir / "checkpoints").glob("[0-9]*") if path.name.isdigit()), key=lambda path: int(path.name))
