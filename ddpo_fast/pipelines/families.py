"""The pipelines that can be trained: one entry a class of diffusers. What is not said here, the pipeline's own call says.

An entry holds what the call cannot tell: the names of some of its arguments, what its authors published, how its numbers are meant.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """A class of pipelines."""

    title: str
    """What people call it."""
    network: str = "transformer"
    """The part that is trained."""
    process: Literal["flow", "diffusion"] = "flow"
    """flow: x_t = (1 - sigma) x0 + sigma e, at the levels of the pipeline's own scheduler. diffusion: at those of its betas, by DDIM."""
    guidance: str = "guidance_scale"
    """The argument of the call that sample.guidance_scale is."""
    negative_prompt: str | None = None
    """Given to the call where there is guidance; None: the pipeline's own."""
    arguments: Mapping[str, object] = field(default_factory=dict)
    """Other arguments of the call that differ from the pipeline's own defaults."""
    encoded: Callable[[object, Mapping[str, object]], object] | None = None
    """Changes what encode_prompt returns, for a pipeline whose call would otherwise depend on the prompts beside it."""


def _keep_mask(encoded: tuple[Tensor, Tensor | None], arguments: Mapping[str, object]) -> tuple[Tensor, Tensor]:
    """Qwen-Image's text, padded to one length, with a mask also where no token is masked: otherwise both would depend on the prompts."""
    embeds, mask = encoded
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device) if mask is None else mask
    missing = arguments["max_sequence_length"] - embeds.shape[1]
    return torch.nn.functional.pad(embeds, (0, 0, 0, missing)), torch.nn.functional.pad(mask, (0, missing))


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family("Stable Diffusion 1.x and 2.x", network="unet", process="diffusion"),
    "StableDiffusionXLPipeline": Family("Stable Diffusion XL", network="unet", process="diffusion"),
    "StableDiffusion3Pipeline": Family("Stable Diffusion 3 and 3.5"),
    "FluxPipeline": Family("FLUX.1 (dev)"),
    "Flux2KleinPipeline": Family("FLUX.2 klein (base)"),
    "ChromaPipeline": Family("Chroma", negative_prompt=""),
    "SanaPipeline": Family("SANA", arguments={"use_resolution_binning": False}),
    "ZImagePipeline": Family("Z-Image"),
    "QwenImagePipeline": Family(
        "Qwen-Image", guidance="true_cfg_scale", negative_prompt=" ", arguments={"max_sequence_length": 128}, encoded=_keep_mask
    ),
    "Lumina2Pipeline": Family("Lumina-Image 2.0"),
    "AuraFlowPipeline": Family("AuraFlow"),
    "HiDreamImagePipeline": Family("HiDream"),
}
"""By the name of the pipeline's class."""

_REFUSED = (
    ("Img2Img|Image2|ImageTo|I2|Inpaint|Edit|Control|Adapter|Kontext|Fill|Redux|Pix2Pix|Depth|Upscale|Refiner", "it is given a picture"),
    ("Wan|Video|T2V|LTX|Mochi|CogVideo|SkyReels|AnimateDiff|Allegro|Latte", "it draws videos, which no reward here takes"),
    ("CogView4", "a prompt's text depends on the prompts beside it, so its transitions cannot be batched"),
    ("PixArt|HunyuanDiT", "its network predicts a variance, too, and diffusers has no LoRA for it"),
    ("Sprint|Turbo|Distilled|Consistency", "it is distilled to a few steps of its own, which have no density to train by"),
)
"""Parts of names of pipelines' classes, and why they are refused."""


def find_family(index: Mapping[str, object]) -> str:
    """The class of a pipeline with this model_index.json. Raises ValueError, with the reason, for one that cannot be trained."""
    name = index.get("_class_name")
    if isinstance(name, str) and name in FAMILIES:
        return name
    reason = next((why for part, why in _REFUSED if isinstance(name, str) and re.search(part, name)), None)
    raise ValueError(f"it holds a {name}{'' if reason is None else f': {reason}'}; valid is one of {', '.join(FAMILIES)}")


def check_not_distilled(name: str, index: Mapping[str, object], network: Mapping[str, object]) -> None:
    """Raises ValueError for a distilled model of a family whose other models can be trained. network: the config of its network."""
    distilled = {
        "FluxPipeline": (not network.get("guidance_embeds", False), "guidance_embeds=false in transformer/config.json", "FLUX.1-dev"),
        "Flux2KleinPipeline": (index.get("is_distilled", False), "is_distilled=true in model_index.json", "the base model"),
    }
    found, sign, valid = distilled.get(name, (False, "", ""))
    if found:
        raise ValueError(f"it is distilled to a few steps of its own, which have no density to train by ({sign}); valid is {valid}")
