"""What a run is: any change of it is seen on --resume and said in one line, once; that it lies elsewhere is none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from shared import policy_of
from test_places import MOVING, NAMES, began, moved  # noqa: F401

from ddpo_fast import train as trainer
from ddpo_fast.pipelines.folders import find_model, open_pipeline
from ddpo_fast.pipelines.template import Recording
from ddpo_fast.records.checkpoint import list_checkpoints, read_state
from ddpo_fast.records.fingerprints import _weights, changes, of_model, of_reward


def of(model: Path) -> dict[str, str]:
    return of_model(open_pipeline(find_model(str(model)), torch.float32), "unet", has_own_vae=True)


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change_one_element(file: Path) -> None:
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[-2] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


def edit(file: Path, **changed) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def test_it_is_of_what_is_in_a_place_and_not_of_the_place(model, tmp_path):
    (tmp_path / "deeper").mkdir()
    before = of(model)
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "deeper" / "again", max_shard_size="50KB")  # other files, other configs' order
    assert of(tmp_path / "deeper" / "again") == before
    policy = policy_of(model, targets=["attention"], rank=2, alpha=2.0)
    policy.merge_lora()
    assert of_model(policy.pipe, "unet", has_own_vae=True) == before  # LoRA is the run's and not the model's


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda m: change_one_element(m / "unet" / "diffusion_pytorch_model.safetensors"), "the unet weights"),
        (lambda m: change_one_element(m / "vae" / "diffusion_pytorch_model.safetensors"), "the vae weights"),
        (lambda m: change_one_element(m / "text_encoder" / "model.safetensors"), "the text_encoder weights"),
        (lambda m: edit(m / "unet" / "config.json", norm_eps=1e-6), "the unet config"),
        (lambda m: edit(m / "vae" / "config.json", scaling_factor=0.5), "the vae config"),
        (lambda m: edit(m / "text_encoder" / "config.json", hidden_act="gelu"), "the text_encoder config"),
        (lambda m: edit(m / "scheduler" / "scheduler_config.json", prediction_type="v_prediction"), "the scheduler config"),
    ],
)
def test_a_change_in_the_model_is_seen_and_named(model, change, what):
    before = of(model)
    change(model)
    assert changes(of(model), before) == [f"model.path ({what})"]


def test_half_precision_is_a_change_and_a_default_that_is_written_out_is_none(model):
    before, pipe = of(model), StableDiffusionPipeline.from_pretrained(model, safety_checker=None, requires_safety_checker=False)
    edit(model / "scheduler" / "scheduler_config.json", dynamic_thresholding_ratio=0.995, sample_max_value=1.0)
    assert changes(of(model), before) == []
    pipe.to(torch.float16).save_pretrained(model)
    assert changes(of(model), before) == [f"model.path (the {part} weights)" for part in ("unet", "text_encoder", "vae")]


def test_a_weight_that_lies_askew_or_is_of_another_shape_or_dtype():
    torch.manual_seed(0)
    base = torch.randn(101, dtype=torch.float16)

    def hashed(*tensors):
        return _weights(torch.nn.ParameterList([torch.nn.Parameter(tensor) for tensor in tensors]))

    askew = torch.cat([torch.zeros(1, dtype=torch.float16), base])[1:]
    assert hashed(base) == hashed(askew) == hashed(base.repeat(2, 1).T[:, 0])
    swapped = base.clone()
    swapped[:4], swapped[4:8] = base[4:8], base[:4]  # the same sum
    different = [hashed(base[None]), hashed(base.float()), hashed(swapped), hashed(base, base), hashed(base[:100])]
    assert len({hashed(base), *different}) == 6 and hashed(base, askew + 1) == hashed(askew + 1, base)


def test_rewards(tmp_path):
    code, file = tmp_path / "r.py", tmp_path / "weights.bin"
    code.write_text("f = 1")
    file.write_bytes(bytes(3_000_000))
    own, server, isolated = (f"{code}:f", {}), ("http://a/", {}), ("bench.soak_reward:flaky", {"log": str(file)})  # never imported
    summed = ("weighted_sum", {"rewards": {f"{code}:f": 1}})
    before = [of_reward(*options) for options in (own, summed, isolated, server)]
    assert len({found["reward.name (the text of its code)"] for found in before}) == 4
    code.write_text("f = 2")
    file.write_bytes(bytes(2_999_999) + b"1")
    its_code, its_files = ["reward.name (the text of its code)"], ["reward.kwargs (the files that it names)"]
    found = [changes(of_reward(*options), old) for options, old in zip((own, summed, isolated, ("http://b/", {})), before)]
    assert found == [its_code, its_code, its_files, its_code]


def test_resume_says_what_has_changed_once(moved, caplog, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Recording, "digest", "that of another version of diffusers")
    new = [f"--{option}={moved / place}" for option, place in NAMES.items()]
    (moved / "p.txt").write_text("a\nb\nd\n")
    (moved / "r.py").write_text(MOVING.format(at_import="", in_call="pass  # new"))
    change_one_element(moved / "vae" / "diffusion_pytorch_model.safetensors")
    trainer.main([f"--run.dir={moved}/run", "--resume", "--run.iterations=2", *new])
    said = [record.message for record in caplog.records if "since iteration" in record.message]
    whats = ("prompts.file (the prompts)", "reward.name (the text of its code)", "model.path (how its pipeline calls its network)")
    whats = (*whats, "model.vae (the vae weights)")
    assert said == [f"{what}: it has changed since iteration 1; the run goes on with what is there now" for what in whats]
    caplog.clear()
    trainer.main([f"--run.dir={moved}/run", "--resume", "--run.iterations=3"])
    assert not [record for record in caplog.records if "since iteration" in record.message]
    assert len(read_state(list_checkpoints(moved / "run")[-1])["fingerprints"]) == 12
