"""A random tiny Stable Diffusion pipeline in diffusers' folder format, and what would be most of the time of a run as small as that."""

import functools
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("bounds", "runs")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: without a GPU, kernels run in its interpreter

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from runs import Ranks
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddpo_fast.config import options
from ddpo_fast.records import report, run_directory

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


@pytest.fixture(scope="session", autouse=True)
def quick():
    """Runs in this process write no report, whose plots are 40 % of so short a run, and build the parser once.

    What has been imported by now is no work of the garbage collector, which takes a tenth of the time otherwise.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "write_report", lambda folder: None)
        patch.setattr(options, "_parser", functools.cache(options._parser))
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter patches its language once in a launch for each module of kernels, not in each call of a nested function."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    patch_language, execute, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        if fn.__module__ not in patched:
            patched.add(fn.__module__)
            return patch_language(fn)

    def launch(*args, **kwargs):
        patched.clear()
        return execute(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        yield


@pytest.fixture
def reports(monkeypatch):
    """Runs write their report, as they do for users."""
    monkeypatch.setattr(run_directory, "write_report", report.write_report)


@pytest.fixture(scope="session")
def _ranks(tmp_path_factory) -> Iterator[list[Ranks]]:
    started = []
    yield started
    for ranks in started:
        if ranks.alive:
            ranks.end()


@pytest.fixture
def ranks(_ranks, tmp_path_factory) -> Ranks:
    """Two ranks, started for the first test that wants them, and anew after one that ended them."""
    if not _ranks or not _ranks[-1].alive:
        _ranks.append(Ranks(tmp_path_factory.mktemp("ranks")))
    return _ranks[-1]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("tiny") / "model")
