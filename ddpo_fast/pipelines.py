"""Which pipelines can be trained, and how they are opened: a folder in diffusers format or a hub id."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

CLASSES = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
"""What can be trained, by the name in model_index.json."""


def check_model(path: str) -> None:
    """Raises ValueError for a folder whose pipeline cannot be trained. Of a hub id `open_pipeline` will tell."""
    index = Path(path, "model_index.json")
    if not index.is_file():
        return
    try:
        name = json.loads(index.read_text()).get("_class_name")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"model.path={path}: model_index.json cannot be read: {error}") from None
    _check_class(path, name)


def open_pipeline(path: str, vae: str | None, dtype: torch.dtype) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The pipeline of `path`, with the VAE of `vae` instead of its own, in `dtype`; of safetensors only.

    SDXL's own VAE overflows in fp16 and says so by `force_upcast`; it is then in fp32, as diffusers has it. Raises ValueError where
    `path` or `vae` has nothing of the kind.
    """
    parts = {}
    if vae is not None:
        with _in_one_line(f"model.vae={vae}"):
            parts["vae"] = AutoencoderKL.from_pretrained(vae, dtype=dtype, use_safetensors=True)
    with _in_one_line(f"model.path={path}"):
        name = DiffusionPipeline.load_config(path).get("_class_name")
    _check_class(path, name)
    kind = CLASSES[name]
    is_sdxl = kind is StableDiffusionXLPipeline
    parts |= {"add_watermarker": False} if is_sdxl else {"safety_checker": None, "requires_safety_checker": False}
    with _in_one_line(f"model.path={path}"):
        pipe = kind.from_pretrained(path, dtype=dtype, use_safetensors=True, **parts)
    unet, expected = pipe.unet.config, "text_time" if is_sdxl else None
    if unet.addition_embed_type != expected or unet.in_channels != pipe.vae.config.latent_channels:
        raise ValueError(f"model.path={path}: its UNet takes more than latents, time, text and, of SDXL, sizes; valid is text-to-image")
    if is_sdxl and (pipe.text_encoder is None or pipe.text_encoder_2 is None):
        raise ValueError(f"model.path={path}: it lacks a text encoder; valid is an SDXL base model, with two")
    if is_sdxl and dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.float()
    return pipe


def _check_class(path: str, name: str | None) -> None:
    if name not in CLASSES:
        raise ValueError(
            f"model.path={path}: it holds a {name}; valid is a StableDiffusionPipeline (SD 1.x or 2.x) or a StableDiffusionXLPipeline"
        )


@contextmanager
def _in_one_line(option: str) -> Iterator[None]:
    """Inside, what a library raises of files becomes a ValueError of one line that names the option."""
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{option}: {' '.join(str(error).split())}") from error
