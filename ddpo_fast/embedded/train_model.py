"""Train the embedded default model: a StableDiffusionPipeline of 64x64 pictures, from the pictures in `data/`.

    python -m ddpo_fast.embedded.train_model vae decoder unet scorer export grid evaluate [--minutes 30]

Each stage continues from its checkpoint in --work if there is one. Schedules follow the clock, so that a stage takes
--minutes on any machine: the seed fixes data and initialisation, the number of steps depends on the machine. The shipped
model took 23 minutes for vae, 50 minutes for decoder, in what the other stages left of the machine, and 70 minutes for unet,
on one to two cores of a busy machine.
  tokenizer write data/tokenizer/; the shipped model needs the shipped tokenizer, so run this only to train everything again
  vae       AutoencoderKL 3x64x64 <-> 4x16x16 on --all-pictures (see build_data), otherwise on the pictures in `data/`
  decoder   the VAE's decoder alone for longer; this needs nothing from the unet stage, and can run beside it
  unet      text tower and UNet, from scratch together, on latents encoded once
  scorer    the linear head of scorer.py on frozen features of the pictures and of their reconstructions
  export    write model/ in 16 bit
  grid      write samples.png, one sample for each subject
  evaluate  write evaluation.json: how the scorer judges samples, and the VAE's PSNR

Shapes: B batch, N pictures.
"""

import argparse
import copy
import json
import string
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddpo_fast.embedded.build_data import DATA, read_sheet
from ddpo_fast.embedded.scorer import HEAD, features
from ddpo_fast.embedded.training import (
    ACTIVITIES,
    MAX_TOKENS,
    TOKENIZER,
    Examples,
    accuracy,
    draw_sheet,
    judge,
    make_parser,
    place,
    run_stages,
    sample,
    save_atomically,
    save_pipeline,
    to_tensor,
    write_json,
)
from ddpo_fast.embedded.vocabulary import SUBJECTS, TEMPLATES, caption


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def learn_tokenizer(args: argparse.Namespace) -> None:
    """CLIP's byte-level BPE with 2,048 entries, learned from the captions and the names of all emoji: data/tokenizer/.

    Entries of equal count are numbered in another order every time, so a model belongs to the tokenizer that it was trained with.
    """
    words = json.loads((DATA / "pictures.json").read_text())["words"]
    captions = [caption(name, template) for name in SUBJECTS for template in TEMPLATES]
    corpus = words + 3 * captions + 3 * list(ACTIVITIES) + list(string.ascii_lowercase + string.digits)
    tokenizer = CLIPTokenizer(model_max_length=MAX_TOKENS)
    tokenizer = tokenizer.train_new_from_iterator(corpus, 2048, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.save_pretrained(TOKENIZER)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(80, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's scheduler."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


class Clock:
    """The share of a stage's time that all runs of the stage have used up, with a progress bar."""

    def __init__(self, name: str, minutes: float, elapsed_s: float = 0.0):
        self.total_s, self.before_s, self.start = minutes * 60, elapsed_s, time.monotonic()
        self.bar = tqdm(desc=name, total=round(self.total_s), unit="s", mininterval=10, initial=round(elapsed_s))

    def elapsed_s(self) -> float:
        return self.before_s + time.monotonic() - self.start

    def progress(self) -> float:
        return min(1.0, self.elapsed_s() / self.total_s)

    def show(self, **values: float) -> None:
        self.bar.n = min(round(self.elapsed_s()), self.bar.total)
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
        self.bar.update(0)


def fit_vae(args: argparse.Namespace, name: str, trained: str, learning_rate: float, draw_batch: Callable) -> None:
    """Fit the parameters of the VAE whose names begin with `trained`. Continues from the checkpoint `name`, and writes it.

    Loss: L1 + squared error + L1 of the gradients at two scales, and a small KL. Flips, shifts and sometimes permuted
    colours are drawn at random. `draw_batch(generator)` gives images (B, 3, 64, 64) in [-1, 1].
    """
    vae = new_vae().to(memory_format=torch.channels_last)
    parameters = [parameter.requires_grad_(key.startswith(trained)) for key, parameter in vae.named_parameters()]
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint, step, elapsed_s = args.work / f"{name}.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed_s = state["step"], state["elapsed_s"]
    elif name == "decoder":
        vae.load_state_dict(torch.load(args.work / "vae.pt", weights_only=True)["vae"])
    clock, saved = Clock(name, args.minutes, elapsed_s), time.monotonic()

    def save() -> None:
        state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        save_atomically(state | {"elapsed_s": clock.elapsed_s()}, checkpoint)

    while clock.progress() < 1:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        torch.manual_seed(args.seed * 1_000_003 + step)
        x = draw_batch(generator)
        flip, permute, dx, dy = torch.randint(0, 8, (4,), generator=generator).tolist()
        if flip % 2:
            x = x.flip(3)
        if permute < 1:
            x = x[:, torch.randperm(3, generator=generator)]
        x = x.roll((dy - 4, dx - 4), (2, 3)).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        latents = posterior.sample()
        if name == "decoder":  # generated latents are not exact
            latents = latents + 0.05 * latents.std((0, 2, 3), keepdim=True) * torch.randn_like(latents)
        error = vae.decode(latents).sample - x
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        for scaled in (error, F.avg_pool2d(error, 2)):
            loss = loss + 0.5 * (scaled.diff(dim=2).abs().mean() + scaled.diff(dim=3).abs().mean())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, step / 100, (1 - clock.progress()) / 0.6 + 0.005)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            clock.show(loss=loss.item(), psnr=-10 * error.detach().square().mean().div(4).log10().item(), step=step)
        if time.monotonic() - saved > 120:
            save()
            saved = time.monotonic()
    save()
    clock.bar.close()


def vae_pictures(args: argparse.Namespace) -> torch.Tensor:
    pictures = np.load(args.all_pictures)["pictures"] if args.all_pictures else read_sheet("train")[0]
    return to_tensor(pictures).contiguous(memory_format=torch.channels_last)


def train_vae(args: argparse.Namespace) -> None:
    images = vae_pictures(args)
    fit_vae(args, "vae", "", 2e-3, lambda g: images[torch.randint(len(images), (args.vae_batch,), generator=g)])


def train_decoder(args: argparse.Namespace) -> None:
    """Train the decoder alone further, half of the batches on shipped pictures. The latents stay as they are."""
    images, shipped = vae_pictures(args), to_tensor(read_sheet("train")[0])

    def draw_batch(generator: torch.Generator) -> torch.Tensor:
        source = images if torch.rand((), generator=generator) < 0.5 else shipped
        return source[torch.randint(len(source), (args.vae_batch,), generator=generator)]

    fit_vae(args, "decoder", ("decoder.", "post_quant_conv."), 1e-3, draw_batch)


@torch.no_grad()
def load_vae(args: argparse.Namespace) -> AutoencoderKL:
    """The trained VAE, changed so that each channel of its latents has mean 0 and deviation 1 on the shipped pictures.

    z' = (z - m) / s is folded into the 1x1 convolutions around the latents, so that scaling_factor is 1.
    """
    vae = new_vae()
    checkpoint = args.work / "decoder.pt" if (args.work / "decoder.pt").exists() else args.work / "vae.pt"
    vae.load_state_dict(torch.load(checkpoint, weights_only=True)["vae"])
    vae.register_to_config(scaling_factor=1.0)
    vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    z = torch.cat([vae.encode(part).latent_dist.mean for part in to_tensor(read_sheet("train")[0]).split(64)])
    m, s = z.mean((0, 2, 3)), z.std((0, 2, 3))
    vae.post_quant_conv.bias += torch.einsum("oc,c->o", vae.post_quant_conv.weight[:, :, 0, 0], m)
    vae.post_quant_conv.weight *= s[:, None, None]
    vae.quant_conv.bias -= torch.cat([m, 2 * s.log()])  # for the means, for the log-variances
    vae.quant_conv.weight[:4] /= s[:, None, None, None]
    vae.quant_conv.bias[:4] /= s
    return vae


def load_unet(args: argparse.Namespace, which: str = "ema") -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """The networks of the checkpoint: their averaged weights ("ema"), or those being trained ("live")."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    unet, text_encoder = new_unet(), new_text_encoder(tokenizer)
    state = torch.load(args.work / "unet.pt", weights_only=True)
    unet.load_state_dict(state[which]["unet"])
    text_encoder.load_state_dict(state[which]["text_encoder"])
    return unet.eval(), text_encoder.eval(), tokenizer


def train_unet(args: argparse.Namespace) -> None:
    """Train UNet and text tower to predict the noise (min-SNR-5 weights); AdamW, linear decay over the last half."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    examples = Examples(args, load_vae(args), tokenizer)
    networks = torch.nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)})
    networks.to(memory_format=torch.channels_last)
    ema = copy.deepcopy(networks).requires_grad_(False)
    parameters, averages = list(networks.parameters()), list(ema.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    checkpoint, step, elapsed_s = args.work / "unet.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for key, module in (("live", networks), ("ema", ema)):
            module["unet"].load_state_dict(state[key]["unet"])
            module["text_encoder"].load_state_dict(state[key]["text_encoder"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed_s = state["step"], state["elapsed_s"]

    def save() -> None:
        states = {
            key: {name: network.state_dict() for name, network in modules.items()} for key, modules in (("live", networks), ("ema", ema))
        }
        progress = {"step": step, "elapsed_s": clock.elapsed_s()}
        save_atomically(states | {"optimizer": optimizer.state_dict()} | progress, checkpoint)

    alphas = new_scheduler().alphas_cumprod
    loss_weight = (5 * (1 - alphas) / alphas).clamp(max=1)  # min(snr, 5) / snr
    clock, saved, losses = Clock("unet", args.minutes, elapsed_s), time.monotonic(), []
    while clock.progress() < 1:
        generator = np.random.default_rng((args.seed, step))
        torch.manual_seed(args.seed * 1_000_003 + step)
        clean, ids = examples.draw(args.batch, generator)
        t = torch.from_numpy(generator.integers(len(alphas), size=args.batch))
        noise = torch.randn_like(clean)
        alpha = alphas[t, None, None, None]
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        error = networks["unet"](noisy, t, networks["text_encoder"](ids).last_hidden_state).sample - noise
        loss = (error.square().mean((1, 2, 3)) * loss_weight[t]).mean()
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, (step + 1) / 200, 2 * (1 - clock.progress()) + 0.005)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(averages, parameters, 1 - min(0.9985, (step + 1) / (step + 20)))
        losses = losses[-199:] + [loss.item()]
        if step % 50 == 0:
            clock.show(loss=sum(losses) / len(losses), step=step)
        if time.monotonic() - saved > 240:
            save()
            saved = time.monotonic()
    save()
    clock.bar.close()


def degrade(images: torch.Tensor, vae: AutoencoderKL, generator: np.random.Generator) -> torch.Tensor:
    """Degrade pictures as generation does: images (B, 3, 64, 64) in [-1, 1] -> [0, 1]. The VAE redraws most of them
    from noisy latents. Then they are tinted, faded, blurred and noised at random."""
    if generator.random() < 0.7:
        latents = vae.encode(images).latent_dist.mean
        latents = latents + torch.randn_like(latents) * generator.uniform(0, 0.5)
        images = vae.decode(latents).sample
    images = images.clamp(-1, 1) / 2 + 0.5
    gain = torch.from_numpy(generator.uniform(0.8, 1.1, (len(images), 3, 1, 1))).float()
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * generator.uniform(0.4, 1.3)
    images = 1 - (1 - images * gain) * generator.uniform(0.6, 1.05)
    if generator.random() < 0.4:
        sigma = generator.uniform(0.3, 1.2)
        kernel = torch.exp(-torch.arange(-3.0, 4.0).square() / (2 * sigma**2))
        kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, 7, 7)
        images = F.conv2d(F.pad(images, (3,) * 4, mode="replicate"), kernel, groups=3)
    if generator.random() < 0.4:
        images = images + torch.randn_like(images) * generator.uniform(0, 0.08)
    return images.clamp(0, 1)


def fit_head(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Multinomial logistic regression on features x (N, D), labels y (N,) -> weight (S, D), bias (S,).

    Every subject counts the same. The strong decay and the few steps were chosen by the accuracy on styles left out.
    """
    mean, std = x.mean(0), x.std(0) + 1e-4
    x = (x - mean) / std
    balance = 1 / torch.bincount(y, minlength=len(SUBJECTS)).clamp(min=1)[y].float()
    head = torch.nn.Linear(x.shape[1], len(SUBJECTS))
    torch.nn.init.zeros_(head.weight)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=10)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 200)
        loss = (F.cross_entropy(head(x), y, reduction="none") * balance).sum() / balance.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = head.weight.detach() / std
    return weight, head.bias.detach() - weight @ mean


@torch.no_grad()
def scorer_features(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Features of the pictures as they are ("plain", N) and degraded ("degraded", N * scorer_variants), both splits."""
    cache = args.work / "scorer_features.pt"
    if not cache.exists():
        vae, generator, out = load_vae(args), np.random.default_rng(args.seed), {}
        for split in ("train", "heldout"):
            pictures = read_sheet(split)[0]
            out[f"{split}_plain"] = torch.cat([features(to_tensor(p) / 2 + 0.5) for p in np.array_split(pictures, 20)])
            rows = []
            for picture in tqdm(pictures, f"features {split}"):
                copies = np.stack([place(picture, generator) for _ in range(args.scorer_variants)])
                parts = [degrade(part, vae, generator) for part in to_tensor(copies).split(2)]
                rows.append(features(torch.cat(parts)))
            out[f"{split}_degraded"] = torch.cat(rows)
        save_atomically(out, cache)
    return torch.load(cache, weights_only=True)


def train_scorer(args: argparse.Namespace) -> None:
    """Fit the head on all training styles. Fit its temperature on each style with a head fitted on the other three."""
    data = scorer_features(args)
    _, names, styles = read_sheet("train")
    _, heldout_names, _ = read_sheet("heldout")
    repeat = args.scorer_variants
    y = torch.tensor([SUBJECTS.index(name) for name in names])
    y_heldout = torch.tensor([SUBJECTS.index(name) for name in heldout_names])
    style = np.array(styles)
    x = torch.cat([data["train_plain"], data["train_degraded"]])
    y_all = torch.cat([y, y.repeat_interleave(repeat)])
    style_all = np.concatenate([style, style.repeat(repeat)])

    unseen_logits, unseen_labels, per_style = [], [], {}
    for left_out in dict.fromkeys(styles):
        kept, rest = torch.from_numpy(style_all != left_out), torch.from_numpy(style_all == left_out)
        weight, bias = fit_head(x[kept], y_all[kept])
        unseen_logits.append(F.linear(x[rest], weight, bias))
        unseen_labels.append(y_all[rest])
        per_style[left_out] = accuracy(F.linear(data["train_plain"], weight, bias)[style == left_out], y[style == left_out])
    logits, labels = torch.cat(unseen_logits), torch.cat(unseen_labels)
    temperatures = torch.logspace(-1, 1, 81)
    temperature = temperatures[torch.stack([F.cross_entropy(logits / t, labels) for t in temperatures]).argmin()].item()

    weight, bias = fit_head(x, y_all)
    HEAD.mkdir(exist_ok=True)
    save_file({"weight": weight.half().contiguous(), "bias": bias.half()}, HEAD / "head.safetensors")
    metadata = {
        "subjects": SUBJECTS,
        "temperature": temperature,
        "heldout_style": accuracy(F.linear(data["heldout_plain"], weight, bias), y_heldout),
        "heldout_style_degraded": accuracy(F.linear(data["heldout_degraded"], weight, bias), y_heldout.repeat_interleave(repeat)),
        "left_out_styles": per_style,
    }
    write_json(metadata, HEAD / "metadata.json")


def export_model(args: argparse.Namespace) -> None:
    """Write the pipeline in 16 bit, replacing --model at once."""
    unet, text_encoder, tokenizer = load_unet(args)
    vae = load_vae(args)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_pipeline(pipeline, args.model)


def draw_grid(args: argparse.Namespace) -> None:
    """samples.png: one sample for each subject, not chosen, with its prompt written under it."""
    pipeline = StableDiffusionPipeline.from_pretrained(args.model)
    draw_sheet(sample(pipeline, list(SUBJECTS), args.seed, eta=1.0, guidance_scale=4.0), args.grid)


@torch.no_grad()
def evaluate(args: argparse.Namespace) -> None:
    """evaluation.json: how often the scorer names the animal asked for, how far apart its scores are, how well the VAE redraws."""
    pipeline = StableDiffusionPipeline.from_pretrained(args.model)
    results = {"samples_per_animal": args.samples, "num_inference_steps": 20, "eta": 1.0}
    for guidance_scale in (1.0, 3.0, 5.0):
        results[f"guidance_{guidance_scale:g}"] = judge(pipeline, args, eta=1.0, guidance_scale=guidance_scale)
    for split in ("train", "heldout"):
        images = to_tensor(read_sheet(split)[0])
        redrawn = torch.cat([pipeline.vae(part).sample.clamp(-1, 1) for part in images.split(64)])
        results[f"vae_psnr_db_{split}"] = -10 * ((redrawn - images) / 2).square().mean((1, 2, 3)).log10().mean().item()
    write_json(results, args.evaluation)


STAGES = {
    "tokenizer": learn_tokenizer,
    "vae": train_vae,
    "decoder": train_decoder,
    "unet": train_unet,
    "scorer": train_scorer,
    "export": export_model,
    "grid": draw_grid,
    "evaluate": evaluate,
}


def main() -> None:
    parser = make_parser(__doc__, STAGES)
    parser.add_argument("--minutes", type=float, default=15, help="time of a training stage, earlier runs of it included")
    parser.add_argument("--all-pictures", type=Path, help="pictures for the VAE, from build_data --all-pictures")
    parser.add_argument("--vae-batch", type=int, default=8)
    parser.add_argument("--scorer-variants", type=int, default=12, help="degraded copies of each picture for the scorer")
    parser.set_defaults(work=Path("runs/embedded"), batch=32, learning_rate=6e-4)
    run_stages(parser.parse_args(), STAGES)


if __name__ == "__main__":
    main()
