"""Reward per device-hour: statistics with results computed by hand, what is run again and what is not, a comparison of real runs."""

import csv
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import harness, reward, rows
from ddpo_fast import train as trainer
from ddpo_fast.config.command_line import parse
from ddpo_fast.records.metrics import read_metrics
from ddpo_fast.records.run_directory import Record

REWARDS = "def redness(images, prompts):\n    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))\n"


def curve(rewards: list[float], seed: int = 0, hours_each: float = 1.0) -> reward.Curve:
    steps = np.arange(len(rewards))
    return reward.Curve(seed, 10 * steps, 2 * steps, hours_each * steps, np.array(rewards, float))


def metrics(rewards: list[float], seconds: float = 36.0, start: int = 1) -> str:
    """Lines of metrics.jsonl as the trainer writes them, evaluations of 4 s before the first iteration and in the second."""
    lines = [{"iteration": 0, "reward_mean": None, "time_total_s": 4.0, "time_eval_s": 4.0}] * (start == 1)
    for number, mean in enumerate(rewards, start):
        evaluation = 4.0 * (number == 2)
        lines.append({"iteration": number, "reward_mean": mean, "time_total_s": seconds + evaluation, "time_eval_s": evaluation})
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def recipe(tmp_path, tiny_model) -> Path:
    (tmp_path / "rewards.py").write_text(REWARDS)
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {{path: {tiny_model}}}\nreward: {{name: '{tmp_path / 'rewards.py'}:redness'}}\n"
        "sample: {num_samples: 8, num_steps: 3, batch_size: 8}\ntrain: {num_minibatches: 2, learning_rate: 0.01}\nlora: {rank: 2}\n"
        "prompts: {limit: 4, samples_per_prompt: 1}\neval: {num_samples: 2}\nrun: {iterations: 3}\n"
    )
    return path


@pytest.fixture
def bench(tmp_path, recipe):
    """Runs the command line on the tiny recipe; returns its exit status."""

    def run(*options: str) -> int:
        folders = [text for name in ("runs", "out", "docs") for text in (f"--{name}", str(tmp_path / name))]
        return reward.main(["--config", str(recipe), *folders, *options])

    return run


class FakeTrainer:
    """Stands for the trainer's process: writes the rows of a rising reward, and stops where it is told to."""

    def __init__(self, monkeypatch):
        self.started, self.fail_in, self.kill_in = [], "", ""
        monkeypatch.setattr(reward, "run_process", self)

    def __call__(self, command: list[str]) -> None:
        folder = Path(command[command.index("--run.dir") + 1])
        self.started.append(folder.name + " --resume" * ("--resume" in command))
        if self.fail_in and self.fail_in in folder.name:
            raise RuntimeError("exit status 1\nthe reason")
        killed = self.kill_in and self.kill_in in folder.name
        done = len(read_metrics(folder))
        rewards = np.linspace(-3, -1, parse(command[2 : command.index("--run.dir")]).run.iterations).tolist()
        text = metrics(rewards[: 1 if killed else None]) if not done else metrics(rewards[done - 1 :], start=done)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(text)
        (folder / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
        if killed:
            raise KeyboardInterrupt


def test_area_and_hours_to_a_reward():
    one = reward.Curve(0, np.array([0, 10, 20]), np.array([0, 2, 4]), np.array([0.0, 1.0, 3.0]), np.array([-3.0, -2.0, -1.0]))
    assert one.area(one.samples, 20) == -2.0
    assert one.area(one.hours, 3.0) == pytest.approx((-2.5 * 1 - 1.5 * 2) / 3)
    assert one.area(one.hours, 2.0) == pytest.approx((-2.5 * 1 - 1.75 * 1) / 2)  # cut where the reward is -1.5
    assert one.hours_to(-1.5) == 2.0
    assert one.hours_to(-1.0) == 3.0
    assert one.hours_to(-3.0) == one.hours_to(-4.0) == 0.0
    assert math.isnan(one.hours_to(-0.9))
    assert curve([-3, -1, -2, -1]).hours_to(-2) == 0.5  # the first crossing


def test_interval_is_student_s():
    assert reward.interval(np.array([0.0, 1.0])) == pytest.approx((0.5 - 12.7062 / 2, 0.5 + 12.7062 / 2), rel=1e-5)
    low, high = reward.interval(np.array([[2.0, 0.0], [2.0, 3.0], [2.0, 6.0]]))
    assert low == pytest.approx([2.0, 3 - 4.30265 * 3**0.5], rel=1e-5) and high == pytest.approx([2.0, 3 + 4.30265 * 3**0.5], rel=1e-5)
    assert np.isnan(reward.interval(np.array([1.0]))).all()
    assert [math.isnan(value) for value in reward.mean_and_interval([])] == [True] * 3


def test_a_point_has_the_training_time_before_it(tmp_path, recipe):
    (tmp_path / "metrics.jsonl").write_text(metrics([1.0, 2.0, 4.0]))
    read = reward.Curve.read(reward.Run(reward.Setting("ours"), 5, ["--config", str(recipe), "--train.inner_epochs=3"], tmp_path))
    assert read.seed == 5
    assert read.samples.tolist() == [0, 8, 16]
    assert read.updates.tolist() == [0, 6, 12]
    assert read.hours.tolist() == pytest.approx([0, 0.01, 0.02])
    assert read.reward.tolist() == [1.0, 2.0, 4.0] and math.isnan(read.evaluation)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 4, "reward_mean": 5.0, "time_total_s": 1.0, "eval_reward_mean": 4.5}) + "\n")
    assert reward.Curve.read(reward.Run(reward.Setting("ours"), 5, ["--config", str(recipe)], tmp_path)).evaluation == 4.5


def test_summary_of_a_setting():
    group = [curve([-3, -2, -1], 0), curve([-3, -2.5, -2], 1), curve([-3, -1, -1], 2)]
    summary = reward.summarize(group, target=-1.5, end_hours=2.0)
    assert summary["hours_to_target"] == pytest.approx((1.5 + 0.75) / 2)
    assert (summary["hours_low"], summary["hours_high"]) == pytest.approx((1.125 - 12.7062 * 0.375, 1.125 + 12.7062 * 0.375), rel=1e-5)
    assert (summary["reached"], summary["seeds"], summary["samples"], summary["updates"]) == ("2 of 3", 3, 20, 4)
    assert summary["final_reward"] == pytest.approx(-4 / 3)
    assert summary["area_samples"] == pytest.approx((-2 - 2.5 - 1.5) / 3) == summary["area_hours"]
    assert summary["reward_per_hour"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert set(summary) < set(rows.TABLES["reward"].columns)

    alone = reward.summarize(group[:1], target=5.0, end_hours=2.0)
    assert (alone["hours_to_target"], alone["final_low"], alone["reached"]) == (None, None, "0 of 1")
    text = reward.table({"ours": summary, "one": alone}).splitlines()
    assert text[0].split() == ["ours", "one"]
    assert text[2].split() == ["reached", "2", "of", "3", "0", "of", "1"]
    assert text[3].split() == ["hours_to_target", "1.125", "(-3.64", "to", "5.89)", "-"]


NAMES = ("ours", "trl")


def test_verdict_on_the_target():
    ours = [curve([-3, -2, -1], seed, 1.0) for seed in range(3)]
    other = [curve([-3, -2, -1], seed, hours) for seed, hours in enumerate((1.5, 2.0, 2.5))]
    said = reward.verdict_on_target(NAMES, ours, other, -2.0)
    assert said == "ours reaches -2 in 1 device-hours, trl in 2: 1.96x faster (1.04 to 3.70)"
    said = reward.verdict_on_target(("trl", "ours"), other, ours, -2.0)
    assert said == "trl reaches -2 in 2 device-hours, ours in 1: 1.96x slower (1.04 to 3.70)"
    noisy = [curve([-3, -2, -1], seed, hours) for seed, hours in enumerate((0.5, 1.0, 2.5))]
    assert "1.08x faster (0.14 to 8.00, which includes no difference)" in reward.verdict_on_target(NAMES, ours, noisy, -2.0)
    assert "(one seed, no interval)" in reward.verdict_on_target(NAMES, ours[:1], other, -2.0)

    one_fails = [*other[:2], curve([-3, -3, -3], 2)]
    said = reward.verdict_on_target(NAMES, ours, one_fails, -2.0)
    assert "1.73x faster (0.28 to 10.77, which includes no difference), over the 2 seeds with which both do" in said
    assert said.endswith("(ours in 3 of 3 seeds, trl in 2 of 3)")
    said = reward.verdict_on_target(NAMES, ours, other, 0.0)
    assert said == "no ratio of hours to 0, which no seed reaches with both (ours in 0 of 3 seeds, trl in 0 of 3)"
    assert "some runs have before any update" in reward.verdict_on_target(NAMES, ours, other, -3.5)


def test_verdict_against_samples():
    other = [curve([-3, -2.2, -1.2], 0), curve([-3, -1.8, -0.8], 1)]
    said = reward.verdict_on_samples(NAMES, [curve([-3, -2, -1], seed) for seed in (0, 1)], other)
    assert said.startswith("against samples the curves agree: ours lies inside trl's 95 % interval at 3 of 3 points, and the paired")
    assert said.endswith("contains 0 at 3 of 3")
    apart = reward.verdict_on_samples(NAMES, [curve([-3, 1, -0.9], seed) for seed in (0, 1)], other)
    assert "curves differ" in apart and "at 2 of 3 points" in apart and apart.endswith("contains 0 at 2 of 3")
    wide = reward.verdict_on_samples(NAMES, [curve([-3, -4, -1], 0), curve([-3, 6, -1], 1)], other)
    assert "not told apart seed by seed" in wide and "at 2 of 3 points" in wide and wide.endswith("contains 0 at 3 of 3")
    assert "one seed" in reward.verdict_on_samples(NAMES, [curve([-3, -2, -1])], other)
    twice_as_many = [reward.Curve(c.seed, 2 * c.samples, c.updates, c.hours, c.reward) for c in other]
    assert "at 1 of 2 points" in reward.verdict_on_samples(NAMES, [curve([-3, -2, 2], seed) for seed in (0, 1)], twice_as_many)


def test_verdict_against_hours():
    ours, other = [curve([-3, -2, -1.5, -1])], [curve([-3, -2, -1.5, -0.9], hours_each=1.6)]
    said = reward.verdict_on_hours(NAMES, ours, other)  # at hours 1, 1.6, 2, 3: what trl reaches later, ours has had no time for
    assert said == "against device-hours ours is ahead of trl: higher mean reward at 4 of 4 points up to 3 hours, which both have"
    assert "trl is not always ahead of ours: higher mean reward at 0 of 4" in reward.verdict_on_hours(("trl", "ours"), other, ours)
    dips = [curve([-3, -2, -3, -1])]
    assert "ours is not always ahead of trl: higher mean reward at 2 of 4" in reward.verdict_on_hours(NAMES, dips, other)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--setting", "ours", "--setting", "fast"], "'fast': valid is ours, trl, or \"NAME: --section.option value ...\""),
        (["--setting", "ours", "--setting", "x: --run.seed 3"], "--run.seed is set by the benchmark"),
        (["--setting", "ours", "--setting", "x: --train.learning_rat 3"], "train.learning_rat: no such option"),
        (["--setting", "ours"], "--setting: valid is two or more"),
        (["--setting", "a b:", "--setting", "A-B:"], "valid is each only once"),
        (["--seeds", "1", "1"], "--seeds: valid is each only once"),
        (["--iterations", "1"], "valid is 2 or more"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_bad_input_is_one_line(bench, capsys, options, said):
    with pytest.raises(SystemExit) as exit_:
        bench(*options)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


OURS_AND_SLOW = ["--setting", "ours", "--setting", "lr 2e-3: --train.learning_rate 2e-3", "--seeds", "0", "1", "2"]


def test_runs_take_turns_continue_and_are_reused(bench, monkeypatch, tmp_path, capsys):
    fake = FakeTrainer(monkeypatch)
    fake.kill_in = "lr-2e-3-seed1"
    with pytest.raises(KeyboardInterrupt):
        bench(*OURS_AND_SLOW)
    assert fake.started == ["ours-seed0", "lr-2e-3-seed0", "lr-2e-3-seed1"]
    assert not (tmp_path / "out").exists()

    fake.started, fake.kill_in = [], ""
    monkeypatch.setattr(rows, "commit", lambda: "later")
    assert bench(*OURS_AND_SLOW) == 0
    assert fake.started == ["lr-2e-3-seed1 --resume", "ours-seed1", "ours-seed2", "lr-2e-3-seed2"]
    out = capsys.readouterr().out
    assert out.startswith("target -2: midway between the first and the last point of ours's mean curve")
    assert "against samples the curves agree: ours lies inside lr 2e-3's 95 % interval at 3 of 3 points" in out

    fake.started = []
    assert bench(*OURS_AND_SLOW, "--target", "-1.5") == 0
    assert fake.started == []
    first, second = rows.runs(rows.read("reward", tmp_path / "out"))[-1][-2:]
    assert (first["comparison"], first["setting"], second["setting"], second["reached"]) == ("tiny", "ours", "lr 2e-3", "3 of 3")
    assert float(first["hours_to_target"]) == pytest.approx(0.015)
    assert "later" in second["commit"].split("+") and len(second["commit"].split("+")) == 2
    with (tmp_path / "out/reward_tiny.csv").open() as file:
        points = list(csv.DictReader(file))
    assert len(points) == 2 * 3 * 3
    assert list(points[2].values()) == ["ours", "0", "3", "16", "4", "0.02", "-1"]
    assert (tmp_path / "docs/reward_tiny.png").stat().st_size > 10_000


def test_a_setting_may_have_more_and_smaller_iterations(bench, monkeypatch, tmp_path):
    FakeTrainer(monkeypatch)
    small = "small: --sample.num_samples 4 --train.num_minibatches 1 --run.iterations 5"
    assert bench("--setting", "ours", "--setting", small, "--seeds", "0", "1", "--name", "sizes") == 0
    ours, smaller = rows.runs(rows.read("reward", tmp_path / "out"))[-1]
    assert (ours["comparison"], ours["samples"], smaller["samples"], smaller["updates"]) == ("sizes", "16", "16", "4")
    assert (tmp_path / "out/reward_sizes.csv").exists() and (tmp_path / "docs/reward_sizes.png").exists()


def test_a_run_made_otherwise_is_no_result(bench, monkeypatch, tmp_path, capsys):
    fake = FakeTrainer(monkeypatch)
    assert bench(*OURS_AND_SLOW) == 0
    for change, said in (
        (["--setting", "ours", "--setting", "lr 2e-3: --train.learning_rate 3e-3"], "train.learning_rate=0.002, not 0.003"),
        ([*OURS_AND_SLOW, "--iterations", "4"], "run.iterations=3, not 4"),
    ):
        with pytest.raises(SystemExit) as exit_:
            bench(*change)
        assert exit_.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert said in line and str(tmp_path / "runs/tiny") in line
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(rows, "device_name", lambda: "another machine")
        bench(*OURS_AND_SLOW)
    assert "not another machine" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "runs/tiny/ours-seed0/options.json").unlink()
    with pytest.raises(SystemExit):
        bench(*OURS_AND_SLOW)
    assert "ours-seed0 holds a run with no options.json" in capsys.readouterr().err
    assert len(fake.started) == 6


def test_the_others_go_on_when_a_run_fails(bench, monkeypatch, tmp_path, capsys):
    fake = FakeTrainer(monkeypatch)
    fake.fail_in = "ours-seed0"
    assert bench(*OURS_AND_SLOW) == 1
    assert len(fake.started) == 6
    printed = capsys.readouterr()
    assert "ours-seed0: failed: exit status 1\nthe reason" in printed.out
    assert "1 of 6 runs failed: ours-seed0" in printed.err
    written = rows.read("reward", tmp_path / "out")
    assert [(row["setting"], row["seeds"]) for row in written] == [("ours", "2"), ("lr 2e-3", "3")]
    fake.started, fake.fail_in = [], "seed"
    shutil.rmtree(tmp_path / "runs")
    assert bench(*OURS_AND_SLOW) == 1
    assert len(rows.read("reward", tmp_path / "out")) == 2


def test_trl_is_driven_for_as_many_iterations(bench, monkeypatch, tmp_path, capsys):
    FakeTrainer(monkeypatch)
    started, dies_at = [], 3

    class Worker:
        def __init__(self, name: str, options: list[str]):
            started.append((name, parse(options).run.seed))
            self.iteration = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def iterate(self) -> dict:
            self.iteration += 1
            if self.iteration == dies_at:
                raise RuntimeError("trl: out of memory")
            return {"total_s": 72.0, "reward_mean": self.iteration - 4.0, "reward_std": 1.0, "peak_memory_mib": 1.0}

    def missing():
        raise FileNotFoundError("there is no TRL")

    monkeypatch.setattr(harness, "Worker", Worker)
    monkeypatch.setattr(harness, "trl_python", missing)
    with pytest.raises(SystemExit):
        bench("--seeds", "0", "1")
    assert "there is no TRL" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(harness, "trl_python", lambda: "python")
    assert bench("--seeds", "0", "1") == 1
    assert "trl-seed1: failed: trl: out of memory" in capsys.readouterr().out
    dies_at = 0
    assert bench("--seeds", "0", "1") == 0
    assert started == [("trl", 0), ("trl", 1)] * 2
    assert [row["samples"] for row in read_metrics(tmp_path / "runs/tiny/trl-seed0")] == [8, 16, 24]
    out = capsys.readouterr().out
    assert "ours reaches -2 in 0.01 device-hours, trl in 0.02: 2.00x faster (2.00 to 2.00); against samples the curves agree" in out
    assert "against device-hours ours is ahead of trl: higher mean reward at 2 of 2 points up to 0.02 hours" in out


def test_real_runs_killed_and_continued(bench, monkeypatch, tmp_path):
    """The first run is a process of its own, the others run here; the third is killed behind its first checkpoint and continued."""
    options = ["--setting", "ours", "--setting", "slow: --train.learning_rate 1e-4", "--seeds", "0", "1", "--iterations", "2"]
    real, resumed = reward.run_process, []

    def run(command: list[str]) -> None:
        resumed.append("--resume" in command)
        trainer.main(command[2:]) if len(resumed) > 1 else real(command)

    def killed(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reward, "run_process", run)
    publish = Record._publish
    monkeypatch.setattr(Record, "_publish", lambda *args: killed(*args) if len(resumed) == 3 else publish(*args))
    with pytest.raises(KeyboardInterrupt):
        bench(*options)
    assert bench(*options) == 0
    assert resumed == [False, False, False, True, False]
    written = {row["setting"]: row for row in rows.read("reward", tmp_path / "out")}
    assert [(row["seeds"], row["samples"], row["updates"]) for row in written.values()] == [("2", "8", "2")] * 2
    points = {
        name: [read_metrics(tmp_path / f"runs/tiny/{name}-seed{seed}") for seed in (0, 1)] for name in ("ours", "slow")
    }  # an untrained model's pictures do not depend on the learning rate
    for ours, slow in zip(*points.values()):
        assert [row["iteration"] for row in ours] == [row["iteration"] for row in slow] == [0, 1, 2]
        assert ours[1]["reward_mean"] == slow[1]["reward_mean"] and ours[2]["reward_mean"] != slow[2]["reward_mean"]
        assert [row["eval_reward_mean"] is None for row in ours] == [False, True, False]


def test_a_failing_process_says_why():
    with pytest.raises(RuntimeError, match=r"exit status 2\nerror: run.seed=-1"):
        reward.run_process([sys.executable, str(reward.ROOT / "ddpo_fast/train.py"), "--run.seed=-1"])
