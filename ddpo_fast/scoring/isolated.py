"""Runs a reward function in a separate process, so that a crash, an exit or a hang costs one batch.

A new process is started for the next batch. It ends when the trainer ends, whatever the reason.
"""

import faulthandler
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from ddpo_fast.distributed.preemption import handle_here
from ddpo_fast.scoring.function import RewardError, call, load_reward
from ddpo_fast.terminal import steady_streams

START_TIMEOUT_S = 300.0
"""Time for the process to start and to import the function's module, unless reward.timeout_s is longer."""


class IsolatedReward:
    """Calls a reward function in a separate process, on the same device and with as many threads, so that the answer is the same.

    multiprocessing's spawn does not start it: that would import the trainer with DeepSpeed, 5 s more for every start.
    """

    def __init__(self, name: str, kwargs: dict, timeout_s: float, without_metadata: str | None = None):
        """Raises ValueError, naming the option, as `load_reward` does."""
        self.options, self.timeout_s = (name, kwargs, without_metadata), timeout_s
        self._start()

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> Tensor:
        """Rewards (B,) fp64 on the CPU. Raises RewardError if the function fails, the process dies, or the call outlasts `timeout_s`."""
        if self.process.poll() is not None:
            self.close()
            try:
                self._start()
            except ValueError as error:
                raise RewardError(str(error)) from None
        with self._limit(self.timeout_s, f"the reward function took longer than reward.timeout_s={self.timeout_s}"):
            channels_last = images.is_contiguous(memory_format=torch.channels_last)
            self.connection.send((images.shape, channels_last, images.device, prompts, metadata))
            self.connection.send_bytes(images.to("cpu", torch.float32).contiguous().numpy().data.cast("B"))
            answer = self.connection.recv()
        if isinstance(answer, RewardError):
            raise answer
        return torch.tensor(answer, dtype=torch.float64)

    def _start(self) -> None:
        self.connection, theirs = Pipe()
        lifeline, ours = os.pipe()  # only this process has the writing end, which is closed when this process ends
        fds = theirs.fileno(), lifeline
        # not by PYTHONPATH: other programs that the function starts would get it, too
        program = f"import sys; sys.path[:] = {sys.path}; from ddpo_fast.scoring.isolated import serve; serve{fds}"
        # a session of its own: Ctrl-C at the terminal reaches only the trainer, and what the function starts is in the process's group
        command = [sys.executable, "-Pu", "-c", program]
        self.process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True)
        theirs.close()
        os.close(lifeline)
        self.close = weakref.finalize(self, _close, self.process, self.connection, ours)
        """Ends the process. This also happens when this object is gone."""
        limit = max(START_TIMEOUT_S, self.timeout_s)
        try:
            with self._limit(limit, f"its process took longer than {limit:g} s to start"):
                self.connection.send((self.options, torch.get_num_threads()))
                error = self.connection.recv()
        except RewardError as death:
            error = ValueError(f"reward.name={self.options[0]}: {death}")
        if error:
            self.close()
            raise error

    @contextmanager
    def _limit(self, seconds: float, message: str):
        """Kills the process if the block takes longer. Raises RewardError if the process does not outlive the block."""
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), _show(self.process), _kill(self.process)))
        timer.daemon = True
        timer.start()
        try:
            yield
        except (EOFError, OSError):
            _kill(self.process)  # it may have closed the connection and still run
            status = self.process.wait()
            cause = f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
            raise RewardError(message if late.is_set() else f"the reward's process {cause}") from None
        finally:
            timer.cancel()


def _show(process: subprocess.Popen) -> None:
    """Makes the process write to standard error which line each of its threads is at, even if a thread never gives up the GIL."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGQUIT)
        time.sleep(1.0)  # a busy machine may need that long


def _kill(process: subprocess.Popen) -> None:
    """Kills the process and those that it has started."""
    if process.returncode is None:  # until then no other group can have its number
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _close(process: subprocess.Popen, connection: Connection, lifeline: int) -> None:
    _kill(process)
    process.wait()
    connection.close()
    os.close(lifeline)


def serve(connection: int, lifeline: int) -> None:
    """What the process does: loads the function, then answers each batch that arrives with its rewards, or with a RewardError."""
    steady_streams()
    for descriptor in (connection, lifeline):
        os.set_inheritable(descriptor, False)
    faulthandler.enable()  # a crash shows where it was
    faulthandler.register(signal.SIGQUIT)  # see `_show`
    # to have a rank save a checkpoint, DeepSpeed's launcher sends SIGTERM to the rank's children, too; the rank still needs this one
    handle_here(signal.SIGTERM, lambda number, frame: None)
    # when the trainer has ended, SIGIO ends this process and those it has started, even one that never gives up the GIL
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
    with Connection(connection) as connection, suppress(EOFError):
        options, num_threads = connection.recv()
        torch.set_num_threads(num_threads)
        try:
            reward = load_reward(*options)
        except ValueError as error:
            connection.send(ValueError(str(error)))  # the other end cannot read a class that the reward defines
            return
        connection.send(None)
        while True:
            shape, channels_last, device, prompts, metadata = connection.recv()
            pixels = bytearray(4 * shape.numel())
            connection.recv_bytes_into(pixels)
            images = torch.frombuffer(pixels, dtype=torch.float32).view(shape)
            # the order in memory decides how sums are rounded
            images = images.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            try:
                answer = call(reward, images, prompts, metadata).tolist()
            except RewardError as error:
                if error.__cause__:
                    traceback.print_exception(error.__cause__)  # the pipe does not carry it
                answer = error
            connection.send(answer)
