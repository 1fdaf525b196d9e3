"""The script that trains the embedded flow model: it learns, continues bit for bit, and exports what plain diffusers draws with."""

import argparse
import shutil
import warnings

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from ddpo_fast.embedded import train_flow
from ddpo_fast.embedded.training import Examples

OPTIONS = "--steps 6 --log-steps 6 --batch 4 --variants 1 --learning-rate 0.1".split()  # the warm-up keeps it under 0.003


def script(monkeypatch, folder, *stages):
    """Runs stages of the script as a command line does, with the threads that this process has."""
    files = {"--work": folder, "--model": folder / "model", "--threads": torch.get_num_threads()}
    words = [str(word) for pair in files.items() for word in pair]
    monkeypatch.setattr("sys.argv", ["train_flow", *stages, *OPTIONS, *words])
    train_flow.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which six steps of training have ended, and the exported model."""
    folder = tmp_path_factory.mktemp("flow")
    with pytest.MonkeyPatch.context() as patch:
        script(patch, folder, "train", "export")
    return folder


@pytest.fixture(scope="module")
def pipeline(trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = StableDiffusion3Pipeline.from_pretrained(trained / "model", text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_latents_need_no_scale_and_no_shift(trained):
    latents = torch.load(trained / "latents.pt", weights_only=True)["latents"]
    assert latents.shape == (598, 4, 16, 16)
    assert latents.mean((0, 2, 3)).abs().max() < 0.1 and (latents.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_a_few_steps_lower_the_error_on_noise_that_was_not_drawn(trained):
    args = argparse.Namespace(work=trained, variants=1, batch=4, seed=0)
    tokenizer = train_flow.CLIPTokenizer.from_pretrained(train_flow.TOKENIZER)
    networks, examples = train_flow.new_networks(tokenizer), Examples(args, train_flow.load_vae(), tokenizer)
    before = train_flow.validate(networks, examples, args)
    assert 1.8 < before < 2.2  # the network begins with velocity 0: the variances of noise and latents remain
    networks.load_state_dict(torch.load(trained / "flow.pt", weights_only=True)["live"])
    assert train_flow.validate(networks, examples, args) < before - 0.1


def test_training_continues_where_it_was_stopped(trained, tmp_path, monkeypatch):
    """Stopped in the fourth step with a checkpoint after the third."""
    shutil.copy(trained / "latents.pt", tmp_path)
    save, saved = train_flow.save_atomically, []

    def save_or_stop(state, path):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(state["step"])
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(train_flow, "SAVE_S", -1)
        patch.setattr(train_flow, "save_atomically", save_or_stop)
        with pytest.raises(KeyboardInterrupt):
            script(patch, tmp_path, "train")
    assert saved == [1, 2, 3]
    script(monkeypatch, tmp_path, "train")
    whole, parts = (torch.load(folder / "flow.pt", weights_only=True) for folder in (trained, tmp_path))
    assert whole["step"] == parts["step"] == 6
    for key in ("live", "ema"):
        assert all(torch.equal(whole[key][name], parts[key][name]) for name in whole[key])
    assert not torch.equal(whole["live"]["transformer.proj_out.weight"], whole["ema"]["transformer.proj_out.weight"])
    for index, moments in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, parts["optimizer"]["state"][index][name]) for name, value in moments.items())


def test_the_exported_pipeline_is_small_and_loads_in_fp32(trained, pipeline):
    assert sum(path.stat().st_size for path in (trained / "model").rglob("*") if path.is_file()) < 14e6
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {part.dtype for part in parts} == {torch.float32}
    assert "_name_or_path" not in (trained / "model/vae/config.json").read_text()
    averages = torch.load(trained / "flow.pt", weights_only=True)["ema"]
    assert torch.equal(pipeline.transformer.proj_out.weight, averages["transformer.proj_out.weight"].half().float())


def test_the_pipeline_asks_the_network_what_it_was_trained_on(pipeline):
    """Tokens and pooled vectors as `encode` makes them, 1000 sigma, and a step from noise along noise - clean arrives at clean."""
    asked, prompts = [], ["a cat", "a polar bear"]
    hook = pipeline.transformer.register_forward_pre_hook(lambda module, args, inputs: asked.append(inputs), with_kwargs=True)
    images = pipeline(prompts, num_inference_steps=3, guidance_scale=1.0, max_sequence_length=0, output_type="pt").images
    hook.remove()
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all()

    ids = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        tokens, pooled = train_flow.encode({name: getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2")}, ids)
    assert tokens.shape == (2, 24, 136) and len(asked) == 3
    for inputs, sigma in zip(asked, pipeline.scheduler.sigmas):
        assert torch.equal(inputs["encoder_hidden_states"], tokens) and torch.equal(inputs["pooled_projections"], pooled)
        torch.testing.assert_close(inputs["timestep"], (1000 * sigma).expand(2))

    clean, noise = torch.randn(2, 1, 4, 16, 16)
    pipeline.scheduler.set_timesteps(1)
    end = pipeline.scheduler.step(noise - clean, pipeline.scheduler.timesteps[0], noise).prev_sample
    torch.testing.assert_close(end, clean)
