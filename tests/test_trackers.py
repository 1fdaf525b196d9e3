"""run.trackers, with stand-ins for wandb and trackio that keep what they are told."""

import errno
import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import yaml
from PIL import Image
from shared import run

from ddpo_fast import assemble
from ddpo_fast import train as trainer
from ddpo_fast.claim import Claim
from ddpo_fast.records.metrics import MetricsWriter, read_metrics, tracker_fault


class StandIn(ModuleType):
    """What ddpo_fast uses of wandb and trackio."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.runs, self.logins, self.broken = [], [], {}

    def login(self):
        self.logins.append("login" not in self.broken)
        self.fail("login")

    def fail(self, call):
        if call in self.broken:
            raise ConnectionError(self.broken[call])

    def init(self, **said):
        self.fail("init")
        self.runs.append({"options": said, "rows": {}, "pictures": {}, "open": True})
        return StandInRun(self.runs[-1], self.fail)

    def Image(self, picture):
        return ("image", picture.size)


class StandInRun:
    def __init__(self, kept, fail):
        self.kept, self.fail = kept, fail

    def log(self, values, step):
        assert self.kept["open"]
        self.fail(f"log {step}" if "evaluation" not in values else f"picture {step}")
        kind = "pictures" if "evaluation" in values else "rows"
        assert step not in self.kept[kind]
        self.kept[kind][step] = values

    def finish(self):
        self.kept["open"] = False
        self.fail("finish")


@pytest.fixture
def stand_ins(monkeypatch):
    modules = {name: StandIn(name) for name in ("wandb", "trackio")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        for variable in ("PROJECT", "MODE"):
            monkeypatch.delenv(f"{name.upper()}_{variable}", raising=False)
    return modules


def test_all_get_every_row_and_picture_and_a_resumed_run_goes_on(options, stand_ins, monkeypatch):
    folder = run(options("my run", run__trackers='["wandb","trackio"]', eval__every=1, run__iterations=1))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    trainer.main([f"--run.dir={folder}", "--resume", "--run.iterations=2"])
    assert not (folder / "tensorboard").exists()
    rows = {row.pop("iteration"): {name: value for name, value in row.items() if value is not None} for row in read_metrics(folder)}
    (begun,), (resumed,) = ({module.runs[i]["options"][key] for module, key in zip(stand_ins.values(), ("id", "name"))} for i in (0, 1))
    assert begun == resumed == (folder / "tracker_id").read_text() and re.fullmatch(r"my-run-[0-9a-f]{8}", begun)
    for name, module in stand_ins.items():
        first, second = module.runs
        assert first["rows"] | second["rows"] == rows and list(second["rows"]) == [2]
        assert first["pictures"].keys() | second["pictures"].keys() == {0, 1, 2}
        assert first["pictures"][0] == {"evaluation": ("image", (8 * 128, 156))}
        assert not first["open"] and not second["open"]
        assert first["options"]["project"] == "ddpo_fast" and first["options"]["resume"] == "allow"
        assert second["options"]["project"] == ("mine" if name == "wandb" else "ddpo_fast")
        assert first["options"]["config"] == yaml.safe_load((folder / "config.yaml").read_text()) | {
            "run": first["options"]["config"]["run"]
        }  # fmt: skip
    assert stand_ins["wandb"].runs[0]["options"]["dir"] == str(folder)


def test_default_is_tensorboard_and_imports_no_other(options, stand_ins):
    folder = run(options(run__iterations=1))
    assert list((folder / "tensorboard").iterdir()) and not (folder / "tracker_id").exists()
    assert not stand_ins["wandb"].runs and not stand_ins["trackio"].runs


def test_one_that_is_not_installed_is_one_line_before_a_model_is_loaded(options, monkeypatch, capsys):
    monkeypatch.setattr("ddpo_fast.records.metrics.find_spec", lambda name: None if name == "wandb" else "there")
    monkeypatch.setattr(assemble, "Policy", None)
    with pytest.raises(SystemExit, match="2"):
        trainer.main(options(run__trackers='["tensorboard","wandb"]'))
    assert capsys.readouterr().err == "error: run.trackers=['tensorboard', 'wandb']: wandb is not installed; pip install wandb\n"


@pytest.mark.parametrize("call", ["picture 1", "log 1", "finish"])
def test_one_that_fails_is_warned_of_once_and_left_out(stand_ins, tmp_path, caplog, call):
    """wandb fails from `call` on; trackio and metrics.jsonl get every row all the same."""
    calls = ["picture 1", "log 1", "picture 2", "log 2", "finish"]
    stand_ins["wandb"].broken = dict.fromkeys(calls[calls.index(call) :], "no\nroute")
    writer = MetricsWriter(tmp_path, Claim(), -1, ["wandb", "trackio"], {})
    for iteration in (0, 1, 2):
        writer.write_images(Image.new("RGB", (8, 8)), "evaluation", iteration)
        writer.write({"iteration": iteration, "loss": 0.5})
    writer.close()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("wandb failed (ConnectionError: no route); the run goes on without it") and "metrics.jsonl" in message
    (other,) = stand_ins["trackio"].runs
    assert list(other["rows"]) == list(other["pictures"]) == [0, 1, 2] and not other["open"]
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    reached = [(list(run["pictures"]), list(run["rows"])) for run in stand_ins["wandb"].runs]
    assert reached == {"picture 1": [([0], [0])], "log 1": [([0, 1], [0])], "finish": [([0, 1, 2], [0, 1, 2])]}[call]


def test_one_that_cannot_begin_ends_the_run(stand_ins, tmp_path):
    stand_ins["wandb"].broken = {"init": "no route"}
    with pytest.raises(ValueError, match=r"run.trackers=.*: wandb cannot begin \(ConnectionError: no route\)"):
        MetricsWriter(tmp_path, Claim(), -1, ["wandb", "trackio"], {})


def test_a_full_disk_is_no_fault_of_the_tracker(stand_ins, tmp_path, caplog, monkeypatch):
    """A tracker that could not write one row gets the next one."""
    writer = MetricsWriter(tmp_path, Claim(), -1, ["wandb"], {})
    log, full = writer.remote["wandb"].log, [OSError(errno.ENOSPC, "No space left on device")]

    def once_full(*args, **kwargs):
        if full:
            raise full.pop()
        log(*args, **kwargs)

    monkeypatch.setattr(writer.remote["wandb"], "log", once_full)
    for iteration in (0, 1):
        writer.write({"iteration": iteration, "loss": 0.5})
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("wandb could not be told (OSError: [Errno 28] No space left on device); all numbers are in ")
    assert list(stand_ins["wandb"].runs[0]["rows"]) == [1] and [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1]


def test_who_is_not_known_to_wandb_is_told_so_before_a_model_is_loaded(options, stand_ins, monkeypatch, capsys):
    stand_ins["wandb"].broken = {"login": "No API key configured.\nUse `wandb login`."}
    monkeypatch.setattr(assemble, "Policy", None)
    with pytest.raises(SystemExit, match="2"):
        trainer.main(options(run__trackers='["wandb"]'))
    assert capsys.readouterr().err == (
        "error: run.trackers=['wandb']: wandb: No API key configured. Use `wandb login`.; valid is after `wandb login`, with "
        "WANDB_API_KEY, or with WANDB_MODE=offline\n"
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracker_fault(["wandb", "trackio"]) is None
    assert stand_ins["wandb"].logins == [False] and not stand_ins["trackio"].logins


@pytest.mark.parametrize("value", ["true", "1", "ON"])
def test_another_librarys_switch_is_named(options, stand_ins, monkeypatch, capsys, value):
    monkeypatch.setenv("WANDB_DISABLED", value)
    monkeypatch.setattr(assemble, "Policy", None)
    with pytest.raises(SystemExit, match="2"):
        trainer.main(options(run__trackers='["wandb"]'))
    error = capsys.readouterr().err
    assert error.startswith(f"error: run.trackers=['wandb']: WANDB_DISABLED={value} asks for no wandb") and error.count("\n") == 1
    monkeypatch.setenv("WANDB_MODE", "disabled")  # wandb's own
    assert tracker_fault(["wandb"]) is None and tracker_fault(["trackio"]) is None and not stand_ins["wandb"].logins


def test_a_run_whose_tracker_does_not_begin_is_one_line(options, stand_ins, capsys):
    stand_ins["trackio"].broken = {"init": "no\nroute"}
    with pytest.raises(SystemExit, match="2"):
        trainer.main(options(run__trackers='["trackio"]'))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: run.trackers=['trackio']: trackio cannot begin (ConnectionError: no route); valid are those that can"
