"""Pictures of your prompts before and after a run.

ddpo-fast sample RUN_DIR "a prompt" ... [--seed 0 1 2] [--output FOLDER]
"""

import argparse
import contextlib
import re
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddpo_fast import kernels
from ddpo_fast.assemble import find, load_policy, share_guidance
from ddpo_fast.config.command_line import parse
from ddpo_fast.config.options import Config
from ddpo_fast.distributed.ranks import Ranks
from ddpo_fast.networks import attention_backends
from ddpo_fast.places import NETWORKS, typed_path
from ddpo_fast.prompts import EVALUATIONS
from ddpo_fast.records.metrics import picture_grid
from ddpo_fast.rollout import generate
from ddpo_fast.terminal import steady_streams, user_error


def read_config(run_dir: Path, options: list[str]) -> Config:
    """The config of a run with some of it changed by `options`, as on the trainer's command line. Raises ValueError.

    An attention that the run's machine chose, and that cannot run on this one, gives way to auto.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"RUN_DIR={run_dir}: there is no config.yaml in it; valid is the directory of a run")
    unused = ["--run.dir=null", "--prompts.name=simple_animals", "--prompts.file=null", "--prompts.list=null"]  # which may be gone
    config = parse([f"--config={path}", *unused, *options])
    asked = any(option.startswith("--attention.backend=") for option in options)
    if not asked and (reason := attention_backends.fault(config.attention.backend, _device())):  # it is what another machine chose
        print(f"attention.backend={config.attention.backend}: {reason}; auto takes its place", file=sys.stderr)
        config = config.replace(attention__backend="auto")
    return config


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def before_and_after(weights: Path, config: Config, prompts: list[str], seeds: list[int]) -> tuple[Tensor, Tensor]:
    """Pictures of a run's model untrained and with the trained weights in `weights`, as its trainer samples them: 2 x (B, 3, H, W), uint8.

    Picture i is of prompts[i] with the noise of the run's evaluation picture number seeds[i], and so that picture if it has that prompt,
    too. Raises ValueError if the run has not saved its weights yet.
    """
    if not any((weights / name).is_dir() for name in ("lora", *NETWORKS)):
        raise ValueError(
            f"{weights}: there is no lora/ (or whole network) in it yet; a run writes it with its first checkpoint, best/ on evaluation"
        )
    device = _device()
    ops, sample = kernels.select(config.kernels.backend, device), config.sample
    attention_backends.require(config.attention.backend, device)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is the pictures' path alone
        config, policy = load_policy(config, find(config), Ranks(), device, ops)
    share_guidance(config, policy)
    policy.attach(policy.network)
    policy.check_output()
    seed = config.run.seed
    schedule = policy.denoising(config.evaluation).schedule(seed, 1)
    ids = EVALUATIONS["eval"].first_id + torch.tensor(seeds, device=device)
    pictures = []
    with tqdm(total=2 * len(prompts) * schedule.num_steps, unit="step", leave=False, dynamic_ncols=True) as bar:
        for trained in (False, True):
            if trained:
                policy.load_exported(weights)
            for start in range(0, len(prompts), sample.batch_size):
                rows = slice(start, start + sample.batch_size)
                _, images = generate(policy, ops, schedule, seed, ids[rows], prompts[rows], progress=bar.update)
                pictures.append((images.nan_to_num() * 255).round().to("cpu", torch.uint8))
    return torch.cat(pictures).chunk(2)


def save(folder: Path, prompts: list[str], seeds: list[int], before: Tensor, after: Tensor) -> Path:
    """Writes every picture as <number>_<prompt>_seed<seed>_<before|after>.png and all of them as grid.png, whose path it returns."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = torch.stack([before, after], 1)
    for number, (prompt, seed, pair) in enumerate(zip(prompts, seeds, pairs)):
        words = re.sub(r"\W+", "_", prompt).strip("_")[:60]
        for when, picture in zip(("before", "after"), pair):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number:03d}_{words}_seed{seed}_{when}.png")
    notes = [f"{when}, seed {seed}" for seed in seeds for when in ("before", "after")]
    twice = [prompt for prompt in prompts for _ in range(2)]
    picture_grid(pairs.flatten(0, 1), twice, notes, min(8, len(notes))).save(folder / "grid.png")
    return folder / "grid.png"


def main(argv: list[str] | None = None) -> None:
    """Runs a command line. A mistake is one line on standard error and exit code 2."""
    if argv is None:
        steady_streams()
    parser = argparse.ArgumentParser(prog="ddpo-fast sample", description="Pictures of your prompts before and after a run.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="A picture of every prompt for each of these. Default: 0.")
    parser.add_argument("--output", type=typed_path, help="Folder for the pictures. Default: RUN_DIR/samples.")
    parser.add_argument("--best", action="store_true", help="The weights of RUN_DIR/best, not the newest.")
    for option, what in (
        ("model.path", "Where the model is now."),
        ("model.config", "Where the configs of a single file are now."),
        ("model.vae", "Where the VAE is now."),
        ("lora.init", "Where the LoRA is now that the run began from; null: 'before' is the model without it."),
        ("model.dtype", "fp32, fp16 or bf16."),
        ("eval.num_steps", "Denoising steps."),
        ("eval.guidance_scale", "Guidance."),
        ("eval.height", "Height of a picture, in pixels."),
        ("eval.width", "Width of a picture, in pixels."),
        ("eval.sampler", "How a picture is denoised."),
        ("sample.batch_size", "Pictures denoised together."),
        ("attention.backend", "What computes attention; auto measures."),
        ("kernels.backend", "auto, triton or reference."),
    ):
        parser.add_argument(f"--{option}", metavar="VALUE", help=f"{what} Default: the run's.")
    args = parser.parse_args(argv)
    changed = [f"--{name}={value}" for name, value in vars(args).items() if "." in name and value is not None]
    try:
        if not args.prompts:
            raise ValueError('PROMPT: there is none; valid is at least one, such as "a lion"')
        if not all(0 <= seed < 1 << 32 for seed in args.seed):
            raise ValueError(f"--seed={args.seed}: valid is whole numbers in [0, 2^32)")
        prompts = [prompt for prompt in args.prompts for _ in args.seed]
        seeds = args.seed * len(args.prompts)
        weights = args.run_dir / "best" if args.best else args.run_dir
        before, after = before_and_after(weights, read_config(args.run_dir, changed), prompts, seeds)
        grid = save(args.output or args.run_dir / "samples", prompts, seeds, before, after)
    except (ValueError, OSError) as error:
        user_error(error)
    print(grid)


if __name__ == "__main__":
    main()
