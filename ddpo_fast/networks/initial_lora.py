"""lora.init: starts a run from a LoRA of ours, of diffusers, or in a single file as kohya's sd-scripts write it."""

import inspect
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft.tuners import lora
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from ddpo_fast.networks.lora import LORA_TARGETS, block_names
from ddpo_fast.networks.merged_lora import ADAPTER, lora_weights
from ddpo_fast.places import lora_file

_OTHER_KINDS = ("dora_scale", "lora_magnitude", "hada_", "lokr_", "lora_mid", "oft_")
"""Parts of the names of tensors that are not LoRA's A and B: DoRA, LoHa, LoKr, CP decomposition, OFT."""
_DIFFERENCES = (".diff", ".diff_b")
"""Ends of the names of tensors that are the whole difference of a weight."""
_WORDS = {"unet": "UNet", "transformer": "transformer"}


def start_from(pipe: DiffusionPipeline, init: str, scope: str) -> str:
    """Copies the LoRA `init` into that of a pipeline's network, which then computes the same with either. Returns a line about it.

    The scale of `init`, alpha / r of each layer, goes into B. Where `init` has a lower rank, or lacks a layer, the rest stays as it was:
    A random, B zero. Raises ValueError unless `init` is a LoRA whose layers are all trained here, with at most their rank.
    """
    part = "unet" if "unet" in pipe.components else "transformer"
    network = pipe.components[part]
    ours = {name: layer for name, layer in network.named_modules() if isinstance(layer, lora.LoraLayer)}
    given = _read(pipe, part, init)
    _check(init, scope, given, ours, block_names(network))
    with torch.no_grad():
        for name, (A, B, scale) in given.items():
            _, own_A, own_B = lora_weights(ours[name])
            own_A[: len(A)] = A.to(own_A)
            own_B[:, : len(A)] = (scale / ours[name].scaling[ADAPTER] * B).to(own_B)
    ranks = sorted({len(A) for A, _, _ in given.values()})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"lora.init={init}: {len(given)} of the {len(ours)} layers that are trained, rank {shown} of {len(own_A)}"


def _read(pipe: DiffusionPipeline, part: str, init: str) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Reads a LoRA from a file: for each layer of the pipeline's `part` A (r, I, ...) and B (O, r, ...), both fp32, and the scale."""
    file = lora_file(init)
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
        others = (name for name in names if name.endswith(_DIFFERENCES) or any(kind in name for kind in _OTHER_KINDS))
        if other := next(others, None):
            raise ValueError(f"{other} is of another kind than LoRA's A and B")
        tensors, alphas, metadata = _load(pipe, part, file)
        if not any(name.startswith((f"{part}.", "text_encoder")) for name in tensors):  # as a network's save_lora_adapter writes it
            tensors = {f"{part}.{name}": tensor for name, tensor in tensors.items()}
            metadata = {f"{part}.{name}": value for name, value in metadata.items()}
        if others := sorted({name.split(".")[0] for name in tensors} - {part}):
            raise ValueError(
                f"it also has layers of the {' and '.join(others)}, which is not trained here; valid is a LoRA of the "
                f"{_WORDS[part]} alone, or, as model.path, a pipeline that it has been fused into: load_lora_weights, fuse_lora, "
                "unload_lora_weights, save_pretrained"
            )
        tensors, alphas, metadata = (
            {name.removeprefix(f"{part}."): value for name, value in values.items()}
            for values in (_in_peft_s_names(tensors), _in_peft_s_names(alphas), metadata)
        )
        _check_layers(tensors, pipe.components[part])
        halves = {name.removesuffix(".lora_A.weight"): name for name in tensors if name.endswith(".lora_A.weight")}
        return {
            name: (tensors[half].float(), tensors[f"{name}.lora_B.weight"].float(), _scale(name, len(tensors[half]), alphas, metadata))
            for name, half in halves.items()
            if tensors[f"{name}.lora_B.weight"].any()  # kohya's joined layers have zeros for those without a LoRA
        }
    except Exception as error:  # the libraries may raise anything for a damaged or foreign file
        raise ValueError(f"lora.init={init}: it cannot be loaded: {' '.join(str(error).split())}") from error


def _load(pipe: DiffusionPipeline, part: str, file: Path) -> tuple[dict, dict, dict]:
    """What the pipeline's own reader makes of a file, which may be of another program: tensors, the alphas that it leaves, metadata."""
    read, wanted = type(pipe).lora_state_dict, {"return_lora_metadata": True}
    if part == "unet":
        wanted["unet_config"] = pipe.unet.config
    if "return_alphas" in inspect.signature(read).parameters:
        wanted["return_alphas"] = True
    tensors, *alphas, metadata = read(str(file.parent), weight_name=file.name, use_safetensors=True, local_files_only=True, **wanted)
    return tensors, (alphas[0] if alphas else None) or {}, metadata or {}


def _in_peft_s_names(values: dict) -> dict:
    """Tensors, or alphas, with diffusers' older or newer names changed to peft's."""
    values = {name.removesuffix(".alpha"): value for name, value in values.items()}
    return values if any("lora_A" in name for name in values) else convert_unet_state_dict_to_peft(values)


def _scale(name: str, rank: int, alphas: dict[str, float], metadata: dict) -> float:
    """A layer's alpha / r, from kohya's alphas or from peft's config; 1 if the file has neither.

    diffusers' own loader (0.42) differs: it takes the commonest of kohya's alphas for all layers of attention.
    """
    if "lora_alpha" not in metadata:
        return float(alphas.get(name, alphas.get(f"{name}.lora_A.weight", rank))) / rank
    patterns = metadata.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, name), metadata["lora_alpha"])
    return alpha / (rank**0.5 if metadata.get("use_rslora") else rank)


def _check_layers(tensors: dict[str, Tensor], network: nn.Module) -> None:
    """Raises ValueError unless all tensors are A and B of the network's layers, with fitting shapes; it names the first that is not."""
    modules, halves = dict(network.named_modules()), {"lora_A": {}, "lora_B": {}}
    for full, tensor in tensors.items():
        name, _, half = full.removesuffix(".weight").rpartition(".")
        weight = getattr(modules.get(name), "weight", None)
        if half not in halves or weight is None:
            raise ValueError(f"the model has no layer for {full}")
        expected = (len(tensor), *weight.shape[1:]) if half == "lora_A" else (len(weight), *tensor.shape[1:])
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{full} is {tuple(tensor.shape)}, for a layer of {tuple(weight.shape)}: it is of another model")
        halves[half][name] = tensor
    if not tensors or halves["lora_A"].keys() != halves["lora_B"].keys():
        raise ValueError("it has no layers, or one without A or B")


def _check(init: str, scope: str, given: dict[str, tuple[Tensor, Tensor, float]], ours: dict[str, nn.Module], blocks: list[str]) -> None:
    """Raises ValueError, naming the option to change, unless all given layers are trained, with at least the given rank."""
    kinds, have = _kinds(given), _kinds(ours)
    if missing := next((name for name in sorted(given) if name not in ours), None):
        it = f"lora.init={init} has {missing}, which"
        if not _kinds([missing]) or not missing.startswith(tuple(f"{block}." for block in blocks)):
            raise ValueError(f"{it} is never trained here; valid is a LoRA of layers of blocks that lora.targets has a name for")
        if not kinds <= have:
            needed = [kind for kind in LORA_TARGETS if kind in kinds | have]
            raise ValueError(f"lora.targets={[kind for kind in LORA_TARGETS if kind in have]}: {it} is not trained then; valid is {needed}")
        raise ValueError(f"lora.scope={scope}: {it} is not trained then; valid is a scope with that block, such as all")
    rank, own = max(len(A) for A, _, _ in given.values()), next(iter(ours.values())).r[ADAPTER]
    if rank > own:
        raise ValueError(f"lora.rank={own}: lora.init={init} has rank {rank}; valid is {rank} or more")


def _kinds(names: Iterable[str]) -> set[str]:
    """The lora.targets that these layers belong to."""
    return {kind for name in names for kind, pattern in LORA_TARGETS.items() if re.search(pattern, name)}
