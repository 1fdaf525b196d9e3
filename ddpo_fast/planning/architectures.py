"""The configs that a plan counts: of a model that is there, or of one that is known without a network."""

import atexit
import functools
import inspect
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

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
"""UNets' pipelines known without a network, as differences from the defaults of diffusers' and transformers' classes."""
_CLIP = _SD15["text_encoder"] | {"_class_name": "CLIPTextModel"}
_T5_XXL = {
    "_class_name": "T5EncoderModel",
    "d_model": 4096,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_QWEN3_4B = {
    "_class_name": "Qwen3ForCausalLM",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
_QWEN2_5_VL_7B = {
    "_class_name": "Qwen2_5_VLForConditionalGeneration",
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    },
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
}
_FLUX_VAE = _SD15["vae"] | {
    "_class_name": "AutoencoderKL",
    "sample_size": 1024,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_DC_AE = {
    "_class_name": "AutoencoderDC",
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
} | {f"{side}_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3 for side in ("encoder", "decoder")}
_EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
_SD35_LARGE = {
    "_class_name": "StableDiffusion3Pipeline",
    "transformer": {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
    "vae": _FLUX_VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "text_encoder": _CLIP | {"_class_name": "CLIPTextModelWithProjection"},
    "text_encoder_2": _SDXL["text_encoder_2"] | {"_class_name": "CLIPTextModelWithProjection"},
    "text_encoder_3": _T5_XXL,
    "scheduler": _EULER | {"shift": 3.0},
}
_SD35_MEDIUM = _SD35_LARGE | {
    "transformer": _SD35_LARGE["transformer"]
    | {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    }
}
_FLUX_DYNAMIC = _EULER | {"shift": 3.0, "use_dynamic_shifting": True}
FLOW_MODELS: dict[str, dict] = {
    "stabilityai/stable-diffusion-3.5-medium": _SD35_MEDIUM,
    "stabilityai/stable-diffusion-3.5-large": _SD35_LARGE,
    "black-forest-labs/FLUX.1-dev": {
        "_class_name": "FluxPipeline",
        "transformer": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
        "vae": _FLUX_VAE,
        "text_encoder": _CLIP,
        "text_encoder_2": _T5_XXL,
        "scheduler": _FLUX_DYNAMIC,
    },
    "black-forest-labs/FLUX.2-klein-base-4B": {
        "_class_name": "Flux2KleinPipeline",
        "transformer": {
            "_class_name": "Flux2Transformer2DModel",
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        "vae": {"_class_name": "AutoencoderKLFlux2"},
        "text_encoder": _QWEN3_4B,
        "scheduler": _FLUX_DYNAMIC,
    },
    "Qwen/Qwen-Image": {
        "_class_name": "QwenImagePipeline",
        "transformer": {"_class_name": "QwenImageTransformer2DModel"},
        "vae": {"_class_name": "AutoencoderKLQwenImage"},
        "text_encoder": _QWEN2_5_VL_7B,
        "scheduler": _EULER | {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
    },
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": {
        "_class_name": "SanaPipeline",
        "transformer": {"_class_name": "SanaTransformer2DModel"},
        "vae": _DC_AE,
        "text_encoder": {"_class_name": "Gemma2Model"},
        "scheduler": {
            "_class_name": "DPMSolverMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
        },
    },
    "Tongyi-MAI/Z-Image": {
        "_class_name": "ZImagePipeline",
        "transformer": {"_class_name": "ZImageTransformer2DModel"},
        "vae": _FLUX_VAE,
        "text_encoder": _QWEN3_4B | {"_class_name": "Qwen3Model"},
        "scheduler": _EULER | {"shift": 6.0},
        "arguments": {"max_sequence_length": 128},  # its texts are not padded: few prompts have the 512 tokens that it takes at most
    },
}
"""Flow models' pipelines known without a network, in the same way, with their classes, and with arguments of a plan's call.

The configs are the published ones, as other public repositories quote them. Those that nobody quotes in full are FLUX.2 klein's text
encoder, which is said to be Qwen3-4B, and what Z-Image changes from Z-Image-Turbo, of which one repository tells the shift.
"""
VAES = {"madebyollin/sdxl-vae-fp16-fix": _SDXL["vae"] | {"force_upcast": False}}
"""VAEs known without a network."""


def planned_model(options) -> Model | None:
    """The model that `options`, config.model, name; None for one of `ARCHITECTURES`. Its VAE may be its own instead of one of `VAES`.

    A folder comes before what is known. Raises ValueError as `find_model` does.
    """
    source = options.config or options.path
    if source in ARCHITECTURES and not Path(source).is_dir():
        return None
    vae = None if _known_vae(options) else options.vae
    if not _is_known(options):
        return find_model(
            options.path, options.config, vae, options.variant, options.parts, options.arguments, options.quantize, options.unlisted
        )
    arguments = FLOW_MODELS[options.path].get("arguments", {}) | dict(options.arguments or {})
    model = find_model(str(_known_folder(options.path)), None, vae, None, options.parts, arguments, options.quantize)
    return replace(model, path=options.path, option=f"model.path={options.path}")


def assumed(options, model: Model | None) -> list[str]:
    """What a plan has to say of `model`, one of `FLOW_MODELS`; of another model nothing."""
    if not _is_known(options):
        return []
    default = inspect.signature(model.kind.__call__).parameters["max_sequence_length"].default
    length = {"max_sequence_length": default, **model.family.arguments, **model.arguments}["max_sequence_length"]
    return [f"{options.path}: its configs are known here; its tokenizers are not, so every text has max_sequence_length={length} tokens"]


def _is_known(options) -> bool:
    return options.config is None and options.path in FLOW_MODELS and not Path(options.path).is_dir()


@functools.cache
def _known_folder(name: str) -> Path:
    """One of `FLOW_MODELS` as a folder in diffusers' format, whose weights are empty files. It is removed at the end of the process."""
    folder, parts = Path(tempfile.mkdtemp(prefix="ddpo_fast_")), FLOW_MODELS[name]
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    index: dict[str, object] = {"_class_name": parts["_class_name"]}
    for part, config in parts.items():
        if part in ("_class_name", "arguments"):
            continue
        library, kind = ("transformers" if part.startswith("text_encoder") else "diffusers"), config["_class_name"]
        index[part] = [library, kind]
        (folder / part).mkdir()
        if part == "scheduler":
            (folder / part / "scheduler_config.json").write_text(json.dumps(config))
            continue
        (folder / part / "config.json").write_text(json.dumps(config))
        (folder / part / ("model.safetensors" if library == "transformers" else "diffusion_pytorch_model.safetensors")).touch()
        if library == "transformers":
            tokenizer = part.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", PreTrainedTokenizerFast.__name__]
            _any_tokenizer().save_pretrained(folder / tokenizer)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _any_tokenizer() -> PreTrainedTokenizerFast:
    """Stands for a model's own: it knows no word, has a CLIP's length, and lengthens a chat, so that it has as many tokens as it may."""
    words = {word: number for number, word in enumerate(("<pad>", "<bos>", "<unk>", "more"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", model_max_length=77,
        chat_template="{{ messages[0]['content'] }}{{ ' more' * 1024 }}",
    )  # fmt: skip


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
