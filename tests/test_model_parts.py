"""Parts of a pipeline that do not go together: each is one line before any weight is read, never a traceback."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ddpo_fast.pipelines import model_parts
from ddpo_fast.pipelines.folders import find_model, open_pipeline

OPTION = "model.path=m"
BAD = (None, -1, "x", [3, 5], {}, 1.5)


def config_of(folder: Path, part: str) -> dict:
    return json.loads((folder / part / "config.json").read_text())


def one_line_or_fine(check) -> bool:
    """Whether it is fine; anything but a ValueError of one line fails."""
    try:
        check()
        return True
    except ValueError as error:
        assert re.fullmatch(rf"{OPTION}: [^\n]+", str(error)), error
        return False


def variations(config: dict):
    """Every key with a bad value, all of them in turn."""
    for number, key in enumerate(sorted({*config, "class_embed_type", "num_class_embeds", "encoder_hid_dim", "time_cond_proj_dim"})):
        yield key, config | {key: BAD[number % len(BAD)]}


def test_any_bad_unet_or_text_encoder_is_one_line(tiny_model):
    unet, text, refused = config_of(tiny_model, "unet"), config_of(tiny_model, "text_encoder"), set()

    def check(unet: dict, text: dict) -> None:
        unet = model_parts.check_unet(OPTION, StableDiffusionPipeline, unet, 4)
        model_parts.check_networks(OPTION, StableDiffusionPipeline, {"unet": unet, "text_encoder": text}, {"text_encoder": 8})

    check(unet, text)
    for key, bad in variations(unet):
        if not one_line_or_fine(lambda: check(bad, text)):  # noqa: B023
            refused.add(key)
    for key, bad in variations(text):
        if not one_line_or_fine(lambda: check(unet, bad)):  # noqa: B023
            refused.add(key)
    assert {"in_channels", "cross_attention_dim", "block_out_channels", "class_embed_type", "hidden_size", "num_attention_heads"} <= refused


def test_any_bad_vae_or_scheduler_is_one_line(tiny_model):
    vae, refused = config_of(tiny_model, "vae"), set()
    for key, bad in variations(vae):
        if not one_line_or_fine(lambda: model_parts.check_vae(OPTION, "vae/config.json", bad)):  # noqa: B023
            refused.add(key)
    index = {"scheduler": ["diffusers", "DDIMScheduler"]}
    for key, bad in variations(json.loads((tiny_model / "scheduler" / "scheduler_config.json").read_text())):
        if not one_line_or_fine(lambda: model_parts.check_scheduler(OPTION, StableDiffusionPipeline, index, bad)):  # noqa: B023
            refused.add(key)
    assert {"latent_channels", "scaling_factor", "latents_mean", "beta_schedule", "prediction_type", "num_train_timesteps"} <= refused


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"class_embed_type": "timestep"}, 'has class_embed_type=timestep; valid is null'),
        ({"attention_type": "gated"}, 'has attention_type=gated; valid is "default"'),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type=ip_image_proj; valid is null"),
        ({"dual_cross_attention": True}, "dual_cross_attention=True; valid is false"),
        ({"addition_embed_type": "text"}, "addition_embed_type=text; valid is null"),
        ({"in_channels": 9}, "in_channels=9; valid is 4, the latent_channels of the VAE"),
        ({"cross_attention_dim": 24}, "cross_attention_dim=24; valid is 16, the text encoders' width"),
        ({"sample_size": [8, "8"]}, r"sample_size=\[8, '8'\]; valid is a whole number, or two of them"),
        ({"down_block_types": ["os.system", "DownBlock2D"]}, "nothing that works can be made of it: ValueError"),
    ],
)  # fmt: skip
def test_a_unet_that_does_not_fit_says_what_is_valid(tiny_model, changed, message):
    unet, text = config_of(tiny_model, "unet") | changed, config_of(tiny_model, "text_encoder")
    with pytest.raises(ValueError, match=f"^{OPTION}: unet/config.json[^\n]*{message}"):
        unet = model_parts.check_unet(OPTION, StableDiffusionPipeline, unet, 4)
        model_parts.check_networks(OPTION, StableDiffusionPipeline, {"unet": unet, "text_encoder": text}, {"text_encoder": 8})


@pytest.mark.parametrize(
    "kind, config, size",
    [
        (StableDiffusionPipeline, {"sample_size": None}, 64),
        (StableDiffusionXLPipeline, {"addition_embed_type": "text_time"}, 128),
        (StableDiffusionPipeline, {"sample_size": 32, "_diffusers_version": "0.6.0"}, 64),  # as the pipeline itself mends it
        (StableDiffusionPipeline, {"sample_size": 32, "_diffusers_version": "0.42.1"}, 32),
        (StableDiffusionPipeline, {"sample_size": [8, 12]}, [8, 12]),
    ],
)
def test_pictures_without_a_size_have_that_of_the_pipeline(kind, config, size):
    assert model_parts.check_unet(OPTION, kind, config, 4)["sample_size"] == size


def test_a_unet_without_a_size_is_opened_with_that_of_the_pipeline(tiny_model, tmp_path):
    path = shutil.copytree(tiny_model, tmp_path / "m")
    (path / "unet" / "config.json").write_text(json.dumps(config_of(tiny_model, "unet") | {"sample_size": None}))
    assert open_pipeline(find_model(str(path)), torch.float32).unet.config.sample_size == 64


def remove(*names: str):
    return lambda m: [(m / name).unlink() for name in names]


def edit(name: str, **changed):
    return lambda m: (m / name).write_text(json.dumps(json.loads((m / name).read_text()) | changed))


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            remove("tokenizer/tokenizer.json"),
            "tokenizer/ lacks the tokenizer's files; valid is tokenizer.json, or merges.txt and vocab.json",
        ),
        (remove("tokenizer/tokenizer_config.json"), r"tokenizer/tokenizer_config.json has model_max_length=1\d+; valid is 2 to 8"),
        (
            edit("tokenizer/tokenizer_config.json", model_max_length=77),
            "model_max_length=77; valid is 2 to 8, the text encoder's max_position",
        ),
        (
            edit("text_encoder/config.json", vocab_size=20),
            "tokenizer/ has a token number 53; valid is below 20, the text encoder's vocab_size",
        ),
        (
            edit("model_index.json", text_encoder=["transformers", "CLIPTokenizer"]),
            "model_index.json has text_encoder=.*; valid is CLIPTextModel",
        ),
        (edit("model_index.json", text_encoder=[None, None]), "text_encoder=.*; valid is CLIPTextModel of transformers"),
        (edit("model_index.json", tokenizer=["transformers", "AutoModel"]), "tokenizer=.*; valid is CLIPTokenizer of transformers"),
        (edit("model_index.json", vae=["diffusers", "AutoencoderTiny"]), "vae=.*; valid is AutoencoderKL of diffusers"),
        (edit("vae/config.json", _class_name="AutoencoderTiny"), "vae/config.json is a AutoencoderTiny's; valid is AutoencoderKL's"),
        (edit("vae/config.json", latents_mean=[0.0]), r"latents_mean=\[0.0\]; valid is null, or 4 numbers"),
        (edit("vae/config.json", out_channels=1), r"vae/config.json: .*8x8 latents are decoded to \(1, 1, 16, 16\), not \(1, 3, 16, 16\)"),
        (
            edit("scheduler/scheduler_config.json", prediction_type="flow_prediction"),
            "prediction_type=flow_prediction; valid is epsilon, v_pred",
        ),
        (edit("scheduler/scheduler_config.json", beta_start=0.0, beta_end=0.0), "betas that are not 1000 numbers above 0"),
        (edit("scheduler/scheduler_config.json", trained_betas=[0.1, 0.2]), "betas that are not 1000 numbers above 0"),
    ],
)
def test_parts_that_do_not_go_together_are_one_line(tiny_model, tmp_path, damage, message):
    path = shutil.copytree(tiny_model, tmp_path / "m")
    damage(path)
    with pytest.raises(ValueError, match=f"^model.path={path}: [^\n]*{message}[^\n]*$"):
        find_model(str(path))


def test_checking_draws_no_random_numbers(tiny_model):
    """LoRA's first weights are the seed's."""
    before = torch.get_rng_state()
    find_model(str(tiny_model)).check_networks()
    assert torch.equal(torch.get_rng_state(), before)
