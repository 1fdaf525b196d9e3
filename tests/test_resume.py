"""Checkpoints: damage is named and the one before used, a full disk harms nothing, nothing hostile runs, any number of ranks goes on."""

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import bounds
import pytest
import torch
from runs import BY_PROMPT, TIMES
from safetensors.torch import load_file
from shared import run, untimed, weights

from ddpo_fast import train as trainer
from ddpo_fast.records.checkpoint import find_fault, list_checkpoints
from ddpo_fast.records.metrics import read_metrics


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> Path:
    """A finished run's directory, with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return run(
        [
            f"--model.path={tiny_model}", f"--run.dir={folder}", "--sample.num_samples=4", "--sample.num_steps=3", "--eval.num_samples=2",
            "--run.iterations=2", "--train.num_minibatches=2", "--lora.rank=2", "--prompts.limit=4", "--prompts.samples_per_prompt=1",
        ]
    )  # fmt: skip


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["BOMB_FOLDER"]) / "exploded"),)


def bomb(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


def pretend(folder: Path) -> None:
    """Makes a manifest that fits what is there, as an attacker would."""
    (folder / "manifest.json").unlink()
    subprocess.run(
        [sys.executable, "-c", "import hashlib, json, os, sys; os.chdir(sys.argv[1]); json.dump({n: {'size': os.path.getsize(n), 'sha256': "
         "hashlib.sha256(open(n, 'rb').read()).hexdigest()} for n in os.listdir()}, open('manifest.json', 'w'))", folder], check=True,
    )  # fmt: skip


def move_out(path: Path) -> None:
    shutil.move(path, path.parents[1] / path.name)
    path.symlink_to(Path("..") / path.name)


DAMAGE = {
    "truncated": (lambda c: os.truncate(c / "weights.safetensors", 100), "weights.safetensors has 100 bytes, not "),
    "flipped byte": (lambda c: flip(c / "optimizer-0.safetensors"), "optimizer-0.safetensors does not have the SHA-256"),
    "missing": (lambda c: (c / "optimizer-0.safetensors").unlink(), "optimizer-0.safetensors is missing"),
    "garbage JSON": (lambda c: (c / "manifest.json").write_bytes(b"{\xff["), "manifest.json cannot be read: "),
    "other JSON": (lambda c: (c / "manifest.json").write_text("[1, 2]"), "manifest.json cannot be read: TypeError"),
    "deep JSON": (lambda c: (c / "manifest.json").write_text("[" * 100_000), "manifest.json cannot be read: RecursionError"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json cannot be read: FileNotFoundError"),
    "pickle": (lambda c: (bomb(c / "weights.safetensors"), pretend(c)), "weights.safetensors cannot be read: SafetensorError"),
    "pickled optimizer": (lambda c: (bomb(c / "optimizer-0.safetensors"), pretend(c)), "optimizer-0.safetensors cannot be read: "),
    "pickled state": (lambda c: (bomb(c / "state.json"), pretend(c)), "state.json cannot be read: UnicodeDecodeError"),
    "stray pickle": (lambda c: bomb(c / "mp_rank_00_model_states.pt"), "mp_rank_00_model_states.pt is not in the manifest"),
    "state of another": (lambda c: ((c / "state.json").write_text('{"iteration": 7}'), pretend(c)), "state.json is not that of"),
    "link out": (lambda c: move_out(c / "weights.safetensors"), "weights.safetensors is not a file"),
    "path out": (
        lambda c: (c / "manifest.json").write_text((c / "manifest.json").read_text().replace('"state.json"', '"../../metrics.jsonl"')),
        "../../metrics.jsonl is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage, text", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found(copy, damage, text, monkeypatch):
    monkeypatch.setenv("BOMB_FOLDER", str(copy))
    assert find_fault(copy / "checkpoints" / "2") is None
    damage(copy / "checkpoints" / "2")
    assert text in find_fault(copy / "checkpoints" / "2")
    assert not (copy / "exploded").exists()


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(finished, copy, caplog):
    flip(copy / "checkpoints" / "2" / "weights.safetensors")
    trainer.main([f"--run.dir={copy}", "--resume"])
    (message,) = [record.message for record in caplog.records if "damaged" in record.message]
    assert "\n" not in message and re.search(r"2 is damaged \(weights.safetensors .*\): it is set aside, checkpoint 1 is used", message)
    assert untimed(read_metrics(copy)) == untimed(read_metrics(finished))
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["1", "2", "2.damaged"]
    assert find_fault(copy / "checkpoints" / "2") is None


def test_no_checkpoint_left_is_one_clear_error(copy, capsys):
    for folder in list_checkpoints(copy):
        os.truncate(folder / "state.json", 3)
    with pytest.raises(SystemExit) as end:
        trainer.main([f"--run.dir={copy}", "--resume"])
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and error.count("\n") == 0
    assert re.fullmatch(r"error: run\.dir=.*: no checkpoint can be used: 2: state.json has 3 bytes, not \d+; 1: state.json has 3 .*", error)


DISK = """
import resource
calls = 0
def redness(images, prompts):  # calls 1, 4 and 6 evaluate, 2, 3 and 5 are of iterations 1 to 3
    global calls
    calls += 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if calls in (3, 4) else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
"""


@pytest.fixture
def any_file_size():
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_disk_that_is_full_for_a_while(options, any_file_size, reports, tmp_path, caplog):
    """No file may grow past 10 kB while iteration 2 is evaluated and saved: writing fails as on a full disk, for real."""
    (tmp_path / "disk.py").write_text(DISK)
    whole = run(options("whole", run__iterations=3, eval__every=2, reward__name=f"{tmp_path}/disk.py:redness"))
    (tmp_path / "free.py").write_text(DISK.replace("calls in (3, 4)", "False"))
    free = run(options("free", run__iterations=3, eval__every=2, reward__name=f"{tmp_path}/free.py:redness"))
    messages = [record.message for record in caplog.records if "could not be written" in record.message]
    assert [message.split(" could")[0] for message in messages] == [
        "the pictures of iteration 2", "TensorBoard's file of iteration 2", "the best weights of iteration 2",
        "the checkpoint of iteration 2", "the weights of iteration 2", "the report of iteration 2",
    ]  # fmt: skip
    assert sorted(path.name for path in (whole / "images").iterdir()) == ["iteration_00000.png", "iteration_00003.png"]  # none is half
    assert all("\n" not in message for message in messages)
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["1", "3"]
    assert untimed(read_metrics(whole)) == untimed(read_metrics(free))
    assert all(torch.equal(tensor, weights(free)[name]) for name, tensor in weights(whole).items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_full_file_system(options, tmp_path):
    """Filled to the last byte by the reward while iteration 2 runs: metrics, pictures and checkpoint cannot be written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        (tmp_path / "filling.py").write_text(f"""
import os
calls = 0
def redness(images, prompts):
    global calls
    calls += 1
    if calls == 3:
        with open({str(disk / "ballast")!r}, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
    if calls == 4:
        os.remove({str(disk / "ballast")!r})
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
""")
        folder = run(options(run__dir=disk / "run", run__iterations=3, eval__every=3, reward__name=f"{tmp_path}/filling.py:redness"))
        assert [row["iteration"] for row in read_metrics(folder)] == [0, 1, 2, 3]
        assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["1", "3"]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.slow
def test_other_numbers_of_ranks_give_the_same_curve(launch_options, ranks, tmp_path, stage):
    change_ranks(launch_options, ranks, tmp_path, stage)


@pytest.mark.rounding
def test_another_number_of_ranks_gives_the_same_curve(launch_options, ranks, tmp_path):
    change_ranks(launch_options, ranks, tmp_path, 2)


def change_ranks(options, ranks, tmp_path, stage):
    """2 ranks, then 1, then 2, an iteration each, against 3 on one."""
    (tmp_path / "reward.py").write_text(BY_PROMPT)
    plain = [
        f"--zero.stage={stage}", "--eval.every=9", "--train.max_grad_norm=1e9", "--train.learning_rate=1e-5",
        f"--reward.name={tmp_path}/reward.py:by_prompt",
    ]  # fmt: skip

    def go_on_two(argv):
        codes, text = ranks.run(argv)
        assert codes == [0, 0], text

    trainer.main(options("whole", *plain, "--run.iterations=3"))
    go_on_two(options("parts", *plain, "--run.iterations=1"))
    trainer.main([f"--run.dir={tmp_path / 'parts'}", "--resume", "--run.iterations=2"])
    go_on_two([f"--run.dir={tmp_path / 'parts'}", "--resume", "--run.iterations=3"])
    other = re.compile(f"{TIMES.pattern}|^eval|^ratio|^clip_fraction")
    bound = bounds.of_run(tmp_path / "whole")
    rows = [
        [{k: v for k, v in row.items() if v is not None and not other.search(k)} for row in read_metrics(tmp_path / n)]
        for n in ("whole", "parts")
    ]
    for expected, row in zip(*rows, strict=True):
        assert row == pytest.approx(expected, rel=bounds.turned(bound.gradient), abs=bound.ratio)
    whole, parts, before = (
        load_file(tmp_path / name / "checkpoints" / step / "weights.safetensors")
        for name, step in (("whole", "3"), ("parts", "3"), ("parts", "2"))
    )
    whole, parts, before = (torch.cat([tensors[name].flatten() for name in whole]) for tensors in (whole, parts, before))
    assert (parts - whole).norm() <= bound.weights(len(whole), bound.gradient) < 0.2 * (parts - before).norm()


def test_a_state_is_readable_json(finished):
    state = json.loads((finished / "checkpoints" / "2" / "state.json").read_text())
    assert state["iteration"] == 2 and state["world_size"] == 1 and state["credit"]
