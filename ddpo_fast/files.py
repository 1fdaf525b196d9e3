"""Writing files so that a kill at any moment leaves either the old or the new one, whole."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text under another name, then renames it."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives another name to write a file under. The file is renamed to `path` if the block ends well; otherwise it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
    """Gives a folder to fill. It replaces what is at `path` if the block ends well; otherwise it is removed."""
    partial, old = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for written in (partial, *partial.rglob("*")):
            flush(written)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)  # not removed yet: a disk that fails at the next line would leave neither
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file's contents, or a folder's list of files, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no fsync, or none for folders
            raise
    finally:
        os.close(descriptor)
