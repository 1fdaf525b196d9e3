"""Standard output and error that no run dies of: of any encoding, closed, without a reader, on a full disk; and a user's mistake there."""

import atexit
import io
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import NoReturn, TextIO


class SteadyStream:
    """A text stream that skips what it cannot write. A run's result is in its files and its exit code."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: somebody has closed it
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def steady_streams() -> None:
    """Makes sys.stdout and sys.stderr steady. A command that has the process to itself calls this first. Once is enough.

    A character that the encoding does not have is written as an escape. A stream that is closed becomes a stream to os.devnull. Otherwise
    the next file that is opened would get the stream's number, and what other programs and libraries write to that number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # not steady yet, and not a notebook's
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, SteadyStream(stream))
            atexit.register(_end, stream)


def _end(stream: TextIO) -> None:
    """Flushes a stream at the end. Otherwise what is left in it could make the interpreter fail last of all, with exit code 120."""
    if stream.closed:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)


def user_error(error: Exception | str) -> NoReturn:
    """Ends the program for a user's mistake: one line on standard error, exit code 2."""
    rank = os.environ.get("RANK", "0")
    text = " ".join(str(error).splitlines())  # some of it is a file's, or another program's
    print(f"error{'' if rank == '0' else f' (rank {rank})'}: {text}", file=sys.stderr, flush=True)
    sys.exit(2)
