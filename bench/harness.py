"""Lets contenders take turns. Each is a separate process that runs one iteration when told. All are checked before any is timed."""

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from bench import ROOT

GRADIENT_TOLERANCE = {"fp16": 2e-2, "bf16": 1e-1}
"""The largest difference between a gradient and the textbook loop's in fp32, as a fraction of its norm. Above it nothing is reported.

In fp32 it is what rounding explains, see `textbook.Loop.rounding`.
"""
TOLERANCE = {"pictures": 1 / 255, "advantages": 2e-4}
"""How far ours, in fp32, may be from the textbook loop's with the same noise and rewards: less than a level of a picture's value. To the
standard deviation of rewards, about 1, Flow-GRPO adds 1e-4 and ours 1e-6.
"""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that a launcher sets for a process of a group."""


class GateError(RuntimeError):
    """A contender does not compute what it should, so its times mean nothing."""


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank_variables(num_ranks: int) -> list[dict[str, str]]:
    """RANK_VARIABLES of a group's processes, as a launcher on one machine sets them."""
    port = str(free_port())
    return [dict(zip(RANK_VARIABLES, (str(rank), str(rank), str(num_ranks), "127.0.0.1", port))) for rank in range(num_ranks)]


def trl_python() -> str:
    """The interpreter of TRL's virtual environment: TRL_PY, or .venv-trl of the checkout. Raises FileNotFoundError if there is none."""
    python = os.environ.get("TRL_PY", ".venv-trl/bin/python")
    try:
        subprocess.run([python, "-c", "import trl"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise FileNotFoundError(
            f"TRL_PY={python}: it has no TRL; `make .venv-trl/installed` makes an environment for it, TRL_PY names another Python"
        ) from None
    return python


class Worker:
    """A contender in a separate process. Its methods raise RuntimeError, with the contender's message, when it fails."""

    def __init__(self, name: str, options: list[str], environment: dict[str, str] | None = None):
        """`environment`: variables to set; without a RANK among them the contender is alone."""
        self.name = name
        self.log = tempfile.TemporaryFile("w+")
        command = [trl_python() if name == "trl" else sys.executable, "-m", "bench.contenders", name, *options]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1, start_new_session=True,
            env={k: v for k, v in os.environ.items() if k not in RANK_VARIABLES} | (environment or {}),
        )  # fmt: skip
        self.work: dict = {}
        """The contender's dtype and num_samples, once it has loaded its model."""

    def wait(self) -> None:
        """Waits until the contender has loaded its model."""
        if not self.work:
            self.work = self.answer()

    def answer(self) -> dict:
        """What the contender returns for the last command."""
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"it ended with status {self.process.wait()}: {self._tail()}"}
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def _tail(self) -> str:
        self.log.seek(0)
        return self.log.read()[-2000:].strip()

    def send(self, method: str, **arguments) -> None:
        """Makes the contender begin a method. The caller then has to fetch the `answer`."""
        self.wait()
        with suppress(BrokenPipeError):  # the answer tells why
            self.process.stdin.write(json.dumps({"call": method, **arguments}) + "\n")

    def call(self, method: str, **arguments) -> dict:
        """Calls a method of the contender and waits for what it returns."""
        self.send(method, **arguments)
        return self.answer()

    def iterate(self, count_flop: bool = False) -> dict:
        """One iteration: total_s, seconds by stage, reward_mean, reward_std, peak_memory_mib, transitions; FLOP by stage if counted."""
        return self.call("iterate", count_flop=count_flop)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        if error:  # such as an interrupt in an iteration, whose result is not wanted any more
            self.process.kill()
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # this ends a contender that waits for a command
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


def leave_out(workers: dict[str, Worker], name: str, error: RuntimeError) -> None:
    """Goes on without a contender that failed, and says so."""
    del workers[name]
    tqdm.write(f"left out: {error}", file=sys.stderr)


def compare(workers: dict[str, Worker], oracle: Worker) -> tuple[dict[str, dict[str, float]], float]:
    """What each contender computes of the same trajectories, compared with the textbook loop in fp32, and what fp32 explains.

    gradient: norm of the difference over the norm. pictures and advantages, of ours in fp32: see `Ours.differences`. A contender that fails
    is left out, and removed from `workers`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trajectories.pt")
        rounding = oracle.call("trajectories", file=str(file))["rounding"]
        oracle.call("gradient", file=str(file))
        expected = torch.load(file.with_suffix(".Textbook"))
        errors = {}
        for name, worker in list(workers.items()):
            kind = {"ours": "Ours", "textbook": "Textbook", "trl": "TRL"}[worker.name.partition(":")[0]]
            try:
                worker.call("gradient", file=str(file))
                others = worker.call("differences", file=str(file)) if (kind, worker.work["dtype"]) == ("Ours", "fp32") else {}
            except RuntimeError as error:
                leave_out(workers, name, error)
                continue
            errors[name] = {"gradient": gradient_error(torch.load(file.with_suffix(f".{kind}")), expected), **others}
    return errors, rounding


def gradient_error(gradient: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """|g - g*| / |g*| over the parameters that both train; raises GateError if they train different ones."""
    names = sorted(expected)
    if missing := set(names) ^ gradient.keys():
        raise GateError(f"not the same parameters are trained: {', '.join(sorted(missing)[:3])}, ... ({len(missing)})")
    a, b = (torch.cat([g[name].flatten().double() for name in names]) for g in (gradient, expected))
    return ((a - b).norm() / b.norm()).item()


def gate(workers: dict[str, Worker], oracle: Worker) -> dict[str, float]:
    """The errors of all gradients, see `compare`. Raises GateError if a contender computes something else than the textbook loop.

    In half precision, TRL's gradient may be off by up to a half: it computes log-probs of latents that it rounds afterwards.
    """
    errors, rounding = compare(workers, oracle)
    for label, found in errors.items():
        dtype = workers[label].work["dtype"]
        tolerance = 0.5 if workers[label].name == "trl" and dtype != "fp32" else GRADIENT_TOLERANCE.get(dtype, rounding)
        for what, bound in {"gradient": tolerance, **TOLERANCE}.items():
            if not found.get(what, 0.0) <= bound:
                raise GateError(f"{label}: its {what} is off by {found[what]:.2g}, {bound:.0e} is tolerated, so nothing is timed")
    return {label: found["gradient"] for label, found in errors.items()}


def take_turns(workers: dict[str, Worker], rounds: int, deadline: float = math.inf) -> dict[str, list[dict]]:
    """A B C, C B A, ...: every contender runs `rounds` iterations, one at a time, so that a drift of the machine hits all alike.

    After the first, a round that would not end by the `deadline` (of time.time) is not begun. After an interrupt, it returns the complete
    rounds. A contender that fails is left out, and removed from `workers`.
    """
    results, longest = {name: [] for name in workers}, 0.0
    with tqdm(total=rounds * len(workers), desc="iterations", unit="it", dynamic_ncols=True) as bar:
        try:
            for number in range(rounds):
                begun = time.time()
                if number and begun + longest > deadline:
                    tqdm.write(f"{number} of {rounds} rounds: there is no time for more", file=sys.stderr)
                    break
                for name in list(workers)[:: -1 if number % 2 else 1]:
                    bar.set_postfix_str(name)
                    try:
                        results[name].append(workers[name].iterate())
                    except RuntimeError as error:
                        leave_out(workers, name, error)
                    bar.update()
                longest = max(longest, time.time() - begun)
        except KeyboardInterrupt:
            if not min((len(results[name]) for name in workers), default=0):
                raise
            tqdm.write("interrupted: the whole rounds count", file=sys.stderr)
    whole = min((len(results[name]) for name in workers), default=0)
    return {name: results[name][:whole] for name in workers}


def warm_up(workers: dict[str, Worker], count_flop: bool = False) -> dict[str, dict]:
    """Runs one iteration of each, which is not timed. Workers that fail are left out, and removed from `workers`."""
    results = {}
    for name, worker in list(workers.items()):
        try:
            results[name] = worker.iterate(count_flop=count_flop)
        except RuntimeError as error:
            leave_out(workers, name, error)
    return results


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[4], cuts[1], cuts[7]


def start(stack: ExitStack, contenders: dict[str, tuple[str, list[str]]]) -> dict[str, Worker]:
    """Starts the processes, label -> (name, options), and waits until all have loaded their models. Leaves out those that fail."""
    workers = {label: stack.enter_context(Worker(name, options)) for label, (name, options) in contenders.items()}
    for label, worker in tqdm(list(workers.items()), desc="loading", unit="model", dynamic_ncols=True, leave=False):
        try:
            worker.wait()
        except RuntimeError as error:
            leave_out(workers, label, error)
    return workers


def start_oracle(stack: ExitStack, argv: list[str]) -> Worker:
    """The textbook loop in fp32."""
    workers = start(stack, {"oracle": ("textbook", [*argv, "--model.dtype=fp32"])})
    if not workers:
        raise RuntimeError("nothing is timed without the textbook loop to compare with")
    return workers["oracle"]
