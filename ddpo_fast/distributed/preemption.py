"""How a run ends early: SIGTERM and SIGINT stop it at its next safe point, and ranks end with their launcher."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

logger = logging.getLogger("ddpo_fast")
SAME_REQUEST_S = 2.0
"""A signal this soon after the first is the same request: the launcher forwards a signal that its ranks may already have."""


def die_with_launcher() -> None:
    """Has the kernel kill this process when DeepSpeed's per-machine launcher, if that is its parent, dies. Linux only."""
    if sys.platform == "linux" and _started_by_deepspeed():
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def _started_by_deepspeed() -> bool:
    return "LOCAL_SIZE" in os.environ and "deepspeed.launcher.launch" in psutil.Process().parent().cmdline()


_IN_CHILDREN: dict[int, Callable | int | None] = {}
"""For each signal that only this process handles, its handler in a forked child."""
_forking = threading.local()


def handle_here(number: int, handler: Callable) -> Callable[[], None]:
    """Handles a signal in this process, but not in forked children. There SIGTERM does what it did before, and Ctrl-C does nothing.

    So SIGTERM still ends the workers of a process pool. Ctrl-C at a terminal reaches them, too, but this process may still need their
    work. Returns a function that undoes this.
    """
    before = signal.signal(number, handler)
    # not SIG_IGN, which a program that the child becomes would inherit
    _IN_CHILDREN[number] = (lambda number, frame: None) if number == signal.SIGINT else before

    def undo() -> None:
        signal.signal(number, before)
        del _IN_CHILDREN[number]

    return undo


def _before_fork() -> None:
    _forking.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _IN_CHILDREN)  # or Python loses what a child gets in its first moment


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.blocked)


def _in_child() -> None:
    for number, handler in _IN_CHILDREN.items():
        signal.signal(number, handler)
    _IN_CHILDREN.clear()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


class StopRequest:
    """Inside, SIGTERM and SIGINT only set `requested`. A signal more than SAME_REQUEST_S later ends the process with 128 + its number.

    Outside the main thread, where Python handles no signals, it sets nothing up.
    The command `deepspeed` does not pass a signal on. On the machine where it was started, its end is therefore a request, too.
    """

    def __init__(self):
        self._received_at = None
        self._runner = None
        if _started_by_deepspeed():
            runner = psutil.Process().parent().parent()
            if runner is not None and any(Path(word).name in ("deepspeed", "ds") for word in runner.cmdline()[:2]):
                self._runner = runner.pid

    def __enter__(self) -> "StopRequest":
        self._undo = []
        if threading.current_thread() is threading.main_thread():
            self._undo = [handle_here(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)]
        else:
            logger.warning("not in the main thread: SIGTERM and SIGINT save no checkpoint; --resume continues from the newest all the same")
        return self

    def __exit__(self, *_) -> None:
        for undo in self._undo:
            undo()

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received_at is not None or (self._runner is not None and psutil.Process().parent().ppid() != self._runner)

    def _receive(self, number: int, frame) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self._received_at is None:
            self._received_at = now
            # os.write, because the signal may have interrupted a print
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{name}: saving a checkpoint after this iteration, then stopping; once more to stop at once\n".encode())
        elif now - self._received_at > SAME_REQUEST_S:
            for child in multiprocessing.active_children():  # a reward's processes, which wait for work for ever
                child.kill()
            os._exit(128 + number)
