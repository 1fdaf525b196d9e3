"""The model card: what it says is true, its snippet works, and what goes to the hub has no local paths in it."""

import json
import re
import shutil
from types import SimpleNamespace

import bounds
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from shared import conditions, run
from test_report import make_run
from tiny import SD_BETAS

from ddpo_fast.assemble import assemble
from ddpo_fast.config.command_line import parse
from ddpo_fast.records import push
from ddpo_fast.records.model_card import card, write_card
from ddpo_fast.records.report import read_run

WHOLE = {
    "lora": {"scope": "all", "targets": ["attention"], "rank": 4, "alpha": 4.0}, "reward": {"name": "/secret/folder/mine.py:redness"},
    "prompts": {"name": "simple_animals", "file": "/secret/folder/prompts.txt"}, "run": {"seed": 0, "dir": "/secret/run"},
    "train": {
        "algorithm": "ddpo_is", "num_minibatches": 4, "inner_epochs": 1, "learning_rate": 1e-3, "clip_range": 1e-4,
    },
    "sample": {"num_samples": 8, "num_steps": 5, "guidance_scale": 3.0, "eta": 1.0},
}  # fmt: skip


def written(folder, path="/secret/folder/my_model", **changed):
    """A run directory with weights, made by hand."""
    make_run(folder, **changed)
    call = {"network": ["unet", "UNet2DConditionModel"], "guidance": "guidance_scale", "arguments": {}, "scheduler": {}}
    (folder / "environment.json").write_text(json.dumps(call))
    (folder / "config.yaml").write_text(yaml.safe_dump(WHOLE | {"model": {"path": path}}))
    (folder / "lora").mkdir()
    (folder / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    return folder


def test_what_it_says(tmp_path):
    folder = written(tmp_path / "my_run", path="stabilityai/a-model")
    write_card(folder)
    text = (folder / "lora" / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["base_model"] == "stabilityai/a-model" and header["pipeline_tag"] == "text-to-image" and "lora" in header["tags"]
    assert "# my_run" in text and "[stabilityai/a-model](https://huggingface.co/stabilityai/a-model)" in text
    assert "| 0 | 0 | 0 | 1 ± 0.2 |\n| 1 | 8 | 0.5 | 1.5 ± 0.2 |\n| 2 | 16 | 1 | 3 ± 0.2 |" in text
    assert "| iteration | samples | device-hours | reward, fixed evaluation |\n" in text
    assert "fixed evaluation set of 4 pictures" in text and "| train.learning_rate | 0.001 |" in text and "`mine.py:redness`" in text
    for shown, original in (("before.png", "iteration_00000.png"), ("after.png", "iteration_00002.png")):
        assert f"({shown})" in text and (folder / "lora" / shown).read_bytes() == (folder / "images" / original).read_bytes()


def test_long_curve_is_thinned_out_and_keeps_its_ends(tmp_path):
    text = card(read_run(written(tmp_path / "run", reward=[float(i) for i in range(100)])), "w", public=False)
    iterations = [int(i) for i in re.findall(r"^\| (\d+) \|", text, re.M)]
    assert len(iterations) == 12 and iterations[0] == 0 and iterations[-1] == 99 and iterations == sorted(set(iterations))


def rows(folder) -> dict[str, str]:
    """The table of options."""
    text = card(read_run(folder), "w", public=True)
    assert "/secret" not in text
    return dict(re.findall(r"^\| ([a-z_]+\.[a-z_]+) \| (.*) \|$", text, re.M))


def test_the_table_has_the_prompts_and_the_options_that_were_used(tmp_path):
    folder = written(tmp_path / "run")
    found = rows(folder)
    assert found["prompts.file"] == "prompts.txt" and "prompts.name" not in found and found["train.clip_range"] == "0.0001"
    rwr = {"inverse_temperature": 0.2, "percentile": 0.9, "population": "prompt", "guidance_scale": None, "num_timesteps": 10}
    changed = WHOLE | {"model": {"path": "m"}, "algorithm": rwr, "train": WHOLE["train"] | {"algorithm": "rwr_sparse"}}
    changed["prompts"] = {"name": "simple_animals", "file": None, "list": ["a", "b", "c"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(changed))
    found = rows(folder)
    assert found["prompts.list"] == "3 of its own" and not {"prompts.name", "prompts.file", "train.clip_range"} & set(found)
    assert found["algorithm.percentile"] == "0.9" and found["algorithm.num_timesteps"] == "10" and "algorithm.guidance_scale" not in found
    assert not {"sample.sampler", "sample.window"} & set(found)  # of a run older than these
    changed["sample"] = WHOLE["sample"] | {"sampler": "ddim", "window": {"size": 2, "among": 3}}
    (folder / "config.yaml").write_text(yaml.safe_dump(changed))
    found = rows(folder)
    assert (found["sample.sampler"], found["sample.window"]) == ("ddim", "{'among': 3, 'size': 2}")


@pytest.mark.parametrize(
    "evaluation, call",
    [
        (None, "num_inference_steps=5, guidance_scale=3.0, eta=1.0"),
        ({"sampler": None, "num_steps": None, "guidance_scale": None}, "num_inference_steps=5, guidance_scale=3.0, eta=1.0"),
        ({"sampler": "ode", "num_steps": 20, "guidance_scale": None}, "num_inference_steps=20, guidance_scale=3.0, eta=0.0"),
        ({"sampler": None, "num_steps": None, "guidance_scale": 1.0}, "num_inference_steps=5, guidance_scale=1.0, eta=1.0"),
    ],
)
def test_snippet_samples_as_the_evaluation_does(tmp_path, evaluation, call):
    folder = written(tmp_path / "run")
    sampling = {"sample": WHOLE["sample"] | {"sampler": "ddim"}, "eval": evaluation} if evaluation else {}
    (folder / "config.yaml").write_text(yaml.safe_dump(WHOLE | {"model": {"path": "m"}} | sampling))
    assert f'pipe(prompt="a prompt", {call})' in card(read_run(folder), "w", public=False)


@pytest.mark.parametrize("public", [True, False])
def test_snippet_for_a_single_file_and_another_vae(tmp_path, public):
    folder, configs = written(tmp_path / "run"), tmp_path / "configs"
    configs.mkdir()
    (configs / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    model = {"path": "/secret/xl.safetensors", "config": str(configs), "vae": "org/vae", "dtype": "fp16"}
    (folder / "config.yaml").write_text(yaml.safe_dump(WHOLE | {"model": model}))
    snippet = re.search(r"```python\n(.*?)```", card(read_run(folder), "me/lora", public), re.S)[1]
    path, config = ("xl.safetensors", "configs") if public else (model["path"], configs)
    assert snippet.splitlines()[:4] == [
        "from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline",
        "",
        f'pipe = StableDiffusionXLPipeline.from_single_file("{path}", config="{config}", vae=AutoencoderKL.from_pretrained("org/vae"))',
        'pipe.load_lora_weights("me/lora")',
    ]


@pytest.mark.parametrize("scope", ["all", "none"])
def test_snippet_loads_what_was_trained(options, scope, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    DPMSolverMultistepScheduler(**SD_BETAS, timestep_spacing="linspace", steps_offset=1).save_pretrained(model / "scheduler")
    index = json.loads((model / "model_index.json").read_text()) | {"scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}
    (model / "model_index.json").write_text(json.dumps(index))
    folder = run(options(model__path=model, lora__scope=scope, run__iterations=1, train__learning_rate=1e-2))
    text = (folder / ("unet" if scope == "none" else "lora") / "README.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1].replace('"a prompt"', '"a"'), names)
    assert names["image"].size == (16, 16) and isinstance(names["pipe"].scheduler, DDIMScheduler)
    if scope == "all":
        unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
        exec(re.findall(r"```python\n(.*?)```", text, re.S)[1], {"unet": unet})
        loaded, own = (u.state_dict() for u in (unet, names["pipe"].unet))
        named = {re.sub(r"default(_0)?\.", "", name): tensor for name, tensor in own.items()}
        assert all(torch.equal(named[re.sub(r"default(_0)?\.", "", name)], tensor) for name, tensor in loaded.items())
        assert sum("lora_B" in name for name in loaded) > 10
    made = assemble(parse(options("other", model__path=model, lora__scope=scope)))
    policy, schedule, scheduler = made.policy, made.schedule(1), names["pipe"].scheduler
    scheduler.set_timesteps(schedule.num_steps)
    assert torch.equal(scheduler.timesteps, schedule.times) and not scheduler.config.clip_sample
    policy.load_exported(folder)
    latents, t = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor([481, 481])  # both branches of guidance
    given = conditions(policy, ["a", "b"])
    (embeds,) = given.leaves
    with torch.no_grad():
        loaded = names["pipe"].unet(latents, t, encoder_hidden_states=embeds).sample
        bounds.assert_same_output(loaded, policy.predict(latents, t, given), policy.network)


def test_push_is_one_commit_without_local_paths_in_the_card(tmp_path, monkeypatch, capsys):
    folder, calls = written(tmp_path / "run"), []
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["reward"]["kwargs"] = {"rewards": {"/secret/a.py:f": {"file": "/secret/w.pth"}}}
    config["prompts"] = {"list": ["/imagine a cat"], "file": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))

    class Hub:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append((repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=f"user/{repo_id.split('/')[1]}")

        def create_commit(self, repo_id, operations, commit_message):
            calls.append((repo_id, {operation.path_in_repo: operation for operation in operations}))
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(push, "HfApi", Hub)
    monkeypatch.setattr(push, "get_token", lambda: "hf_x")
    push.main([str(folder), "me/lora", "--private"])
    assert capsys.readouterr().out == "https://hub/commit\n"
    assert calls[0] == ("me/lora", True, True) and calls[1][0] == "user/lora"
    files = calls[1][1]
    assert set(files) == {
        "README.md", "after.png", "before.png", "config.yaml", "metrics.jsonl", "pytorch_lora_weights.safetensors",
    }  # fmt: skip
    with files["pytorch_lora_weights.safetensors"].as_file() as content:
        assert content.read() == b"weights"
    with files["README.md"].as_file() as content:
        text = content.read().decode()
    assert 'pipe.load_lora_weights("me/lora")' in text and "/secret" not in text and str(tmp_path) not in text
    assert "hf download me/lora --local-dir lora`, then `ddpo-fast kohya lora`" in text
    with files["config.yaml"].as_file() as content:
        config = yaml.safe_load(content)
    assert "/secret" not in str(config) and config["model"]["path"] == "my_model" and config["reward"]["name"] == "mine.py:redness"
    assert config["prompts"]["list"] == ["/imagine a cat"] and config["reward"]["kwargs"] == {"rewards": {"a.py:f": {"file": "w.pth"}}}
    assert 'from_pretrained("my_model")' in text and "base_model" not in text


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    folder = written(tmp_path / "run")
    early = written(tmp_path / "early")
    shutil.rmtree(early / "lora")
    monkeypatch.setattr(push, "get_token", lambda: None)

    def push_fails(argv, message):
        with pytest.raises(SystemExit, match="2"):
            push.main([str(arg) for arg in argv])
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: .*\n", error) and message in error

    push_fails([folder], "the following arguments are required: REPO_ID")
    push_fails([tmp_path / "none", "me/lora"], "there is no config.yaml in it; valid is the directory of a run")
    push_fails([early, "me/lora"], "there is no lora/ (or whole network) in it yet")
    push_fails([folder, "lora"], "REPO_ID=lora: valid is user/name")
    push_fails([folder, "me/lora"], "REPO_ID=me/lora: there is no token for the hub")
    monkeypatch.setattr(push, "get_token", lambda: "hf_x")
    monkeypatch.setattr(push, "HfApi", lambda: push_api(endpoint="http://127.0.0.1:9"))  # nothing listens there
    push_fails([folder, "me/lora"], "Connection refused")


push_api = push.HfApi
