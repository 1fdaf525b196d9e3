"""Checks, by classes and configs, that a pipeline's parts are those of a text-to-image model that can be trained.

Every check raises ValueError of one line that begins with `option`, such as "model.path=...". Networks are made from their configs as
shapes without memory and are called as the policy calls them. This also finds faults that no rule below knows.
"""

import inspect
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from ddpo_fast.pipelines.ddim import SD_STEPS, ddim_scheduler
from ddpo_fast.pipelines.families import FAMILIES, family_of, find_family

SCHEDULERS = tuple(
    f"{name}Scheduler"
    for name in "DDIM DDIMParallel DDPM DDPMParallel PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete "
    "KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE DEISMultistep UniPCMultistep SASolver".split()
)
"""Samplers of models that were trained to denoise at every step of their betas, which is what DDIM needs."""
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
"""Libraries that the parts of a pipeline may come from. Others would run code in the model's folder, or a module of its choice."""
NETWORKS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
TEXT_ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_TEXT_CLASSES = {"text_encoder": transformers.CLIPTextModel, "text_encoder_2": transformers.CLIPTextModelWithProjection}
_TEXT_SIZES = {"vocab_size": 49408, "max_position_embeddings": 77}
"""A CLIP's, where its config has none."""
_PLAIN_UNET = {
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_type": "default",
    "dual_cross_attention": False,
}
"""The config of a UNet that takes nothing but latents, time, text and, for SDXL, sizes."""


@dataclass(frozen=True)
class Parts:
    """What a pipeline is made of, by the names of its parts; no weights."""

    classes: dict[str, type]
    """The networks'."""
    configs: dict[str, dict]
    """The networks'."""
    tokenizers: dict[str, transformers.PreTrainedTokenizerBase]
    scheduler: SchedulerMixin


def check_index(option: str, index: dict, unlisted: bool = False) -> type:
    """The pipeline's class, by its model_index.json. All of its parts are classes of diffusers or transformers.

    unlisted: whether it may be any class of diffusers that has a transformer and is given prompts and guidance.
    """
    try:
        name = find_family(index, unlisted)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    for part, origin in index.items():
        if isinstance(origin, list) and not (part.isidentifier() and (origin == [None, None] or _is_class(origin))):
            raise ValueError(f"{option}: model_index.json has {part}={origin}; valid are classes of {', '.join(LIBRARIES)}")
    kind = getattr(diffusers, name, None)
    if name not in FAMILIES and not _may_be_tried(kind):
        raise ValueError(
            f"{option}: it holds a {name}; valid with model.unlisted=true is a pipeline of diffusers that has a transformer and takes "
            "prompts and a guidance scale"
        )
    return kind


def _may_be_tried(kind: object) -> bool:
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        return False
    parts, arguments = kind._get_signature_keys(kind)[0], inspect.signature(kind.__call__).parameters
    return {"transformer", "vae", "scheduler"} <= {*parts} and "prompt" in arguments and family_of(kind).guidance in arguments


def find_parts(option: str, folder: Path, kind: type, index: dict) -> Parts:
    """The parts of a diffusion model; its networks have not been checked."""
    _check_classes(option, kind, index)
    scheduler = check_scheduler(option, kind, index, read_config(option, folder, "scheduler_config.json", "scheduler"))
    encoders = {part: name for part, name in TEXT_ENCODERS.items() if part == "text_encoder" or kind is StableDiffusionXLPipeline}
    configs = {part: read_config(option, folder, "config.json", part) for part in ("unet", "vae", *encoders)}
    classes: dict[str, type] = dict(NETWORKS)
    tokenizers = {}
    for part, name in encoders.items():
        vocabulary, positions = (configs[part].get(key, default) for key, default in _TEXT_SIZES.items())
        tokenizers[name] = load_tokenizer(option, folder, name, index, vocabulary)
        check_length(option, name, tokenizers[name], positions)
        configs[part] |= {"_class_name": index[part][1]}
        classes[part] = getattr(transformers, index[part][1])
    return Parts(classes, configs, tokenizers, scheduler)


def _check_classes(option: str, kind: type, index: dict) -> None:
    for part, network in NETWORKS.items():
        if index.get(part) != ["diffusers", network.__name__]:
            raise ValueError(f"{option}: model_index.json has {part}={index.get(part)}; valid is {network.__name__} of diffusers")
    is_sdxl = kind is StableDiffusionXLPipeline
    if is_sdxl and any(index.get(part) in (None, [None, None]) for part in TEXT_ENCODERS):
        raise ValueError(f"{option}: it lacks a text encoder; valid is an SDXL base model, with two")
    for part, tokenizer in list(TEXT_ENCODERS.items())[: 2 if is_sdxl else 1]:
        network, default = class_of(index, part, transformers.PreTrainedModel), _TEXT_CLASSES[part]
        if network is None or is_sdxl and network is not default:
            raise ValueError(f"{option}: model_index.json has {part}={index.get(part)}; valid is {default.__name__} of transformers")
        if class_of(index, tokenizer, transformers.PreTrainedTokenizerBase) is None:
            raise ValueError(f"{option}: model_index.json has {tokenizer}={index.get(tokenizer)}; valid is CLIPTokenizer of transformers")


def _is_class(origin: list) -> bool:
    return len(origin) == 2 and origin[0] in (*LIBRARIES, "stable_diffusion") and isinstance(origin[1], str)  # a safety checker's


def class_of(index: dict, part: str, *kinds: type) -> type | None:
    """The class of a part in model_index.json, if it is one of the kinds, or a subclass, of the same library."""
    origin = index.get(part)
    if not isinstance(origin, list) or origin[0] not in {kind.__module__.partition(".")[0] for kind in kinds}:
        return None
    named = getattr(LIBRARIES[origin[0]], str(origin[1]), None)
    return named if isinstance(named, type) and issubclass(named, kinds) else None


def read_config(option: str, folder: Path, name: str, part: str = "") -> dict:
    """A part's config, as the file has it."""
    try:
        config = json.loads((folder / part / name).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("it is no object")
        return config
    except (OSError, TypeError, ValueError, RecursionError) as error:  # a JSON or Unicode error is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{option}: {Path(part, name)} cannot be read: {reason}") from None


def check_scheduler(option: str, kind: type, index: dict, config: dict) -> DDIMScheduler:
    """A DDIM scheduler with the model's betas, see `ddim_scheduler`. The pipeline's values replace lacking or old ones in its config."""
    origin = index.get("scheduler")
    sampler = origin[1] if isinstance(origin, list) else None
    if sampler not in SCHEDULERS:
        raise ValueError(
            f"{option}: its scheduler is a {sampler}, whose steps are not DDIM's: the last one, or every one, is deterministic and has "
            f"no density to train by; valid is a model for {', '.join(SCHEDULERS)}"
        )
    learnt_noise = config.get("prediction_type", "epsilon") == "epsilon" and not config.get("rescale_betas_zero_snr", False)
    if sampler.startswith("Euler") and config.get("timestep_spacing") == "trailing" and learnt_noise:
        raise ValueError(
            f"{option}: its scheduler, {sampler} with timestep_spacing=trailing, is that of a model distilled to a few steps (turbo): "
            "they are not DDIM's, and the last of them has no density to train by; valid is the model that it was distilled from"
        )
    if config.get("timestep_type") == "continuous":
        raise ValueError(
            f"{option}: its scheduler has timestep_type=continuous, as EDM's has: its levels of noise are not betas; valid is discrete"
        )
    config = {"clip_sample": sampler.startswith(("DDIM", "DDPM"))} | config
    if kind is StableDiffusionPipeline:
        config |= {"clip_sample": False, "steps_offset": SD_STEPS["steps_offset"]}
    option, num_steps = f"{option}: scheduler/scheduler_config.json", config.get("num_train_timesteps", 1000)
    for key, valid, good in (
        ("num_train_timesteps", "a whole number from 1 to 100000", lambda value: is_whole(value) and 1 <= value <= 100_000),
        ("prediction_type", "epsilon, v_prediction or sample", lambda value: value in ("epsilon", "v_prediction", "sample")),
        ("steps_offset", "a whole number below num_train_timesteps", lambda value: is_whole(value) and value < num_steps),
        ("clip_sample_range", "a number > 0", lambda value: _is_number(value) and value > 0),
        ("thresholding", "false, for a latent diffusion model", lambda value: not value),
    ):
        if key in config and not good(config[key]):
            raise ValueError(f"{option} has {key}={config[key]}; valid is {valid}")
    with made_of(option):
        scheduler = ddim_scheduler(config)
    betas = scheduler.betas
    if betas.shape != (num_steps,) or not ((betas > 0) & (betas <= 1)).all():
        raise ValueError(f"{option} has betas that are not {num_steps} numbers above 0 and up to 1")
    return scheduler


def check_unet(option: str, kind: type, config: dict, latent_channels: int) -> dict:
    """Checks a UNet's config. Returns it with the pipeline's `sample_size` if it has none, or an old one."""
    is_sdxl, guided = kind is StableDiffusionXLPipeline, config.get("time_cond_proj_dim")
    if guided is not None:
        raise ValueError(
            f"{option}: its UNet is given the guidance scale (time_cond_proj_dim={guided}): it is distilled to a few "
            "steps of its own, not DDIM's, of which the last has no density to train by; valid is the model that it was distilled from"
        )
    for key, valid in (_PLAIN_UNET | {"addition_embed_type": "text_time" if is_sdxl else None}).items():
        if config.get(key, valid) != valid:
            raise ValueError(
                f"{option}: unet/config.json has {key}={config[key]}; valid is {json.dumps(valid)}: a text-to-image model's UNet takes "
                "latents, time, text and, for SDXL, sizes, no more and no less"
            )
    for key in ("in_channels", "out_channels"):
        if config.get(key, 4) != latent_channels:
            raise ValueError(
                f"{option}: unet/config.json has {key}={config.get(key, 4)}; valid is {latent_channels}, the latent_channels of the VAE"
            )
    size = config.get("sample_size")
    if size is None:
        size = 128 if is_sdxl else 64
    if not all(is_whole(side) and 1 <= side <= 4096 for side in _pair(size)):
        raise ValueError(f"{option}: unet/config.json has sample_size={size}; valid is a whole number, or two of them, from 1 to 4096")
    if not is_sdxl and isinstance(size, int) and size < 64 and re.match(r"0\.[0-8]\.", str(config.get("_diffusers_version"))):
        size = 64
    return config | {"sample_size": size}


def _pair(size) -> tuple | list:
    return size if isinstance(size, list) and len(size) == 2 else (size, size)


def latent_size(unet_config: dict) -> tuple[int, int]:
    """Height and width of the latents of a config that `check_unet` has returned."""
    return tuple(_pair(unet_config["sample_size"]))


def check_networks(option: str, kind: type, configs: dict[str, dict], lengths: dict[str, int]) -> None:
    """Checks that networks with these configs fit together and can be called. lengths: each text encoder's prompt length, in tokens."""
    height, width = latent_size(configs["unet"])
    with torch.device("meta"), torch.no_grad():
        texts, pooled = [], None
        for part, length in lengths.items():
            with made_of(f"{option}: {part}/config.json"):
                encoder = text_encoder(part, configs[part])
                out = encoder(torch.zeros(1, length, dtype=torch.int64), output_hidden_states=True)
                texts.append(out.hidden_states[-2] if kind is StableDiffusionXLPipeline else out[0])
                pooled = out[0] if part == "text_encoder_2" else None
        embeds = torch.cat(texts, -1) if len({text.shape[1] for text in texts}) == 1 else texts[0]
        _check_text(option, configs["unet"], embeds, pooled)
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": torch.empty(1, 6)}
        latents = torch.empty(1, configs["unet"].get("in_channels", 4), height, width)
        with made_of(f"{option}: unet/config.json"):
            unet = UNet2DConditionModel.from_config(configs["unet"])
            if scalars := [name for name, parameter in unet.named_parameters() if parameter.dim() == 0]:
                raise ValueError(f"{scalars[0]} is a scalar")
            out = unet(latents, torch.zeros(1, dtype=torch.int64), embeds, added_cond_kwargs=added, return_dict=False)[0]
            if out.shape != latents.shape:
                raise ValueError(f"latents {tuple(latents.shape)} come out as {tuple(out.shape)}")


def _check_text(option: str, unet: dict, embeds: Tensor, pooled: Tensor | None) -> None:
    wanted = unet.get("cross_attention_dim", 1280)
    if wanted != embeds.shape[-1]:
        raise ValueError(
            f"{option}: unet/config.json has cross_attention_dim={wanted}; valid is {embeds.shape[-1]}, the text encoders' width"
        )
    if pooled is not None:
        times, wanted = unet.get("addition_time_embed_dim"), unet.get("projection_class_embeddings_input_dim")
        if not is_whole(times) or wanted != pooled.shape[-1] + 6 * times:
            raise ValueError(
                f"{option}: unet/config.json has projection_class_embeddings_input_dim={wanted} and addition_time_embed_dim={times}; valid "
                f"is {pooled.shape[-1]}, the projection_dim of text_encoder_2, and six times the latter"
            )


def check_vae(option: str, where: str, config: dict) -> int:
    """Checks a VAE's config and returns the number of latent channels. where: the config's path in the model."""
    channels, scale = config.get("latent_channels", 4), config.get("scaling_factor", 0.18215)
    if (name := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise ValueError(f"{option}: {where} is a {name}'s; valid is AutoencoderKL's")
    if not _is_number(scale) or scale <= 0:
        raise ValueError(f"{option}: {where} has scaling_factor={scale}; valid is a number > 0")
    for key in ("latents_mean", "latents_std"):
        numbers = config.get(key)
        good = isinstance(numbers, list) and len(numbers) == channels and all(map(_is_number, numbers))
        if numbers is not None and not good:
            raise ValueError(f"{option}: {where} has {key}={numbers}; valid is null, or {channels} numbers")
    with made_of(f"{option}: {where}"), torch.device("meta"), torch.no_grad():
        vae = AutoencoderKL.from_config(config)
        side = 8 * 2 ** (len(vae.config.block_out_channels) - 1)
        if (shape := tuple(vae.decode(torch.empty(1, channels, 8, 8), return_dict=False)[0].shape)) != (1, 3, side, side):
            raise ValueError(f"8x8 latents are decoded to {shape}, not {(1, 3, side, side)}")
    return channels


def text_encoder(part: str, config: dict) -> nn.Module:
    """A text encoder with this config, on the default device. It is a CLIP unless `_class_name` is another class of transformers."""
    network = getattr(transformers, config.get("_class_name", _TEXT_CLASSES[part].__name__))
    return network(network.config_class(**{key: value for key, value in config.items() if key != "_class_name"}))


def load_tokenizer(option: str, folder: Path, part: str, index: dict, vocabulary: int | None) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a text encoder that knows so many tokens; None: there is no text encoder."""
    kind = class_of(index, part, transformers.PreTrainedTokenizerBase)
    files = {key: name for key, name in kind.vocab_files_names.items() if isinstance(name, str)}
    whole, pieces = files.pop("tokenizer_file", "tokenizer.json"), set(files.values())
    there = set(os.listdir(folder / part)) if (folder / part).is_dir() else set()
    if whole not in there and not (pieces and pieces <= there):  # transformers would make a tokenizer that knows no word
        raise ValueError(f"{option}: {part}/ lacks the tokenizer's files; valid is {whole}, or {' and '.join(sorted(pieces))}")
    with made_of(f"{option}: {part}/"):
        tokenizer = kind.from_pretrained(folder / part)
        largest = max([*tokenizer.get_vocab().values(), *tokenizer("a cat").input_ids])
    if vocabulary is not None and (not is_whole(vocabulary) or largest >= vocabulary):
        raise ValueError(f"{option}: {part}/ has a token number {largest}; valid is below {vocabulary}, the text encoder's vocab_size")
    return tokenizer


def check_length(option: str, part: str, tokenizer: transformers.PreTrainedTokenizerBase, positions: int) -> None:
    """Raises ValueError for a tokenizer whose texts may be longer than a CLIP with so many positions takes."""
    if not is_whole(positions) or not 2 <= tokenizer.model_max_length <= positions:
        raise ValueError(
            f"{option}: {part}/tokenizer_config.json has model_max_length={tokenizer.model_max_length}; valid is 2 to {positions}, the "
            "text encoder's max_position_embeddings"
        )


@contextmanager
def made_of(what: str, fault: str = "nothing that works can be made of it") -> Iterator[None]:
    """Inside, whatever the libraries raise for a bad config becomes a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {fault}: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error


def is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
