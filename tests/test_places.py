"""Options that say where something is: they mean the same in every working directory, and are not what a run is."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from shared import run, untimed
from test_config import OPTIONS

from ddpo_fast import train as trainer
from ddpo_fast.config.command_line import parse
from ddpo_fast.places import PLACES, located, located_kwargs, may_be_same, typed_path
from ddpo_fast.records.metrics import read_metrics

NO_PLACES = {"lora.scope", "model.variant", "run.plan"}
"""The other options that are any text."""

MOVING = """
import os, tempfile
{at_import}
def redness(images, prompts):
    {in_call}
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
"""


def test_of_every_option_that_is_a_text_it_is_said_whether_it_is_a_place():
    texts = {option for option, annotation in OPTIONS.items() if annotation in (str, str | None)}
    assert texts == NO_PLACES | set(PLACES)


@pytest.mark.parametrize(
    "option, value, place",
    [
        ("run.dir", "runs/x", "{here}/runs/x"),
        ("run.dir", "./x/", "{here}/x"),
        ("run.dir", "~/x", "{home}/x"),
        ("run.dir", "/a/../b", "/a/../b"),  # a may be a link
        ("run.dir", "~nobody-of-this-name/x", "{here}/~nobody-of-this-name/x"),
        ("run.dir", "", ""),
        ("prompts.file", "org/name", "{here}/org/name"),
        ("model.path", "org/name", "org/name"),
        ("model.path", "org/folder", "{here}/org/folder"),  # a folder that is there
        ("model.path", "./org/name", "{here}/org/name"),
        ("model.path", "~/sd", "{home}/sd"),
        ("model.vae", "name.safetensors", "{here}/name.safetensors"),
        ("model.config", "a/b/c", "{here}/a/b/c"),
        ("reward.name", "jpeg_compressibility", "jpeg_compressibility"),
        ("reward.name", "package.module:f", "package.module:f"),
        ("reward.name", "http://host:8000/r.py", "http://host:8000/r.py"),
        ("reward.name", "http://host/r.py:f", "http://host/r.py:f"),
        ("reward.name", "r.py:f", "{here}/r.py:f"),
        ("reward.name", "~/a:b/r.py:f", "{home}/a:b/r.py:f"),
    ],
)
def test_a_place_is_an_absolute_path_and_nothing_else_is(option, value, place, tmp_path, monkeypatch):
    (tmp_path / "org" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/my-home")
    assert located(option, value) == place.format(here=tmp_path, home="/my-home")


def test_places_in_a_reward_s_arguments(tmp_path, monkeypatch):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "a.pth").touch()
    (tmp_path / "cpu").touch()
    monkeypatch.chdir(tmp_path)
    kwargs = {
        "weights": "w/a.pth",
        "clip": "openai/clip",
        "device": "cpu",
        "scale": 2,
        "rewards": {"r.py:f": {"kwargs": {"p": ["w/a.pth"]}}},
    }
    there = f"{tmp_path}/w/a.pth"
    located_ = kwargs | {"weights": there, "rewards": {f"{tmp_path}/r.py:f": {"kwargs": {"p": [there]}}}}
    assert located_kwargs(kwargs) == located_


@pytest.mark.parametrize(
    "option, value, before, same",
    [
        ("model.path", "/new", "/old", True),
        ("model.path", "org/name", "/old", True),
        ("model.vae", "/new", None, False),
        ("prompts.file", None, "/old", False),
        ("reward.name", "/new/a.py:f", "/old/b.py:f", True),
        ("reward.name", "/new/a.py:f", "package.a:f", True),
        ("reward.name", "/new/a.py:f", "/new/a.py:g", False),
        ("reward.name", "/new/a.py:aesthetic", "aesthetic", False),
        ("reward.name", "aesthetic", "pickscore", False),
        ("reward.name", "https://new:1/", "http://old:1/", True),
        ("reward.name", "http://new:1/f", "/a.py:f", False),
        ("reward.kwargs", {"weights": "/"}, {"weights": "/old"}, True),
        ("reward.kwargs", {"weights": "/not there"}, {"weights": "/old"}, False),
        ("reward.kwargs", {"scale": 1}, {"scale": 2}, False),
        ("reward.kwargs", {"weights": "/", "scale": 1}, {"weights": "/old"}, False),
        ("reward.kwargs", {"rewards": {"/new.py:f": 1}}, {"rewards": {"/old.py:f": 1}}, True),
        ("reward.kwargs", {"rewards": {"/new.py:f": 1}}, {"rewards": {"/old.py:f": 2}}, False),
    ],
)
def test_what_may_be_the_same_in_another_place(option, value, before, same):
    assert may_be_same(option, value, before) == same


def test_home_in_a_recipe_and_after_an_equals_sign(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_model, tmp_path / "sd")
    (tmp_path / "p.txt").write_text("a")
    (tmp_path / "r.yaml").write_text("model: {path: ~/sd}\nprompts: {file: ~/p.txt}\nreward: {name: ~/r.py:f}\n")
    config = parse(["--config=~/r.yaml", "--run.dir=~/run"])
    names = (config.model.path, config.prompts.file, config.reward.name, config.run.dir)
    assert names == tuple(f"{tmp_path}/{name}" for name in ("sd", "p.txt", "r.py:f", "run"))
    assert typed_path("~/x.safetensors") == tmp_path / "x.safetensors"


AWAY = "os.chdir(tempfile.mkdtemp())"


@pytest.mark.parametrize("run_dir, moves", [("runs/x", {"at_import": AWAY}), (None, {"in_call": AWAY})])
def test_a_reward_that_changes_the_working_directory_does_not_move_the_run(options, run_dir, moves, reports, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MOVING.format(**{"at_import": "", "in_call": "pass"} | moves))
    (tmp_path / "p.txt").write_text("a\nb\n")
    argv = options(reward__name="mine.py:redness", prompts__file="p.txt", run__dir=run_dir or "null", run__iterations=1)
    trainer.main(argv)
    (folder,) = (tmp_path / "runs").iterdir()
    shown, out = folder.relative_to(tmp_path), capsys.readouterr().out
    assert out.startswith(f"{shown}: ddpo_is for mine.py:redness on ") and out.endswith(
        f"report: {shown}/report.html\nweights: {shown}/lora\n"
    )
    assert all(
        (folder / name).exists() for name in ("lora", "best/lora/README.md", "report.html", "images/iteration_00001.png", "checkpoints/1")
    )


@pytest.fixture(scope="module")
def began(tiny_model, tmp_path_factory) -> Path:
    """A folder with a run in `run` and all that it needs beside it, by the names that PLACES may have."""
    here = tmp_path_factory.mktemp("began")
    shutil.copytree(tiny_model, here / "model")
    shutil.copytree(here / "model" / "vae", here / "vae")
    (here / "p.txt").write_text("a\nb\nc\n")
    (here / "ds.json").write_text(json.dumps({"zero_optimization": {"overlap_comm": False}}))
    (here / "r.py").write_text(MOVING.format(at_import="", in_call="pass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        run(["--run.dir=run", "--run.iterations=1", *SHORT, *(f"--{option}={place}" for option, place in NAMES.items())])
    return here


NAMES = {"model.path": "model", "model.vae": "vae", "prompts.file": "p.txt", "reward.name": "r.py:redness", "deepspeed.config": "ds.json"}
SHORT = (
    "--sample.num_samples=4 --sample.num_steps=3 --eval.num_samples=2 --train.num_minibatches=1 --lora.rank=2 "
    "--prompts.samples_per_prompt=1"
).split()


@pytest.fixture
def moved(began, tmp_path, monkeypatch) -> Path:
    """The same in another folder, and nothing where it was."""
    copy = Path(shutil.copytree(began, tmp_path / "moved"))
    content = (copy / "run" / "config.yaml").read_text()
    (copy / "run" / "config.yaml").write_text(content.replace(str(began), str(tmp_path / "gone")))
    monkeypatch.chdir(tmp_path)
    return copy


def test_a_run_goes_on_where_everything_of_it_has_moved_to(began, moved, tmp_path, monkeypatch, caplog):
    whole = Path(shutil.copytree(began / "run", tmp_path / "whole"))  # from this directory, with nothing given anew
    trainer.main([f"--run.dir={whole}", "--resume", "--run.iterations=2"])
    new = [f"--{option}={os.path.join('moved', place)}" for option, place in NAMES.items()]
    trainer.main(["--run.dir=moved/run", "--resume", "--run.iterations=2", *new])
    assert untimed(read_metrics(moved / "run")) == untimed(read_metrics(whole))
    config = yaml.safe_load((moved / "run" / "config.yaml").read_text())
    for option, place in (NAMES | {"run.dir": "run"}).items():
        section, key = option.split(".")
        assert config[section][key] == f"{moved}/{place}"
    assert not [record.message for record in caplog.records if "since" in record.message]
    trainer.main([f"--run.dir={moved}/run", "--resume", "--run.iterations=3"])  # which needs no places any more
    assert len(read_metrics(moved / "run")) == 4


@pytest.mark.parametrize("option", NAMES)
def test_what_is_gone_is_named_with_the_option_that_says_where_it_is_now(option, moved, capsys):
    new = [f"--{other}={moved / place}" for other, place in NAMES.items() if other != option]
    with pytest.raises(SystemExit, match="2"):
        trainer.main([f"--run.dir={moved}/run", "--resume", *new])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {option}={moved.parent}/gone/{NAMES[option]}: ") and f"--{option}=" in error


@pytest.mark.parametrize("option", ["--reward.name=r.py:other", "--model.vae=null", "--prompts.file=null"])
def test_another_thing_than_the_run_began_with_is_still_refused(option, began, monkeypatch, capsys):
    monkeypatch.chdir(began)
    with pytest.raises(SystemExit, match="2"):
        trainer.main(["--run.dir=run", "--resume", option])
    assert "--resume keeps it" in capsys.readouterr().err
