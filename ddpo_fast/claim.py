"""A run's claim to its directory: no other run writes there. The claim also remembers what could not be written there."""

import errno
import fcntl
import logging
import os
import re
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from safetensors import SafetensorError

from ddpo_fast.terminal import user_error

logger = logging.getLogger("ddpo_fast")

LOCK_FILE = ".lock"
_one_run = threading.Lock()
"""Held by the run that is going on in this process."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""Errors of flock on a file system without locks."""

_held: set[int] = set()
"""Descriptors of locks, which a forked child must not keep: it may outlive the run."""


def _drop_in_child() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_drop_in_child)


class Claim:
    """Taken by rank 0, until `release` or the end of the process. The claims of other ranks hold nothing.

    The lock is the kernel's, on the file LOCK_FILE in the directory, so that a killed run leaves no lock. The file says whose it is.
    """

    def __init__(self):
        self.folder: Path | None = None
        self.unwritten: dict[str, str] = {}
        """What could not be written when it was last tried, and why."""
        self.newest: dict[str, int] = {}
        """For each thing that this process has written, the iteration of the newest."""
        self._descriptor: int | None = None
        self._mine = f"process {os.getpid()} on {socket.gethostname()} ({secrets.token_hex(4)})"
        self._made, self._lockable = False, True

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def take(self, folder: Path, new: bool) -> Path:
        """Makes the directory if there is none, locks it and returns its path. With `new`, a number is added to a name that is taken.

        Raises ValueError, naming run.dir, for a directory that cannot be written to or in which a run is going on.
        """
        try:
            for number in count(1):
                self.folder = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
                self._made = not self.folder.exists()
                try:
                    self.folder.mkdir(parents=True, exist_ok=not new)
                    break
                except FileExistsError:
                    if not new:
                        raise
            self._lock()
        except BlockingIOError as error:
            raise ValueError(f"run.dir={self.folder}: {error.strerror}; valid is another one, or this one when that is over") from None
        except OSError as error:
            self.release()
            raise ValueError(f"run.dir={self.folder}: cannot be written to ({_reason(error)}); valid is a folder that can") from None
        return self.folder

    def release(self) -> None:
        """Gives the directory up, and removes it if it was made for the run and is empty."""
        with suppress(OSError):
            if self._descriptor is not None and self._owner() == self._mine:
                (self.folder / LOCK_FILE).unlink()
            if self._made:
                self.folder.rmdir()
        self._close()

    @contextmanager
    def writing(self, what: str, iteration: int, faults: type[Exception] = OSError) -> Iterator[None]:
        """A context in which a part of the run's record is written. A fault is logged and kept in `unwritten`, and the run goes on.

        The disk may be full, gone or read-only by now, or a folder may have been deleted. What has been computed is worth more than any
        of its record, and at the end there may be space again.
        """
        try:
            yield
        except (faults, SafetensorError) as error:
            if isinstance(error, SafetensorError) and "(os error " not in str(error):
                raise
            reason = self.unwritten[what] = _reason(error)
            if self.folder is not None:
                shown = not isinstance(error, OSError | SafetensorError)
                logger.warning("%s of iteration %d could not be written (%s); the run goes on", what, iteration, reason, exc_info=shown)
        else:
            self.unwritten.pop(what, None)
            self.newest[what] = iteration

    def hold(self) -> None:
        """Called before anything is written: takes the directory again if it was deleted. Raises OSError if it is another run's by now."""
        if self.folder is None or not self._lockable:
            return
        with suppress(FileNotFoundError):
            owner = self._owner()
            if owner not in (self._mine, ""):
                raise OSError(errno.EBUSY, f"{self.folder} is another run's by now, that of {owner}")
            if owner:
                return
        self._close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()

    def _lock(self) -> None:
        """Raises BlockingIOError where a run is going on, OSError where nothing can be written."""
        path = self.folder / LOCK_FILE
        while True:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            _held.add(self._descriptor)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, self._mine.encode(), 0)
                if self._owner() == self._mine:
                    return
            except FileNotFoundError:  # a run that has just ended has removed its file
                pass
            except BlockingIOError:
                self._close()
                with suppress(FileNotFoundError):
                    raise BlockingIOError(errno.EAGAIN, f"a run is going on there, that of {self._owner()}") from None
            except OSError as error:
                self._close()
                if error.errno not in NO_LOCKS:
                    raise
                self._lockable = False
                logger.warning("%s: its file system has no locks (%s): nothing keeps a second run out of it", self.folder, error)
                return
            self._close()

    def _owner(self) -> str:
        return (self.folder / LOCK_FILE).read_text()

    def _close(self) -> None:
        if self._descriptor is not None:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def only_run() -> Iterator[Claim]:
    """A claim for a run. If another thread of this process has a run going on, the program ends with an error."""
    if not _one_run.acquire(blocking=False):
        user_error("a run is going on in this process, in another thread; valid is one after the other, or a process for each")
    try:
        with Claim() as claim:
            yield claim
    except SystemExit as end:
        if isinstance(end.code, str) and threading.current_thread() is not threading.main_thread():
            print(end.code, file=sys.stderr, flush=True)  # Python says nothing of a thread that ends so
        raise
    finally:
        _one_run.release()


def _reason(error: Exception) -> str:
    """What a fault is, in a few words."""
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors'
        return os.strerror(int(found[1]))
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())
