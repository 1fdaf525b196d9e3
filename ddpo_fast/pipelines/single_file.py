"""Loads networks from a single file of weights, with the names that Stable Diffusion was first published with, or with later ones."""

import re
from pathlib import Path

import torch
import transformers
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import safe_open
from torch import Tensor, nn

from ddpo_fast.pipelines.hub import check_readable, in_one_line
from ddpo_fast.pipelines.model_parts import NETWORKS

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
SDXL_PREFIXES = PREFIXES | {"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."}
_NEWER = (
    (
        r"state_dict\.(?=model\.|first_stage_model\.|cond_stage_model\.|conditioner\.|encoder\.|decoder\.)",
        "",
    ),  # a training run's checkpoint
    (r"((?:cond_stage_model|conditioner\.embedders\.0)\.transformer\.)(?=embeddings\.|encoder\.|final_layer_norm\.)", r"\1text_model."),
)
"""Patterns of names, and their replacements that diffusers knows: a prefix around other names, and names from before transformers 4."""
_VAE = re.compile(r"(?:first_stage_model\.|vae\.)?((?:encoder|decoder|quant_conv|post_quant_conv)\..*)")
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of layers in a VAE's attention in diffusers before 0.18, and their names now."""


def renamed(name: str) -> str:
    """A weight's name as diffusers knows it."""
    for old, new in _NEWER:
        name = re.sub(f"^{old}", new, name)
    return name


def names_in(option: str, path: str) -> list[str]:
    """The names of a file's weights, renamed."""
    check_readable(option, Path(path).parent, [Path(path).name])
    with in_one_line(option), safe_open(path, "pt") as file:
        return [renamed(name) for name in file.keys()]


def is_vae(names: list[str]) -> bool:
    return any((found := _VAE.fullmatch(name)) and found[1].startswith("decoder.") for name in names)


def load(option: str, path: str, folder: Path, part: str, prefix: str, dtype: torch.dtype) -> nn.Module:
    """A network from a file, with the config in `folder`. The names of its weights begin with `prefix`.

    A VAE's names may also have no prefix, or diffusers' own. Raises ValueError for a file that lacks a weight.
    """
    with in_one_line(option):
        with safe_open(path, "pt") as file:
            names = {renamed(name): name for name in file.keys()}
            if part != "vae":
                tensors = {name: file.get_tensor(old) for name, old in names.items() if name.startswith(prefix)}
            else:
                tensors = {_vae_name(found[1]): file.get_tensor(old) for name, old in names.items() if (found := _VAE.fullmatch(name))}
        try:
            network = _convert(tensors, folder, part)
        except NotImplementedError:  # diffusers moves a weight that the file lacks
            raise ValueError(f"it lacks weights of the {part}") from None
    check_complete(option, network)
    return network.to(dtype)


def check_complete(option: str, network: nn.Module) -> None:
    """Raises ValueError for a network of diffusers that still lacks a weight."""
    if missing := next((name for name, tensor in network.state_dict().items() if tensor.is_meta), None):
        raise ValueError(f"{option}: the weights of its {type(network).__name__} lack {missing}")


def _vae_name(name: str) -> str:
    return re.sub(r"(mid_block\.attentions\.0\.)(query|key|value|proj_attn)\.", lambda found: f"{found[1]}{_ATTENTION[found[2]]}.", name)


def _convert(tensors: dict[str, Tensor], folder: Path, part: str) -> nn.Module:
    if part in NETWORKS:
        return NETWORKS[part].from_single_file(tensors, config=str(folder), subfolder=part)
    kind = transformers.CLIPTextModelWithProjection if part == "text_encoder_2" else transformers.CLIPTextModel
    return create_diffusers_clip_model_from_ldm(kind, tensors, subfolder=part, config=str(folder), local_files_only=True)
