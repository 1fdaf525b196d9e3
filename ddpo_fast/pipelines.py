"""Which pipelines can be trained, and how they are opened: a folder in diffusers format, a hub id, or a single file of weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers

transformers.logging.set_verbosity_error()  # it warns that torchvision is missing, for image processors that are not used here
transformers.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from torch import nn

from ddpo_fast.ddim import SD_STEPS, changed_steps, ddim_scheduler

CLASSES = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
"""What can be trained, by the name in model_index.json."""
SCHEDULERS = tuple(
    f"{name}Scheduler"
    for name in "DDIM DDIMParallel DDPM DDPMParallel PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete "
    "KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE DEISMultistep UniPCMultistep SASolver".split()
)
"""Samplers of models that were trained to denoise at every step of their betas, which is what DDIM needs."""


LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""What the parts of a pipeline may come from; anything else would be code that a folder brings, or a module that it picks."""


def check_model(path: str, config: str | None, vae: str | None) -> None:
    """Raises ValueError for a model that cannot be trained, as far as the configs in a folder and the names in a file say.

    path, config, vae: as `open_pipeline` has them. Of a hub id that will tell.
    """
    if Path(config or path).is_dir():
        _checked_class(path, config, vae)


def open_pipeline(
    path: str, config: str | None, vae: str | None, dtype: torch.dtype
) -> tuple[StableDiffusionPipeline | StableDiffusionXLPipeline, list[str]]:
    """The pipeline of `path`, with the VAE of `vae` instead of its own, in `dtype`; of safetensors only. And what is to be said of it.

    Its scheduler is DDIM's of the model's betas, see `ddim_scheduler`, whatever sampler is saved with it.

    path is a folder or hub id; or, if `config` is one, with the configs and the tokenizer of a pipeline of the same layout, a file of
    weights as Stable Diffusion was first published. SDXL's own VAE overflows in fp16 and says so by `force_upcast`; it is then in fp32,
    as diffusers has it. Raises ValueError where `path`, `config` or `vae` has nothing of the kind, before weights are read if configs tell.
    """
    kind, scheduler, notes = _checked_class(path, config, vae)
    is_sdxl = kind is StableDiffusionXLPipeline
    parts = {"scheduler": scheduler}
    if vae is not None:
        with _in_one_line(f"model.vae={vae}"):
            parts["vae"] = AutoencoderKL.from_pretrained(vae, dtype=dtype, use_safetensors=True)
    parts |= {"add_watermarker": False} if is_sdxl else {"safety_checker": None, "requires_safety_checker": False}
    if config is None:
        parts |= _text_encoders(path, dtype)
    with _in_one_line(f"model.path={path}"):
        if config is None:
            pipe = kind.from_pretrained(path, dtype=dtype, use_safetensors=True, **parts)
        else:
            parts |= {"feature_extractor": None, "image_encoder": None}
            pipe = kind.from_single_file(path, config=config, dtype=dtype, **parts)
    for network in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
        if missing := next((name for name, tensor in network.state_dict().items() if tensor.is_meta), None):
            raise ValueError(f"model.path={path}: the weights of its {type(network).__name__} lack {missing}")
    unet, expected = pipe.unet.config, "text_time" if is_sdxl else None
    if unet.addition_embed_type != expected or unet.in_channels != pipe.vae.config.latent_channels:
        raise ValueError(f"model.path={path}: its UNet takes more than latents, time, text and, of SDXL, sizes; valid is text-to-image")
    if is_sdxl and (pipe.text_encoder is None or pipe.text_encoder_2 is None):
        raise ValueError(f"model.path={path}: it lacks a text encoder; valid is an SDXL base model, with two")
    if is_sdxl and dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.float()
    return pipe, notes


def _text_encoders(path: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The text encoders of a folder or hub id, by their part's name. Raises ValueError for one whose file lacks a weight, which
    transformers draws at random and tells only who asks."""
    option, encoders = f"model.path={path}", {}
    index = _read_config(option, path, DiffusionPipeline)
    for part in ("text_encoder", "text_encoder_2"):
        if (name := (index.get(part) or [None, None])[1]) is None:
            continue
        with _in_one_line(option):
            encoders[part], found = getattr(transformers, name).from_pretrained(
                path, subfolder=part, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{option}: {part}/*.safetensors lack {missing[0]}")
    return encoders


def _checked_class(path: str, config: str | None, vae: str | None) -> tuple[type, DDIMScheduler, list[str]]:
    """The pipeline's class, its scheduler and what is to be said of it, if configs and names of weights are of a model to train.

    Raises ValueError otherwise.
    """
    source = config or path
    option = f"model.path={path}" if config is None else f"model.config={config}"
    name = (index := _read_config(option, source, DiffusionPipeline)).get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"{option}: it holds a {name}; valid is a StableDiffusionPipeline (SD 1.x or 2.x) or a StableDiffusionXLPipeline")
    for part, origin in index.items():
        if isinstance(origin, list) and not (part.isidentifier() and (origin == [None, None] or _is_class(origin))):
            raise ValueError(f"{option}: model_index.json has {part}={origin}; valid are classes of {', '.join(LIBRARIES[:2])}")
    if index.get("unet") != ["diffusers", "UNet2DConditionModel"]:
        raise ValueError(f"{option}: model_index.json has unet={index.get('unet')}; valid is UNet2DConditionModel of diffusers")
    unet, scheduler = (_read_config(option, source, *part) for part in ((UNet2DConditionModel, "unet"), (DDIMScheduler, "scheduler")))
    scheduler_class = index.get("scheduler")
    sampler = scheduler_class[1] if isinstance(scheduler_class, list) else None
    if sampler not in SCHEDULERS:
        raise ValueError(
            f"{option}: its scheduler is a {sampler}, whose steps are not DDIM's: the last one, or every one, is deterministic and has "
            f"no density to train by; valid is a model for {', '.join(SCHEDULERS)}"
        )
    if unet.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"{option}: its UNet is given the guidance scale (time_cond_proj_dim={unet['time_cond_proj_dim']}): it is distilled to a few "
            "steps of its own, not DDIM's, of which the last has no density to train by; valid is the model that it was distilled from"
        )
    learnt_noise = scheduler.get("prediction_type", "epsilon") == "epsilon" and not scheduler.get("rescale_betas_zero_snr", False)
    if sampler.startswith("Euler") and scheduler.get("timestep_spacing") == "trailing" and learnt_noise:
        raise ValueError(
            f"{option}: its scheduler, {sampler} with timestep_spacing=trailing, is that of a model distilled to a few steps (turbo): "
            "they are not DDIM's, and the last of them has no density to train by; valid is the model that it was distilled from"
        )
    if scheduler.get("timestep_type") == "continuous":
        raise ValueError(
            f"{option}: its scheduler has timestep_type=continuous, as EDM's do, whose levels of noise are no betas; valid is discrete"
        )
    if config is not None:
        _check_file(path, CLASSES[name], vae)
    ddim, notes = _ddim_scheduler(CLASSES[name], sampler, scheduler), []
    if changed := changed_steps(scheduler, ddim):
        ours, stated = (", ".join(f"{key}={values[key]}" for key in changed) for values in (changed, scheduler))
        notes = [f"{option}: the steps are DDIM's with {ours}; its scheduler_config.json has {stated}"]
    return CLASSES[name], ddim, notes


def _ddim_scheduler(kind: type, sampler: str, config: dict) -> DDIMScheduler:
    """`ddim_scheduler`, where the config is silent or old as the pipeline's class and the sampler's have it."""
    config = {"clip_sample": sampler.startswith(("DDIM", "DDPM"))} | config
    if kind is StableDiffusionPipeline:
        config |= {"clip_sample": False, "steps_offset": SD_STEPS["steps_offset"]}
    return ddim_scheduler(config)


def _is_class(origin: list) -> bool:
    return len(origin) == 2 and origin[0] in LIBRARIES and isinstance(origin[1], str)


def _read_config(option: str, source: str, kind: type, part: str = "") -> dict:
    """The config of `part` of a folder or hub id, which is of the class `kind`."""
    if not Path(source).is_dir():
        with _in_one_line(option):
            return dict(kind.load_config(source, subfolder=part or None))
    try:
        config = json.loads(Path(source, part, kind.config_name).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("it is no object")
        return config
    except (OSError, TypeError, ValueError, RecursionError) as error:  # a JSON or Unicode error is a ValueError
        raise ValueError(f"{option}: {Path(part, kind.config_name)} cannot be read: {error}") from None


def _check_file(path: str, kind: type, vae: str | None) -> None:
    """Raises ValueError for a file that lacks a part of the pipeline, by the names that Stable Diffusion was first published with."""
    parts = ["model.diffusion_model."] if vae is not None else ["model.diffusion_model.", "first_stage_model."]
    sdxl = kind is StableDiffusionXLPipeline
    parts += ["conditioner.embedders.0.", "conditioner.embedders.1."] if sdxl else ["cond_stage_model."]
    with _in_one_line(f"model.path={path}"), safe_open(path, "pt") as file:
        names = list(file.keys())
    for part in parts:
        if not any(name.startswith(part) for name in names):
            raise ValueError(
                f"model.path={path}: it holds no {part}*; valid is a whole checkpoint, of a {kind.__name__} as model.config says"
            )


@contextmanager
def _in_one_line(option: str) -> Iterator[None]:
    """Inside, what a library raises of files becomes a ValueError of one line that names the option."""
    try:
        yield
    except Exception as error:  # whatever a damaged folder brings about in the libraries that read it
        raise ValueError(f"{option}: it cannot be loaded: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error
