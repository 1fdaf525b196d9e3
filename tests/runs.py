"""Runs in processes of their own: as users start them, and as ranks that are started once for many runs."""

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
TIMES = re.compile(r"time_|_per_s|device_hours|peak_memory")
BIN = Path(sys.executable).parent
DEEPSPEED = [str(BIN / "deepspeed"), "--master_port"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
ENVIRONMENT |= {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
LIMIT_S = 1800
"""Only what hangs takes as long, also on a machine many times slower than those at hand, where a start takes ten seconds."""
ALONE_S = 300
"""One rank waits no longer for another that has failed."""
BY_PROMPT = "def by_prompt(images, prompts):\n    return [float(len(prompt)) for prompt in prompts]\n"
"""A reward that no rounding of a picture changes, so that advantages are the same numbers. A JPEG file's size jumps by whole bytes."""


def _free_ports() -> Iterator[int]:
    """Below those that the system gives to anybody who asks; from a place of this process's own, so that two suites do not meet."""
    for port in itertools.count(20_000 + os.getpid() * 101 % 10_000):
        try:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:  # somebody has it
            continue
        yield port


ports = _free_ports()


def deepspeed(num_ranks: int, script: Path | str, argv: list[str], cwd: Path = ROOT, timeout=LIMIT_S) -> subprocess.CompletedProcess:
    command = [*DEEPSPEED, str(next(ports)), "--num_gpus", str(num_ranks), str(script), *argv]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


class Ranks:
    """Two processes under the deepspeed launcher that make one run after the other: nearly all of a short run's time is its start."""

    def __init__(self, folder: Path):
        self.folder, self.numbers, self.log = folder, itertools.count(), folder / "log"
        with self.log.open("w") as log:
            command = [*DEEPSPEED, str(next(ports)), "--num_gpus", "2", str(ROOT / "tests" / "ranks.py"), str(folder)]
            self.launcher = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)

    def run(self, *runs: list[str], changed: str | None = None) -> tuple[list[int], str]:
        """Exit codes of both ranks and what they printed; of several command lines, all in turn until one fails."""
        number = next(self.numbers)
        write_job(self.folder, number, runs, changed)
        codes = [self.folder / f"{number}.{rank}.code" for rank in range(2)]
        deadline = time.monotonic() + LIMIT_S
        while not all(code.exists() for code in codes):
            if failed := [code for code in codes if code.exists() and code.read_text() != "0"]:
                deadline = min(deadline, failed[0].stat().st_mtime - time.time() + time.monotonic() + ALONE_S)
            if self.launcher.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"{self.log.read_text()}\n{printed(self.folder, number)}")
            time.sleep(0.02)
        ended = [int(code.read_text()) for code in codes]
        if len(set(ended)) > 1:  # one of them may still be in the middle of what the other has left
            self.kill()
        return ended, printed(self.folder, number)

    def kill(self) -> None:
        if self.alive:
            for process in [*psutil.Process(self.launcher.pid).children(recursive=True), self.launcher]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.launcher.wait()

    @property
    def alive(self) -> bool:
        return self.launcher.poll() is None

    def end(self) -> None:
        (self.folder / "end").touch()
        self.launcher.wait(LIMIT_S)


def write_job(folder: Path, number: int, runs: list[list[str]], changed: str | None = None) -> None:
    """See ranks.py."""
    (folder / "partial").write_text(json.dumps({"runs": runs, "changed": changed}))
    (folder / "partial").rename(folder / f"{number}.json")


def printed(folder: Path, number: int) -> str:
    """What all ranks have printed of a job."""
    return "\n".join(path.read_text() for path in sorted(folder.glob(f"{number}.*.out")))
