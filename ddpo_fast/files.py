"""Writing files so that a kill at any moment leaves either the old or the new one, whole."""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

logger = logging.getLogger("ddpo_fast")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text under another name, then renames it."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives another name to write a file under, which takes the name `path` once the block has ended well; else it goes."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to fill, which takes the name `path`, and the place of what has it, once the block has ended well; else it goes."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for written in (partial, *partial.rglob("*")):
            flush(written)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file's, or a folder's list of, contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def unless_disk_full(what: str) -> Iterator[None]:
    """Lets a block that only leaves a record of the run behind fail for want of space; `what` it would have written is logged."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_FULL:
            raise
        if isinstance(error, SafetensorError) and not str(error).endswith(tuple(f"(os error {number})" for number in DISK_FULL)):
            raise
        logger.warning("%s could not be written (%s); the run goes on", what, error)
