"""The comparison of algorithms: which runs it makes, what is equal between them, and the statistics, computed by hand."""

import json
import threading
from pathlib import Path

import pytest

from bench import algorithms, reward, rows
from ddpo_fast.config.command_line import parse
from ddpo_fast.embedded.vocabulary import SUBJECTS
from ddpo_fast.prompts import load_prompts

AFTER = {"ddpo_is": 3.0, "ddpo_sf": 2.0, "rwr": 1.0, "rwr_sparse": 0.5}


class FakeTrainer:
    """Stands for the trainer's process: the evaluation after the last update is AFTER of the algorithm, plus the seed."""

    def __init__(self, monkeypatch):
        self.started, self.fail_in, self.one_at_a_time = [], "", threading.Lock()  # the parser is for one thread
        monkeypatch.setattr(reward, "run_process", self)

    def __call__(self, command: list[str]) -> None:
        folder = Path(command[command.index("--run.dir") + 1])
        with self.one_at_a_time:
            config = parse(command[2 : command.index("--run.dir")])
        self.started.append(config)
        if self.fail_in and self.fail_in in str(folder):
            raise RuntimeError("exit status 1\nthe reason")
        after = AFTER[config.train.algorithm] + config.run.seed
        lines = [{"iteration": 0, "samples": 0, "reward_mean": None, "eval_reward_mean": 0.25, "heldout_reward_mean": 0.125}]
        for iteration in range(1, config.run.iterations + 1):
            lines.append({"iteration": iteration, "samples": iteration * config.sample.num_samples, "reward_mean": 0.5 * iteration})
        lines[-1] |= {"eval_reward_mean": after, "heldout_reward_mean": after / 2}
        lines[0] |= {"eval_diversity": 0.5, "heldout_diversity": 0.4}
        lines[-1] |= {"eval_diversity": 0.25, "heldout_diversity": 0.1}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def trainer(monkeypatch) -> FakeTrainer:
    return FakeTrainer(monkeypatch)


@pytest.fixture
def bench(tmp_path):
    folders = [text for name in ("runs", "out", "docs") for text in (f"--{name}", str(tmp_path / name))]
    return lambda *options: algorithms.main([*folders, *options])


def test_every_run_of_a_task_has_as_many_queries_and_nothing_held_out_is_trained_on(trainer, bench):
    assert bench("--seeds", "5") == 0
    assert len(trainer.started) == sum(len(algorithms.ALGORITHMS | algorithms.ABLATIONS.get(task, {})) for task in algorithms.OPTIONS) == 16
    queries = {}
    for config in trainer.started:
        queries.setdefault(config.reward.name, set()).add(config.run.iterations * config.sample.num_samples)
        trained = load_prompts(config.prompts.name, config.prompts.file, config.prompts.limit, config.prompts.list).texts
        assert not set(config.eval.heldout) & set(trained) and set(config.eval.heldout) < set(SUBJECTS)
        assert config.run.seed == 5 and config.eval.every > config.run.iterations
    assert queries == {"jpeg_compressibility": {336}, "jpeg_incompressibility": {336}, "embedded_alignment": {768}}


def test_the_table(trainer, bench, tmp_path, capsys):
    assert bench("--seeds", "0", "1", "--tasks", "alignment", "--jobs", "2") == 0
    table = {row["algorithm"]: row for row in rows.read("algorithms", tmp_path / "out")}
    assert list(table) == ["DDPO_IS", "DDPO_SF", "RWR", "RWR_sparse"]
    row = table["DDPO_SF"]
    assert {name: row[name] for name in "task seeds queries updates eval_before eval_after heldout_before heldout_after".split()} == {
        "task": "alignment", "seeds": "2", "queries": "768", "updates": "8", "eval_before": "0.25", "eval_after": "2.5",
        "heldout_before": "0.125", "heldout_after": "1.25",
    }  # fmt: skip
    assert (float(row["eval_low"]), float(row["eval_high"])) == pytest.approx((2.5 - 12.7062 / 2, 2.5 + 12.7062 / 2), rel=1e-4)
    assert (float(row["heldout_low"]), float(row["heldout_high"])) == pytest.approx((1.25 - 12.7062 / 4, 1.25 + 12.7062 / 4), rel=1e-4)
    assert (row["eval_diversity"], row["heldout_diversity"]) == ("0.5", "0.25")
    assert table["DDPO_IS"]["updates"] == "32"
    order = "alignment: DDPO_IS 3.5, DDPO_SF 2.5 (-1 to -1), RWR 1.5 (-2 to -2), RWR_sparse 1 (-2.5 to -2.5)"
    assert order in capsys.readouterr().out
    assert (tmp_path / "docs/algorithms.png").read_bytes().startswith(b"\x89PNG")
    assert bench("--seeds", "0", "1", "--tasks", "alignment") == 0 and len(trainer.started) == 8  # nothing is run again


def test_a_run_that_fails_leaves_the_others(trainer, bench, tmp_path, capsys):
    trainer.fail_in = "rwr_sparse-seed0"
    assert bench("--seeds", "0", "--tasks", "compressibility") == 1
    assert [row["algorithm"] for row in rows.read("algorithms", tmp_path / "out")] == [
        "DDPO_IS", "DDPO_SF", "RWR", "RWR at DDPO's rate", "the same with equal weights",
    ]  # fmt: skip
    said = capsys.readouterr()
    assert "1 of 6 runs failed: rwr_sparse-seed0" in said.err and "the reason" in said.out


def test_wrong_options(bench, capsys):
    for options, message in ((["--jobs", "0"], "--jobs 0: valid is 1 or more"), (["--tasks", "beauty"], "invalid choice: 'beauty'")):
        with pytest.raises(SystemExit) as exit:
            bench(*options)
        assert exit.value.code == 2 and message in capsys.readouterr().err
