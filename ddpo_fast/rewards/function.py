"""A reward, (images (B, 3, H, W) fp32 in [0, 1], prompts: B strings) -> (B,) numbers: finding it by its name and calling it."""

import copy
import importlib
import importlib.util
import inspect
import os
import sys
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ddpo_fast.memory import is_out_of_memory

# a process that is forked has none of the threads that this one computes with, and would wait for them
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))

REWARDS = {
    "jpeg_compressibility": "ddpo_fast.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "ddpo_fast.rewards.jpeg:jpeg_incompressibility",
    "embedded_alignment": "ddpo_fast.rewards.embedded_alignment:embedded_alignment",
    "aesthetic": "ddpo_fast.rewards.aesthetic:Aesthetic",
    "clip_score": "ddpo_fast.rewards.clip_score:ClipScore",
    "pickscore": "ddpo_fast.rewards.clip_score:PickScore",
    "weighted_sum": "ddpo_fast.rewards.weighted_sum:WeightedSum",
    "vlm_alignment": "ddpo_fast.rewards.vlm:VlmAlignment",
    "vlm_counting": "ddpo_fast.rewards.vlm:VlmCounting",
}


def load_reward(name: str, kwargs: dict, without_metadata: str | None = None) -> Callable:
    """The reward (images, prompts) of a name, given its arguments: one of REWARDS, `path/to/file.py:function` or `package.module:function`.

    In place of a function there may be a class, what must be loaded once: the reward is then its instance, made with the arguments.
    Either may take `metadata` besides. without_metadata: an option whose prompts have none, so that a reward must not need it.
    Raises ValueError, naming the option, when there is no such function or it does not take (images, prompts, **kwargs).
    """
    source, _, function_name = REWARDS.get(name, name).rpartition(":")
    if not source or not function_name.isidentifier():
        raise ValueError(f"reward.name={name}: {_VALID}")
    if source.endswith(".py") and not os.path.isfile(source):
        raise ValueError(f"reward.name={name}: there is no file {source}")
    # where the module's own imports are looked for, after everything else
    folder = str(Path(source).resolve().parent if source.endswith(".py") else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = _load_file(Path(source).resolve()) if source.endswith(".py") else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward.name={name}: importing {source} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = ", ".join(n for n, f in vars(module).items() if inspect.isfunction(f) or inspect.isclass(f)) or "none"
        raise ValueError(f"reward.name={name}: {source} has no function {function_name}; it has: {functions}")
    try:
        if inspect.isclass(function):
            inspect.signature(function).bind(**kwargs)
        else:
            inspect.signature(function).bind(None, None, **_with_metadata(function, None) | kwargs)
    except ValueError:
        raise ValueError(f"reward.name={name}: {function_name} has no signature; valid is a function (images, prompts, **kwargs)") from None
    except TypeError as error:
        given = "**kwargs" if inspect.isclass(function) else "images, prompts, **kwargs"
        raise ValueError(f"reward.kwargs={kwargs}: {function_name}({given}) does not take them: {error}") from None
    reward = _make(name, function, kwargs) if inspect.isclass(function) else partial(function, **kwargs) if kwargs else function
    if without_metadata and (needing := needs_metadata(reward, function_name)):
        raise ValueError(
            f"reward.name={name}: {needing} needs metadata, and the prompts of {without_metadata} have none; valid is a prompts.file "
            "with metadata, or a reward whose metadata has a default value"
        )
    return reward


def _make(name: str, reward: type, kwargs: dict) -> Callable:
    try:
        instance = reward(**kwargs)
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward.name={name}: {reward.__name__}(**kwargs) raised {type(error).__name__}: {error}") from error
    try:
        inspect.signature(instance).bind(None, None, **_with_metadata(instance, None))
    except TypeError:
        raise ValueError(f"reward.name={name}: an instance of {reward.__name__} cannot be called with (images, prompts)") from None
    return instance


def _metadata_parameter(reward: Callable) -> inspect.Parameter | None:
    """The parameter `metadata`; None if there is none, or reward.kwargs sets it."""
    if isinstance(reward, partial) and "metadata" in reward.keywords:
        return None
    parameter = inspect.signature(reward.forward if isinstance(reward, nn.Module) else reward).parameters.get("metadata")
    return parameter if parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) else None


def _with_metadata(reward: Callable, metadata: list[dict] | None) -> dict:
    """The argument that a reward takes besides: copies, which it may change; none if it takes no metadata."""
    return {} if _metadata_parameter(reward) is None else {"metadata": metadata and [copy.deepcopy(entry) for entry in metadata]}


def needs_metadata(reward: Callable, name: str) -> str | None:
    """The name of what cannot be called without metadata: the reward, or a part of it."""
    parameter = _metadata_parameter(reward)
    return name if parameter is not None and parameter.default is parameter.empty else getattr(reward, "needs_metadata", None)


_FILES: dict[Path, tuple[int, ModuleType]] = {}
"""By file, the module that is loaded, and when the file was written."""


def _load_file(file: Path) -> ModuleType:
    """The module in a file, which is executed once, and again when the file has changed.

    The module has the name that `import` finds it by, as the workers of a process pool do. Where another module has that name, it has a
    name of its own, which no worker can import.
    """
    written = file.stat().st_mtime_ns
    if file in _FILES and _FILES[file][0] == written:
        return _FILES[file][1]
    name = file.stem if _finds(file) else f"reward_{file.stem}_{zlib.crc32(bytes(file)):x}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    spec.loader.exec_module(module)
    _FILES[file] = written, module
    return module


def _finds(file: Path) -> bool:
    """Whether `import` of a file's name finds that file."""
    try:
        spec = importlib.util.find_spec(file.stem)
    except (ImportError, ValueError):  # what is before a dot is no package; the main module
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file


_VALID = f"valid is one of {', '.join(REWARDS)}, path/to/file.py:function or package.module:function"


class RewardError(RuntimeError):
    """A call of a reward that failed; the message says how."""


class RewardMemoryError(RewardError):
    """A call that ran out of memory; it may do better when nothing is denoised beside it."""


def call(reward: Callable, images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> Tensor:
    """Calls a reward on the images' device, without gradient, and checks its answer. Returns (B,) fp64 on the CPU.

    metadata: B JSON objects for one that takes them; None where the prompts have none, then it is called without.
    What fp32 cannot hold becomes infinite. Raises RewardError, caused by what the function raised, sys.exit() included; that is a
    RewardMemoryError if memory ran out.
    """
    if images.is_cuda:
        torch.cuda.set_device(images.device)  # the current device is a thread's own
    try:
        with torch.no_grad():
            answer = reward(images, prompts, **({} if metadata is None else _with_metadata(reward, metadata)))
    except RewardError:
        raise
    except BaseException as error:
        kind = RewardMemoryError if is_out_of_memory(error) else RewardError
        raise kind(f"the reward function raised {type(error).__name__}: {error}") from error
    try:
        rewards = torch.as_tensor(answer).detach()
        if rewards.is_complex():
            raise TypeError("complex numbers have no order")
        rewards = rewards.to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(f"the reward function returned {type(answer).__name__}, not {len(prompts)} numbers: {error}") from error
    if rewards.shape != (len(prompts),):
        raise RewardError(f"the reward function returned shape {tuple(rewards.shape)}, not ({len(prompts)},)")
    return rewards.masked_fill(rewards.abs() > torch.finfo(torch.float32).max, torch.inf)


def score(reward: Callable, images: Tensor, prompts: list[str], timeout_s: float, metadata: list[dict] | None = None) -> Tensor:
    """`call` that is abandoned (its daemon thread is left behind) and raises RewardError when it outlasts `timeout_s`."""
    rewards = in_background("reward", call, reward, images, prompts, metadata)
    if wait([rewards], timeout_s).not_done:
        raise RewardError(f"the reward function took longer than reward.timeout_s={timeout_s}")
    try:
        return rewards.result()
    finally:
        del rewards  # else a cycle, by way of its exception's traceback, keeps the images


def in_background(name: str, function: Callable, *args) -> Future:
    """Calls a function in a daemon thread: unlike an executor's, it does not keep a program from ending."""
    future = Future()
    threading.Thread(target=_run, args=(future, function, args), daemon=True, name=name).start()
    return future


def _run(future: Future, function: Callable, args: tuple) -> None:
    try:
        future.set_result(function(*args))
    except BaseException as error:
        future.set_exception(error)
        del future  # see `score`
