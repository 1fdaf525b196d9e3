"""Fixtures of many tests: tiny models, command lines of short runs; and what would be most of the time of a run as small as that."""

import functools
import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("bounds", "runs", "shared")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: without a GPU, kernels run in its interpreter

from families import CALL, make_family
from runs import Ranks
from shared import AS_EMBEDDED, command_line
from tiny import make_pipeline, make_sdxl

from ddpo_fast.config import command_line as parsing
from ddpo_fast.pipelines.families import FAMILIES
from ddpo_fast.records import report, run_directory


@pytest.fixture(scope="session", autouse=True)
def quick():
    """Runs in this process write no report, whose plots are 40 % of so short a run, and build the parser once.

    What has been imported by now is no work of the garbage collector, which takes a tenth of the time otherwise.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "write_report", lambda folder: None)
        patch.setattr(parsing, "_parser", functools.cache(parsing._parser))
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter patches its language once in a launch for each module of kernels, not in each call of a nested function."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    patch_language, execute, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        if fn.__module__ not in patched:
            patched.add(fn.__module__)
            return patch_language(fn)

    def launch(*args, **kwargs):
        patched.clear()
        return execute(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        yield


@pytest.fixture
def reports(monkeypatch):
    """Runs write their report, as they do for users."""
    monkeypatch.setattr(run_directory, "write_report", report.write_report)


@pytest.fixture(scope="session")
def _ranks(tmp_path_factory) -> Iterator[list[Ranks]]:
    started = []
    yield started
    for ranks in started:
        if ranks.alive:
            ranks.end()


@pytest.fixture
def ranks(_ranks, tmp_path_factory) -> Ranks:
    """Two ranks, started for the first test that wants them, and anew after one that ended them."""
    if not _ranks or not _ranks[-1].alive:
        _ranks.append(Ranks(tmp_path_factory.mktemp("ranks")))
    return _ranks[-1]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> Callable[[str], Path]:
    """The tiny pipeline of a family's name, one of families.FAMILIES or families.OTHERS; each is made once."""
    return functools.cache(lambda name: make_family(name, tmp_path_factory.mktemp("families") / name))


REWARDS = """
from pathlib import Path
import torch
calls = 0
def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
def by_place(images, prompts):
    return torch.arange(len(images))
def integers(images, prompts):
    return (1e6 * redness(images, prompts)).round().long()
def sometimes_bad(images, prompts):
    global calls
    calls += 1
    rewards = redness(images, prompts)
    if calls == 3:
        raise RuntimeError("the third call")
    if calls > 3:
        rewards[1] = torch.nan
    return rewards
def raising(images, prompts):
    raise KeyError("always")
def bad_in_iteration_3(images, prompts, while_there_is):
    global calls
    calls += 1
    rewards = redness(images, prompts)
    if calls == 4 and Path(while_there_is).exists():
        rewards[:5] = torch.nan
    return rewards
def bad_after_start(images, prompts):
    global calls
    calls += 1
    return redness(images, prompts) * (1 if calls == 1 else torch.nan)
"""


@pytest.fixture(scope="session")
def rewards_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def options(tiny_model, rewards_file, tmp_path):
    """Command lines of short runs: keyword arguments with __ for the dot."""

    def make(name="run", **changed) -> list[str]:
        values = {
            "model.path": tiny_model, "run.dir": tmp_path / name, "reward.name": f"{rewards_file}:redness",
            "sample.num_samples": 8, "sample.num_steps": 5, "sample.batch_size": 8, "eval.num_samples": 4, "run.iterations": 2,
            "train.num_minibatches": 2, "train.micro_batch": 16, "lora.rank": 2, "train.learning_rate": 1e-3,
            "eval.prompts": '["a", "b"]', "prompts.limit": 4,
            "prompts.samples_per_prompt": 1, "baseline.min_count": 16, "baseline.buffer_size": 16,
        }  # fmt: skip
        return command_line(values, changed)

    return make


LEFT_TO_THE_FAMILY = {"height", "width", "negative_prompt", "use_resolution_binning"}


@pytest.fixture
def flow_options(family, rewards_file, tmp_path):
    """Command lines of short runs on a family's tiny pipeline: keyword arguments with __ for the dot."""

    def make(name: str, folder="run", **changed) -> list[str]:
        path, call = family(name), CALL[name]
        kind = FAMILIES[json.loads((path / "model_index.json").read_text())["_class_name"]]
        arguments = {key: value for key, value in call.items() if key not in LEFT_TO_THE_FAMILY | {kind.guidance}}
        values = {
            "model.path": path, "model.arguments": json.dumps(arguments), "run.dir": tmp_path / folder,
            "reward.name": f"{rewards_file}:redness", "sample.height": call["height"], "sample.width": call["width"],
            "sample.guidance_scale": call[kind.guidance], "sample.sampler": "cps", "sample.eta": 0.8, "sample.num_steps": 4,
            "sample.num_samples": 4, "sample.batch_size": 4, "eval.sampler": "ode", "eval.num_steps": "null", "eval.num_samples": 2,
            "run.iterations": 2, "train.num_minibatches": 1, "train.micro_batch": 5, "lora.rank": 2, "lora.targets": '["attention"]',
            "train.learning_rate": 1e-3, "prompts.limit": 2, "prompts.samples_per_prompt": 2, "baseline.min_count": 16,
            "baseline.buffer_size": 16, "run.trackers": "[]",
        }  # fmt: skip
        return command_line(values, changed)

    return make


@pytest.fixture
def launch_options(tiny_model, tmp_path):
    """Command lines of short runs on ranks: further options as they are typed."""

    def make(name, *extra: str) -> list[str]:
        return [
            *(f"--{option}={value}" for option, value in AS_EMBEDDED.items()), f"--model.path={tiny_model}",
            f"--run.dir={tmp_path / name}", "--sample.num_samples=8", "--sample.num_steps=5",
            "--eval.num_samples=4", "--run.iterations=2", "--train.num_minibatches=2", "--train.micro_batch=16", "--lora.rank=2",
            "--prompts.limit=4", "--prompts.samples_per_prompt=1", *extra,
        ]  # fmt: skip

    return make
