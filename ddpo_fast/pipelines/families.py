"""The pipelines that can be trained: one entry a class of diffusers. What is not said here, the pipeline's own call says.

An entry holds what the call cannot tell: the names of some of its arguments, what was published, how its numbers are meant. This file
imports no torch, because a command line's defaults are in it.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

_SIZES = {"sample.num_samples": 64, "sample.batch_size": "auto", "train.micro_batch": "auto"}
"""Not published: what one GPU or eight can begin with."""
_DDPO = {
    **_SIZES,
    "sample.sampler": "ddim", "sample.eta": 1.0, "sample.num_steps": 50, "sample.guidance_scale": 5.0,
    "lora.targets": ["attention"], "lora.rank": 4, "lora.alpha": 4.0, "train.learning_rate": 3e-4, "train.clip_range": 1e-4,
}  # fmt: skip
"""DDPO (arXiv:2305.13301); LoRA's numbers are those of the PyTorch port of its code."""
_FLOW_GRPO = {
    **_SIZES,
    "sample.sampler": "flow_sde", "sample.eta": 0.7, "sample.num_steps": 10, "eval.sampler": "ode",
    "lora.targets": ["attention"], "lora.rank": 32, "lora.alpha": 64.0, "train.learning_rate": 3e-4, "train.clip_range": 4e-4,
}  # fmt: skip
"""Flow-GRPO (arXiv:2505.05470) for SD3.5-M. Its clip range, 1e-4 for 65,536 latent elements, is stated for 16,384 here."""
_LARGE = {"lora.targets": ["attention", "feed_forward"], "lora.rank": 64, "lora.alpha": 128.0}
"""LoRA of the large transformers: Flow-GRPO's for FLUX.1-dev, Flow-Factory's for FLUX.2 klein, Z-Image and Qwen-Image."""


@dataclass(frozen=True)
class Family:
    """A class of pipelines."""

    title: str
    """What people call it."""
    models: tuple[str, ...] = ()
    """Some of its models on the hub."""
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
    no_guidance: float = 1.0
    """The least guidance scale, which is none; of FLUX.1 the least that its network is told of."""
    dtype: Literal["fp16", "bf16"] = "bf16"
    """What its networks compute in on a GPU, unless the user says otherwise."""
    published: Mapping[str, object] = field(default_factory=dict)
    """Defaults of options: what was published of its training, or else its pipeline's own steps and guidance."""


def _keep_mask(encoded, arguments: Mapping[str, object]):
    """Qwen-Image's text (B, L, D), padded to one length, with a mask (B, L) also where no token is masked: otherwise both would depend on
    the prompts."""
    embeds, mask = encoded
    (num_prompts, length), longest = embeds.shape[:2], arguments["max_sequence_length"]
    padded = embeds.new_zeros(num_prompts, longest, embeds.shape[2])
    padded[:, :length] = embeds
    kept = embeds.new_zeros(num_prompts, longest).long() if mask is None else mask.new_zeros(num_prompts, longest)
    kept[:, :length] = 1 if mask is None else mask
    return padded, kept


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(
        "Stable Diffusion 1.x and 2.x",
        models=("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4"),
        network="unet",
        process="diffusion",
        dtype="fp16",
        published=_DDPO,
    ),
    "StableDiffusionXLPipeline": Family(
        "Stable Diffusion XL",
        models=("stabilityai/stable-diffusion-xl-base-1.0",),
        network="unet",
        process="diffusion",
        dtype="fp16",
        published=_DDPO,
    ),
    "StableDiffusion3Pipeline": Family(
        "Stable Diffusion 3 and 3.5",
        models=("stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-large"),
        dtype="fp16",
        published=_FLOW_GRPO | {"sample.guidance_scale": 4.5, "eval.num_steps": 40},
    ),
    "FluxPipeline": Family(
        "FLUX.1 (dev)",
        models=("black-forest-labs/FLUX.1-dev",),
        no_guidance=0.0,
        published=_FLOW_GRPO | _LARGE | {"sample.num_steps": 6, "sample.eta": 0.9, "sample.guidance_scale": 3.5, "eval.num_steps": 28},
    ),
    "Flux2KleinPipeline": Family(
        "FLUX.2 klein (base)",
        models=("black-forest-labs/FLUX.2-klein-base-4B",),
        published=_FLOW_GRPO
        | _LARGE
        | {"sample.num_steps": 8, "sample.guidance_scale": 4.0, "eval.num_steps": 28, "train.clip_range": 4.5e-4},
    ),
    "ChromaPipeline": Family("Chroma", negative_prompt="", published=_FLOW_GRPO | {"sample.guidance_scale": 5.0, "eval.num_steps": 35}),
    "SanaPipeline": Family(
        "SANA",
        models=("Efficient-Large-Model/Sana_1600M_1024px_diffusers",),
        arguments={"use_resolution_binning": False},
        published=_FLOW_GRPO | {"sample.guidance_scale": 4.5, "eval.num_steps": 20},
    ),
    "ZImagePipeline": Family(
        "Z-Image",
        models=("Tongyi-MAI/Z-Image",),
        no_guidance=0.0,
        published=_FLOW_GRPO | _LARGE | {"sample.guidance_scale": 4.0, "eval.num_steps": 40},
    ),
    "QwenImagePipeline": Family(
        "Qwen-Image",
        models=("Qwen/Qwen-Image",),
        guidance="true_cfg_scale",
        negative_prompt=" ",
        arguments={"max_sequence_length": 128},
        encoded=_keep_mask,
        published=_FLOW_GRPO | _LARGE | {"sample.guidance_scale": 4.0, "eval.num_steps": 50},
    ),
    "Lumina2Pipeline": Family("Lumina-Image 2.0", published=_FLOW_GRPO | {"sample.guidance_scale": 4.0, "eval.num_steps": 30}),
    "AuraFlowPipeline": Family("AuraFlow", dtype="fp16", published=_FLOW_GRPO | {"sample.guidance_scale": 3.5, "eval.num_steps": 50}),
    "HiDreamImagePipeline": Family("HiDream", published=_FLOW_GRPO | {"sample.guidance_scale": 5.0, "eval.num_steps": 50}),
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


UNLISTED = _FLOW_GRPO | {"sample.guidance_scale": 4.0}
"""Defaults of options for a class without an entry."""


def family_of(kind: type) -> Family:
    """The entry of a pipeline's class; for one that has none, what the arguments of its call say."""
    if kind.__name__ in FAMILIES:
        return FAMILIES[kind.__name__]
    arguments = inspect.signature(kind.__call__).parameters
    guidance = "true_cfg_scale" if "true_cfg_scale" in arguments else "guidance_scale"
    return Family(kind.__name__, guidance=guidance, negative_prompt="" if "negative_prompt" in arguments else None)


def find_family(index: Mapping[str, object], unlisted: bool = False) -> str:
    """The class of a pipeline with this model_index.json. Raises ValueError, with the reason, for one that cannot be trained.

    unlisted: whether it may be one that has no entry.
    """
    name = index.get("_class_name")
    if isinstance(name, str) and name in FAMILIES:
        return name
    reason = next((why for part, why in _REFUSED if isinstance(name, str) and re.search(part, name)), None)
    if unlisted and isinstance(name, str) and reason is None:
        return name
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
