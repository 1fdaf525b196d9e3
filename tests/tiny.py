"""Random tiny pipelines in diffusers' folder format."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SD_BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def make_pipeline(
    folder: Path, *, channels=(16, 32), latent_size=8, latent_channels=4, prediction_type="epsilon", width=16, groups=8
) -> Path:
    """Writes a random pipeline that draws pictures twice the latents' size; its vocabulary is the single letters."""
    torch.manual_seed(0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = {t: i for i, t in enumerate(["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    text_config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=latent_size, in_channels=latent_channels, out_channels=latent_channels, block_out_channels=channels,
        layers_per_block=1, cross_attention_dim=width, attention_head_dim=2, norm_num_groups=groups,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels, norm_num_groups=4, sample_size=2 * latent_size,
    )  # fmt: skip
    scheduler = DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text_config), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def make_sdxl(folder: Path, force_zeros: bool = True) -> Path:
    """Writes a random SDXL pipeline of 16x16 pictures; its text encoders are 16 and 24 wide, the second one's projection 12."""
    base = StableDiffusionPipeline.from_pretrained(make_pipeline(folder / "sd"), safety_checker=None, requires_safety_checker=False)
    torch.manual_seed(1)
    wider = {"hidden_size": 24, "intermediate_size": 48, "projection_dim": 12, "num_hidden_layers": 2}
    second = CLIPTextModelWithProjection(type(base.text_encoder.config)(**base.text_encoder.config.to_dict() | wider))
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16 + 24, attention_head_dim=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=12 + 6 * 8,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=base.vae, text_encoder=base.text_encoder, text_encoder_2=second, tokenizer=base.tokenizer, tokenizer_2=base.tokenizer,
        unet=unet, scheduler=base.scheduler, force_zeros_for_empty_prompt=force_zeros, add_watermarker=False,
    ).save_pretrained(folder / "sdxl")  # fmt: skip
    return folder / "sdxl"
