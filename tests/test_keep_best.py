"""<run_dir>/best: the weights of the best evaluation, whatever comes later and however often the run is interrupted."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import run, weights

from ddpo_fast import sample
from ddpo_fast import train as trainer
from ddpo_fast.policy import Policy
from ddpo_fast.records.metrics import read_metrics
from ddpo_fast.records.run_directory import Record

LORA = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture
def rewards_file(tmp_path) -> Path:
    """A reward of evaluations that is told what to give: call 1 is iteration 0's evaluation, then training and evaluation alternate."""
    path = tmp_path / "told.py"
    path.write_text(f"""
from pathlib import Path
import torch
told = Path({str(tmp_path / "told")!r})
def redness(images, prompts):
    noise = torch.linspace(-0.1, 0.1, len(prompts))
    if len(prompts) == 8:
        return noise
    calls = told.read_text().split()
    told.write_text(" ".join(calls[1:]))
    return noise + float(calls[0])
""")
    return path


def test_the_best_evaluation_is_kept_and_resume_remembers_it(options, reports, tmp_path, monkeypatch, capsys):
    """5 iterations whose evaluations give 9 (untrained: does not count), 1, 3, 2, 3, 2.5, with a stop after the third."""
    exported, export = {}, Policy.export

    def watch(policy, folder):
        export(policy, folder)
        exported[folder.name, len(exported)] = load_file(folder / LORA)

    monkeypatch.setattr(Policy, "export", watch)
    (tmp_path / "told").write_text("9 1 3 2")
    argv = options(eval__every=1, run__iterations=3)
    folder = run(argv)
    kept = weights(folder / "best")
    published = [tensors for (name, _), tensors in exported.items() if name == "run"]
    assert all(torch.equal(kept[name], published[2][name]) for name in kept)  # one an iteration, from 0 on
    assert all(any(not torch.equal(kept[name], published[i][name]) for name in kept) for i in (1, 3))
    assert f"best: 3.0000 after iteration 2: {folder / 'best'}\n" in capsys.readouterr().out
    (tmp_path / "told").write_text("3 2.5")
    trainer.main([f"--run.dir={folder}", "--resume", "--run.iterations=5"])
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(folder / "best").items())
    said = json.loads((folder / "best" / "evaluation.json").read_text())
    row = read_metrics(folder)[2]
    assert said == {key: row[key] for key in said} and said["iteration"] == 2 and said["eval_reward_mean"] == pytest.approx(3)
    assert [name for name, _ in exported].count(".best.partial") == 2
    assert "best, after iteration 2" in re.sub("<[^>]*>", " ", (folder / "report.html").read_text())

    (tmp_path / "told").write_text("")
    assert (sample.read_config(folder, []).run.keep_best, sorted(p.name for p in (folder / "best").iterdir())) == (
        True, ["evaluation.json", "lora"],
    )  # fmt: skip
    sample.main([str(folder), "a", "--best", "--output", str(tmp_path / "of the best")])
    sample.main([str(folder), "a", "--output", str(tmp_path / "newest")])
    names = ("000_a_seed0_before.png", "000_a_seed0_after.png")
    best, newest = ([(tmp_path / of / name).read_bytes() for name in names] for of in ("of the best", "newest"))
    assert best[0] == newest[0] and best[1] != newest[1]


def test_a_run_killed_before_the_checkpoint_evaluates_and_keeps_again(options, tmp_path, monkeypatch):
    (tmp_path / "told").write_text("0 1 2")
    argv = options(eval__every=1, run__iterations=2)
    save = Record._checkpoint
    monkeypatch.setattr(Record, "_checkpoint", lambda record: save(record) if record.progress.iteration < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(argv)
    folder = tmp_path / "run"
    kept = weights(folder / "best")
    assert json.loads((folder / "best" / "evaluation.json").read_text())["iteration"] == 2
    monkeypatch.setattr(Record, "_checkpoint", save)
    (tmp_path / "told").write_text("2")
    trainer.main([f"--run.dir={folder}", "--resume"])
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(folder / "best").items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(folder).items())


def test_held_out_prompts_cannot_be_added_halfway(options, tmp_path, capsys):
    """A run that began before there was such an option has no evaluation of them before it, either."""
    (tmp_path / "told").write_text("0 1")
    folder = run(options(run__iterations=1))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("  heldout: null\n", ""))
    with pytest.raises(SystemExit, match="2"):
        trainer.main([f"--run.dir={folder}", "--resume", "--run.iterations=2", '--eval.heldout=["c"]'])
    assert "eval.heldout=['c']: the run in run.dir=" in capsys.readouterr().err


def test_it_can_be_left_out(options, tmp_path):
    (tmp_path / "told").write_text("0 1")
    folder = run(options(run__keep_best="false", run__iterations=1))
    assert not (folder / "best").exists() and (folder / LORA).exists()


def test_held_out_prompts_decide_and_resume_remembers_them(options, reports, tmp_path, monkeypatch, capsys):
    """Evaluations give 0, 5, 9, 7 on the fixed set, held-out prompts 0, 8, 3, 6: the weights after iteration 1 stay."""
    (tmp_path / "told").write_text("0 0 5 8 9 3")
    same = '["c", "d"]'  # whose noise is another all the same
    folder = run(options(eval__every=1, run__iterations=2, eval__prompts=same, eval__heldout=same))
    kept = weights(folder / "best")
    (tmp_path / "told").write_text("7 6")
    trainer.main([f"--run.dir={folder}", "--resume", "--run.iterations=3"])
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(folder / "best").items())
    said, rows = json.loads((folder / "best" / "evaluation.json").read_text()), read_metrics(folder)
    assert said == {key: rows[1][key] for key in said} and said["heldout_samples"] == 4
    assert [round(row["heldout_reward_mean"], 4) for row in rows] == [0, 8, 3, 6]
    assert [round(row["eval_reward_mean"], 4) for row in rows] == [0, 5, 9, 7]
    out = capsys.readouterr().out
    assert "reward on held-out prompts after iteration 3: 0.0000 -> 6.0000" in out
    assert f"best: 8.0000 after iteration 1: {folder / 'best'}\n" in out
    pictures = {
        name: [path.read_bytes() for path in sorted((folder / "images").glob(f"{name}_*.png"))] for name in ("iteration", "heldout")
    }
    assert [len(set(files)) for files in pictures.values()] == [4, 4] and not set(pictures["iteration"]) & set(pictures["heldout"])
    page = re.sub("<[^>]*>", " ", (folder / "report.html").read_text())
    assert "best, after iteration 1" in page and "Held-out prompts: before and now" in page
    card = (folder / "lora" / "README.md").read_text()
    assert "| iteration | samples | device-hours | reward, fixed evaluation | reward, held-out evaluation |" in card
    assert "| 7 ± 0.037 | 6 ± 0.037 |" in card
