"""Rewards in a process of their own: real processes that crash, exit, hang and are orphaned."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from ddpo_fast.scoring.scorer import RewardError, open_reward

ROOT = Path(__file__).resolve().parents[1]
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))

REWARD_FILE = """
import ctypes, os, re, signal, subprocess, sys, time
import torch

def reward(images, prompts, scale=1.0):
    "Does what the first prompt says, then scores."
    match prompts[0]:
        case "exit": os._exit(3)
        case "sys.exit": sys.exit(3)
        case "crash": ctypes.string_at(0)
        case "raise": raise KeyError("wolf")
        case "shape": return torch.zeros(2)
        case "hang": time.sleep(1000)
        case "close": os.closerange(3, 100)
        case "helper":
            with open(prompts[1], "w") as file:
                file.write(str(subprocess.Popen(["sleep", "1000"]).pid))
            time.sleep(1000)
        case "never give up the GIL": subprocess.Popen(["sleep", "1000"]); re.match("(a+)+$", 60 * "a" + "b")
        case "handle a signal":
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        case "print": print("from the reward"); os.write(1, b"and below\\n")
    scores = scale * images.log1p().mean((1, 2, 3)) + 1e-17
    images.zero_()
    return scores

def not_called(images, prompts): pass

def counts(images, prompts, metadata):
    return [entry.pop("count", 0) for entry in metadata]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("isolated") / "my_reward.py"
    path.write_text(REWARD_FILE)
    return str(path)


@pytest.fixture(scope="module")
def reward(file):
    reward = open_reward(f"{file}:reward", {"scale": 3.0}, timeout_s=3.0, isolate=True)
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def expected(file) -> list[float]:
    return open_reward(f"{file}:reward", {"scale": 3.0}, 1.0, isolate=False)(IMAGES.clone(), ["a", "b", "c"]).tolist()


def assert_soon(condition, within_s: float = 120.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("prompt", ["a", "handle a signal"])
def test_the_numbers_are_those_of_a_call_here_and_the_images_stay(reward, expected, prompt):
    images = IMAGES.clone()
    assert reward(images, [prompt, "b", "c"]).tolist() == expected  # every bit
    assert torch.equal(images, IMAGES)


def test_the_layout_in_memory_is_kept(file, reward):
    here = open_reward(f"{file}:reward", {"scale": 3.0}, 1.0, isolate=False)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    assert reward(images, ["a", "b", "c"]).tolist() == here(images, ["a", "b", "c"]).tolist()  # every bit


@pytest.mark.parametrize("isolate", [True, False])
def test_what_a_reward_prints_is_not_its_answer(file, capfd, isolate):
    reward = open_reward(f"{file}:reward", {"scale": 3.0}, 1.0, isolate)
    assert reward(IMAGES.clone(), ["print", "b", "c"]).shape == (3,)
    assert set(capfd.readouterr().out.splitlines()) == {"from the reward", "and below"}


def test_metadata_crosses_and_is_missed_in_good_time(file):
    reward, metadata = open_reward(f"{file}:counts", {}, 10.0, isolate=True), [{"count": 2}, {}, {"count": 5}]
    for _ in range(2):
        assert reward(IMAGES, ["a", "b", "c"], metadata=metadata).tolist() == [2, 0, 5]
    reward.close()
    with pytest.raises(ValueError, match=r"reward.name=.*: counts needs metadata, and the prompts of eval.heldout have none"):
        open_reward(f"{file}:counts", {}, 10.0, isolate=True, without_metadata="eval.heldout")


def test_what_the_function_raised_is_shown_with_its_line(file, capfd):
    with pytest.raises(RewardError, match="KeyError"):
        open_reward(f"{file}:reward", {}, 120.0, isolate=True)(IMAGES, ["raise", "b", "c"])
    assert f'File "{file}"' in capfd.readouterr().err


@pytest.mark.parametrize(
    "prompt, message, survives",
    [
        ("raise", "the reward function raised KeyError: 'wolf'", True),
        ("sys.exit", "the reward function raised SystemExit: 3", True),
        ("shape", r"the reward function returned a Tensor of shape \(2,\); valid is one number for each picture, 3 here", True),
        ("exit", "the reward's process ended with status 3", False),
        ("crash", "the reward's process was ended by SIGSEGV", False),
        ("close", "the reward's process ", False),
        ("hang", "the reward function took longer than reward.timeout_s=3.0", False),
        ("never give up the GIL", "the reward function took longer than reward.timeout_s=3.0", False),
    ],
)
def test_a_call_that_fails_costs_that_call_only(reward, expected, prompt, message, survives):
    reward(IMAGES, ["a", "b", "c"])
    process = reward.process
    with pytest.raises(RewardError, match=message):
        reward(IMAGES, [prompt, "b", "c"])
    assert (process.poll() is None) == survives
    assert reward(IMAGES, ["a", "b", "c"]).tolist() == expected
    assert (reward.process is process) == survives


def test_a_process_that_dies_between_calls_is_started_again(reward, expected):
    reward(IMAGES, ["a", "b", "c"])
    reward.process.kill()
    assert_soon(lambda: gone(reward.process.pid))
    assert reward(IMAGES, ["a", "b", "c"]).tolist() == expected


def test_what_a_hanging_function_has_started_is_ended_too(reward, tmp_path):
    reward(IMAGES, ["a", "b", "c"])
    with pytest.raises(RewardError, match="took longer"):
        reward(IMAGES, ["helper", str(tmp_path / "pid"), "c"])
    helper = int((tmp_path / "pid").read_text())
    assert_soon(lambda: gone(helper))


@pytest.mark.parametrize("last_call", ["", "hang", "never give up the GIL"])
def test_the_process_ends_with_a_trainer_that_is_killed(file, last_call):
    program = f"""
import torch
from ddpo_fast.scoring.scorer import open_reward
reward = open_reward("{file}:reward", {{}}, 100.0, isolate=True)
print(reward.process.pid, flush=True)
reward(torch.zeros(1, 3, 8, 8), [{last_call!r}])
input()
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with trainer:
        pid = int(trainer.stdout.readline())
        processes = [psutil.Process(pid)]
        if "GIL" in last_call:
            assert_soon(processes[0].children)
            processes += processes[0].children()
        time.sleep(0.2)  # into the call
        assert not any(gone(process.pid) for process in processes)
        trainer.send_signal(signal.SIGKILL)
    assert_soon(lambda: all(gone(process.pid) for process in processes))


@pytest.mark.parametrize("name", ["{file}:no_such_function", "no_such_reward", "no_such_module:f"])
def test_what_does_not_load_is_refused_as_without_isolation(file, name):
    errors = []
    for isolate in (False, True):
        with pytest.raises(ValueError) as error:
            open_reward(name.format(file=file), {}, 1.0, isolate)
        errors.append(str(error.value))
    assert errors[0] == errors[1] and errors[0].startswith("reward.name=")


def test_kwargs_that_the_function_does_not_take_are_refused(file):
    with pytest.raises(ValueError, match=re.escape("reward.kwargs={'a': 1}: not_called(images, prompts, **kwargs) does not take them")):
        open_reward(f"{file}:not_called", {"a": 1}, 1.0, isolate=True)


def test_a_module_that_ends_its_process_is_refused(tmp_path):
    (tmp_path / "ending.py").write_text("import os\nos._exit(7)\n")
    with pytest.raises(ValueError, match=r"reward\.name=.*ending.py:f: the reward's process ended with status 7"):
        open_reward(f"{tmp_path}/ending.py:f", {}, 1.0, isolate=True)


def test_a_file_that_breaks_during_the_run_costs_calls_not_the_run(tmp_path):
    path = tmp_path / "breaking.py"
    path.write_text("import os\ndef f(images, prompts):\n    os._exit(1)\n")
    reward = open_reward(f"{path}:f", {}, 120.0, isolate=True)
    with pytest.raises(RewardError, match="ended with status 1"):
        reward(IMAGES, ["a", "b", "c"])
    path.write_text("def f(:")
    with pytest.raises(RewardError, match="SyntaxError"):
        reward(IMAGES, ["a", "b", "c"])
