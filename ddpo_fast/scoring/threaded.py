"""Runs a reward in a thread of this process, and keeps it from disturbing the process."""

import logging
import os
import queue
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor

from ddpo_fast.scoring.function import RewardError, call, close_event_loop, place

logger = logging.getLogger(__name__)


class ThreadedReward:
    """A reward that one thread loads and calls, so that what belongs to a thread, such as an event loop, works in every call.

    The thread is not the main one, which the caller needs. It is a daemon, so that it does not keep the program from ending. A call that
    takes too long cannot be ended. Its thread is left behind, and a new one takes over.
    """

    def __init__(self, load: Callable[[], Callable], timeout_s: float):
        """`load` returns the reward; what it raises is raised."""
        self.timeout_s, self.thread = timeout_s, Thread("reward")
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.surroundings = Surroundings()
        with self.surroundings.kept():
            self.reward = self.thread.submit(_loaded, load, device).result()

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> Tensor:
        """Makes a `call` in the thread. Raises RewardError if it fails, or takes longer than `timeout_s`."""
        with self.surroundings.kept():
            rewards = self.thread.submit(call, self.reward, images, prompts, metadata)
            if wait([rewards], self.timeout_s).not_done:
                where = self.thread.place()
                self.thread = Thread("reward")
                raise RewardError(f"the reward function took longer than reward.timeout_s={self.timeout_s}{where}")
        try:
            return rewards.result()
        finally:
            del rewards  # otherwise a reference cycle through its exception's traceback keeps the images


def _loaded(load: Callable[[], Callable], device: int | None) -> Callable:
    if device is not None:
        torch.cuda.set_device(device)  # each thread has its own current device
    return load()


class Thread:
    """A daemon thread that makes the calls it is given, one after the other, until nothing refers to this object."""

    def __init__(self, name: str):
        self.calls = queue.SimpleQueue()
        self.thread = threading.Thread(target=_make_calls, args=(self.calls,), daemon=True, name=name)
        self.thread.start()
        weakref.finalize(
            self, self.calls.put, None
        ).atexit = False  # a daemon that wakes while the interpreter ends may hold a lock for ever

    def submit(self, function: Callable, *args) -> Future:
        future = Future()
        self.calls.put((future, function, args))
        return future

    def place(self) -> str:
        """The line of the user's own code that the thread is at."""
        frame = sys._current_frames().get(self.thread.ident)
        return place(traceback.extract_stack(frame)) if frame else ""


def _make_calls(calls: queue.SimpleQueue) -> None:
    while task := calls.get():
        _make(*task)
        del task  # it would keep the images
    close_event_loop()


def _make(future: Future, function: Callable, args: tuple) -> None:
    try:
        future.set_result(function(*args))
    except BaseException as error:
        future.set_exception(error)
        del future  # see `ThreadedReward.__call__`


def in_background(name: str, function: Callable, *args) -> Future:
    """Calls a function in a daemon thread: unlike an executor's, it does not keep a program from ending."""
    return Thread(name).submit(function, *args)


class Surroundings:
    """The state of the process, which a reward shares with the trainer."""

    def __init__(self):
        self.directory: str | None = None
        """The reward's working directory, once it has changed it."""
        self.said: set[str] = set()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Undoes what the block changes. A reward gets its own working directory back in its next call. Other changes are logged once."""
        directory, streams, settings = _directory(), (sys.stdout, sys.stderr), _settings()
        with suppress(OSError):  # a temporary directory may be gone
            if self.directory is not None:
                os.chdir(self.directory)
        try:
            yield
        finally:
            if (left := _directory()) != directory and directory is not None:
                self.directory = left
                os.chdir(directory)
            sys.stdout, sys.stderr = (_opened(stream, number) for number, stream in enumerate(streams, 1))
            self._put_back(settings)

    def _put_back(self, settings: dict) -> None:
        for name, (put, value) in _settings().items():
            before = settings[name][1]
            if value != before:
                put(before)
                if name not in self.said:
                    self.said.add(name)
                    logger.warning(
                        "the reward changed %s from %s to %s, which is put back; reward.isolate=true keeps it", name, before, value
                    )


def _settings() -> dict[str, tuple[Callable, object]]:
    """Settings of the process that the trainer depends on, each with the function that sets it and its value."""
    errors = [rule for rule in warnings.filters if rule[0] == "error"]
    return {
        "the level of logging.disable": (logging.disable, logging.root.manager.disable),  # first, so that the others can be logged
        "torch's default dtype": (torch.set_default_dtype, torch.get_default_dtype()),
        "torch.use_deterministic_algorithms": (torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()),
        "torch.backends.cudnn.benchmark": (partial(setattr, torch.backends.cudnn, "benchmark"), torch.backends.cudnn.benchmark),
        "which warnings are errors": (_set_errors, errors),
    }


def _set_errors(rules: list[tuple]) -> None:
    warnings.filters[:] = [rule for rule in warnings.filters if rule[0] != "error" or rule in rules]


def _directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _opened(stream, number: int):
    """A standard stream, opened again if it has been closed."""
    return open(number, "w", buffering=1, closefd=False) if getattr(stream, "closed", False) else stream
