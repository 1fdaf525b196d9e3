"""`make gpu`: its time is kept, it goes on where it was stopped, and it says what is missing. And the wheels that it is carried with."""

import ast
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import psutil
import pytest
import torch
from test_bench_contenders import argv, tiny_work  # noqa: F401

from bench import gpu, harness, kernels, models, peers, rows, waterfall, wheels

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class StandIn(gpu.Part):
    """Rows of the table `kernels` by name; one that is `broken` stops it."""

    names: tuple[str, ...] = ("a", "b", "c")
    broken: tuple[str, ...] = ()
    error: type[BaseException] = RuntimeError
    tried: list = None

    def wanted(self):
        return list(self.names)

    def name(self, row):
        return row["op"]

    def run(self, missing, writers, deadline):
        for name in missing:
            self.tried.append(name)
            if name in self.broken:
                raise self.error(f"{name} is broken")
            writers("kernels").add(op=name, p50_us=1.0)


def stand_in(least_s=10, most_s=100, **kwargs):
    return StandIn("kernels", least_s, most_s, tried=[], **kwargs)


class InProcess:
    """A part's process that is this one. Told to wait, it runs the part; what is too slow for `patience` runs when it is told to stop."""

    patience = float("inf")
    waited: list = []
    argv: list = []

    def __init__(self, command, **_):
        self.argv, self.returncode = command[command.index("bench.gpu") + 1 :], None

    def wait(self, seconds=None):
        if self.returncode is None:
            self.waited.append(seconds)
            if seconds > self.patience:
                raise subprocess.TimeoutExpired("gpu", seconds)
            self.returncode = gpu.main(self.argv)
        return self.returncode

    def send_signal(self, _):
        self.returncode = gpu.main(self.argv)


@pytest.fixture
def machine(monkeypatch, tmp_path, capsys):
    """Runs `make gpu` with stand-ins for its parts; returns its exit status and last line. Attributes `out`, `process`."""
    monkeypatch.setattr(rows, "commit", lambda: "abc1234")
    monkeypatch.setattr(rows, "device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    process = type("Process", (InProcess,), {"waited": []})
    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(Popen=process, TimeoutExpired=subprocess.TimeoutExpired))

    def run(parts, *options, seconds=480):
        monkeypatch.setattr(gpu, "BEGUN", time.time())
        monkeypatch.setattr(gpu, "REHEARSED", parts)
        for part in parts.values():
            part.tried.clear()
        status = gpu.main([*(options or parts), "--rehearse", f"--out={run.out}", f"--seconds={seconds}"])
        run.text = capsys.readouterr().out
        return status, run.text.splitlines()[-1]

    run.out, run.process = tmp_path / "out", process
    return run


def measured(machine) -> list[str]:
    return [row["op"] for row in rows.read("kernels", machine.out)]


COMPLETE = (0, "make gpu: complete")


def incomplete(*names):
    return 1, f"make gpu: incomplete: {', '.join(names)}; called again, it goes on with what is missing"


def test_parts_run_in_their_order_and_a_second_call_measures_nothing(machine):
    parts = {"one": stand_in(names=("a", "b")), "two": stand_in(names=("c",))}
    assert machine(parts) == COMPLETE and measured(machine) == ["a", "b", "c"]
    assert machine(parts) == COMPLETE and not parts["one"].tried and measured(machine) == ["a", "b", "c"]


def test_what_failed_is_said_and_alone_is_tried_again(machine):
    parts = {"one": stand_in(broken=("b",)), "two": stand_in(names=("d",))}
    assert machine(parts) == incomplete("one")
    assert measured(machine) == ["a", "d"] and "one       RuntimeError: b is broken; 2 missing: b, c" in machine.text
    [row] = [row for row in rows.read("gpu", machine.out) if row["part"] == "one"]
    assert (row["step"], row["passed"], row["failed"], row["said"]) == ("all", "1", "2", "RuntimeError: b is broken; 2 missing: b, c")
    assert row["device"] == "NVIDIA H200" and row["command"] == "python -m bench.gpu --rehearse one"
    parts = {"one": stand_in()}
    assert machine(parts) == COMPLETE and parts["one"].tried == ["b", "c"]


@pytest.mark.parametrize("what, other", [("commit", "def5678"), ("device_name", "NVIDIA A100")])
def test_rows_of_another_commit_or_device_do_not_count(machine, monkeypatch, what, other):
    parts = {"one": stand_in()}
    assert machine(parts) == COMPLETE
    monkeypatch.setattr(rows, what, lambda: other)
    assert machine(parts) == COMPLETE and parts["one"].tried == ["a", "b", "c"]


def test_rows_that_are_in_the_results_count(machine):
    rows.Writer("kernels", rows.RESULTS, ["x"]).add(op="b", p50_us=1.0)
    parts = {"one": stand_in()}
    assert machine(parts) == COMPLETE and parts["one"].tried == ["a", "c"]


def test_a_part_that_does_not_fit_is_not_begun_but_one_behind_it_that_does_is(machine):
    parts = {"long": stand_in(least_s=100), "short": stand_in(least_s=20, names=("d",))}
    assert machine(parts, seconds=80) == incomplete("long")
    assert not parts["long"].tried and measured(machine) == ["d"]
    assert "long      not begun: 65 s are left, it needs 100" in machine.text


def test_the_time_is_shared_and_a_part_has_no_more_than_its_own(machine):
    assert machine({"one": stand_in(most_s=50), "two": stand_in(most_s=1000, names=("d",))}, seconds=300) == COMPLETE
    first, second = machine.process.waited
    assert first == 50 and 280 < second <= 300 - gpu.STOPPING_S


def test_a_part_whose_time_is_up_keeps_its_rows_and_the_next_one_runs(machine):
    machine.process.patience = 60
    parts = {"slow": stand_in(most_s=70, broken=("c",), error=KeyboardInterrupt), "next": stand_in(most_s=50, names=("d",))}
    assert machine(parts) == incomplete("slow")
    assert measured(machine) == ["a", "b", "d"] and "slow      it was stopped; 1 missing: c" in machine.text


def test_interrupted_it_stops_the_part_and_says_what_is_there(machine, monkeypatch):
    def wait(process, seconds=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine.process, "wait", wait)
    monkeypatch.setattr(gpu, "stop", lambda process: process.send_signal(2))
    assert machine({"one": stand_in(), "two": stand_in(names=("d",))}) == incomplete("one", "two")
    assert measured(machine) == ["a", "b", "c"] and "two       interrupted" in machine.text


def test_a_part_that_dies_left_no_word(machine, monkeypatch):
    monkeypatch.setattr(machine.process, "wait", lambda self, seconds: setattr(self, "returncode", -9))
    assert machine({"one": stand_in()}) == incomplete("one") and "one       it ended with status -9 and left no word" in machine.text


def test_an_unknown_part_is_named(capsys):
    assert gpu.main(["kernels", "kernel"]) == 2
    assert capsys.readouterr().err == f"make gpu: PART=kernel: valid is {', '.join(gpu.PARTS)}\n"


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([f"--out={tmp_path}"]) == 1 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == f"make gpu: there is no GPU to measure: torch {torch.__version__} finds no CUDA device here\n"


def test_a_stopped_part_takes_its_contenders_with_it(monkeypatch):
    monkeypatch.setattr(gpu, "STOPPING_S", 0.2)
    start = "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    start += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
    start += "print(child.pid, flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True)
    contender = psutil.Process(int(process.stdout.readline()))
    gpu.stop(process)
    process.stdout.close()
    assert process.returncode == -9
    psutil.wait_procs([contender], timeout=600)
    assert not contender.is_running() or contender.status() == psutil.STATUS_ZOMBIE


# the parts' own code


def run_part(part: gpu.Part, out: Path, seconds: float = 600) -> int:
    return gpu.run_part("part", part, out, time.time() + seconds, ["make", "gpu"])


@pytest.fixture
def work(tiny_work, monkeypatch, tmp_path):  # noqa: F811
    """A tiny one in this process, as `tiny` of models.WORKS; no rows in bench/results."""
    monkeypatch.setitem(models.WORKS, "tiny", tiny_work)
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    return "tiny"


def test_stages_have_the_planned_memory_beside_the_measured(work, tmp_path):
    part = gpu.Stages("throughput", 1, 1, work, 1)
    assert part.missing(tmp_path) == [work] and run_part(part, tmp_path) == 0
    [total] = [row for row in rows.read("throughput", tmp_path) if row["stage"] == "total"]
    assert float(total["peak_memory_mib"]) > float(total["planned_mib"]) > 0
    assert total["command"] == "make gpu" and run_part(part, tmp_path) == 0
    assert len(rows.read("throughput", tmp_path)) == 8


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Has a module's function, of which the first argument is the work and the second what is measured, write rows instead; its calls."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")

    def record(module, function: str, **row):
        def write(work, chosen, rounds, writer, deadline):
            for one in chosen:
                each = {key: value(one) if callable(value) else value for key, value in row.items()}
                writer.add(model=work.model, work=str(work), **each)
            return chosen

        mock = create_autospec(getattr(module, function), side_effect=write)
        monkeypatch.setattr(module, function, mock)
        monkeypatch.setattr(module, "table", len)
        return mock.call_args_list

    return record


def test_peers_without_a_row_are_timed_beside_ours(recorded, tmp_path, monkeypatch):
    calls = recorded(peers, "compare", peer=str, stage="total", median_s=1.0)
    assert run_part(gpu.Peers("peers", 1, 1, "sd15_wide", ("textbook",), 3), tmp_path) == 0
    part = gpu.Peers("peers", 1, 1, "sd15_wide", ("textbook", "trl"), 3)
    monkeypatch.setenv("TRL_PY", "no/such/python")
    assert run_part(part, tmp_path) == 1 and part.missing(tmp_path) == ["trl"]
    assert "TRL_PY=no/such/python: it has no TRL" in rows.read("gpu", tmp_path)[-1]["said"]
    monkeypatch.setattr(harness, "trl_python", lambda: sys.executable)
    assert run_part(part, tmp_path) == 0 and [call.args[:3] for call in calls] == [
        (models.WORKS["sd15_wide"], ["textbook"], 3), (models.WORKS["sd15_wide"], ["trl"], 3),
    ]  # fmt: skip
    assert run_part(gpu.Peers("peers", 1, 1, "sd15", ("textbook",), 3), tmp_path) == 0 and len(calls) == 3  # another work


def test_nothing_is_timed_if_no_peer_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "start", lambda *_: {"ours": None})
    with pytest.raises(RuntimeError, match="none of trl could be started"):
        peers.compare(models.WORKS["embedded"], ["trl"], 1, rows.Writer("peers", tmp_path, []))


def test_the_waterfall_goes_on_with_the_techniques_that_have_no_row(recorded, tmp_path, monkeypatch):
    calls = recorded(waterfall, "measure", technique=lambda technique: technique.name, images_per_s=1.0)
    first = waterfall.Technique("first"), waterfall.Technique("or second", alternative=True)
    for techniques in (first, (*first, waterfall.Technique("third"), waterfall.Technique("or fourth", alternative=True))):
        monkeypatch.setattr(waterfall, "techniques", lambda *_, techniques=techniques: list(techniques))
        assert run_part(gpu.Waterfall("waterfall", 1, 1, "embedded", 1), tmp_path) == 0
    names = [[technique.name for technique in call.args[1]] for call in calls]
    assert names == [["first", "or second"], ["first", "third", "or fourth"]]


@pytest.fixture
def operations(monkeypatch, tmp_path):
    """Benchmarks of two operations, plain PyTorch only."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # beside other tests pytest-benchmark measures nothing
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(kernels, "cases", lambda: [kernels.Case("geglu", (rows, 32), torch.float32) for rows in (16, 32)])
    monkeypatch.setattr(kernels, "providers", lambda: {"eager": "", "fused": "needs a GPU"})
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda: 1e10)
    return gpu.Operations("kernels", 1, 1)


def test_operations_stop_in_time_and_go_on(operations, tmp_path):
    wanted = [f"geglu {direction} eager {shape} float32 " for shape in ("16x32", "32x32") for direction in ("forward", "backward")]
    assert operations.missing(tmp_path) == wanted
    assert run_part(operations, tmp_path, seconds=-1) == 1 and operations.missing(tmp_path) == wanted[1:]
    assert "pytest ended with INTERRUPTED; 3 missing: geglu backward" in rows.read("gpu", tmp_path)[-1]["said"]
    assert run_part(operations, tmp_path) == 0 and len(rows.read("kernels", tmp_path)) == 4


def test_test_functions_have_a_row_each_and_failed_ones_are_run_again(monkeypatch, tmp_path):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: {0})
    monkeypatch.chdir(tmp_path)
    text = "import pytest\n\n@pytest.mark.parametrize('x', [0, 1, 2])\ndef test_some(x):\n    assert x != 1, 'it is one'\n\n"
    text += "def test_other():\n    pytest.skip('not here')\n\ndef test_died(request):\n    request.getfixturevalue('nothing')\n"
    (tmp_path / "test_x.py").write_text(text)
    part, out = gpu.Tests("gpu", 1, 1, ("test_x.py",)), tmp_path / "out"
    assert run_part(part, out) == 1
    found = {row["step"]: [row[name] for name in ("passed", "failed", "skipped", "said")] for row in rows.read("gpu", out)}
    assert found.pop("test_x.py::test_some")[:3] == ["2", "1", "0"] and found.pop("test_x.py::test_other") == ["0", "0", "1", ""]
    assert found.pop("test_x.py::test_died")[:3] == ["0", "1", "0"]
    assert found.pop("all")[3] == "RuntimeError: pytest ended with TESTS_FAILED; 2 missing: test_x.py::test_some, test_x.py::test_died"
    (tmp_path / "test_x.py").write_text(text.replace("x != 1", "x != 7").replace("request.getfixturevalue('nothing')", "pass"))
    assert run_part(part, out) == 0
    again = [row["step"].removeprefix("test_x.py::") for row in rows.read("gpu", out)[4:]]
    assert again == ["test_some", "test_died", "all"]


def test_a_case_whose_worker_died_has_failed(tmp_path):
    plugin = gpu.TestRows(rows.Writer("gpu", tmp_path, ["make", "gpu"]))
    plugin.pytest_xdist_node_collection_finished(None, ["t.py::test_a[1]", "t.py::test_a[2]"])
    died = SimpleNamespace(nodeid="t.py::test_a[1]", when="???", outcome="failed", failed=True, passed=False, skipped=False, duration=0.0)
    died.longrepr = "worker 'gw0' crashed while running 't.py::test_a[1]'"
    plugin.pytest_runtest_logreport(died)
    plugin.pytest_xdist_node_collection_finished(None, ["t.py::test_a[1]", "t.py::test_a[2]"])  # of the worker in its place
    assert not rows.read("gpu", tmp_path)
    for when in ("setup", "call", "teardown"):
        report = SimpleNamespace(
            nodeid="t.py::test_a[2]", when=when, outcome="passed", failed=False, passed=True, skipped=False, duration=0.5
        )
        plugin.pytest_runtest_logreport(report)
    [row] = rows.read("gpu", tmp_path)
    assert (row["step"], row["passed"], row["failed"], row["seconds"]) == ("t.py::test_a", "1", "1", "1.5")
    assert "worker 'gw0' crashed" in row["said"]


def test_all_parts_know_what_they_want():
    assert gpu.PARTS.keys() == gpu.REHEARSED.keys() and set(gpu.FIRST) <= gpu.PARTS.keys()
    for part in [*gpu.PARTS.values(), *gpu.REHEARSED.values()]:
        assert part.wanted() and part.least_s < part.most_s and (not hasattr(part, "work") or part.work in models.WORKS)
    assert "tests/test_noise.py::test_philox_gives_the_published_words" in gpu.PARTS["kernels"].wanted()
    assert sum(gpu.PARTS[name].least_s for name in gpu.FIRST) < 480


def test_another_python_needs_no_environment_of_ours():
    command = ["make", "--dry-run", "gpu", "PY=python3", "PART=ops peers", "OUT=some/folder", "BUDGET=300"]
    path = {"PATH": os.environ["PATH"]}  # and nothing of a `make test` that this may run under
    said = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == "python3 -m bench.wheels --install" and len(said) == 2
    assert 'python3 -m bench.gpu ops peers --out "some/folder" --seconds $((' in said[1] and " + 300 - " in said[1]


# wheels.py


def test_wheels_carry_what_the_package_needs_and_such_a_machine_lacks():
    [call] = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if getattr(node, "arg", "") == "install_requires"]
    required = {text.partition("=")[0].partition(">")[0].lower().replace("_", "-") for text in ast.literal_eval(call.value)}
    there = (
        "torch triton transformers peft accelerate huggingface-hub numpy opencv-python-headless psutil pillow matplotlib tensorboard tqdm"
    )
    carried = {name.lower().replace("_", "-") for name in wheels.names()}
    assert required - carried == {*there.split(), "bitsandbytes"}


@pytest.mark.parametrize("mib, fits", [(1, True), (61, False)])
def test_a_folder_that_is_too_large_is_refused(tmp_path, mib, fits):
    with (tmp_path / "a.whl").open("wb") as file:
        file.truncate(mib << 20)
    line, fitted = wheels.weigh(tmp_path)
    assert fitted == fits and f"1 wheels, {mib}.0 MiB" in line and ("cannot be carried" in line) != fits


def test_installing_asks_no_index_and_leaves_what_is_there(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(wheels.subprocess, "run", lambda command, **_: calls.append(command) or SimpleNamespace(returncode=1))
    assert wheels.main(["--install", "--folder", str(tmp_path)]) == 1
    [command] = calls
    assert {"--no-index", "--no-deps", f"--find-links={tmp_path}", "diffusers", wheels.TRL, f"--editable={ROOT}"} <= set(command)
    assert not [word for word in command if "upgrade" in word or "reinstall" in word]
    assert "`make wheels` makes it where there is a network" in capsys.readouterr().out


def test_a_copy_without_git_is_known_by_its_source(monkeypatch, tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        for name in ("bench/rows.py", "ddpo_fast/train.py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"# {name}\n")
    assert rows.fingerprint(tmp_path / "a") == rows.fingerprint(tmp_path / "b")
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "a/bench/rows.py"))
    assert rows.commit.__wrapped__() == f"source-{rows.fingerprint(tmp_path / 'b')}"
    (tmp_path / "a/bench/rows.py").write_text("# another\n")
    assert rows.commit.__wrapped__() != f"source-{rows.fingerprint(tmp_path / 'b')}"
