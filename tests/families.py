"""Tiny random pipelines of the families of flow transformers, in diffusers' folder format: `make_family(name, folder)`.

Their classes are the real ones, of the networks as of the text encoders and tokenizers; nothing is downloaded.
"""

import math
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tokenizers.pre_tokenizers import ByteLevel

EMBEDDED_TOKENIZER = Path(__file__).parents[1] / "ddpo_fast/embedded/data/tokenizer"
TEXT = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
GROUPED_TEXT = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 1024}
"""Sizes of text encoders; hidden_size comes with each."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip_tokenizer() -> transformers.CLIPTokenizer:
    return transformers.CLIPTokenizer.from_pretrained(EMBEDDED_TOKENIZER)


def t5_tokenizer() -> transformers.T5Tokenizer:
    """One token a character."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return transformers.T5Tokenizer(vocab=special + [(chr(c), -3.0) for c in range(33, 127)], extra_ids=0, model_max_length=32)


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """One token a byte, and a template for chats."""
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=512,
        additional_special_tokens=words[-2:],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def gemma_tokenizer() -> transformers.GemmaTokenizer:
    """One token a character."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127))]
    words = dict.fromkeys(words)
    return transformers.GemmaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=128)


def clip(kind: type) -> torch.nn.Module:
    tokenizer = clip_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, projection_dim=32, max_position_embeddings=24, **TEXT,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config)


def t5(width: int = 32) -> transformers.T5EncoderModel:
    sizes = dict(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(transformers.T5Config(**sizes))


def umt5() -> transformers.UMT5EncoderModel:
    sizes = dict(vocab_size=len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))


def gemma() -> transformers.Gemma2Model:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(vocab_size=len(gemma_tokenizer()), hidden_size=32, head_dim=8, **GROUPED_TEXT)
    )


def qwen(kind: type, num_layers: int = 2) -> torch.nn.Module:
    sizes = GROUPED_TEXT | {"num_hidden_layers": num_layers}
    return kind(transformers.Qwen3Config(vocab_size=len(qwen_tokenizer()), hidden_size=32, head_dim=8, **sizes))


def decoder(kind: type = diffusers.AutoencoderKL, num_blocks: int = 4, **config) -> torch.nn.Module:
    """A VAE whose pictures are 2^(num_blocks - 1) times the latents' size."""
    return kind(
        down_block_types=("DownEncoderBlock2D",) * num_blocks, up_block_types=("UpDecoderBlock2D",) * num_blocks,
        block_out_channels=(4,) * num_blocks, layers_per_block=1, latent_channels=4, norm_num_groups=1, sample_size=64,
        mid_block_add_attention=False, **config,
    )  # fmt: skip


def vae(num_blocks: int = 4, shift_factor: float | None = 0.06) -> diffusers.AutoencoderKL:
    return decoder(num_blocks=num_blocks, scaling_factor=1.5, shift_factor=shift_factor, use_quant_conv=False, use_post_quant_conv=False)


def sd3() -> DiffusionPipeline:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16,
            dual_attention_layers=(0, 1), qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(),
        text_encoder=clip(transformers.CLIPTextModelWithProjection), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(64), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def flux() -> DiffusionPipeline:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
            pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae=vae(),
        text_encoder=clip(transformers.CLIPTextModel), tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def flux2_klein() -> DiffusionPipeline:
    return diffusers.Flux2KleinPipeline(
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=3 * 32,
            axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=decoder(diffusers.AutoencoderKLFlux2),
        text_encoder=qwen(transformers.Qwen3ForCausalLM, num_layers=3), tokenizer=qwen_tokenizer(), is_distilled=False,
    )  # fmt: skip


def chroma() -> DiffusionPipeline:
    return diffusers.ChromaPipeline(
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(), text_encoder=t5(), tokenizer=t5_tokenizer(),
    )  # fmt: skip


def qwen_image() -> DiffusionPipeline:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = GROUPED_TEXT | dict(vocab_size=len(qwen_tokenizer()), hidden_size=32, rope_parameters=rope, bos_token_id=256, eos_token_id=258)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1] * 4, latents_std=[1.1] * 4,
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer=qwen_tokenizer(),
    )  # fmt: skip


def sana() -> DiffusionPipeline:
    sides = ("encoder", "decoder")
    blocks = {f"{side}_block_types": ("ResBlock", "EfficientViTBlock") for side in sides}
    blocks |= {f"{side}_block_out_channels": (8, 8) for side in sides} | {f"{side}_layers_per_block": (1, 1) for side in sides}
    blocks |= {f"{side}_qkv_multiscales": ((), (5,)) for side in sides}
    return diffusers.SanaPipeline(
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=4, num_cross_attention_heads=2,
            cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=32, sample_size=32, patch_size=1,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=2, downsample_block_type="conv", upsample_block_type="interpolate", **blocks
        ),
        text_encoder=gemma(), tokenizer=gemma_tokenizer(),
    )  # fmt: skip


def z_image() -> DiffusionPipeline:
    return diffusers.ZImagePipeline(
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=4, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[4, 6, 6],
            axes_lens=[256, 32, 32],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(), text_encoder=qwen(transformers.Qwen3Model),
        tokenizer=qwen_tokenizer(),
    )  # fmt: skip


def lumina2() -> DiffusionPipeline:
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=4, num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1,
            multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(300, 32, 32), cap_feat_dim=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=vae(), text_encoder=gemma(), tokenizer=gemma_tokenizer(),
    )  # fmt: skip


def auraflow() -> DiffusionPipeline:
    return diffusers.AuraFlowPipeline(
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=64,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73), vae=vae(shift_factor=None), text_encoder=umt5(), tokenizer=t5_tokenizer(),
    )  # fmt: skip


def hidream() -> DiffusionPipeline:
    """The pipeline makes any size into that of 128 x 128 latents. So patches are large, and the VAE's pictures no larger than latents."""
    config = GROUPED_TEXT | dict(vocab_size=len(qwen_tokenizer()), hidden_size=16)
    return diffusers.HiDreamImagePipeline(
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=16, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, axes_dims_rope=(4, 2, 2), llama_layers=(0, 1),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(num_blocks=1),
        text_encoder=clip(transformers.CLIPTextModelWithProjection), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(), tokenizer_3=t5_tokenizer(),
        text_encoder_4=transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)), tokenizer_4=qwen_tokenizer(),
    )  # fmt: skip


def cogview4() -> DiffusionPipeline:
    sizes = GROUPED_TEXT | dict(vocab_size=len(qwen_tokenizer()), hidden_size=32, head_dim=8, pad_token_id=0)
    return diffusers.CogView4Pipeline(
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4, text_embed_dim=32,
            time_embed_dim=8, condition_dim=4, sample_size=8, rope_axes_dim=(16, 16),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
        vae=vae(), text_encoder=transformers.GlmModel(transformers.GlmConfig(**sizes)), tokenizer=qwen_tokenizer(),
    )  # fmt: skip


def wan() -> DiffusionPipeline:
    return diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, ffn_dim=32, num_layers=4,
            rope_max_seq_len=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1] * 4, latents_std=[1.1] * 4,
        ),
        text_encoder=umt5(), tokenizer=t5_tokenizer(),
    )  # fmt: skip


def pixart() -> DiffusionPipeline:
    return diffusers.PixArtSigmaPipeline(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4, out_channels=8,
            cross_attention_dim=32, caption_channels=32, use_additional_conditions=False,
        ),
        scheduler=diffusers.DDIMScheduler(), vae=vae(shift_factor=None), text_encoder=t5(), tokenizer=t5_tokenizer(),
    )  # fmt: skip


Builder = Callable[[], DiffusionPipeline]
TRAINED = (sd3, flux, flux2_klein, chroma, qwen_image, sana, z_image, lumina2, auraflow, hidream)
FAMILIES: dict[str, Builder] = {build.__name__: build for build in TRAINED}
"""Those that can be trained."""
OTHERS: dict[str, Builder] = {build.__name__: build for build in (cogview4, wan, pixart)}
"""Those that are refused."""

SMALL = {"height": 64, "width": 64}
CALL: dict[str, dict] = {
    "sd3": SMALL | {"guidance_scale": 4.5, "max_sequence_length": 16},
    "flux": SMALL | {"guidance_scale": 3.5, "max_sequence_length": 16},
    "flux2_klein": SMALL | {"guidance_scale": 4.0, "max_sequence_length": 64, "text_encoder_out_layers": [1, 2, 3]},
    "chroma": SMALL | {"guidance_scale": 4.0, "max_sequence_length": 16, "negative_prompt": ""},
    "qwen_image": SMALL | {"true_cfg_scale": 4.0, "negative_prompt": " "},
    "sana": {
        "height": 32, "width": 32, "guidance_scale": 4.5, "max_sequence_length": 32, "complex_human_instruction": None,
        "use_resolution_binning": False,
    },
    "z_image": SMALL | {"guidance_scale": 3.0, "max_sequence_length": 128},
    "lumina2": SMALL | {"guidance_scale": 4.0, "max_sequence_length": 64, "system_prompt": "draw"},
    "auraflow": SMALL | {"guidance_scale": 3.5, "max_sequence_length": 16},
    "hidream": {"height": 128, "width": 128, "guidance_scale": 5.0, "max_sequence_length": 16},
    "cogview4": SMALL | {"guidance_scale": 5.0, "max_sequence_length": 16, "negative_prompt": "x"},
    "wan": {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 5.0, "max_sequence_length": 16},
    "pixart": SMALL | {"guidance_scale": 4.5, "max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False},
}  # fmt: skip
"""What each family's own call is given beside prompts and steps."""


@torch.no_grad()
def _redraw(part: torch.nn.Module) -> None:
    """New weights: gates and output layers begin with zeros, which would hide what the blocks do."""
    for name, weight in part.named_parameters():
        if weight.dim() >= 2:
            weight.normal_(0, 0.3 if "table" in name or "pad_token" in name else 0.85 / math.sqrt(weight[0].numel()))
        elif "norm" not in name:
            weight.normal_(0, 0.1)


def make_family(name: str, folder: Path) -> Path:
    """Writes the random pipeline of a family, one of FAMILIES or OTHERS; the same one every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = (FAMILIES | OTHERS)[name]()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                _redraw(part)
    pipeline.save_pretrained(folder)
    return folder
