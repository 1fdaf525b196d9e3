"""Finds a reward by its name and calls it. A reward is (images (B, 3, H, W) fp32 in [0, 1], prompts: B strings) -> (B,) numbers."""

import asyncio
import copy
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import threading
import traceback
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ddpo_fast.memory import is_out_of_memory
from ddpo_fast.rewards import CHOICES, attribute
from ddpo_fast.scoring.answer import NotNumbers, to_numbers

# a forked process lacks the threads that torch computes with here, and would wait for them
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


def load_reward(name: str, kwargs: dict, without_metadata: str | None = None) -> Callable:
    """The reward (images, prompts) of a name, given its arguments.

    The name is that of a file in rewards/, `path/to/file.py:function` or `package.module:function`.
    A class may take the function's place if something has to be loaded once. The reward is then an instance, made with the arguments.
    Either may also take `metadata`. without_metadata: the option of prompts that have no metadata; the reward must not need it then.
    Raises ValueError, naming the option, when there is no such function or it does not take (images, prompts, **kwargs).
    """
    source, function_name = reward_source(name)
    if not source or not function_name.isidentifier():
        raise ValueError(f"reward.name={name}: {_VALID}")
    if source.endswith(".py") and not os.path.isfile(source):
        raise ValueError(f"reward.name={name}: there is no file {source}")
    # the module's own imports are looked for here, after all other places
    folder = str(Path(source).resolve().parent if source.endswith(".py") else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    event_loop()
    try:
        module = _load_file(Path(source).resolve()) if source.endswith(".py") else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward.name={name}: importing {source} failed: {_said(error)}") from error
    function_name = attribute(module, name) if name in CHOICES else function_name
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


def reward_source(name: str) -> tuple[str, str]:
    """The file or module of a reward, and the function or class in it; both are empty if the name is not that of a reward."""
    source, _, function_name = (f"ddpo_fast.rewards.{name}:{name}" if name in CHOICES else name).rpartition(":")
    return source, function_name


def _make(name: str, reward: type, kwargs: dict) -> Callable:
    try:
        instance = reward(**kwargs)
    except (Exception, SystemExit) as error:
        if isinstance(error, ValueError) and str(error).startswith("reward."):  # an error of our own rewards, which names the option
            raise
        raise ValueError(f"reward.name={name}: {reward.__name__}(**kwargs) raised {_said(error)}") from error
    try:
        inspect.signature(instance).bind(None, None, **_with_metadata(instance, None))
    except TypeError:
        raise ValueError(f"reward.name={name}: an instance of {reward.__name__} cannot be called with (images, prompts)") from None
    return instance


def _metadata_parameter(reward: Callable) -> inspect.Parameter | None:
    """A reward's parameter `metadata`; None if it has none, or if reward.kwargs sets it."""
    if isinstance(reward, partial) and "metadata" in reward.keywords:
        return None
    parameter = inspect.signature(reward.forward if isinstance(reward, nn.Module) else reward).parameters.get("metadata")
    return parameter if parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) else None


def _with_metadata(reward: Callable, metadata: list[dict] | None) -> dict:
    """The argument `metadata` for a reward, as copies, which it may change; empty if it takes no metadata."""
    return {} if _metadata_parameter(reward) is None else {"metadata": metadata and [copy.deepcopy(entry) for entry in metadata]}


def needs_metadata(reward: Callable, name: str) -> str | None:
    """The name of what cannot be called without metadata, the reward or a part of it; None if there is nothing."""
    parameter = _metadata_parameter(reward)
    return name if parameter is not None and parameter.default is parameter.empty else getattr(reward, "needs_metadata", None)


_of_thread = threading.local()


def event_loop() -> asyncio.AbstractEventLoop:
    """This thread's event loop, the same in all calls: what a reward opens in one call, such as a session, it can use in the next."""
    if not hasattr(_of_thread, "loop") or _of_thread.loop.is_closed():
        _of_thread.loop = asyncio.new_event_loop()
    asyncio.set_event_loop(_of_thread.loop)  # asyncio.run takes it away
    return _of_thread.loop


def close_event_loop() -> None:
    """Closes this thread's event loop, if it has one."""
    if hasattr(_of_thread, "loop"):
        _of_thread.loop.close()


def _load_file(file: Path) -> ModuleType:
    """The module in a file, which is executed once for all parts of a reward.

    The module gets the name by which `import` finds it, because the workers of a process pool import it. If that name belongs to another
    module, it gets a different one, which no worker can import.
    """
    files = vars(_of_thread).setdefault("files", {})
    if file in files:
        return files[file]
    name = file.stem if _finds(file) else f"reward_{file.stem}_{zlib.crc32(bytes(file)):x}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    spec.loader.exec_module(module)
    files[file] = module
    return module


def _finds(file: Path) -> bool:
    """Whether `import` of a file's name finds that file."""
    try:
        spec = importlib.util.find_spec(file.stem)
    except (ImportError, ValueError):  # what is before a dot is not a package; or it is the main module
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file


_VALID = f"valid is one of {', '.join(CHOICES)}, path/to/file.py:function or package.module:function"


def _said(error: BaseException) -> str:
    """An error, where in the user's code it was raised, and what would help."""
    frames = traceback.extract_tb(error.__traceback__)
    advice = "; reward.isolate=true calls it in a main thread" if "signal only works in main thread" in str(error) else ""
    return f"{type(error).__name__}: {error}{place(frames)}{advice}"


def place(frames: traceback.StackSummary) -> str:
    """The last line in the frames that is the user's own code, not Python's, a package's or ours."""
    others = (*sysconfig.get_paths().values(), str(Path(__file__).parents[1]), "<")
    own = [frame for frame in frames if not frame.filename.startswith(others)]
    return f" ({own[-1].filename}, line {own[-1].lineno}, in {own[-1].name})" if own else ""


class RewardError(RuntimeError):
    """A call of a reward that failed; the message says how."""


class RewardMemoryError(RewardError):
    """A call that ran out of memory. It may succeed later, while nothing is being denoised."""


def call(reward: Callable, images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> Tensor:
    """Calls a reward on the images' device, without gradient, and checks its answer. Returns (B,) fp64 on the CPU.

    metadata: B JSON objects for a reward that takes them; None if the prompts have none; then the reward is called without.
    An `async def` is awaited. What fp32 cannot hold becomes infinite. Raises RewardError, caused by what the function raised,
    sys.exit() included. It is a RewardMemoryError if memory ran out.
    """
    if images.is_cuda:
        torch.cuda.set_device(images.device)  # each thread has its own current device
    try:
        with torch.no_grad():
            loop = event_loop()
            answer = reward(images, prompts, **({} if metadata is None else _with_metadata(reward, metadata)))
            if inspect.isawaitable(answer):
                answer = loop.run_until_complete(answer)
    except RewardError:
        raise
    except BaseException as error:
        kind = RewardMemoryError if is_out_of_memory(error) else RewardError
        raise kind(f"the reward function raised {_said(error)}") from error
    try:
        rewards = to_numbers(answer, len(prompts))
    except NotNumbers as error:
        raise RewardError(f"the reward function returned {error}") from None
    return rewards.masked_fill(rewards.abs() > torch.finfo(torch.float32).max, torch.inf)
