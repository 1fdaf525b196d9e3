"""bench.cache on the embedded model with next to no work."""

import pytest
import torch

from bench import cache, rows
from bench.models import Work


@pytest.mark.slow  # seven processes that load a model each: two minutes
def test_every_setting_is_gated_and_timed(monkeypatch, tmp_path, capsys):
    # calls of as many rows in sampling and in the update: Adam makes much of rounding, which depends on the rows of a call
    options = "sample.num_samples=2", "sample.batch_size=2", "sample.num_steps=2", "train.num_minibatches=1", "train.micro_batch=2"
    small = Work("embedded", tuple(f"--{option}" for option in (*options, "prompts.samples_per_prompt=1")))
    monkeypatch.setitem(cache.WORKS, "embedded", small)
    assert cache.main(["--models", "embedded", "--rounds", "1", "--out", str(tmp_path)]) == 0
    times = rows.read("cache", tmp_path)
    assert [(row["scope"], row["cache"]) for row in times] == [
        ("all", "off"), ("mid_up", "off"), ("mid_up", "on"), ("up_blocks.1", "off"), ("up_blocks.1", "on")
    ]  # fmt: skip
    flop = {(row["scope"], row["cache"]): float(row["update_tflop"]) for row in times}
    assert flop["up_blocks.1", "on"] < 0.6 * flop["up_blocks.1", "off"] < 0.6 * flop["mid_up", "off"] < 0.6 * flop["all", "off"]
    ppo, scores = rows.read("score_accumulation", tmp_path)
    assert float(scores["update_s"]) < 0.3 * float(ppo["update_s"]) and float(scores["weights_error"]) < 1e-3
    assert "1 update" in capsys.readouterr().out


def test_weights_that_move_elsewhere_are_an_error():
    class Worker:
        work = {"dtype": "fp32"}

        def __init__(self, value):
            self.value = value

        def call(self, method, file):
            torch.save({"w": torch.tensor([1.0, self.value])}, file)

    workers = {("all", "off"): Worker(1.0), ("all", "on"): Worker(1.0), ("mid_up", "off"): Worker(2.0), ("mid_up", "on"): Worker(2.001)}
    assert cache.same_weights(workers, "off") == pytest.approx({("all", "on"): 0, ("mid_up", "on"): 1e-3 / 5**0.5}, rel=1e-3)
    workers["all", "on"].value = 1.01
    with pytest.raises(cache.GateError, match="all, on: the weights move elsewhere, by 0.0071"):
        cache.same_weights(workers, "off")
