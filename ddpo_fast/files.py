"""Writing files so that a kill at any moment leaves either the old or the new one, whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text under another name, then renames it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    os.replace(partial, path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to fill, which takes the name `path`, and the place of what has it, once the block has ended well."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for written in (partial, *partial.rglob("*")):
        flush(written)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file's, or a folder's list of, contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
