"""Checkpoints: everything that an exact resume needs; a kill or a failing disk at any moment leaves the last good one.

<run_dir>/checkpoints/<iteration>/ holds the engine's safetensors, state.json and, written last, manifest.json: size and SHA-256 of every
other file. Nothing in it can run code when it is loaded. The manifest finds damage; it is no signature.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open

from ddpo_fast.distributed.engine import Engine, WrongCheckpoint, any_rank, broadcast
from ddpo_fast.files import new_folder

logger = logging.getLogger("ddpo_fast")

STATE_FILE, MANIFEST_FILE = "state.json", "manifest.json"


class Stateful(Protocol):
    """What a run has to remember beside its weights."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


def save(run_dir: Path, iteration: int, engine: Engine, state: dict, rank: int, keep: int) -> None:
    """Writes <run_dir>/checkpoints/<iteration>/, every rank its part, and removes all but the newest `keep`.

    state: what goes into state.json, by name: the state of each stateful part, the number of ranks, fingerprints.
    Raises OSError, on every rank, where one cannot write: nothing of the new checkpoint stays then, and no old one goes.
    """
    final = run_dir / "checkpoints" / str(iteration)
    folder = final.with_name(f".{final.name}.partial")

    def complete():
        (folder / STATE_FILE).write_text(json.dumps({"iteration": iteration} | state))
        (folder / MANIFEST_FILE).write_text(json.dumps({path.name: _fingerprint(path) for path in sorted(folder.iterdir())}, indent=1))
        written.close()

    with ExitStack() as written:
        on_every_rank(lambda: rank == 0 and written.enter_context(new_folder(final)))
        on_every_rank(lambda: engine.save(folder))
        on_every_rank(lambda: rank == 0 and complete())
    if rank == 0:
        with suppress(OSError):  # the new one is whole
            for old in list_checkpoints(run_dir)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)


def on_every_rank(step: Callable) -> None:
    """Runs a step; if it raised OSError on one rank, so does this on all of them."""
    fault = None
    try:
        step()
    except (OSError, SafetensorError) as error:
        fault = error if isinstance(error, OSError) else OSError(str(error))
    if any_rank(fault is not None):
        raise fault or OSError("another rank could not write its part")


def find(run_dir: Path, rank: int) -> Path:
    """The newest undamaged checkpoint, the same on every rank; damaged newer ones are named and set aside as <iteration>.damaged.

    Raises ValueError, saying what is wrong with each, if none is undamaged.
    """
    good, faults = broadcast(_find(run_dir) if rank == 0 else None)
    if good is None:
        raise ValueError(f"run.dir={run_dir}: no checkpoint can be used: {'; '.join(faults)}")
    return good


def _find(run_dir: Path) -> tuple[Path | None, list[str]]:
    faults = {}
    for folder in reversed(list_checkpoints(run_dir)):
        fault = find_fault(folder)
        if fault is None:
            for damaged, text in faults.items():
                logger.warning("checkpoint %s is damaged (%s): it is set aside, checkpoint %s is used", damaged, text, folder.name)
                aside = damaged.with_name(f"{damaged.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                damaged.rename(aside)
            return folder, []
        faults[folder] = fault
    return None, [f"{folder.name}: {text}" for folder, text in faults.items()]


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in some words; None if it is as it was written."""
    name = MANIFEST_FILE
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        present = {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
        if different := sorted(present ^ set(manifest)):
            return f"{different[0]} is {'not in the manifest' if different[0] in present else 'missing'}"
        for name in sorted(present):  # what is there, not what the manifest calls it: it may say ../../x
            path = folder / name
            if path.is_symlink() or not path.is_file():
                return f"{name} is not a file"
            if (size := path.stat().st_size) != manifest[name]["size"]:
                return f"{name} has {size} bytes, not {manifest[name]['size']}"
            if _fingerprint(path) != manifest[name]:
                return f"{name} does not have the SHA-256 of the manifest"
            if name.endswith(".safetensors"):
                safe_open(path, "pt")
        name = STATE_FILE
        state = read_state(folder)
        if state["iteration"] != int(folder.name):
            return f"{name} is not that of iteration {folder.name}"
        if "baseline" in state:
            return f"{name} is that of an older version, which this one cannot continue"
        float(state["world_size"])
        if not all(isinstance(part, dict) for key, part in state.items() if key not in ("iteration", "world_size")):
            return f"{name} has a part of another kind"
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{name} cannot be read: {type(error).__name__}: {error}"
    return None


def load(folder: Path, engine: Engine, parts: dict[str, Stateful]) -> None:
    """Restores a checkpoint into the engine and the parts that its state names.

    Raises WrongCheckpoint when it is whole and still not one of this run.
    """
    try:
        engine.load(folder)
        state = read_state(folder)
        for name, part in parts.items():
            try:
                part.load_state_dict(state[name])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise WrongCheckpoint(f"{STATE_FILE} has another {name}: {type(error).__name__}: {error}") from None
    except WrongCheckpoint as error:
        raise WrongCheckpoint(f"run.dir={folder.parents[1]}: checkpoint {folder.name} is not this run's: {error}") from None


def read_state(folder: Path) -> dict:
    """The `state` that a checkpoint was saved with. Raises ValueError for a number in it that is not finite."""
    return json.loads((folder / STATE_FILE).read_text(), parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not finite")
    return number


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path for path in (run_dir / "checkpoints").glob("[0-9]*") if path.name.isdigit()), key=lambda path: int(path.name))


def _fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
