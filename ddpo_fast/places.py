"""Options that say where something is: makes their values absolute paths, and tells whether two values may be the same thing, moved."""

import json
import os
import re
from pathlib import Path

PLACES = ("model.path", "model.config", "model.vae", "lora.init", "prompts.file", "reward.name", "deepspeed.config", "run.dir")
"""The options that say where something is. --resume accepts new values, since a run does not depend on where things are. Once parsed they
are absolute paths, so that they mean the same in every working directory. A value that is not a path (a hub id, a server's address, a
reward of a package) stays as it is."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers and we give the file of a LoRA's weights."""
NETWORKS = ("unet", "transformer")
"""The parts of pipelines that are trained, and the folders that a fully fine-tuned one is written to."""


def located(option: str, value: str) -> str:
    """The absolute path of a place, from the working directory, with ~ as the home directory. `value` itself if it is not a path."""
    path, function = _path_and_function(option, value)
    if not path.strip() or (option.startswith("model.") and is_hub_id(path)):
        return value
    return str(Path(os.path.expanduser(path)).absolute()) + function


def typed_path(text: str) -> Path:
    """A path from a command line, with ~ as the home directory. After an equals sign, a shell leaves ~ as it is."""
    return Path(os.path.expanduser(text))


def is_missing(option: str, value: str) -> bool:
    """Whether a located place is not there."""
    path, _ = _path_and_function(option, value)
    return os.path.isabs(path) and not os.path.exists(path)


def located_kwargs(value):
    """reward.kwargs with absolute paths for rewards that are named by their files, and for texts with a / that name something there is."""
    if isinstance(value, dict):
        return {located("reward.name", key) if isinstance(key, str) else key: located_kwargs(item) for key, item in value.items()}
    if isinstance(value, list):
        return [located_kwargs(item) for item in value]
    is_place = isinstance(value, str) and os.sep in value and os.path.exists(os.path.expanduser(value))
    return str(Path(os.path.expanduser(value)).absolute()) if is_place else value


def may_be_same(option: str, value, before) -> bool:
    """Whether a place, or reward.kwargs, can mean the same thing as before, wherever that is now."""
    if option == "reward.kwargs":
        return _may_be_same_kwargs(value, before)
    if not isinstance(value, str) or not isinstance(before, str):
        return value == before
    return option != "reward.name" or _called(value) == _called(before)


def without_folders(config: dict) -> dict:
    """A run's config as others may see it: only the last part of each place, and of each absolute path in reward.kwargs."""
    shown = {section: dict(values) for section, values in config.items()}
    for section, key in (option.split(".") for option in (*PLACES, "reward.kwargs")):
        if key in shown.get(section, {}):
            shown[section][key] = _without_folders(shown[section][key])
    return shown


def _without_folders(value):
    if isinstance(value, dict):
        return {_without_folders(key): _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def is_hub_id(path: str) -> bool:
    """Whether a model has to be on the hub: nothing with that name is here, and it is a name such as org/name."""
    if os.path.exists(path) or Path(path).suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        return False
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) is not None


def lora_file(path: str) -> Path | None:
    """The weights of a LoRA: a file, or those in a folder, or in the lora/ of a run's directory; None if there are none."""
    files = (Path(path), Path(path, LORA_FILE), Path(path, "lora", LORA_FILE))
    return next((file for file in files if file.suffix == ".safetensors" and os.path.isfile(file)), None)


def is_lora(path: str) -> bool:
    """Whether a file of weights, or one in a folder, is a LoRA's, by the names in its header."""
    if os.path.isfile(Path(path, "model_index.json")) or (file := lora_file(path)) is None:
        return False
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            names = json.loads(opened.read(length)) if length <= os.path.getsize(file) else {}
    except (OSError, ValueError, RecursionError):  # not readable, or damaged: loading it says so
        return False
    return isinstance(names, dict) and any(re.search(r"lora_|\.lora\.|_lora\.", name) for name in names)


def is_address(reward: str) -> bool:
    """Whether a reward's name is a server's address."""
    return reward.lower().startswith(("http://", "https://"))


def _may_be_same_kwargs(value, before) -> bool:
    if isinstance(value, dict) and isinstance(before, dict) and len(value) == len(before):
        pairs = zip(value.items(), before.items())
        return all(may_be_same("reward.name", a, b) and _may_be_same_kwargs(c, d) for (a, c), (b, d) in pairs)
    if isinstance(value, str) and isinstance(before, str) and os.path.isabs(value) and os.path.exists(value):
        return True
    return value == before


def _path_and_function(option: str, value: str) -> tuple[str, str]:
    """The path and :function for the reward path/to/file.py:function; no path for another reward; the path alone for another option."""
    if option != "reward.name":
        return value, ""
    path, colon, function = value.rpartition(":")
    return (path, colon + function) if path.endswith(".py") and not is_address(value) else ("", value)


def _called(reward: str) -> str:
    """The part of a reward's name that does not say where it is: its function's name, or that it is a server."""
    return "http:" if is_address(reward) else "".join(reward.rpartition(":")[1:])
