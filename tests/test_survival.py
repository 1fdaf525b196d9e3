"""Runs of real processes that are killed or asked to stop: what is left can be resumed exactly, and nothing hangs."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from runs import DEEPSPEED, ENVIRONMENT, LIMIT_S, ROOT, TIMES, deepspeed, ports
from safetensors.torch import load_file

from ddpo_fast.distributed.preemption import StopRequest
from ddpo_fast.records.checkpoint import find_fault, list_checkpoints
from ddpo_fast.records.metrics import read_metrics

END_S = 300
"""After a death everything has to be over within this: a minute, and that on a machine five times slower."""
REWARD = """
import multiprocessing, os, pathlib, time
def slow_redness(images, prompts):
    if "SCORING_S" in os.environ:
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), daemon=True)
        worker.start()
        (pathlib.Path(__file__).parent / "worker").write_text(str(worker.pid))
    (pathlib.Path(__file__).parent / "scoring").touch()
    time.sleep(float(os.environ.get("SCORING_S", 0.2)))
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
"""


@pytest.fixture
def options(tiny_model, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)

    def make(name: str, *extra: str) -> list[str]:
        return [
            f"--model.path={tiny_model}", f"--run.dir={tmp_path / name}", "--sample.num_samples=4", "--sample.num_steps=3",
            f"--reward.name={tmp_path / 'reward.py'}:slow_redness", "--eval.num_samples=2", "--eval.every=100",
            "--train.num_minibatches=2", "--train.inner_epochs=2", "--lora.rank=2", "--prompts.limit=4", "--prompts.samples_per_prompt=1",
            "--baseline.min_count=2", "--run.iterations=8", *extra,
        ]  # fmt: skip

    return make


class Run:
    """A run on two ranks under the launcher: `deepspeed` starts launch.py, which starts the ranks."""

    def __init__(self, argv: list[str]):
        self.folder = next(Path(a.split("=")[1]) for a in argv if a.startswith("--run.dir="))
        self.log = self.folder.with_suffix(".log")
        with self.log.open("w") as log:
            command = [*DEEPSPEED, str(next(ports)), "--num_gpus", "2", "ddpo_fast/train.py", *argv]
            self.runner = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
        self.launcher, self.ranks = self.runner, []

    def __enter__(self) -> "Run":
        before = self.newest_row()
        try:
            self.wait_for(lambda: self.newest_row() > before)
        except AssertionError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        """What a failed test has left."""
        for process in (self.runner, self.launcher, *self.ranks):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.runner.wait()

    def newest_row(self) -> int:
        return max((row["iteration"] for row in read_metrics(self.folder)), default=-1)

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.runner.poll() is None and time.monotonic() < deadline, self.log.read_text()
            if len(self.ranks) < 2:
                with suppress(psutil.NoSuchProcess, IndexError):  # not started yet, or a helper that is over already
                    self.launcher = psutil.Process(self.runner.pid).children()[0]
                    self.ranks = self.launcher.children()
            time.sleep(0.005)

    def end(self) -> int:
        """Waits until no process of the run is left; the exit code of the `deepspeed` command."""
        start = time.monotonic()
        code = self.runner.wait(END_S)
        _, alive = psutil.wait_procs([self.launcher, *self.ranks], timeout=END_S - (time.monotonic() - start))
        assert not alive, f"{alive} outlived the run by {END_S} s: {self.log.read_text()}"
        return code

    def kill(self, whom: str) -> None:
        """kill -9 of one rank, of the launcher (both of its processes), or of everything."""
        victims = {"rank": self.ranks[1:], "launcher": [psutil.Process(self.runner.pid), self.launcher]}
        victims["all"] = victims["launcher"] + self.ranks
        for process in victims[whom]:
            process.kill()
        code = self.end()
        assert code != 0, self.log.read_text()
        if whom == "rank":
            assert re.search(r"error \(rank 0\): another rank is gone|return code = -9", self.log.read_text()), self.log.read_text()
        newest = list_checkpoints(self.folder)[-1]
        assert find_fault(newest) is None and self.newest_row() - int(newest.name) <= 1  # one iteration at most is repeated


def rows(folder: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if not TIMES.search(key)} for row in read_metrics(folder)]


def same_run(folder: Path, expected: Path) -> None:
    assert rows(folder) == rows(expected)
    whole, parts = (load_file(f / "lora" / "pytorch_lora_weights.safetensors") for f in (expected, folder))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


@pytest.mark.slow  # a minute and a half
def test_kills_at_random_moments_then_resume_is_the_uninterrupted_run(options, tmp_path):
    done = deepspeed(2, "ddpo_fast/train.py", options("whole"))
    assert done.returncode == 0, done.stdout + done.stderr
    moments, argv = random.Random(0), options("killed")
    for whom in ("rank", "launcher", "all"):
        with Run(argv) as run:
            time.sleep(moments.uniform(0, 0.5))
            run.kill(whom)
        argv = [f"--run.dir={tmp_path / 'killed'}", "--resume"]
    done = deepspeed(2, "ddpo_fast/train.py", argv)
    assert done.returncode == 0, done.stdout + done.stderr
    same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("name", ["sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen_image", "z_image", "sdxl"))])
def test_a_kill_in_an_iteration_then_resume_for_other_models(options, flow_options, sdxl, ranks, tmp_path, name):
    """Also with texts of several lengths: a mask (Qwen-Image), or lists (Z-Image)."""

    def argv(where: str) -> list[str]:
        extra = ("--run.iterations=5", '--prompts.list=["a", "a very big dog"]')
        if name == "sdxl":
            return options(where, f"--model.path={sdxl}", *extra)
        reward = f"--reward.name={tmp_path / 'reward.py'}:slow_redness"
        return [*flow_options(name, where, eval__every=100, train__num_minibatches=2, train__inner_epochs=2), reward, *extra]

    with Run(argv("killed")) as run:
        run.wait_for(lambda: run.newest_row() >= 1)
        (tmp_path / "scoring").unlink()
        run.wait_for((tmp_path / "scoring").exists)
        run.kill("rank")
        assert 1 <= run.newest_row() < 5 and "Traceback" not in run.log.read_text(), run.log.read_text()
    whole, resumed = (ranks.run(one) for one in (argv("whole"), [f"--run.dir={tmp_path / 'killed'}", "--resume"]))
    assert whole[0] == resumed[0] == [0, 0], whole[1] + resumed[1]
    said = [[line for line in text.splitlines() if line.startswith("reward on the fixed evaluation set")] for _, text in (whole, resumed)]
    assert said[0] == said[1] and len(said[0]) == 1 and "resumed after iteration" in resumed[1], resumed[1]
    same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_twenty_kills(options, tmp_path):
    """Five each in rollout, reward, update and save, of a rank, the launcher or everything."""
    extra = ("--run.iterations=45", "--zero.stage=2", "--sample.num_steps=8")
    done = deepspeed(2, "ddpo_fast/train.py", options("whole", *extra))
    assert done.returncode == 0, done.stdout + done.stderr
    moments, argv, scoring = random.Random(1), options("killed", *extra), tmp_path / "scoring"
    for number in range(20):
        stage, whom = ("rollout", "reward", "update", "save")[number % 4], moments.choice(("rank", "launcher", "all"))
        with Run(argv) as run:
            if stage == "save":
                run.wait_for(lambda: list((run.folder / "checkpoints").glob(".*.partial")))  # noqa: B023
            else:
                row = run.newest_row()
                run.wait_for(lambda: run.newest_row() > row)  # noqa: B023
                if stage != "rollout":
                    scoring.unlink(missing_ok=True)
                    run.wait_for(scoring.exists)
                    time.sleep(0.2 * (stage == "update"))
                time.sleep(moments.uniform(0, 0.1))
            print(f"kill {number + 1}: {whom} in {stage} after row {run.newest_row()}", flush=True)
            run.kill(whom)
        argv = [f"--run.dir={tmp_path / 'killed'}", "--resume"]
    done = deepspeed(2, "ddpo_fast/train.py", argv)
    assert done.returncode == 0, done.stdout + done.stderr
    same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    "whom, code",
    [
        pytest.param("rank", 0, marks=pytest.mark.slow),
        ("runner", -signal.SIGTERM),  # `deepspeed` itself passes nothing on; the ranks see that it is gone
        pytest.param("launcher", 1, marks=pytest.mark.slow),  # launch.py passes it on and exits with 1 whatever its ranks do
        pytest.param("terminal", None, marks=pytest.mark.slow),  # Ctrl-C: SIGINT to all of them at once
    ],
)
def test_sigterm_saves_and_stops(options, tmp_path, whom, code):
    with Run(options("stopped", "--run.checkpoint_every=100", "--run.iterations=500")) as run:
        if whom == "terminal":
            for process in (psutil.Process(run.runner.pid), run.launcher, *run.ranks):
                process.send_signal(signal.SIGINT)
        else:
            {"rank": run.ranks[1], "runner": psutil.Process(run.runner.pid), "launcher": run.launcher}[whom].terminate()
        ended = run.end()
    log, last = run.log.read_text(), run.newest_row()
    assert code is None or ended == code, log
    assert f"stopped after iteration {last}; --run.dir=" in log and "Traceback" not in log.split("stopped after")[1], log
    assert list_checkpoints(run.folder)[-1].name == str(last) and find_fault(list_checkpoints(run.folder)[-1]) is None
    if whom == "rank":
        assert log.count("SIGTERM: saving a checkpoint after this iteration, then stopping") == 1
        more = ("--run.checkpoint_every=100", f"--run.iterations={last + 1}")
        done = deepspeed(2, "ddpo_fast/train.py", [f"--run.dir={run.folder}", "--resume", more[1]])
        assert done.returncode == 0, done.stdout + done.stderr
        assert deepspeed(2, "ddpo_fast/train.py", options("whole", *more)).returncode == 0
        same_run(run.folder, tmp_path / "whole")


def test_a_second_signal_ends_the_run_at_once(options, tmp_path):
    """Long before the reward, whose call the first one came in, is done."""
    trainer, log = [sys.executable, "ddpo_fast/train.py", *options("stopped", "--run.iterations=500")], tmp_path / "log"
    with log.open("w") as file:
        alone = subprocess.Popen(trainer, cwd=ROOT, env=ENVIRONMENT | {"SCORING_S": str(LIMIT_S)}, stderr=file)

    def wait_for(condition) -> None:
        while not condition():
            assert alone.poll() is None, log.read_text()
            time.sleep(0.05)

    wait_for((tmp_path / "scoring").exists)
    for process in (alone, *psutil.Process(alone.pid).children()):  # as Ctrl-C at a terminal does
        process.send_signal(signal.SIGINT)
    wait_for(lambda: "SIGINT: saving a checkpoint" in log.read_text())
    time.sleep(2.5)
    assert alone.poll() is None
    alone.send_signal(signal.SIGTERM)
    assert alone.wait(END_S) == 128 + signal.SIGTERM and "Traceback" not in log.read_text()
    assert log.read_text().count("SIGINT: saving a checkpoint") == 1  # not by the reward's worker, too
    worker = int((tmp_path / "worker").read_text())
    deadline = time.monotonic() + END_S
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:  # it takes a moment to die
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_is_ended_by_sigterm_and_not_by_ctrl_c(capfd):
    """Else a pool of worker processes, which SIGTERM ends, would never end, and one at work would lose it to Ctrl-C."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
        child.start()
        os.kill(child.pid, signal.SIGINT)
        child.join(0.3)
        assert child.is_alive()
        child.terminate()
        child.join(600)
        assert child.exitcode == -signal.SIGTERM
        if not (pid := os.fork()):
            os.execvp(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)"])
        os.kill(pid, signal.SIGINT)  # before or after the child has become another program
        os.kill(pid, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) in (signal.SIGINT, signal.SIGTERM)
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert capfd.readouterr().err.count("saving a checkpoint") == 1


def test_a_loss_that_is_nan_on_one_rank_is_skipped_on_all(options, ranks, tmp_path):
    for stage in (0, 1, 2):
        codes, text = ranks.run(options(f"run-{stage}", "--run.iterations=1", f"--zero.stage={stage}"), changed="nan_once")
        assert codes == [0, 0], text
        row = read_metrics(tmp_path / f"run-{stage}")[1]
        assert row["skipped_updates"] == 1 and row["grad_norm"] > 0, stage
        weights = load_file(tmp_path / f"run-{stage}" / "lora" / "pytorch_lora_weights.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values()), stage


def test_exit_codes(options, tmp_path):
    (tmp_path / "broken.py").write_text("def f(images, prompts):\n    raise KeyError\n")
    for extra, code in ((f"--reward.name={tmp_path}/broken.py:f", 1), ("--sample.eta=0", 2)):  # 0: whatever test_launch.py starts
        command = [sys.executable, "ddpo_fast/train.py", *options(f"run{code}", extra)]
        assert subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=LIMIT_S).returncode == code
