"""Flow transformers, and SDXL, on two ranks and at ZeRO 0, 2 and 3: one pair of processes goes through all families."""

import json
from itertools import product

import bounds
import pytest
from families import FAMILIES
from ranks import sgd
from runs import BY_PROMPT
from shared import joined, run_dir, weights

from ddpo_fast import train as trainer
from ddpo_fast.records.metrics import read_metrics

STAGES = {
    "sd3": 2, "flux": 0, "flux2_klein": 3, "chroma": 3, "qwen_image": 3, "sana": 2, "z_image": 0, "lumina2": 3, "auraflow": 0,
    "hidream": 3, "sdxl": 3,
}  # fmt: skip
"""The ZeRO stage that each family is tried at: those whose pipelines call their networks twice a step at 3, HiDream's experts, too."""
IS_SDXL = {
    "model__arguments": "{}", "sample__sampler": "ddim", "sample__eta": 1, "eval__sampler": "ddim", "sample__height": "null",
    "sample__width": "null",
}  # fmt: skip

RATE = 10
"""Of SGD: gradients are added to weights, whose rounding would be as large as a gradient's of 0.002."""

pytestmark = pytest.mark.rounding


@pytest.fixture
def make(flow_options, sdxl, tmp_path):
    """Command lines of one unclipped update by SGD: what it changes of the weights is RATE gradients."""
    (tmp_path / "reward.py").write_text(BY_PROMPT)
    # by default ZeRO 3 would leave almost all of a model this small whole
    (tmp_path / "partition.json").write_text(json.dumps({"zero_optimization": {"stage": "auto", "stage3_param_persistence_threshold": 0}}))

    def argv(name: str, where: str, **changed) -> list[str]:
        values = {
            "reward__name": f"{tmp_path}/reward.py:by_prompt", "prompts__list": '["a", "a bird"]', "prompts__samples_per_prompt": 1,
            "run__seed": 1, "run__iterations": 1, "eval__every": 100, "sample__num_steps": 3, "train__learning_rate": RATE,
            "train__max_grad_norm": 1e9, "train__clip_range": 1e3, "deepspeed__config": tmp_path / "partition.json",
        }  # fmt: skip
        if name == "sdxl":
            return flow_options("sd3", f"{name}-{where}", model__path=sdxl, **values | IS_SDXL | changed)
        return flow_options(name, f"{name}-{where}", **values | changed)

    return argv


def compare(make, ranks, cases: list[tuple[str, int]]) -> None:
    """Of each family at a stage: the gradient on two ranks is that of one process at stage 0."""
    alone = {name: make(name, "alone") for name, _ in cases}
    with sgd():
        for argv in alone.values():
            trainer.main(argv)
    runs = [make(name, str(stage), zero__stage=stage) for name, stage in cases]
    codes, text = ranks.run(*runs, changed="sgd")
    assert codes == [0, 0], text
    for (name, stage), argv in zip(cases, runs):
        folder, expected = run_dir(argv), run_dir(alone[name])
        bound, (_, row), (_, other) = bounds.of_run(expected), read_metrics(expected), read_metrics(folder)
        error = (joined(weights(folder)) - joined(weights(expected))).norm().item() / RATE
        assert error <= bound.gradient * row["grad_norm"] and row["grad_norm"] > 1e-3, (name, stage, error)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=bound.gradient), (name, stage)
        assert other["ratio_error"] <= bound.ratio and other["transitions"] == row["transitions"], (name, stage)


def test_two_ranks_have_one_gradient(make, ranks):
    compare(make, ranks, list(STAGES.items()))


@pytest.mark.slow
def test_two_ranks_have_one_gradient_at_every_stage(make, ranks):
    compare(make, ranks, [(name, stage) for name, stage in product([*FAMILIES, "sdxl"], (0, 2, 3)) if stage != STAGES[name]])
