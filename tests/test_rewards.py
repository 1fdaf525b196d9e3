"""JPEG rewards against Pillow, finding a reward by name, and what a reward may and may not answer."""

import importlib
import inspect
import io
import logging
import math
import re
import threading
import time
import weakref
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo_fast.rewards import CHOICES, attribute
from ddpo_fast.rewards.jpeg_compressibility import jpeg_compressibility
from ddpo_fast.rewards.jpeg_incompressibility import jpeg_incompressibility
from ddpo_fast.scoring.function import load_reward
from ddpo_fast.scoring.scorer import RewardError, Scorer, score_or_nan
from ddpo_fast.scoring.threaded import ThreadedReward

PROMPTS = ["cat", "dog", "horse"]
IMAGES = torch.zeros(3, 3, 8, 8)


def score(reward, images, prompts, timeout_s, metadata=None):
    return ThreadedReward(lambda: reward, timeout_s)(images, prompts, metadata)


# --- JPEG ---


def pictures(kind: str, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    if kind == "random":  # beyond [0, 1] too, which the pixels must be clamped to
        return torch.rand(2, 3, size, size, generator=generator) * 1.2 - 0.1
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    return torch.stack([torch.stack([x, y, x * y]), torch.stack([(9 * x).sin() / 2 + 0.5, y.square(), 1 - x])])


def pillow_kilobytes(images: torch.Tensor) -> list[float]:
    sizes = []
    for image in images.float().numpy():
        pixels = np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return sizes


@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("size", [64, 512])
def test_jpeg_rewards_are_the_kilobytes_that_pillow_writes(kind, size):
    images = pictures(kind, size)
    expected = torch.tensor(pillow_kilobytes(images))
    assert torch.equal(jpeg_incompressibility(images, PROMPTS[:2]), expected)
    assert torch.equal(jpeg_compressibility(images, PROMPTS[:2]), -expected)


def test_jpeg_takes_the_pictures_of_any_dtype_and_shape():
    images = (torch.randint(0, 256, (3, 3, 40, 72), generator=torch.Generator().manual_seed(0)) / 255).to(torch.float16)
    assert torch.equal(jpeg_incompressibility(images, PROMPTS), torch.tensor(pillow_kilobytes(images)))


@pytest.mark.parametrize("offset", [-0.4, 0.4])
def test_jpeg_pixels_are_rounded_not_truncated(offset):
    levels = torch.randint(1, 255, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(jpeg_incompressibility((levels + offset) / 255, ["cat"]), jpeg_incompressibility(levels / 255, ["cat"]))


def test_jpeg_prefers_what_it_should():
    images = torch.stack([pictures("random", 64)[0], pictures("smooth", 64)[0]])
    assert jpeg_compressibility(images, PROMPTS[:2]).argmax() == 1
    assert jpeg_incompressibility(images, PROMPTS[:2]).argmax() == 0


# --- load_reward ---


@pytest.mark.parametrize("name", CHOICES)
def test_a_file_of_rewards_holds_the_one_of_its_name(name):
    module = importlib.import_module(f"ddpo_fast.rewards.{name}")
    reward = getattr(module, attribute(module, name))
    assert reward.__module__ == module.__name__ and reward.__doc__
    called = reward.__call__ if inspect.isclass(reward) else reward
    assert {"images", "prompts"} <= inspect.signature(called).parameters.keys()


def test_jpeg_rewards_by_name():
    assert load_reward("jpeg_compressibility", {}) is jpeg_compressibility
    assert load_reward("jpeg_incompressibility", {}) is jpeg_incompressibility


def test_reward_of_a_package():
    assert load_reward("ddpo_fast.rewards.jpeg_compressibility:jpeg_compressibility", {}) is jpeg_compressibility


REWARD_FILE = """
def first(images, prompts, scale=2.0):
    return [scale] * len(prompts)

def second(images, prompts, *, weight, bias=0):
    return [weight + bias] * len(prompts)

def greedy(images, prompts, **kwargs):
    return [kwargs["anything"]] * len(prompts)

NOT_A_FUNCTION = 3
"""


@pytest.fixture
def reward_file(tmp_path) -> str:
    (tmp_path / "my reward-1.py").write_text(REWARD_FILE)
    return str(tmp_path / "my reward-1.py")


@pytest.mark.parametrize(
    "function, kwargs, answer",
    [("first", {}, 2.0), ("first", {"scale": 5}, 5), ("second", {"weight": 3, "bias": 1}, 4), ("greedy", {"anything": 7}, 7)],
)
def test_reward_of_a_file(reward_file, function, kwargs, answer):
    reward = load_reward(f"{reward_file}:{function}", kwargs)
    assert score(reward, IMAGES, PROMPTS, 10).tolist() == [answer] * 3


def test_reward_of_a_file_in_the_working_directory(reward_file, monkeypatch):
    monkeypatch.chdir(Path(reward_file).parent)
    assert callable(load_reward("my reward-1.py:first", {}))


def test_reward_file_is_a_module_as_python_knows_them(tmp_path):
    file = tmp_path / "with_dataclass.py"
    file.write_text(
        "from __future__ import annotations\nimport pickle\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Scale:\n    value: float\n\n"
        "def reward(images, prompts):\n    return [pickle.loads(pickle.dumps(Scale(2.0))).value] * len(prompts)\n"
    )
    assert score(load_reward(f"{file}:reward", {}), IMAGES, PROMPTS, 10).tolist() == [2] * 3


@pytest.mark.parametrize(
    "name, reason",
    [
        ("no_such_reward", "valid is one of aesthetic, .*path/to/file.py:function or package.module:function"),
        ("", "valid is one of"),
        (":function", "valid is one of"),
        ("module:", "valid is one of"),
        ("module:not-a-name", "valid is one of"),
        ("no_such_package.module:f", "importing no_such_package.module failed: ModuleNotFoundError"),
        (".relative:f", "importing .relative failed"),
        ("no/such/file.py:f", "there is no file no/such/file.py"),
        ("builtins:max", "max.*signature"),  # nothing says what it takes
        ("ddpo_fast.scoring.jpeg:no_such", "has no function no_such; it has: .*jpeg_kilobytes"),
        ("ddpo_fast.scoring.jpeg:QUALITY", "has no function QUALITY"),
    ],
)
def test_reward_that_is_not_there_is_refused(name, reason):
    with pytest.raises(ValueError, match=rf"reward\.name={re.escape(name)}: .*{reason}"):
        load_reward(name, {})


@pytest.mark.parametrize("function", ["third", "NOT_A_FUNCTION"])
def test_function_that_a_file_does_not_have_is_refused_with_those_it_has(reward_file, function):
    with pytest.raises(ValueError, match=f"has no function {function}; it has: .*first, second, greedy"):
        load_reward(f"{reward_file}:{function}", {})


@pytest.mark.parametrize(
    "code, reason",
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("def reward(images, prompts:\n    return 1", "SyntaxError"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("raise RuntimeError('no weights')", "RuntimeError: no weights"),
        ("raise ValueError('no weights')", "ValueError: no weights"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_file_that_does_not_load_is_refused_with_its_error(tmp_path, code, reason):
    file = tmp_path / "broken.py"
    file.write_text(code)
    with pytest.raises(ValueError, match=re.escape(f"reward.name={file}:reward: importing {file} failed: {reason}")):
        load_reward(f"{file}:reward", {})


@pytest.mark.parametrize(
    "function, kwargs, reason",
    [
        ("first", {"factor": 2}, "unexpected keyword argument 'factor'"),
        ("second", {}, "missing a required.*'weight'"),
        ("first", {"prompts": 2}, "multiple values for argument 'prompts'"),
    ],
)
def test_kwargs_that_the_function_does_not_take_are_refused(reward_file, function, kwargs, reason):
    with pytest.raises(ValueError, match=rf"reward\.kwargs=.*{function}\(images, prompts, \*\*kwargs\) does not take them: .*{reason}"):
        load_reward(f"{reward_file}:{function}", kwargs)


# --- score ---


def answering(answer):
    return lambda images, prompts, **kwargs: answer


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3], dtype=np.float32),
        np.array([1, 2, 3], dtype=np.int64),
        torch.tensor([1, 2, 3]),
        torch.tensor([1, 2, 3], dtype=torch.float16),
        torch.tensor([1.0, 2, 3], requires_grad=True),
        [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)],
        [np.float32(1), np.float32(2), np.float32(3)],
    ],
    ids=["list", "tuple", "numpy", "numpy int", "int tensor", "half", "requires grad", "list of tensors", "list of numpy numbers"],
)
def test_any_three_numbers_are_three_rewards(answer):
    rewards = score(answering(answer), IMAGES, PROMPTS, 10)
    assert rewards.dtype == torch.float64 and rewards.device.type == "cpu" and not rewards.requires_grad
    assert rewards.tolist() == [1, 2, 3]


def test_reward_gets_images_prompts_and_kwargs_without_gradient():
    def reward(images, prompts, scale):
        assert images is IMAGES and prompts is PROMPTS and not torch.is_grad_enabled()
        return [scale] * 3

    assert score(partial(reward, scale=4), IMAGES, PROMPTS, 10).tolist() == [4] * 3


def test_nan_of_one_sample_passes_through():
    rewards = score(answering([1.0, float("nan"), float("inf")]), IMAGES, PROMPTS, 10)
    assert rewards[0] == 1 and rewards[1].isnan() and rewards[2].isinf()


@pytest.mark.parametrize(
    "answer, expected",
    [
        (torch.tensor([[1.0], [2.0], [3.0]]), [1, 2, 3]),
        (np.array([[1, 2, 3]]), [1, 2, 3]),
        ([[1], [2], [3]], [1, 2, 3]),
        ([torch.tensor([1.0]), torch.tensor(2), np.float32(3)], [1, 2, 3]),
        ([[[1.0, 2.0, 3.0]]], [1, 2, 3]),
        (np.array([1, 2, 3], dtype=object), [1, 2, 3]),
        ([Decimal(1), Fraction(2), True], [1, 2, 1]),
        (torch.tensor([1, 2, 3], dtype=torch.bfloat16), [1, 2, 3]),
        (np.array([True, False, True]), [1, 0, 1]),
        ((torch.tensor([1.0, 2.0, 3.0]), {}), [1, 2, 3]),  # ddpo-pytorch's form
        (([1, 2, 3], {"aux": [4, 5, 6]}), [1, 2, 3]),  # and TRL's
        (([1, 2, 3], None), [1, 2, 3]),
        ([1.0, None, 3.0], [1, None, 3]),
        (np.array([1.0, None, 3.0], dtype=object), [1, None, 3]),
        (np.ma.masked_array([1.0, 2.0, 3.0], mask=[False, True, False]), [1, None, 3]),
        ([1, 2, 10**400], [1, 2, math.inf]),
    ],
    ids=str,
)
def test_what_is_plainly_three_numbers_is_three_rewards(answer, expected):
    found = score(answering(answer), IMAGES, PROMPTS, 10)
    assert found.dtype == torch.float64 and [None if math.isnan(x) else x for x in found.tolist()] == expected


@pytest.mark.parametrize(
    "answer, expected",
    [((1.0, 2.0), [1, 2]), ([[1.0], [2.0]], [1, 2]), ((torch.tensor([1.0, 2.0]), {}), [1, 2]), ((1.0, None), [1, math.nan])],
)
def test_two_pictures_are_scored_as_three_are(answer, expected):
    """What of a pair is (numbers, info) does not depend on how many pictures there are."""
    assert str(score(answering(answer), IMAGES[:2], PROMPTS[:2], 10).tolist()) == str([float(x) for x in expected])


def test_one_picture_may_have_a_single_number():
    for answer in (5.0, [5], [[5.0]], torch.tensor(5), torch.tensor([[5.0]]), (5.0, {})):
        assert score(answering(answer), IMAGES[:1], PROMPTS[:1], 10).tolist() == [5]


@pytest.mark.parametrize(
    "answer, reason",
    [
        (torch.zeros(2), r"a Tensor of shape \(2,\); valid is one number for each picture, 3 here"),
        (torch.zeros(3, 2), r"a Tensor of shape \(3, 2\)"),
        (torch.zeros(3, 3, 8, 8), r"a Tensor of shape \(3, 3, 8, 8\)"),
        ((torch.zeros(3), torch.zeros(3)), r"a tuple of shape \(2, 3\)"),
        (1.0, "1.0; valid is one number for each picture"),
        ([], r"a list of shape \(0,\)"),
        (None, "None: is there a `return`"),
        ("abc", "'abc'"),
        (["a", "b", "c"], "a list with 'a', which is no number"),
        ([1.0, "2.0", 3.0], "a list with '2.0', which is no number"),
        ([[1.0], [2.0, 3.0], []], r"a list with '\[2.0, 3.0\]', which is no number"),
        ({"cat": 1.0}, "a dict with the keys cat"),
        (({"clip": [1, 2, 3]}, {}), "a dict with the keys clip"),
        (np.array(["a", "b", "c"]), "a ndarray with 'a', which is no number"),
        (np.array(["2020-01-01"] * 3, dtype="M8[ns]"), "a ndarray of datetime64"),
        (torch.zeros(3, dtype=torch.complex64), "a Tensor with '0j', which is no number"),
        ({1, 2, 3}, "a set"),
        ((x for x in (1, 2, 3)), "a generator"),
    ],
    ids=range(18),
)
def test_answer_that_is_not_three_numbers_is_an_error(answer, reason):
    with pytest.raises(RewardError, match=f"the reward function returned {reason}"):
        score(answering(answer), IMAGES, PROMPTS, 10)


@pytest.mark.parametrize(
    "error", [KeyError("wolf"), RuntimeError("no memory"), StopIteration("end"), SystemExit(1), KeyboardInterrupt()], ids=repr
)
def test_reward_that_raises_is_an_error_with_its_cause(error):
    def reward(images, prompts):
        raise error

    with pytest.raises(RuntimeError, match=f"the reward function raised {type(error).__name__}") as caught:
        score(reward, IMAGES, PROMPTS, 10)
    assert caught.value.__cause__ is error


@pytest.fixture
def hanging_reward():
    release = threading.Event()

    def reward(images, prompts):
        release.wait(600)
        return [1.0] * 3

    yield reward
    release.set()


def test_reward_that_hangs_is_abandoned_in_time(hanging_reward):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="took longer than reward.timeout_s=0.1"):
        score(hanging_reward, IMAGES, PROMPTS, timeout_s=0.1)
    assert 0.1 <= time.monotonic() - start < 60
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "reward")  # none keeps the process from ending


def raising_reward(images, prompts):
    raise KeyError("wolf")


@pytest.mark.parametrize("reward, reason", [(raising_reward, "KeyError: 'wolf'"), (answering([1.0]), r"shape \(1,\)")])
def test_failed_call_is_logged_and_gives_nan(reward, reason, caplog):
    with caplog.at_level(logging.WARNING, logger="ddpo_fast"):
        rewards = score_or_nan(ThreadedReward(lambda: reward, 600), IMAGES, PROMPTS)
    assert rewards.shape == (3,) and rewards.dtype == torch.float64 and rewards.isnan().all()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "3 samples" in record.getMessage()
    assert re.search(reason, record.getMessage())


def test_hanging_call_gives_nan(hanging_reward, caplog):
    assert score_or_nan(ThreadedReward(lambda: hanging_reward, 0.1), IMAGES, PROMPTS).isnan().all()
    assert "reward.timeout_s=0.1" in caplog.text


def test_good_call_is_not_logged(caplog):
    assert score_or_nan(ThreadedReward(lambda: answering([1, 2, 3]), 600), IMAGES, PROMPTS).tolist() == [1, 2, 3]
    assert not caplog.records


def test_what_fp32_cannot_hold_costs_its_sample_only(caplog):
    """Its square would make every advantage of the iteration 0 or NaN."""
    rewards = score_or_nan(ThreadedReward(lambda: answering([1.0, 1e300, float("nan")]), 600), IMAGES, PROMPTS)
    assert rewards.isfinite().tolist() == [True, False, False]
    assert "2 of 3 rewards are not finite; these samples are left out" in caplog.text


def test_a_call_that_fails_does_not_keep_the_images():
    images = torch.zeros(3, 3, 8, 8)
    gone = weakref.ref(images)
    with suppress(RewardError):
        score(raising_reward, images, PROMPTS, 10)
    del images
    assert gone() is None


# --- Scorer ---


def test_batches_are_scored_behind_the_callers_back_in_order_and_one_at_a_time(caplog):
    go, active = threading.Semaphore(0), []

    def reward(images, prompts):
        active.append(prompts)
        assert go.acquire(timeout=600) and active == [prompts]
        active.clear()
        if prompts == ["bad"] * 3:
            raise KeyError("wolf")
        return [float(prompts[0])] * 3

    scorer = Scorer(ThreadedReward(lambda: reward, 600))
    scorer.add(IMAGES, ["1"] * 3)  # comes back although the reward waits for the line below
    go.release()
    scorer.add(IMAGES, ["bad"] * 3)
    second = threading.Thread(target=scorer.add, args=(IMAGES, ["3"] * 3))
    second.start()
    second.join(0.1)
    assert second.is_alive()  # one at a time
    go.release(2)
    second.join()
    rewards = scorer.rewards()
    assert rewards[:3].tolist() == [1] * 3 and rewards[3:6].isnan().all() and rewards[6:].tolist() == [3] * 3
    assert caplog.text.count("samples are left out") == 1


@pytest.mark.parametrize("failures, bad", [(1, 0), (2, 3)])
def test_a_batch_that_ran_out_of_memory_is_scored_once_more_when_the_caller_waits(caplog, failures, bad):
    calls = []

    def reward(images, prompts):
        calls.append(prompts[0])
        if prompts[0] == "2" and calls.count("2") <= failures:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return [float(prompts[0])] * 3

    scorer = Scorer(ThreadedReward(lambda: reward, 600))
    for number in "123":
        scorer.add(IMAGES, [number] * 3)
    rewards = scorer.rewards()
    assert calls == ["1", "2", "3", "2"] and int(rewards.isnan().sum()) == bad
    assert rewards[rewards.isfinite()].tolist() == [1.0] * 3 + [2.0] * (3 - bad) + [3.0] * 3
    assert "the reward ran out of memory beside the denoising" in caplog.text
    assert ("its 3 samples are left out" in caplog.text) == bool(bad)


# --- metadata ---

METADATA = [{"count": 2}, {}, {"count": 5, "names": ["cat", "dog"]}]
TAKING_METADATA = """
import functools
from torch import nn

def third(images, prompts, metadata):
    return [entry.get("count", 0) for entry in metadata]

def keyword(images, prompts, scale=1, *, metadata=None):
    return [-1] * len(prompts) if metadata is None else third(images, prompts, metadata)

def passing_on(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner

wrapped = passing_on(third)

class Called:
    def __call__(self, images, prompts, metadata=None):
        return keyword(images, prompts, metadata=metadata)

class Module(nn.Module):
    def forward(self, images, prompts, metadata):
        return third(images, prompts, metadata)

def changing(images, prompts, metadata):
    return [entry.pop("count", 0) for entry in metadata]

def without(images, prompts):
    return [-1] * len(prompts)

def anything(images, prompts, **kwargs):
    return [-1 - len(kwargs)] * len(prompts)
"""


@pytest.fixture
def taking(tmp_path) -> str:
    (tmp_path / "taking.py").write_text(TAKING_METADATA)
    return f"{tmp_path}/taking.py"


@pytest.mark.parametrize("function", ["third", "keyword", "wrapped", "Called", "Module", "changing"])
def test_a_reward_with_a_parameter_metadata_is_given_it(taking, function):
    reward = load_reward(f"{taking}:{function}", {})
    for _ in range(2):  # the second call's are not what the first has made of them
        assert score(reward, IMAGES, PROMPTS, 10, METADATA).tolist() == [2, 0, 5]
    same = [METADATA[0]] * 3  # samples of one prompt share its entry
    assert score(reward, IMAGES, PROMPTS, 10, same).tolist() == [2, 2, 2] and METADATA[0] == {"count": 2}


@pytest.mark.parametrize("function, kwargs", [("without", {}), ("anything", {}), ("keyword", {"metadata": None})])
def test_another_reward_is_called_as_if_there_were_none(taking, function, kwargs):
    assert score(load_reward(f"{taking}:{function}", kwargs), IMAGES, PROMPTS, 10, METADATA).tolist() == [-1] * 3


@pytest.mark.parametrize("function, needing", [("third", True), ("wrapped", True), ("Module", True), ("keyword", False), ("Called", False)])
@pytest.mark.parametrize("summed", [False, True])
def test_a_reward_that_needs_metadata_is_refused_where_prompts_have_none(taking, function, needing, summed):
    name, kwargs = ("weighted_sum", {"rewards": {f"{taking}:{function}": 1.0}}) if summed else (f"{taking}:{function}", {})
    if not needing:
        assert score(load_reward(name, kwargs, "prompts.name"), IMAGES, PROMPTS, 10).tolist() == [-1] * 3
        return
    with pytest.raises(ValueError, match=rf"reward.name={name}: .*{function} needs metadata, and the prompts of prompts.name have none"):
        load_reward(name, kwargs, "prompts.name")
    assert score(load_reward(name, kwargs), IMAGES, PROMPTS, 10, METADATA).tolist() == [2, 0, 5]


def test_metadata_of_a_batch_that_is_scored_again(taking, caplog):
    failing = iter([True, False])

    def reward(images, prompts, metadata):
        if next(failing):
            raise MemoryError
        return [entry.get("count", 0) for entry in metadata]

    scorer = Scorer(ThreadedReward(lambda: reward, 600))
    scorer.add(IMAGES, PROMPTS, METADATA)
    assert scorer.rewards().tolist() == [2, 0, 5]
