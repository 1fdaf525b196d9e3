"""What the scripts that train an embedded model share: placed and encoded pictures, captions, and samples drawn and judged.

Shapes: B batch, N pictures.
"""

import argparse
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from tqdm import tqdm
from transformers import CLIPTokenizer

from ddpo_fast.embedded.build_data import DATA, read_sheet
from ddpo_fast.embedded.scorer import log_probs
from ddpo_fast.embedded.vocabulary import ANIMALS, SUBJECTS, TEMPLATES, caption

PACKAGE = Path(__file__).parent
TOKENIZER = DATA / "tokenizer"
MAX_TOKENS = 24  # of a prompt, with its start and end
TEMPLATE_WEIGHTS = (0.5, 0.25, 0.1, 0.15)  # of TEMPLATES in training
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")  # the paper's, as words that must not confuse the model


def make_parser(description: str, stages: Mapping[str, Callable], prefix: str = "") -> argparse.ArgumentParser:
    """The options that the scripts share. prefix: of the names of what is written into this package."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=stages, help="what to do, in this order")
    parser.add_argument("--work", type=Path, help="folder of the checkpoints")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", type=int, default=32, help="random placements of each picture that are encoded")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--model", type=Path, default=PACKAGE / f"{prefix}model", help="folder to export to and to sample from")
    parser.add_argument("--grid", type=Path, default=PACKAGE / f"{prefix}samples.png")
    parser.add_argument("--evaluation", type=Path, default=PACKAGE / f"{prefix}evaluation.json")
    parser.add_argument("--samples", type=int, default=2, help="of each animal and guidance scale, to evaluate")
    return parser


def run_stages(args: argparse.Namespace, stages: Mapping[str, Callable[[argparse.Namespace], object]]) -> None:
    """Does args.stages, each from the same random state."""
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        torch.manual_seed(args.seed)
        stages[stage](args)


def save_atomically(state: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.rename(path)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def place(picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A picture (64, 64, 3) uint8 flipped, moved and scaled at random, so that its drawing stays inside the frame."""
    if generator.random() < 0.5:
        picture = picture[:, ::-1]
    rows, columns = np.nonzero((picture < 250).any(2))
    low, high = np.array([columns.min(), rows.min()]), np.array([columns.max(), rows.max()]) + 1
    scale = 1.0 if generator.random() < 0.4 else generator.uniform(0.8, min(1.1, 62 / (high - low).max()))
    room = 64 - scale * (high - low)
    corner = np.round(generator.uniform(np.minimum(1, room / 2), np.maximum(room - 1, room / 2)))
    matrix = np.array([[scale, 0, 0], [0, scale, 0]])
    matrix[:, 2] = corner - scale * low
    return cv2.warpAffine(np.ascontiguousarray(picture), matrix, (64, 64), flags=cv2.INTER_CUBIC, borderValue=(255, 255, 255))


@torch.no_grad()
def encode_pictures(args: argparse.Namespace, vae: AutoencoderKL) -> torch.Tensor:
    """Latents (N * variants, 4, 16, 16) of the randomly placed pictures, picture by picture."""
    cache = args.work / "latents.pt"
    if not cache.exists():
        generator, latents = np.random.default_rng(args.seed), []
        for picture in tqdm(read_sheet("train")[0], "encode"):
            variants = np.stack([place(picture, generator) for _ in range(args.variants)])
            latents.append(vae.encode(to_tensor(variants)).latent_dist.mean)
        save_atomically({"latents": torch.cat(latents)}, cache)
    return torch.load(cache, weights_only=True)["latents"]


def random_caption(name: str, words: list[str], generator: np.random.Generator) -> str:
    """A caption for `name`: one in ten is empty, one in ten goes on with words that say nothing about the picture."""
    kind = generator.random()
    if kind < 0.1:
        return ""
    text = caption(name, TEMPLATES[generator.choice(len(TEMPLATES), p=TEMPLATE_WEIGHTS)])
    if kind < 0.2:
        extra = [words[i] for i in generator.integers(len(words), size=generator.integers(1, 4))]
        text += " " + (generator.choice(ACTIVITIES) if generator.random() < 0.3 else " ".join(extra))
    return text


class Examples:
    """Latents of placed pictures with captions, drawn at random: every subject as often as the next, animals three times as often."""

    def __init__(self, args: argparse.Namespace, vae: AutoencoderKL, tokenizer: CLIPTokenizer):
        self.latents, self.tokenizer, self.variants = encode_pictures(args, vae), tokenizer, args.variants
        self.subjects = read_sheet("train")[1]
        self.words = [word for word in json.loads((DATA / "pictures.json").read_text())["words"] if word not in SUBJECTS]
        counts = {name: self.subjects.count(name) for name in self.subjects}
        self.weight = np.array([(3 if name in ANIMALS else 1) / counts[name] for name in self.subjects])

    def draw(self, count: int, generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (count, 4, 16, 16) and the token ids (count, MAX_TOKENS) of their captions."""
        chosen = generator.choice(len(self.subjects), count, p=self.weight / self.weight.sum())
        latents = self.latents[torch.from_numpy(chosen * self.variants + generator.integers(self.variants, size=count))]
        captions = [random_caption(self.subjects[i], self.words, generator) for i in chosen]
        return latents, self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def rounded(tree: dict) -> dict:
    """The same nested dict with floats rounded to four decimals."""
    return {
        key: rounded(value) if isinstance(value, dict) else round(value, 4) if isinstance(value, float) else value
        for key, value in tree.items()
    }


def accuracy(logits: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Share of animal pictures whose name is the best, or in the best five, of the 45 animals' names; and share of all
    pictures whose name is the best of all names."""
    animal = y < len(ANIMALS)
    ranks = logits[animal, : len(ANIMALS)].argsort(dim=1, descending=True)
    hits = ranks == y[animal, None]
    return {
        "animals_top1": hits[:, :1].any(1).float().mean().item(),
        "animals_top5": hits[:, :5].any(1).float().mean().item(),
        "all_top1": (logits.argmax(1) == y).float().mean().item(),
    }


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline of 16 bit, replacing `folder` at once; its text encoders load in fp32, as everything else does."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    for config in partial.glob("text_encoder*/config.json"):  # transformers loads in the dtype named there
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for config in partial.glob("*/config.json"):  # where a part was loaded from is a folder of this machine
        config.write_text(re.sub(r'  "_name_or_path": .*\n', "", config.read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def sample(pipeline: DiffusionPipeline, prompts: list[str], seed: int, **arguments: float) -> torch.Tensor:
    """One picture a prompt, in 20 steps and with `arguments` of the pipeline's call: (B, 3, 64, 64) in [0, 1]."""
    generator = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(len(prompts))]
    pipeline.set_progress_bar_config(disable=True)
    batches = [
        pipeline(
            prompts[i : i + 32], num_inference_steps=20, generator=generator[i : i + 32], output_type="pt", **arguments
        ).images
        for i in range(0, len(prompts), 32)
    ]  # fmt: skip
    return torch.cat(batches).float()


def draw_sheet(images: torch.Tensor, path: Path) -> None:
    """A PNG of one sample (3, 64, 64) for each subject, with its name written under it."""
    columns, height = 15, 64 + 14
    rows = math.ceil(len(SUBJECTS) / columns)
    sheet = np.full((rows * height, columns * 72, 3), 255, np.uint8)
    for i, (name, image) in enumerate(zip(SUBJECTS, images)):
        y, x = i // columns * height, i % columns * 72 + 4
        sheet[y : y + 64, x : x + 64] = (image.permute(1, 2, 0).numpy()[..., ::-1] * 255).round()
        width = cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, 0.33, 1)[0][0]
        cv2.putText(sheet, name, (x + 32 - width // 2, y + 73), cv2.FONT_HERSHEY_SIMPLEX, 0.33, (60, 60, 60), 1, cv2.LINE_AA)
    cv2.imwrite(str(path), sheet, [cv2.IMWRITE_PNG_COMPRESSION, 9])


def judge(pipeline: DiffusionPipeline, args: argparse.Namespace, **arguments: float) -> dict[str, float]:
    """How often the scorer names the animal asked for, and how far apart its scores are, in args.samples of each animal."""
    y = torch.arange(len(ANIMALS)).repeat(args.samples)
    scores = log_probs(sample(pipeline, list(ANIMALS) * args.samples, args.seed, **arguments))
    probabilities = scores.exp()[:, : len(ANIMALS)]
    right = probabilities.gather(1, y[:, None])
    wrong = (probabilities.sum() - right.sum()) / (probabilities.numel() - len(y))
    return {
        "animals_top1": accuracy(scores, y)["animals_top1"],
        "animals_top5": accuracy(scores, y)["animals_top5"],
        "reward_mean": right.mean().item(),
        "reward_std": right.std().item(),
        "reward_mean_of_wrong_prompts": wrong.item(),
    }


def write_json(results: dict, path: Path) -> None:
    """Write and print results, floats rounded to four decimals."""
    text = json.dumps(rounded(results), indent=1)
    path.write_text(text + "\n")
    print(text)
