"""Models and checkpoints from somebody else: refused in one line, nothing in them is run, nothing outside the run directory changes."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_resume import bomb, copy, finished, pretend  # noqa: F401

from ddpo_fast import assemble
from ddpo_fast import train as trainer
from ddpo_fast.config.command_line import parse
from ddpo_fast.records import checkpoint

UNET, TEXT, VAE = "unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"


def pickled(model: Path, weights: str, name: str) -> None:
    (model / f"{weights}.safetensors").unlink()
    bomb((model / weights).with_name(name))


def retensor(path: Path, change) -> None:
    """Rewrites a safetensors file with its tensors changed in place."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def first(tensors: dict) -> str:
    return sorted(tensors)[0]


def resize(tensors: dict) -> None:
    tensors[first(tensors)] = torch.zeros(1)


def rename(tensors: dict) -> None:
    tensors["../../x"] = tensors.pop(first(tensors))


def edit(path: Path, **changed) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


BAD_MODELS = {
    "pickled unet": lambda m: pickled(m, UNET, "diffusion_pytorch_model.bin"),
    "pickled vae": lambda m: pickled(m, VAE, "diffusion_pytorch_model.bin"),
    "pickled text encoder": lambda m: pickled(m, TEXT, "pytorch_model.bin"),
    "pickle called safetensors": lambda m: bomb(m / f"{UNET}.safetensors"),
    "truncated": lambda m: (m / f"{UNET}.safetensors").write_bytes((m / f"{UNET}.safetensors").read_bytes()[:-100]),
    "truncated text encoder": lambda m: (m / f"{TEXT}.safetensors").write_bytes((m / f"{TEXT}.safetensors").read_bytes()[:100]),
    "empty": lambda m: (m / f"{VAE}.safetensors").write_bytes(b""),
    "header of 2^62 bytes": lambda m: (m / f"{UNET}.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "header of too many bytes": lambda m: (m / f"{TEXT}.safetensors").write_bytes(struct.pack("<Q", 10**8) + b"{}"),
    "tensor of another shape": lambda m: retensor(m / f"{UNET}.safetensors", resize),
    "tensor of another name": lambda m: retensor(m / f"{UNET}.safetensors", rename),
    "vae's tensor of another name": lambda m: retensor(m / f"{VAE}.safetensors", rename),
    "text encoder's tensor of another name": lambda m: retensor(m / f"{TEXT}.safetensors", rename),
    "unet without a config": lambda m: (m / "unet/config.json").unlink(),
    "config is a list": lambda m: (m / "unet/config.json").write_text("[]"),
    "config is binary": lambda m: (m / "vae/config.json").write_bytes(bytes(range(256))),
    "config is deep": lambda m: (m / "text_encoder/config.json").write_text("[" * 100_000),
    "unet of no channels": lambda m: edit(m / "unet/config.json", block_out_channels=[]),
    "blocks of another module": lambda m: edit(m / "unet/config.json", down_block_types=["os.system", "DownBlock2D"]),
    "no folder of the unet": lambda m: shutil.rmtree(m / "unet"),
    "vocabulary is a list": lambda m: ((m / "tokenizer/tokenizer.json").unlink(True), (m / "tokenizer/vocab.json").write_text("[]")),
}


@pytest.mark.parametrize("damage", BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_models_are_one_line_and_exit_2(tiny_model, tmp_path, damage, capsys, monkeypatch):
    monkeypatch.setenv("BOMB_FOLDER", str(tmp_path))
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    damage(model)
    with pytest.raises(SystemExit) as exit_:
        trainer.main([f"--model.path={model}", f"--run.dir={tmp_path / 'run'}"])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith(f"error: model.path={model}: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


W, OPTIMIZER = "weights.safetensors", "optimizer-0.safetensors"
BAD_CHECKPOINTS = {
    "missing tensor": (lambda c: retensor(c / W, lambda t: t.pop(first(t))), ".weight is missing"),
    "extra tensor": (lambda c: retensor(c / W, lambda t: t.update(x=torch.zeros(1))), "x is not a weight of this run"),
    "path in a name": (lambda c: retensor(c / W, rename), "../../x is not a weight of this run"),
    "shape that would broadcast": (lambda c: retensor(c / W, resize), ".weight is (1,) torch.float32, not ("),
    "other dtype": (lambda c: retensor(c / W, lambda t: t.update({first(t): t[first(t)].half()})), "torch.float16, not ("),
    "no numbers": (lambda c: save_file(load_file(c / W), c / W), "weights.safetensors has no numbers in its header"),
    "optimizer of another": (lambda c: retensor(c / OPTIMIZER, lambda t: t.update({"9999.step": torch.ones(())})), "has no 9999.step"),
    "optimizer's path": (lambda c: retensor(c / OPTIMIZER, lambda t: t.update({"../../x": torch.ones(())})), "has no ../../x"),
    "optimizer's shape": (lambda c: retensor(c / OPTIMIZER, lambda t: t.update({"0.exp_avg": torch.ones(1)})), "0.exp_avg has 1 elements"),
}


@pytest.mark.parametrize("damage, message", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_tensors_of_another_run_are_refused_by_name(copy, damage, message, capsys):  # noqa: F811
    """With a manifest that fits them."""
    damage(copy / "checkpoints" / "2")
    pretend(copy / "checkpoints" / "2")
    before = {path: path.stat().st_mtime_ns for path in copy.parent.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as exit_:
        trainer.main([f"--run.dir={copy}", "--resume", "--run.iterations=3"])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and message in error
    assert error.startswith(f"error: run.dir={copy}: checkpoint 2 is not this run's: ")
    assert {path: path.stat().st_mtime_ns for path in copy.parent.rglob("*") if path.is_file()} == before


WHOLE = (
    '{"iteration": 2, "world_size": 1, "fingerprints": {}, "credit": {"cat": [1.5]}, '
    '"progress": {"iteration": 2, "device_hours": 0, "bad_rewards": 0, "evaluations": {}}}'
)
BAD_STATES = [
    "{}",
    '{"iteration": 2}',
    WHOLE.replace('{"cat": [1.5]}', "[]"),
    WHOLE.replace('"fingerprints": {}', '"fingerprints": 3'),
    WHOLE.replace('"world_size": 1, ', ""),
    "[2]",
    '{"iteration": "2"}',
    '{"iteration": NaN}',
    WHOLE.replace("1.5", "NaN"),
    WHOLE.replace("1.5", "1e999"),
]


@pytest.mark.parametrize("state", BAD_STATES)
def test_a_state_that_cannot_be_is_damage(copy, state):  # noqa: F811
    (copy / "checkpoints" / "2" / "state.json").write_text(state)
    pretend(copy / "checkpoints" / "2")
    assert "state.json" in checkpoint.find_fault(copy / "checkpoints" / "2")


PARTS = [
    ("credit", "[1.5]", "3"),
    ("credit", "[1.5]", '["x"]'),
    ("credit", '"credit"', '"other"'),
    ("progress", '"device_hours": 0', '"device_hours": "x"'),
    ("progress", '"device_hours": 0, ', ""),
    ("progress", '"progress"', '"other"'),
]


@pytest.mark.parametrize("part, old, new", PARTS)
def test_a_part_of_the_state_that_is_another_s_is_refused_by_name(copy, part, old, new, capsys):  # noqa: F811
    folder = copy / "checkpoints" / "2"
    assert old in WHOLE
    (folder / "state.json").write_text(WHOLE.replace(old, new))
    pretend(folder)
    assert checkpoint.find_fault(folder) is None
    with pytest.raises(SystemExit, match="2"):
        trainer.main([f"--run.dir={copy}", "--resume", "--run.iterations=3"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: run.dir={copy}: checkpoint 2 is not this run's: state.json has another {part}: ")


@pytest.mark.parametrize("name", ["../../../x.py:f", "x/../../..:f", "http://127.0.0.1:1/..", "http://127.0.0.1:1/" + "x" * 300])
def test_a_rewards_name_keeps_the_run_inside_of_runs(tiny_model, tmp_path, monkeypatch, name):
    monkeypatch.setattr(assemble, "open_reward", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    run_dir = assemble.assemble(parse([f"--model.path={tiny_model}", f"--reward.name={name}"])).directory.path
    assert run_dir.parent == tmp_path / "runs" and ".." not in run_dir.parts
    run_dir.mkdir(parents=True)  # no part of it is too long
