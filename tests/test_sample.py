"""Pictures before and after a run: the very ones that its trainer saw, whatever else is asked for."""

import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import bounds
import numpy as np
import pytest
import torch
from PIL import Image
from runs import BIN, ENVIRONMENT, LIMIT_S
from shared import run

from ddpo_fast import evaluation as evaluating
from ddpo_fast import sample


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return run(
        [
            f"--model.path={tiny_model}", f"--run.dir={folder}", "--sample.num_samples=4", "--sample.num_steps=3", "--eval.num_samples=2",
            "--run.iterations=1", "--train.num_minibatches=2", "--lora.rank=2", "--prompts.limit=4", "--prompts.samples_per_prompt=1",
        ]
    )  # fmt: skip


def evaluation(argv: list[str], monkeypatch) -> tuple[Path, list[torch.Tensor]]:
    """A run and the pictures (B, 3, H, W) of each of its evaluations."""
    seen, collect = [], evaluating.collect

    def watch(run, schedule, first_id, prompts, timer, stage):
        result = collect(run, schedule, first_id, prompts, timer, stage)
        assert stage == "eval"
        seen.append(result[2])
        return result

    monkeypatch.setattr(evaluating, "collect", watch)
    return run(argv), seen


def one_level(folder: Path) -> int:
    """Of 255: how far batches of another size may take a pixel. Before it is rounded to a level it is off by less than half of one."""
    assert bounds.of_run(folder).picture < 0.5 / 255
    return 1


@pytest.mark.rounding
@pytest.mark.parametrize(
    "changed",
    [
        {}, {"lora__scope": "none"}, {"sample__window": '{"size": 2, "among": 3}'},
        {"eval__sampler": "ode", "eval__num_steps": 3, "eval__guidance_scale": 1},
    ],
    ids=["LoRA", "UNet", "window", "ODE"],
)  # fmt: skip
def test_pictures_are_those_of_the_evaluation(options, monkeypatch, changed):
    """The evaluation set has prompts a, b, a, b: asked for in another order and in other batches."""
    folder, (before, after) = evaluation(options(train__learning_rate=1e-2, run__iterations=1, **changed), monkeypatch)
    assert (before.int() - after.int()).abs().max() >= 4
    config = sample.read_config(folder, ["--sample.batch_size=3"])
    pictures = sample.before_and_after(folder, config, ["b", "a", "b", "a"], [3, 0, 1, 2])
    for shown, expected in zip(pictures, (before, after)):
        assert (shown.int() - expected[[3, 0, 1, 2]].int()).abs().max() <= one_level(folder)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


@pytest.mark.rounding
def test_command_line_writes_pictures_that_its_seeds_fix(finished, capsys):
    folder, samples = finished, finished / "samples"
    sample.main([str(folder), "a", "b / c!", "--seed", "0", "7"])
    assert capsys.readouterr().out == f"{folder / 'samples' / 'grid.png'}\n"
    names = [f"{i:03d}_{words}_seed{seed}" for i, (words, seed) in enumerate([("a", 0), ("a", 7), ("b_c", 0), ("b_c", 7)])]
    written = sorted(path.name for path in (folder / "samples").iterdir())
    assert written == sorted([f"{name}_{when}.png" for name in names for when in ("before", "after")] + ["grid.png"])
    with Image.open(folder / "samples" / "grid.png") as grid:
        assert grid.size == (8 * 128, 156)
    sample.main([str(folder), "b / c!", "--seed", "7", "--output", str(folder / "alone")])
    alone, *among = (pixels(folder / "alone" / "000_b_c_seed7_before.png"), *(pixels(samples / f"{name}_before.png") for name in names))
    assert abs(alone - among[3]).max() <= one_level(folder)
    assert all(abs(one - other).max() > 4 for one, other in combinations(among, 2))


def test_in_a_process_of_its_own(finished):
    """Where no run has been before, whose group of processes would still be there."""
    command = [BIN / "ddpo-fast", "sample", finished, "a", "--output", finished / "apart"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{finished / 'apart' / 'grid.png'}\n"


def test_the_same_command_writes_the_same_files(finished):
    """Bit for bit, because the batches are the same."""
    for output in ("one", "other"):
        sample.main([str(finished), "a", "b", "--seed", "3", "--output", str(finished / output)])
    one, other = ([path.read_bytes() for path in sorted((finished / output).iterdir())] for output in ("one", "other"))
    assert one == other and len(one) == 5


def test_options_that_change_the_pictures(finished):
    """Each of them does, and to say what the run has changes nothing."""
    asked = [[], ["--eval.num_steps=3", "--eval.guidance_scale=5", "--eval.sampler=ddim"]]
    asked += [["--eval.num_steps=4"], ["--eval.guidance_scale=1"], ["--eval.sampler=ode"]]
    pictures = [sample.before_and_after(finished, sample.read_config(finished, options), ["a"], [0])[0].int() for options in asked]
    assert torch.equal(*pictures[:2])
    assert all((one - other).abs().max() > 4 for one, other in combinations(pictures[1:], 2))


def test_an_attention_of_another_machine_is_chosen_anew(finished, tmp_path, capsys):
    """config.yaml has what the machine chose that trained. The path of the pictures stays alone on standard output."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    text = (folder / "config.yaml").read_text()
    assert "backend: sdpa" in text
    (folder / "config.yaml").write_text(text.replace("backend: sdpa", "backend: xformers"))
    sample.before_and_after(folder, sample.read_config(folder, []), ["a"], [0])
    captured = capsys.readouterr()
    said = "attention.backend=xformers: it needs a GPU, and this run is on a CPU; auto takes its place\n"
    assert captured.out == "" and said in captured.err
    with pytest.raises(SystemExit, match="2"):  # asked for by name it is an error
        sample.main([str(folder), "a", "--attention.backend=xformers"])
    assert capsys.readouterr().err.startswith("error: attention.backend=xformers: it cannot run here")


def test_mistakes_are_one_line(finished, capsys, tmp_path):
    folder = finished
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "config.yaml").write_text((folder / "config.yaml").read_text())
    for argv, message in (
        ([], "the following arguments are required: RUN_DIR"),
        ([str(folder)], 'PROMPT: there is none; valid is at least one, such as "a lion"'),
        ([str(tmp_path / "none"), "a"], f"RUN_DIR={tmp_path / 'none'}: there is no config.yaml in it; valid is the directory of a run"),
        ([str(tmp_path / "early"), "a"], "there is no lora/ (or whole network) in it yet; a run writes it with its first checkpoint"),
        ([str(folder), "a", "--seed", "-1"], r"--seed=[-1]: valid is whole numbers in [0, 2^32)"),
        ([str(folder), "a", "--eval.num_steps=0"], "eval.num_steps=0: valid is a whole number >= 1"),
        ([str(folder), "a", "--eval.sampler=euler"], "eval.sampler=euler: expected Literal['cps', 'dance_sde', "),
        (
            [str(folder), "a", "--eval.guidance_scale=0"],
            "eval.guidance_scale=0.0: valid for Stable Diffusion 1.x and 2.x is a finite number >= 1",
        ),
        ([str(folder), "a", "--model.path=/nowhere"], "model.path=/nowhere: valid is a folder with model_index.json"),
    ):
        with pytest.raises(SystemExit, match="2"):
            sample.main(argv)
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: .*\n", error) and message in error


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(sample, "read_config", lambda *args: None)
    monkeypatch.setattr(sample, "before_and_after", lambda *args: (black, black))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        sample.main([str(tmp_path), "a", "--output", str(tmp_path / "file")])
    assert re.fullmatch(r"error: .*File exists.*\n", capsys.readouterr().err)


def test_weights_that_cannot_be_loaded_are_named(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    path = folder / "lora" / "pytorch_lora_weights.safetensors"
    with pytest.raises(
        ValueError, match=r"pytorch_lora_weights.safetensors: cannot be loaded: it has \d+ tensors, not the \d+ of this LoRA"
    ):
        sample.before_and_after(folder, sample.read_config(folder, ["--lora.scope=mid_up"]), ["a"], [0])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"pytorch_lora_weights.safetensors: cannot be loaded: .*"):
        sample.before_and_after(folder, sample.read_config(folder, []), ["a"], [0])
