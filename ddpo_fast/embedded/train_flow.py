"""Train the embedded flow model: a StableDiffusion3Pipeline of 64x64 pictures, from the pictures in `data/`.

    python -m ddpo_fast.embedded.train_flow train export grid evaluate [--steps 7000]

`train` continues from its checkpoint in --work if there is one, exactly where it was stopped. Its schedule follows the number
of steps. The VAE and the tokenizer are those of the model that train_model.py made; towers and transformer begin from scratch.
  train     two text towers and the transformer, together, on latents encoded once
  export    write flow_model/ in 16 bit
  grid      write flow_samples.png, one sample for each subject
  evaluate  write flow_evaluation.json: how the scorer judges samples

The pipeline has no third text encoder. diffusers has to be told so, and has to be told that no tokens stand for it:
`from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)` and `pipeline(prompt, max_sequence_length=0)`.

Shapes: B batch, L = 24 tokens.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.nn.init import zeros_
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ddpo_fast.embedded.training import (
    MAX_TOKENS,
    PACKAGE,
    TOKENIZER,
    Examples,
    draw_sheet,
    judge,
    make_parser,
    run_stages,
    sample,
    save_atomically,
    save_pipeline,
    write_json,
)
from ddpo_fast.embedded.vocabulary import SUBJECTS

WIDTHS = (128, 8)  # of the text towers; the pipeline wants two, and the second is only there for it
SAVE_S = 90  # seconds between checkpoints
VALIDATION_BATCHES = 8


def load_vae() -> AutoencoderKL:
    """The shipped VAE in fp32. Its latents have mean 0 and deviation 1 as they are; SD3's pipeline adds a shift."""
    vae = AutoencoderKL.from_pretrained(PACKAGE / "model" / "vae")
    vae.register_to_config(shift_factor=0.0)
    return vae.eval().requires_grad_(False)


def new_tower(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int) -> CLIPTextModelWithProjection:
    """A text tower; its tokens are the output of the last layer but one."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_transformer() -> SD3Transformer2DModel:
    """Every block begins as the identity, and the output as 0 (adaLN-Zero, arxiv.org/abs/2212.09748)."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=5,
        caption_projection_dim=160,
        joint_attention_dim=sum(WIDTHS),
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    layers = [norm.linear for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (*layers, transformer.norm_out.linear, transformer.proj_out):
        zeros_(layer.weight)
        zeros_(layer.bias)
    return transformer


def new_networks(tokenizer: CLIPTokenizer) -> torch.nn.ModuleDict:
    """What is trained, by the names that the pipeline has for it."""
    towers = {
        "text_encoder": new_tower(tokenizer, WIDTHS[0], layers=3, heads=4),
        "text_encoder_2": new_tower(tokenizer, WIDTHS[1], layers=1, heads=1),
    }
    return torch.nn.ModuleDict({"transformer": new_transformer()} | towers)


def encode(networks: torch.nn.ModuleDict, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What SD3's encode_prompt makes of token ids (B, L): tokens (B, L, 136) and pooled (B, 136), both towers side by side."""
    outputs = [networks[name](ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    return torch.cat([output.hidden_states[-2] for output in outputs], 2), torch.cat([output.text_embeds for output in outputs], 1)


def velocity_error(networks: torch.nn.ModuleDict, examples: Examples, count: int, generator: np.random.Generator) -> torch.Tensor:
    """Mean squared error of the velocity noise - clean at (1 - sigma) clean + sigma noise, sigma = sigmoid(normal).

    Equations 13 and 19 of arxiv.org/abs/2403.03206. Everything random comes from `generator`.
    """
    clean, ids = examples.draw(count, generator)
    noise = torch.from_numpy(generator.standard_normal(clean.shape, dtype=np.float32))
    sigma = torch.from_numpy(generator.standard_normal(count, dtype=np.float32)).sigmoid()
    noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
    velocity = networks["transformer"](noisy, *encode(networks, ids), 1000 * sigma).sample
    return (velocity - (noise - clean)).square().mean()


@torch.no_grad()
def validate(ema: torch.nn.ModuleDict, examples: Examples, args: argparse.Namespace) -> float:
    """The mean error on captions, noise and sigmas that training never draws, the same ones every time."""
    generators = [np.random.default_rng((args.seed, i, 1)) for i in range(VALIDATION_BATCHES)]
    return torch.stack([velocity_error(ema, examples, args.batch, generator) for generator in generators]).mean().item()


def train(args: argparse.Namespace) -> None:
    """AdamW; 200 steps of warm-up, constant, linear decay over the last half. A line of the log every --log-steps steps."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    examples, networks = Examples(args, load_vae(), tokenizer), new_networks(tokenizer)
    ema = copy.deepcopy(networks).requires_grad_(False)
    parameters, averages = list(networks.parameters()), list(ema.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    checkpoint, step = args.work / "flow.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for name, part in (("live", networks), ("ema", ema), ("optimizer", optimizer)):
            part.load_state_dict(state[name])
        step = state["step"]

    def save() -> None:
        states = {"live": networks.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
        save_atomically(states | {"step": step}, checkpoint)

    saved, logged, losses = time.monotonic(), time.monotonic(), []
    while step < args.steps:
        loss = velocity_error(networks, examples, args.batch, np.random.default_rng((args.seed, step)))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, (step + 1) / 200, 2 * (1 - step / args.steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(averages, parameters, 1 - min(0.9985, (step + 1) / (step + 20)))
        losses.append(loss.item())
        if step % args.log_steps == 0:
            rate = args.batch * len(losses) / (time.monotonic() - logged)
            print(f"step {step} of {args.steps}: loss {sum(losses) / len(losses):.4f}", end=", ")
            print(f"validation {validate(ema, examples, args):.4f}, {rate:.1f} samples/s", flush=True)
            logged, losses = time.monotonic(), []
        if time.monotonic() - saved > SAVE_S:
            save()
            saved = time.monotonic()
    save()


def export_model(args: argparse.Namespace) -> None:
    """Write the pipeline of the averaged weights in 16 bit, replacing --model at once."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    networks = new_networks(tokenizer)
    networks.load_state_dict(torch.load(args.work / "flow.pt", weights_only=True)["ema"])
    pipeline = StableDiffusion3Pipeline(
        vae=load_vae().half(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        **networks.eval().half(),
    )
    save_pipeline(pipeline, args.model)


def load_pipeline(args: argparse.Namespace) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(args.model, text_encoder_3=None, tokenizer_3=None)


def draw_grid(args: argparse.Namespace) -> None:
    """flow_samples.png: one sample for each subject, not chosen, with its prompt written under it."""
    images = sample(load_pipeline(args), list(SUBJECTS), args.seed, guidance_scale=3.0, max_sequence_length=0)
    draw_sheet(images, args.grid)


def evaluate(args: argparse.Namespace) -> None:
    """flow_evaluation.json: how often the scorer names the animal asked for, and how far apart its scores are."""
    pipeline = load_pipeline(args)
    results = {"samples_per_animal": args.samples, "num_inference_steps": 20}
    for guidance_scale in (1.0, 3.0):
        arguments = {"guidance_scale": guidance_scale, "max_sequence_length": 0}
        results[f"guidance_{guidance_scale:g}"] = judge(pipeline, args, **arguments)
    write_json(results, args.evaluation)


STAGES = {"train": train, "export": export_model, "grid": draw_grid, "evaluate": evaluate}


def main() -> None:
    parser = make_parser(__doc__, STAGES, "flow_")
    parser.add_argument("--steps", type=int, default=7000, help="of training, earlier runs included")
    parser.add_argument("--log-steps", type=int, default=250, help="steps between two lines of the log")
    parser.set_defaults(work=Path("runs/embedded_flow"), batch=64, learning_rate=1e-3)
    run_stages(parser.parse_args(), STAGES)


if __name__ == "__main__":
    main()
