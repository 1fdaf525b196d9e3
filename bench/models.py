"""What is benchmarked: models and the work that is done with them. Nothing is downloaded.

`embedded` and `embedded_flow` are the models that ship with the package. The others have random weights and the architecture that their
name says. `sd15` and `sdxl` are full-sized, for a GPU. `sd15_small` and `sdxl_small` have the same blocks but fewer channels and smaller
pictures, for a CPU. `sd3_small` has 10 narrow blocks of Stable Diffusion 3.5 medium, 26 million parameters, and pictures of 192x192.
`tiny_small` has two blocks, for runs whose pictures do not matter, and to rehearse a benchmark. The textbook loop cannot run an SDXL
pipeline, so `sdxl` is SDXL's UNet in a pipeline with one text encoder. It lacks the added text and size conditions, which are under 0.1 %
of the UNet's work.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from bench import ROOT
from ddpo_fast.files import new_folder
from ddpo_fast.planning.architectures import ARCHITECTURES

EMBEDDED, EMBEDDED_FLOW = (ROOT / "ddpo_fast" / "embedded" / name for name in ("model", "flow_model"))
SD15 = ARCHITECTURES["stable-diffusion-v1-5/stable-diffusion-v1-5"]
SDXL = ARCHITECTURES["stabilityai/stable-diffusion-xl-base-1.0"]
_SMALL = {
    "vae": {"sample_size": 256, "block_out_channels": (32, 32, 32, 32)},
    "text_encoder": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 64},
}
_NO_ADDED_CONDITIONS = {"addition_embed_type": None, "addition_time_embed_dim": None, "projection_class_embeddings_input_dim": None}


def _changed(architecture: dict, unet: dict, vae: dict, text_encoder: dict) -> dict:
    """An architecture with some values changed. Values that it does not have are those of SD 1.5."""
    base = SD15 | architecture
    return base | {"unet": base["unet"] | unet, "vae": base["vae"] | vae, "text_encoder": base["text_encoder"] | text_encoder}


RANDOM = {
    "sd15": SD15,
    "sdxl": _changed(SDXL, _NO_ADDED_CONDITIONS, {}, {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}),
    "sd15_small": _changed(
        SD15,
        {"sample_size": 32, "block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 64},
        _SMALL["vae"],
        _SMALL["text_encoder"],
    ),
    "sdxl_small": _changed(
        SDXL,
        _NO_ADDED_CONDITIONS
        | {"sample_size": 32, "block_out_channels": (32, 64, 128), "attention_head_dim": (4, 4, 8), "cross_attention_dim": 64},
        _SMALL["vae"],
        _SMALL["text_encoder"],
    ),
    "tiny_small": _changed(
        SD15,
        {
            "sample_size": 8, "block_out_channels": (32, 32), "cross_attention_dim": 64, "layers_per_block": 1, "attention_head_dim": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        {
            "sample_size": 16, "block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1,
        },
        _SMALL["text_encoder"],
    ),
}  # fmt: skip
FLOW = {
    "sd3_small": {
        "transformer": {
            "sample_size": 24, "in_channels": 16, "out_channels": 16, "num_layers": 10, "dual_attention_layers": tuple(range(5)),
            "attention_head_dim": 64, "num_attention_heads": 4, "caption_projection_dim": 256, "joint_attention_dim": 256,
            "pooled_projection_dim": 128, "pos_embed_max_size": 24, "qk_norm": "rms_norm",
        },
        "vae": {
            "sample_size": 192, "latent_channels": 16, "block_out_channels": (16,) * 4, "norm_num_groups": 8, "layers_per_block": 1,
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "scaling_factor": 1.5305,
            "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False,
        },
        "text_encoder": _SMALL["text_encoder"],
    },
}  # fmt: skip
"""Random pipelines of flow transformers; shift as in SD 3.5."""


@dataclass(frozen=True)
class Work:
    """A model and an iteration's amount of work, as options of train.py."""

    model: str
    options: tuple[str, ...]

    def __str__(self) -> str:
        """Without the model: `24 samples x 5 steps, 2 updates`."""
        value = dict(option.removeprefix("--").split("=") for option in self.options)
        samples, steps, updates = (value[key] for key in ("sample.num_samples", "sample.num_steps", "train.num_minibatches"))
        return f"{samples} samples x {steps} steps, {updates} update{'s' if updates != '1' else ''}"

    def argv(self) -> list[str]:
        """The command line; makes the model's folder if it is not there yet."""
        shipped = {"embedded": EMBEDDED, "embedded_flow": EMBEDDED_FLOW}
        return [f"--model.path={shipped.get(self.model) or random_pipeline(self.model)}", *self.options]

    @property
    def on_flow(self) -> bool:
        """Whether the model is a flow transformer."""
        return self.model in ("embedded_flow", *FLOW)


def _options(samples: int, steps: int, updates: int, micro_batch: int, *others: str) -> tuple[str, ...]:
    return (
        f"--sample.num_samples={samples}", f"--sample.batch_size={samples}", f"--sample.num_steps={steps}",
        f"--train.num_minibatches={updates}", f"--train.micro_batch={micro_batch}", *others,
    )  # fmt: skip


_SD_LORA = ("--lora.targets=[attention]", "--lora.rank=4", "--lora.alpha=4", "--sample.guidance_scale=5", "--prompts.samples_per_prompt=1",
            "--train.learning_rate=3e-4", "--train.clip_range=1e-4")  # fmt: skip


def _flow_options(samples: int, steps: int, updates: int, group: int, rank: int, targets: str, *others: str) -> tuple[str, ...]:
    """Flow-GRPO's (arXiv:2505.05470) settings for SD 3.5 medium: Flow-SDE, all steps but the last are trained, advantages by groups.

    Its clip range 1e-4 is of 65,536 latent elements.
    """
    window = {"size": steps - 1, "among": steps - 1}
    return _options(
        samples, steps, updates, samples // updates, "--model.parts={text_encoder_3: null, tokenizer_3: null}",
        "--model.arguments={max_sequence_length: 0}", "--sample.sampler=flow_sde", "--sample.eta=0.7", f"--sample.window={window}",
        "--sample.guidance_scale=4.5", f"--prompts.samples_per_prompt={group}", "--baseline.name=group", "--baseline.std=batch",
        "--train.learning_rate=3e-4", "--train.clip_range=4e-4", f"--lora.targets={targets}", f"--lora.rank={rank}", *others,
    )  # fmt: skip


WORKS = {
    "embedded": Work("embedded", _options(24, 5, 2, 48)),
    "sd15": Work("sd15", _options(12, 50, 2, 12, *_SD_LORA)),  # rollout and update with as many rows a call: the same kernels
    "sd15_short": Work("sd15", _options(12, 20, 2, 12, *_SD_LORA)),  # the same calls, fewer of them
    "sd15_wide": Work("sd15", _options(32, 10, 1, 32, *_SD_LORA)),  # batches as large as TRL can make them, too
    "sdxl": Work("sdxl", _options(4, 10, 1, 4, *_SD_LORA)),
    "sd15_small": Work("sd15_small", _options(2, 5, 1, 10, *_SD_LORA)),
    "sdxl_small": Work("sdxl_small", _options(2, 3, 1, 6, *_SD_LORA)),
    "tiny_small": Work("tiny_small", _options(6, 2, 1, 6, *_SD_LORA)),
    "embedded_flow": Work("embedded_flow", _flow_options(36, 5, 2, 6, 16, "[attention,feed_forward]", "--lora.alpha=16")),
    "sd3_small": Work("sd3_small", _flow_options(18, 3, 2, 6, 32, "[attention]", "--lora.alpha=64")),
}


def default_models() -> list[str]:
    """The models that suit this machine."""
    return ["embedded", "sd15", "sdxl"] if torch.cuda.is_available() else ["embedded", "sd15_small", "sdxl_small"]


def random_pipeline(name: str) -> Path:
    """The folder of a pipeline with random weights, made once: build/models/<name>. A large one is in fp16."""
    folder = ROOT / "build" / "models" / name
    if not folder.exists():
        large = not name.endswith("_small")
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            pipe = _flow(FLOW[name]) if name in FLOW else _stable_diffusion(RANDOM[name])
        with new_folder(folder) as target:
            (pipe.to(dtype=torch.float16) if large else pipe).save_pretrained(target)
    return folder


def _stable_diffusion(architecture: dict) -> DiffusionPipeline:
    unet, vae, text_encoder, tokenizer, scheduler = _parts(architecture)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _flow(architecture: dict) -> DiffusionPipeline:
    tokenizer, text = _text(architecture["text_encoder"])
    encoders = {name: CLIPTextModelWithProjection(text) for name in ("text_encoder", "text_encoder_2")}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**architecture["transformer"]), vae=AutoencoderKL(**architecture["vae"]),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=tokenizer, tokenizer_2=tokenizer, text_encoder_3=None,
        tokenizer_3=None, **encoders,
    )  # fmt: skip


def _text(config: dict) -> tuple[CLIPTokenizer, CLIPTextConfig]:
    """The embedded model's tokenizer, and the config of a text encoder for it."""
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", model_max_length=77)
    width = {"vocab_size": max(len(tokenizer), 1000), "max_position_embeddings": 77, "bos_token_id": tokenizer.bos_token_id}
    return tokenizer, CLIPTextConfig(**config | width, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def _parts(architecture: dict):
    tokenizer, text = _text(architecture["text_encoder"])
    scheduler = DDIMScheduler(**architecture["scheduler"])
    unet, vae = UNet2DConditionModel(**architecture["unet"]), AutoencoderKL(**architecture["vae"])
    return unet, vae, CLIPTextModel(text), tokenizer, scheduler


def tiny_sdxl(folder: Path) -> Path:
    """Writes a real SDXL pipeline of toy size, with two text encoders and added conditions, for `bench.limits`."""
    small = _changed(
        SDXL, {"block_out_channels": (32, 64, 64), "sample_size": 8, "attention_head_dim": 4, "cross_attention_dim": 64}, {}, {}
    )
    small = small | {
        "unet": small["unet"] | {"transformer_layers_per_block": 1, "projection_class_embeddings_input_dim": 32 + 6 * 256},
        **_SMALL,
        "vae": SDXL["vae"] | _SMALL["vae"] | {"sample_size": 64},
    }
    unet, vae, text_encoder, tokenizer, scheduler = _parts(small)
    # the UNet's 64 is the two encoders' 32 + 32
    half = text_encoder.config.__class__(**{**text_encoder.config.to_dict(), "hidden_size": 32, "projection_dim": 32})
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(half), text_encoder_2=CLIPTextModelWithProjection(half), tokenizer=tokenizer,
        tokenizer_2=tokenizer, unet=unet, scheduler=scheduler, add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder
