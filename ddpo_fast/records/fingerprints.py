"""Hashes of a run's prompts, its reward's code and its model's weights. Checkpoints keep them, so that --resume can say what has changed
since: options may name new places, and something else may be in an old place."""

import hashlib
import inspect
import json
import os
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ddpo_fast.distributed.partition import whole
from ddpo_fast.places import is_address
from ddpo_fast.scoring.function import reward_source

_SAMPLES = 64
"""The number of elements of each tensor whose position counts, too."""


def of_model(pipe: DiffusionPipeline, network: str, has_own_vae: bool) -> dict[str, str]:
    """Hashes of a pipeline's weights and configs. network: the name of the part that is trained.

    Every element of every weight counts. Each is read once, on its device. This takes a second for SD 1.5 in fp32 on a core that adds
    4 GB/s, and some milliseconds for SDXL on a GPU.
    """
    vae = "model.path" if has_own_vae else "model.vae"
    encoders = [name for name, part in pipe.components.items() if name.startswith("text_encoder") and isinstance(part, nn.Module)]
    found = {f"model.path (the {part} weights)": _weights(getattr(pipe, part)) for part in (network, *encoders)}
    found |= {f"{vae} (the vae weights)": _weights(pipe.vae), f"{vae} (the vae config)": _configured(pipe.vae)}
    found |= {f"model.path (the {part} config)": _configured(getattr(pipe, part)) for part in (network, "scheduler")}
    return found | {f"model.path (the {part} config)": _differing(getattr(pipe, part)) for part in encoders}


def of_reward(name: str, kwargs: dict) -> dict[str, str]:
    """Hashes of the text of a reward's modules and of its files. The parts of a weighted sum count; what the modules import does not."""
    parts = kwargs.get("rewards") if name == "weighted_sum" else None
    return {
        "reward.name (the text of its code)": _hash(*map(_code, [name, *(parts if isinstance(parts, dict) else ())])),
        "reward.kwargs (the files that it names)": _hash(*map(_sampled, _files(kwargs))),
    }


def of_text(what: str, text: object) -> dict[str, str]:
    """A hash of `text`, which is anything that JSON can write."""
    return {what: _hash(json.dumps(text, default=str).encode())}


def changes(now: dict[str, str], before: dict[str, str]) -> list[str]:
    """The names of what was there before and is different now."""
    return [name for name, value in now.items() if before.get(name, value) != value]


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _code(name: str) -> bytes:
    """The text of a reward's module, without importing it. For a server, its address."""
    source, _ = reward_source(name)
    if is_address(name):
        return name.encode()
    if source.endswith(".py"):
        files = [source]
    elif source in sys.modules:
        files = [getattr(sys.modules[source], "__file__", None)]
    else:  # it is imported in another process
        path = source.replace(".", os.sep)
        files = [os.path.join(folder, path + end) for folder in [*sys.path, "."] for end in (".py", f"{os.sep}__init__.py")]
    return next((Path(file).read_bytes() for file in files if file and os.path.isfile(file)), b"")


def _files(value) -> list[str]:
    if isinstance(value, dict | list):
        return [file for item in (value.values() if isinstance(value, dict) else value) for file in _files(item)]
    return [value] if isinstance(value, str) and os.path.isabs(value) and os.path.isfile(value) else []


def _sampled(file: str) -> bytes:
    """A file's size and some of its contents; all of them may be gigabytes."""
    size, block = os.path.getsize(file), 1 << 20
    with open(file, "rb") as opened:
        parts = [str(size).encode()]
        for start in sorted({0, size // 2, max(0, size - block)}):
            opened.seek(start)
            parts.append(opened.read(block))
    return b"".join(parts)


def _configured(part: nn.Module) -> str:
    """A hash of the values in a part's config that are not defaults: a default that a new version of diffusers adds is not a change."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(part).__init__).parameters.items()}
    own = {name: value for name, value in part.config.items() if not name.startswith("_") and value != defaults.get(name)}
    return _hash(json.dumps(own, sort_keys=True, default=str).encode())


def _differing(encoder: nn.Module) -> str:
    """`_configured` for a network of transformers."""
    own = {name: value for name, value in encoder.config.to_diff_dict().items() if name not in ("transformers_version", "dtype")}
    return _hash(json.dumps(own, sort_keys=True, default=str).encode())


@torch.no_grad()
def _weights(module: nn.Module) -> str:
    """A hash of a module's weights without LoRA's. The weights' names are not part of it, since libraries change them."""
    tensors = [tensor for name, tensor in module.named_parameters() if ".lora_" not in name]
    sums, samples, kinds = [], [], []
    for tensor in tensors:
        with whole(tensor):
            for made, found in zip((sums, samples), _summed(tensor)):
                made.append(found)
            kinds.append((tuple(tensor.shape), str(tensor.dtype)))
    digests = zip(torch.stack(sums).tolist(), torch.cat(samples).cpu().view(torch.uint8).view(len(tensors), -1).numpy())
    return _hash(*sorted(f"{kind} {total} {some.tobytes().hex()}".encode() for kind, (total, some) in zip(kinds, digests)))


def _summed(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor's bytes as 64-bit integers, added modulo 2^64 in any order, and some of its elements, (64,) fp64."""
    flat = tensor.contiguous().flatten()
    flat = flat.clone() if flat.data_ptr() % 8 else flat
    words, rest = flat.view(torch.uint8).split([len(flat) * flat.itemsize // 8 * 8, len(flat) * flat.itemsize % 8])
    some = flat[:: -(-len(flat) // _SAMPLES)].double()
    return words.view(torch.int64).sum() + rest.sum(dtype=torch.int64), torch.nn.functional.pad(some, (0, _SAMPLES - len(some)))
