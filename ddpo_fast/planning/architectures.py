"""The configs that a plan counts: of a model that is there, or of one that is known without a network."""

from pathlib import Path

from ddpo_fast.pipelines.folders import Model, find_model
from ddpo_fast.pipelines.hub import local_folder
from ddpo_fast.pipelines.model_parts import check_vae, read_config

_SD15 = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "vae": {
        "sample_size": 512,
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "scheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
}
_SDXL = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": _SD15["vae"] | {"sample_size": 1024, "scaling_factor": 0.13025},
    "text_encoder": _SD15["text_encoder"],
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
    "scheduler": _SD15["scheduler"],
}
ARCHITECTURES: dict[str, dict[str, dict]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD15,
    "runwayml/stable-diffusion-v1-5": _SD15,
    "CompVis/stable-diffusion-v1-4": _SD15,
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
}
"""Pipelines known without a network, as differences from the defaults of diffusers' and transformers' classes."""
VAES = {"madebyollin/sdxl-vae-fp16-fix": _SDXL["vae"] | {"force_upcast": False}}
"""VAEs known without a network."""


def planned_model(options) -> Model | None:
    """The model that `options`, config.model, name; None for one of `ARCHITECTURES`. Its VAE may be its own instead of one of `VAES`.

    Raises ValueError as `find_model` does.
    """
    source = options.config or options.path
    if source in ARCHITECTURES and not Path(source).is_dir():
        return None
    vae = None if _known_vae(options) else options.vae
    return find_model(options.path, options.config, vae, options.variant, options.parts, options.arguments, options.quantize)


def _known_vae(options) -> dict | None:
    return None if options.vae is None or Path(options.vae).is_dir() else VAES.get(options.vae)


def architecture(options, model: Model | None) -> dict[str, dict]:
    """The configs of a UNet's pipeline: its unet, vae, scheduler, text_encoder and, for SDXL, text_encoder_2.

    options: config.model, of which `model` was found, see `planned_model`. Raises ValueError for networks that do not fit together.
    """
    own = _known_vae(options)
    if model is not None:
        model.check_networks()
        known = model.configs | {"scheduler": dict(model.scheduler.config)}
    else:
        known = ARCHITECTURES[options.config or options.path]
        if options.vae is not None and own is None:
            own = read_config(f"model.vae={options.vae}", local_folder("model.vae", options.vae), "config.json")
            check_vae(f"model.vae={options.vae}", "config.json", own)
    return known if own is None else known | {"vae": own}
