"""run.trackers, with stand-ins for wandb and trackio that keep what they are told."""

import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import yaml
from test_train import options, rewards_file, run  # noqa: F401

from ddpo_fast import preparation
from ddpo_fast import train as trainer
from ddpo_fast.metrics import read_metrics


class StandIn(ModuleType):
    """What ddpo_fast uses of wandb and trackio."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.runs = []

    def init(self, **said):
        self.runs.append({"options": said, "rows": {}, "pictures": {}, "open": True})
        return StandInRun(self.runs[-1])

    def Image(self, picture):
        return ("image", picture.size)


class StandInRun:
    def __init__(self, kept):
        self.kept = kept

    def log(self, values, step):
        assert self.kept["open"]
        kind = "pictures" if "evaluation" in values else "rows"
        assert step not in self.kept[kind]
        self.kept[kind][step] = values

    def finish(self):
        self.kept["open"] = False


@pytest.fixture
def stand_ins(monkeypatch):
    modules = {name: StandIn(name) for name in ("wandb", "trackio")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    return modules


def test_all_get_every_row_and_picture_and_a_resumed_run_goes_on(options, stand_ins, monkeypatch):  # noqa: F811
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


def test_default_is_tensorboard_and_imports_no_other(options, stand_ins):  # noqa: F811
    folder = run(options(run__iterations=1))
    assert list((folder / "tensorboard").iterdir()) and not (folder / "tracker_id").exists()
    assert not stand_ins["wandb"].runs and not stand_ins["trackio"].runs


def test_one_that_is_not_installed_is_one_line_before_a_model_is_loaded(options, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("ddpo_fast.metrics.find_spec", lambda name: None if name == "wandb" else "there")
    monkeypatch.setattr(preparation, "Policy", None)
    with pytest.raises(SystemExit, match="2"):
        trainer.main(options(run__trackers='["tensorboard","wandb"]'))
    assert capsys.readouterr().err == "error: run.trackers=['tensorboard', 'wandb']: wandb is not installed; pip install wandb\n"
