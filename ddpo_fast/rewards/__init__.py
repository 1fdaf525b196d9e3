"""Rewards: functions (images (B, 3, H, W) fp32 in [0, 1], prompts: B strings, **kwargs) -> (B,) numbers, higher is better."""

import importlib
import importlib.util
import inspect
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

REWARDS = {
    "jpeg_compressibility": "ddpo_fast.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "ddpo_fast.rewards.jpeg:jpeg_incompressibility",
    "embedded_alignment": "ddpo_fast.rewards.embedded_alignment:embedded_alignment",
}


def load_reward(name: str, kwargs: dict) -> Callable:
    """The function of a reward's name: one of REWARDS, `path/to/file.py:function` or `package.module:function`.

    Raises ValueError, naming the option, when there is no such function or it does not take (images, prompts, **kwargs).
    """
    if name == "aesthetic":
        raise ValueError("reward.name=aesthetic: this reward comes in a later version; " + _VALID)
    source, _, function_name = REWARDS.get(name, name).rpartition(":")
    if not source or not function_name.isidentifier():
        raise ValueError(f"reward.name={name}: {_VALID}")
    if source.endswith(".py") and not Path(source).is_file():
        raise ValueError(f"reward.name={name}: there is no file {source}")
    # where the module's own imports are looked for, after everything else
    sys.path.append(str(Path(source).resolve().parent if source.endswith(".py") else Path.cwd()))
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"reward_{Path(source).stem}", source)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # where dataclasses and pickle look for it
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward.name={name}: importing {source} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = ", ".join(n for n, f in vars(module).items() if inspect.isfunction(f)) or "none"
        raise ValueError(f"reward.name={name}: {source} has no function {function_name}; it has: {functions}")
    try:
        inspect.signature(function).bind(None, None, **kwargs)
    except ValueError:
        raise ValueError(f"reward.name={name}: {function_name} has no signature; valid is a function (images, prompts, **kwargs)") from None
    except TypeError as error:
        raise ValueError(f"reward.kwargs={kwargs}: {function_name}(images, prompts, **kwargs) does not take them: {error}") from None
    return function


_VALID = f"valid is one of {', '.join(REWARDS)}, path/to/file.py:function or package.module:function"


def score(reward: Callable, images: Tensor, prompts: list[str], kwargs: dict, timeout_s: float) -> Tensor:
    """Calls a reward and checks its answer. Returns (B,) fp64 on the CPU; raises RuntimeError that says what it did wrong.

    A call that outlasts `timeout_s` is abandoned (its daemon thread is left behind) and raises.
    """
    outcome = {}

    def call():
        if images.is_cuda:
            torch.cuda.set_device(images.device)  # the current device is a thread's own
        try:
            with torch.no_grad():
                outcome["rewards"] = reward(images, prompts, **kwargs)
        except BaseException as error:  # sys.exit() too
            outcome["error"] = error

    thread = threading.Thread(target=call, daemon=True, name="reward")
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise RuntimeError(f"the reward function took longer than reward.timeout_s={timeout_s}")
    if error := outcome.get("error"):
        raise RuntimeError(f"the reward function raised {type(error).__name__}: {error}") from error
    try:
        rewards = torch.as_tensor(outcome["rewards"]).detach()
        if rewards.is_complex():
            raise TypeError("complex numbers have no order")
        rewards = rewards.to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(outcome["rewards"]).__name__
        raise RuntimeError(f"the reward function returned {kind}, not {len(prompts)} numbers: {error}") from error
    if rewards.shape != (len(prompts),):
        raise RuntimeError(f"the reward function returned shape {tuple(rewards.shape)}, not ({len(prompts)},)")
    return rewards


def score_or_nan(reward: Callable, images: Tensor, prompts: list[str], kwargs: dict, timeout_s: float) -> Tensor:
    """`score`, but a call that fails is logged and gives NaN, which leaves its samples out of the update."""
    try:
        return score(reward, images, prompts, kwargs, timeout_s)
    except RuntimeError as error:
        logger.warning("%s; its %d samples are left out", error, len(prompts), exc_info=error.__cause__)
        return torch.full((len(prompts),), torch.nan, dtype=torch.float64)
