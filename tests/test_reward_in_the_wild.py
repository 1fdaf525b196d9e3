"""Rewards as people write them: they start processes, await, keep what belongs to a thread, and change what is the whole process's."""

import inspect
import logging
import os
import sys
import textwrap
import threading
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch

from ddpo_fast.distributed.preemption import StopRequest
from ddpo_fast.scoring.scorer import RewardError, open_reward
from ddpo_fast.scoring.threaded import ThreadedReward

IMAGES, PROMPTS = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), ["a", "b", "c"]
EXPECTED = IMAGES[:, 0].mean((1, 2)).double().tolist()


@pytest.fixture
def written(tmp_path):
    """Writes a reward's file; `score` in it ends with the mean of red. Returns the name of the reward."""

    def write(head: str = "", call: str = "", name: str = "my_reward.py", define: str = "def") -> str:
        body = textwrap.indent(textwrap.dedent(call), "    ")
        end = "    return images[:, 0].mean((1, 2))\n"
        (tmp_path / name).write_text(f"{textwrap.dedent(head)}\n{define} score(images, prompts):\n{body}\n{end}")
        return f"{tmp_path / name}:score"

    return write


def called(name: str, isolate: bool = False, times: int = 2, timeout_s: float = 600.0) -> list[float]:
    reward = open_reward(name, {}, timeout_s, isolate)
    for _ in range(times):
        found = reward(IMAGES.clone(), PROMPTS).tolist()
    if isolate:
        reward.close()
    return found


# --- processes ---

POOLS = """
import multiprocessing, os, signal, subprocess, sys
from concurrent.futures import ProcessPoolExecutor

def red(image):
    return float(image[0].mean())

def pool(images, method):
    with multiprocessing.get_context(method).Pool(1) as pool:  # which ends its workers by SIGTERM
        return pool.map(red, list(images.numpy()))

def executor(images, method):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        return list(pool.map(red, list(images.numpy())))

def loader(images, method):
    from torch.utils.data import DataLoader
    batches = DataLoader(list(images), batch_size=3, num_workers=1, multiprocessing_context=method)
    return next(iter(batches))[:, 0].mean((1, 2))

def fork(images, method):
    if not (pid := os.fork()):
        signal.pause()
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0)[1] == signal.SIGTERM
    return [red(image) for image in images]

def program(images, method):
    assert subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True, timeout=50).stdout == b"1\\n"
    return [red(image) for image in images]

def threads(images, method):
    "A worker may compute with torch, although this thread has done so with several threads, which no worker has."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.rand(1 << 20).exp().sum()
    try:
        with multiprocessing.get_context(method).Pool(1) as pool:
            pool.map(large, [1])
    finally:
        torch.set_num_threads(before)
    return [red(image) for image in images]

def large(_):
    import torch
    return float(torch.rand(1 << 20).exp().sum())

def score(images, prompts, kind, method):
    return globals()[kind](images, method)
"""


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # of Python 3.12
@pytest.mark.parametrize(
    "kind, method",
    [
        *(("pool", method) for method in ("fork", "spawn", "forkserver")),
        ("executor", "fork"),
        ("loader", "fork"),
        ("fork", ""),
        ("program", ""),
        ("threads", "fork"),
    ],
)
def test_a_reward_may_start_processes(tmp_path, kind, method, capfd):
    (tmp_path / "pools_of_processes.py").write_text(POOLS)
    with StopRequest() as stop:
        reward = open_reward(f"{tmp_path}/pools_of_processes.py:score", {"kind": kind, "method": method}, 600.0, isolate=False)
        assert reward(IMAGES, PROMPTS).tolist() == pytest.approx(EXPECTED)
    assert not stop.requested and "saving a checkpoint" not in capfd.readouterr().err
    sys.modules.pop("pools_of_processes")  # the next test's has another folder
    sys.path.remove(str(tmp_path))


def test_the_file_of_a_reward_has_the_name_that_a_worker_imports_it_by(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for folder, name in (("one", "only_here"), ("one", "in_both"), ("two", "in_both"), ("two", "json"), ("one", "a.dot"), ("one", "a-b")):
        (tmp_path / folder / f"{name}.py").write_text(f"def score(images, prompts):\n    return [{len(folder + name)}] * len(prompts)\n")
    one, two = tmp_path / "one", tmp_path / "two"
    modules = [
        inspect.getmodule(open_reward(f"{file}.py:score", {}, 10.0, False).reward).__name__
        for file in (one / "only_here", one / "in_both", two / "in_both", two / "json", one / "a.dot", one / "a-b")
    ]
    assert modules[:2] == ["only_here", "in_both"] and modules[5] == "a-b" and len(set(modules)) == 6
    for name, expected in (("in_both", "two"), ("json", "two"), ("a.dot", "one")):  # another's name: its own module, all the same
        found = open_reward(f"{tmp_path / expected / name}.py:score", {}, 10.0, False)(IMAGES, PROMPTS)
        assert found[0] == len(expected + name)
    import json

    assert json.loads("1") == 1


def test_a_file_is_executed_once_a_reward(tmp_path):
    """Else what one part of a sum is pickled as is another object, and its workers would not find it; a new run begins anew."""
    file = tmp_path / "executed.py"
    file.write_text("calls = 0\ndef one(images, prompts):\n    global calls\n    calls += 1\n    return [calls] * 3\ntwo = one\n")
    for _ in range(2):
        reward = open_reward("weighted_sum", {"rewards": {f"{file}:one": 1, f"{file}:two": 1}}, 10.0, False)
        assert reward(IMAGES, PROMPTS).tolist() == [3] * 3


# --- what belongs to a thread ---


def test_what_belongs_to_a_thread_lasts_from_import_to_the_last_call(written):
    head = """
        import asyncio, sqlite3, threading
        loop, database, of_thread, queue = asyncio.get_event_loop(), sqlite3.connect(":memory:"), threading.local(), asyncio.Queue()
        of_thread.calls = 0
        async def nothing(): await asyncio.sleep(0)
    """
    call = """
        of_thread.calls += 1
        database.execute("select 1")
        assert asyncio.get_event_loop() is loop
        loop.run_until_complete(nothing())
        asyncio.run(nothing())  # which leaves its thread without an event loop
    """
    assert called(written(head, call, name="of_thread.py")) == pytest.approx(EXPECTED)


def test_an_async_reward_is_awaited_in_one_loop(written):
    head = "import asyncio\nlock, loops = asyncio.Lock(), set()"
    call = """
        loops.add(asyncio.get_running_loop())
        assert len(loops) == 1
        async with lock:
            await asyncio.gather(*(asyncio.sleep(0.001) for _ in prompts))
    """
    assert called(written(head, call, name="waits.py", define="async def")) == pytest.approx(EXPECTED)


def test_an_async_call_of_a_class_and_a_part_of_a_sum_is_awaited(tmp_path):
    (tmp_path / "scorer.py").write_text(
        "class Scorer:\n    async def __call__(self, images, prompts):\n        return [1.0] * len(prompts)\n"
    )
    name = f"{tmp_path / 'scorer.py'}:Scorer"
    assert open_reward(name, {}, 10.0, False)(IMAGES, PROMPTS).tolist() == [1] * 3
    assert open_reward("weighted_sum", {"rewards": {name: 2}}, 10.0, False)(IMAGES, PROMPTS).tolist() == [2] * 3


def test_an_async_reward_that_raises_or_hangs_says_where(written):
    name = written("import asyncio", "await asyncio.sleep(0)\nraise KeyError('wolf')", name="async_raises.py", define="async def")
    with pytest.raises(RewardError, match=r"KeyError: 'wolf' \(.*async_raises.py, line 4, in score\)"):
        called(name)
    name = written("import asyncio", "await asyncio.sleep(5)", name="async_hangs.py", define="async def")
    with pytest.raises(RewardError, match="took longer than reward.timeout_s=0.2"):
        called(name, timeout_s=0.2)


def test_a_signal_points_to_reward_isolate(written):
    for name in (
        written("", "import signal; signal.signal(signal.SIGALRM, print)", name="alarm_in_call.py"),
        written("import signal; signal.signal(signal.SIGALRM, print)", name="alarm_at_import.py"),
    ):
        with pytest.raises(
            (RewardError, ValueError), match=r"signal only works .*_\w+.py, line \d, in .*reward.isolate=true calls it in a main"
        ):
            called(name)


def test_a_thread_that_hangs_is_replaced_and_ends_with_its_reward():
    calls, release = [], threading.Event()

    def reward(images, prompts):
        calls.append(threading.current_thread())
        if len(calls) == 1:
            release.wait(60)
        return [1.0] * 3

    threaded = ThreadedReward(lambda: reward, 0.2)
    with pytest.raises(RewardError, match=r"took longer than reward.timeout_s=0.2 \(.*test_reward_in_the_wild.py, line \d+, in reward\)"):
        threaded(IMAGES, PROMPTS)
    threaded.timeout_s = 60.0
    assert threaded(IMAGES, PROMPTS).tolist() == threaded(IMAGES, PROMPTS).tolist() == [1] * 3
    assert calls[1] is calls[2] is not calls[0]
    release.set()
    del threaded
    for thread in calls:
        thread.join(60)
        assert not thread.is_alive()


def test_no_call_keeps_its_images():
    images = torch.zeros(3, 3, 8, 8)
    gone, threaded = weakref.ref(images), ThreadedReward(lambda: lambda images, prompts: [1.0] * 3, 10.0)
    threaded(images, PROMPTS)
    del images
    deadline = time.monotonic() + 30
    while gone() is not None:  # the thread may be about to let it go
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- what is the whole process's ---


@pytest.mark.parametrize("when", ["import", "call"])
def test_a_working_directory_is_the_rewards_own(written, tmp_path, when):
    """It finds its own again, as a file that it opens by a relative path needs; nothing else does."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "weights").write_text("1")
    change = f"import os; os.chdir({str(tmp_path / 'data')!r})"
    before = os.getcwd()
    name = written(
        change if when == "import" else "", (change if when == "call" else "") + "\nopen('weights').close()", name=f"cd_{when}.py"
    )
    assert called(name) == pytest.approx(EXPECTED) and os.getcwd() == before


def test_a_working_directory_that_is_gone_harms_nothing(written):
    call = "import os, tempfile\nwith tempfile.TemporaryDirectory() as folder:\n    os.chdir(folder)"
    before = os.getcwd()
    assert called(written("", call, name="cd_gone.py")) == pytest.approx(EXPECTED) and os.getcwd() == before


@pytest.mark.parametrize(
    "change, read",
    [
        ("torch.set_default_dtype(torch.float64)", torch.get_default_dtype),
        ("torch.use_deterministic_algorithms(True)", torch.are_deterministic_algorithms_enabled),
        ("torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark", lambda: torch.backends.cudnn.benchmark),
        ("logging.disable(logging.CRITICAL)", lambda: logging.getLogger("ddpo_fast.scoring").isEnabledFor(logging.WARNING)),
        ("warnings.simplefilter('error', BytesWarning)", lambda: [rule for rule in warnings.filters if rule[0] == "error"]),
    ],
)
@pytest.mark.parametrize("when", ["import", "call"])
def test_what_is_the_trainers_too_is_put_back_and_said_once(written, caplog, change, read, when):
    before, imports = read(), "import logging, torch, warnings\n"
    name = written(
        imports + (change if when == "import" else ""), change if when == "call" else "", name=f"changes_{abs(hash(change))}_{when}.py"
    )
    assert called(name) == pytest.approx(EXPECTED) and read() == before
    assert caplog.text.count("which is put back; reward.isolate=true keeps it") == 1


@pytest.mark.parametrize(
    "change, read",
    [
        ("torch.set_grad_enabled(False)", torch.is_grad_enabled),
        ("logging.getLogger().setLevel(logging.CRITICAL)", lambda: logging.getLogger("ddpo_fast.scoring").isEnabledFor(logging.WARNING)),
        ("logging.basicConfig(level=logging.ERROR)", lambda: logging.getLogger("ddpo_fast.scoring").isEnabledFor(logging.WARNING)),
        ("sys.stdout = io.StringIO()", lambda: sys.stdout),
        ("torch.set_num_threads(torch.get_num_threads() + 1)", torch.get_num_threads),  # a thread's own
        ("torch.manual_seed(0)", lambda: None),  # the trainer's noise is none of it
        ("warnings.filterwarnings('ignore')", lambda: logging.root.manager.disable),  # that one it may
    ],
)
def test_what_harms_nothing_is_not_spoken_of(written, caplog, change, read, monkeypatch):
    monkeypatch.setattr(warnings, "filters", list(warnings.filters))
    before, level = read(), logging.root.level
    name = written(f"import io, logging, sys, torch, warnings\n{change}", change, name=f"changes_{abs(hash(change))}.py")
    assert called(name) == pytest.approx(EXPECTED) and read() == before and not caplog.records
    logging.root.setLevel(level)


def test_standard_output_that_a_reward_closes_is_opened_again(written, capfd):
    stdout = sys.stdout
    try:
        sys.stdout = open(1, "w", closefd=False)
        called(written("import sys", "print('theirs')\nsys.stdout.close()", name="closes.py"), times=1)
        print("ours")
        sys.stdout.flush()
    finally:
        sys.stdout = stdout
    assert capfd.readouterr().out.split() == ["theirs", "ours"]


# --- what is said ---


def test_an_error_says_where_in_the_users_code_it_was_raised(written, tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("import json\ndef parse(text):\n    return json.loads(text)\n")
    name = written("from helper_of_mine import parse", "parse('no')", name="raises.py")
    with pytest.raises(RewardError, match=r"raised JSONDecodeError: .* \(.*helper_of_mine.py, line 3, in parse\)$"):
        called(name)
    with pytest.raises(
        ValueError, match=r"raises_at_import.py failed: ZeroDivisionError: .* \(.*raises_at_import.py, line 1, in <module>\)$"
    ):
        called(written("1 / 0", name="raises_at_import.py"))


@pytest.mark.parametrize(
    "call, shown", [("import ctypes; ctypes.string_at(0)", "Segmentation fault"), ("import time; time.sleep(100)", "")]
)
def test_a_crash_or_a_hang_in_a_process_of_its_own_shows_its_line(written, capfd, call, shown):
    name = written("", call, name=f"line_{bool(shown)}.py")
    with pytest.raises(RewardError, match="was ended by SIGSEGV" if shown else "took longer"):
        called(name, isolate=True, timeout_s=600.0 if shown else 1.0)
    error = capfd.readouterr().err
    assert shown in error and f'File "{Path(name.rpartition(":")[0])}", line 3 in score' in error


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_process_of_its_own_is_a_reward_s_own(written):
    """The main thread of it, its event loop and what is the process's; its other programs do not import the trainer's packages.

    DeepSpeed's launcher sends SIGTERM to all of a rank's processes, and wants a checkpoint with this reward's numbers.
    """
    head = f"""
        import asyncio, multiprocessing, os, signal, sqlite3, time, torch
        loop, lock, database = asyncio.get_event_loop(), asyncio.Lock(), sqlite3.connect(":memory:")
        signal.signal(signal.SIGALRM, print)
        torch.set_default_dtype(torch.float64)
        os.chdir("/")
        assert os.environ.get("PYTHONPATH") == {os.environ.get("PYTHONPATH")!r}
    """
    call = """
        assert asyncio.get_running_loop() is loop and os.getcwd() == "/" and torch.get_default_dtype() == torch.float64
        async with lock:
            await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
        worker.start(); worker.terminate(); worker.join(30)
        assert worker.exitcode == -signal.SIGTERM
    """
    assert called(written(head, call, name="own_process.py", define="async def"), isolate=True) == pytest.approx(EXPECTED)


def test_a_loop_that_a_reward_closes_is_made_anew(written):
    head = "import asyncio\nasync def nothing(): pass\n"
    name = written(head, "loop = asyncio.get_event_loop(); loop.run_until_complete(nothing()); loop.close()")
    assert called(name) == pytest.approx(EXPECTED)


def test_of_two_changes_one_of_which_is_to_the_log_both_are_said(written, caplog):
    called(written("import logging, torch\n", "logging.disable(logging.CRITICAL); torch.set_default_dtype(torch.float64)"))
    assert caplog.text.count("which is put back; reward.isolate=true keeps it") == 2


def test_a_class_that_raises_an_error_of_its_own_is_one_line_from_its_process(tmp_path):
    file = tmp_path / "raises.py"
    file.write_text(
        "class Mine(ValueError):\n    def __init__(self, a, b): super().__init__(f'{a} {b}')\n\n"
        "class Reward:\n    def __init__(self): raise Mine('not', 'here')\n    def __call__(self, images, prompts): pass\n"
    )
    for isolate in (False, True):
        with pytest.raises(
            ValueError, match=rf"^reward.name=.*: Reward\(\*\*kwargs\) raised Mine: not here \({file}, line 5, in __init__\)$"
        ):
            open_reward(f"{file}:Reward", {}, 600.0, isolate)
