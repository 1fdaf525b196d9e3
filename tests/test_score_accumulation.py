"""Gradients taken during sampling: each layer's for every sample, and whole runs, against the ordinary update."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import bounds
import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from ranks import sgd
from shared import CPU, REDNESS, command_line, first_gradient, joined, run, run_dir, untimed, weights
from test_merged_lora import LAYERS, layer_rounding, make_unet, random_lora, structure, with_lora
from tiny import make_pipeline
from torch import nn

from ddpo_fast import algorithms
from ddpo_fast import assemble as assembling
from ddpo_fast import train as trainer
from ddpo_fast.config.command_line import parse
from ddpo_fast.distributed.engine import Engine
from ddpo_fast.dtypes import DTYPES
from ddpo_fast.kernels import reference, select
from ddpo_fast.networks.fused_unet import fuse, unfuse
from ddpo_fast.networks.merged_lora import merge, unmerge
from ddpo_fast.networks.scored_lora import score, unscore
from ddpo_fast.policy import Policy
from ddpo_fast.records.metrics import read_metrics
from ddpo_fast.schedule import Schedule
from ddpo_fast.updates.credit import Advantages, PromptBaseline
from ddpo_fast.updates.objectives import OnTrajectory
from ddpo_fast.updates.score_accumulation import ScoreAccumulation
from ddpo_fast.updates.transitions import Update

NUM_SAMPLES = 3  # of a batch; with guidance, twice as many rows
SCORES = {"train__estimator": "score_accumulation"}


@pytest.fixture
def options(tiny_model, tmp_path):
    """Command lines of short runs with one update an iteration: keyword arguments with __ for the dot."""
    (tmp_path / "rewards.py").write_text(
        f"{REDNESS}def sometimes_bad(images, prompts):\n"
        "    rewards = redness(images, prompts)\n    rewards[1] = float('nan')\n    return rewards\n"
        "def by_place(images, prompts):\n    return [float(place) for place in range(len(images))]\n"
    )

    def make(name="run", **changed) -> list[str]:
        values = {
            "model.path": tiny_model, "run.dir": tmp_path / name, "reward.name": f"{tmp_path}/rewards.py:redness",
            "sample.num_samples": 8, "sample.num_steps": 5, "sample.batch_size": 8, "eval.num_samples": 2, "run.iterations": 2,
            "train.num_minibatches": 1, "train.micro_batch": 16, "lora.rank": 2, "lora.alpha": 3.0, "train.learning_rate": 1e-3,
            "optimizer.eps": 1e-4, "prompts.limit": 4, "prompts.samples_per_prompt": 1, "baseline.min_count": 16,
            "baseline.buffer_size": 16, "eval.every": 10, "run.checkpoint_every": 10,
        }  # fmt: skip
        return command_line(values, changed)

    return make


def result(argv: list[str]) -> tuple[torch.Tensor, list[dict]]:
    """The weights that a run ends with, and its metrics."""
    folder = run(argv)
    return joined(weights(folder)), read_metrics(folder)


def distance(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.norm() > 1e-3
    return ((tensor - expected).norm() / expected.norm()).item()


def started(model: nn.Module, num_samples: int = NUM_SAMPLES) -> ScoreAccumulation:
    """A ScoreAccumulation before the only step of its only batch."""
    algorithm, engine = algorithms.find("ddpo_is")(), SimpleNamespace(loss_scale=1.0)
    credit = Advantages(PromptBaseline(0, 1), 5.0)
    objective = OnTrajectory(algorithm, credit, select("reference", CPU), 0.1, 4)
    scores = ScoreAccumulation(score(model), engine, objective)
    begin(scores, num_samples)
    return scores


def begin(scores: ScoreAccumulation, num_samples: int) -> None:
    update = Update(0, 0, np.arange(num_samples), np.zeros(num_samples, int))
    scores.begin([update], num_samples, Schedule(torch.zeros(1), torch.ones(1, 4), np.arange(1), 3.0))
    scores.begin_batch(slice(num_samples))


def plain_gradient(model: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(x.detach()).backward(upstream)
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.rounding
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind, layout", [(k, "contiguous") for k in LAYERS] + [(k, "channels_last") for k in LAYERS if "conv" in k])
def test_each_sample_has_the_gradient_that_it_has_alone(kind, dtype, merged, layout):
    make, shape = LAYERS[kind]
    tolerance = layer_rounding(kind, dtype)
    torch.manual_seed(0)
    model, x = with_lora(make(), dtype), torch.randn(2 * NUM_SAMPLES, *shape[1:], dtype=dtype)
    if layout == "channels_last":
        model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    if merged:
        merge(model)
    given = x.clone().requires_grad_()
    y = model(given)
    upstream = torch.randn(y.shape, dtype=dtype)
    x_grad = torch.autograd.grad(y, given, upstream)[0]
    expected = [plain_gradient(model, x[i::NUM_SAMPLES], upstream[i::NUM_SAMPLES]) for i in range(NUM_SAMPLES)]

    model.zero_grad()
    scores, given = started(model), x.clone().requires_grad_()
    assert torch.equal(scores.predict(0, lambda rows: model(given[rows])), y)
    scores.out.backward(upstream)
    assert distance(given.grad, x_grad) <= tolerance
    totals = scores.totals
    for choice, gradients in zip(torch.eye(NUM_SAMPLES, dtype=dtype), expected):
        scores.totals = [total.clone() for total in totals]  # `combine` clears the samples of advantage 0
        for (parameter, gradient), exact in zip(scores.combine(choice), gradients, strict=True):
            assert gradient.shape == parameter.shape and gradient.dtype == dtype and parameter.grad is None
            assert distance(gradient, exact) <= tolerance


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scored_unet_is_the_unet_and_unscore_undoes_it(merged, fused):
    unet = make_unet().double()
    torch.manual_seed(2)
    latents, prompt, upstream = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 4, 4, 4), (4, 3, 8), (4, 4, 4, 4)))

    def predict(x):
        return unet(x, torch.tensor([7, 500, 7, 500]), prompt).sample

    if merged:
        merge(unet)
    if fused:
        fuse(unet, select("reference", torch.device("cpu")))
    before, keys, y = structure(unet), list(unet.state_dict()), predict(latents)
    y.backward(upstream)
    expected = {parameter: parameter.grad for parameter in unet.parameters() if parameter.requires_grad}
    unet.zero_grad()
    scores = started(unet, 2)
    assert list(unet.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(predict(latents), y), "without leaves"
        assert torch.equal(scores.predict(0, lambda rows: predict(latents[rows])), y), "and with them"
    scores.out.backward(upstream)
    result = dict(scores.combine(torch.ones(2)))
    assert result.keys() == expected.keys()
    assert all(distance(result[parameter], gradient) <= 1e-11 for parameter, gradient in expected.items())
    unscore(unet)
    unscore(unet)
    assert structure(unet) == before
    unfuse(unet)
    unmerge(unet)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
@pytest.mark.parametrize("merged", [True, False])
def test_compiled_layers_have_the_same_gradients_without_a_break(merged):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Linear(9, 5)

        def forward(self, x):
            return self.linear(self.conv(x).tanh().flatten(2))

    torch.manual_seed(0)
    model = Net().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=["conv", "linear"]), model)
    random_lora(model)
    if merged:
        merge(model)
    scores, x = started(model), torch.randn(2 * NUM_SAMPLES, 4, 6, 6)

    def totals():
        begin(scores, NUM_SAMPLES)
        for _ in range(2):
            scores.predict(0, lambda rows: model(x[rows]))
            scores.out.square().sum().backward()
        return torch.cat([total.flatten() for total in scores.totals])

    expected = totals()
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    assert distance(totals(), expected) <= bounds.BACKWARD * bounds.network_rounding(model)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), "it has no LoRA"),
        (lambda: with_lora(nn.Linear(4, 4), lora_dropout=0.1), "0 cannot .* dropout"),
        (lambda: with_lora(nn.Conv2d(4, 4, 3, padding=3)), "0 cannot .* padding is as wide as its kernel"),
        (lambda: nn.Sequential(*score(with_lora(nn.Linear(4, 4)))), "0 cannot .* unscore it first"),
    ],
)
def test_a_layer_that_does_not_fit_is_named_and_stays_as_it_was(make, message):
    model = make()
    before = structure(model)
    with pytest.raises(ValueError, match=message):
        score(model)
    assert structure(model) == before


def gradient(argv: list[str], dtype: torch.dtype) -> tuple[torch.Tensor, dict]:
    """The gradient of the first update of a run, all parameters joined, and its metrics."""
    first = first_gradient(argv, dtype)
    if isinstance(first.run.gradients, ScoreAccumulation):
        assert all(total.dtype == dtype for total in first.run.gradients.totals) and not first.rollout.latents.numel()
    return joined(first.gradient), first.row


@pytest.mark.parametrize(
    "changed",
    [
        dict(sample__guidance_scale=1.0),
        dict(train__algorithm="ddpo_sf", train__timestep_fraction=0.4),
        dict(lora__forward="separate", train__algorithm="ddpo_sf"),
        dict(lora__forward="separate", train__timestep_fraction=0.4, sample__guidance_scale=1.0),
        dict(lora__scope="mid_up", lora__targets='["attention"]'),
    ],
)
def test_gradient_is_that_of_the_ordinary_update(options, changed):
    """In batches of 3, 3 and 2. All kinds of LoRA layers are there, among them one of stride 2."""
    changed = dict(sample__batch_size=3) | changed
    (expected, before), (found, row) = (gradient(options(**changed, **estimator), torch.float64) for estimator in ({}, SCORES))
    bound = bounds.of(parse(options(**changed)), torch.float64)
    assert distance(found, expected) <= bound.gradient < 1e-11
    for key in ("loss", "transitions", "clip_fraction"):
        assert row[key] == pytest.approx(before[key], rel=0, abs=3 * bound.ratio), key  # advantages are 3 at most
    assert row["ratio_error"] == 0


@pytest.mark.rounding
@pytest.mark.parametrize("forward", ["merged", "separate"])
def test_in_fp32_it_is_as_near_to_the_exact_gradient(options, forward):
    """The last steps' small variance amplifies rounding, in the ordinary update, too."""
    exact, ordinary, ours = (
        gradient(options(lora__forward=forward, **estimator), dtype)[0]
        for dtype, estimator in ((torch.float64, {}), (torch.float32, {}), (torch.float32, SCORES))
    )
    bound = bounds.of(parse(options(lora__forward=forward))).gradient
    assert max(distance(ours, exact), distance(ordinary, exact), distance(ours, ordinary)) <= bound


@pytest.mark.rounding
@pytest.mark.parametrize("changed", [dict(), dict(lora__forward="separate", sample__batch_size=5, train__timestep_fraction=0.6)])
def test_runs_end_in_the_same_weights(options, changed):
    (expected, before), (ours, rows) = (result(options(name, **changed, **estimator)) for name, estimator in (("a", {}), ("b", SCORES)))
    bound = bounds.of(parse(options(**changed)))
    learned = bound.learned(min(row["reward_std"] for row in before[1:]))
    assert (ours - expected).norm() <= bound.weights(len(expected), learned) < 0.5 * bounds.moved(run_dir(options("a")))
    for a, b, relative in zip(before[1:], rows[1:], (learned, bounds.turned(learned)), strict=True):  # Adam has moved the second's weights
        assert {key for key in a if a[key] is None} == {key for key in b if b[key] is None}
        for key in ("loss", "grad_norm", "reward_mean", "transitions", "skipped_updates", "clip_fraction", "approx_kl"):
            assert b[key] == pytest.approx(a[key], rel=relative, abs=bound.reward + bound.ratio), key
        assert b["ratio_error"] == 0 and b["transitions_per_s"] < b["transitions"] / b["time_sample_s"]


def test_the_update_calls_no_unet_and_evaluation_has_no_graph(options, monkeypatch):
    calls, stage, update, evaluate = [], ["sample"], trainer.update, trainer.evaluate

    @contextmanager
    def entering(name):
        stage.append(name)
        yield
        stage.pop()

    class Counting(Policy):
        def predict(self, *args):
            calls.append((stage[-1], torch.is_grad_enabled()))
            return super().predict(*args)

    monkeypatch.setattr(assembling, "Policy", Counting)
    for function in (update, evaluate):
        monkeypatch.setattr(trainer, function.__name__, entering(function.__name__)(function))
    result(options(run__iterations=1, sample__batch_size=4, eval__every=1, model__share_guidance="false", **SCORES))
    assert calls == [("evaluate", False)] * 5 + [("sample", True)] * 5 * 2 + [("evaluate", False)] * 5


def test_only_steps_that_are_trained_on_have_a_graph(options, monkeypatch):
    rows = []

    class Counting(Policy):
        def predict(self, x, *args):
            rows.append((torch.is_grad_enabled(), len(x)))
            return super().predict(x, *args)

    monkeypatch.setattr(assembling, "Policy", Counting)
    _, metrics = result(options(run__iterations=1, train__timestep_fraction=0.4, model__share_guidance="false", **SCORES))
    assert metrics[1]["transitions"] == 8 * 2
    assert sum(size for recorded, size in rows if recorded) == 2 * 8 * 2
    evaluations = 2 * 2 * 2 * 5
    assert sum(size for recorded, size in rows if not recorded) == 2 * 8 * 3 + evaluations


def test_ranks_and_zero_stages_give_one_gradient(options, ranks, tmp_path):
    """Two updates by plain SGD, so that a change of weights is a gradient: the ordinary ones of 1 rank, and those of 2 at every stage."""
    changed = dict(train__learning_rate=1e-2, train__max_grad_norm=1e9, train__clip_range=1e3, sample__batch_size=3, sample__num_steps=3)
    with sgd():
        expected, before = result(options("ppo", **changed))
    codes, text = ranks.run(*(options(stage, zero__stage=stage, **changed, **SCORES) for stage in "012"), changed="sgd")
    assert codes == [0, 0], text
    bound = bounds.of_run(tmp_path / "ppo")
    learned, moved = bound.learned(min(row["reward_std"] for row in before[1:])), 1e-2 * sum(row["grad_norm"] for row in before[1:])
    for stage in "012":
        rows = read_metrics(tmp_path / stage)
        assert (joined(weights(tmp_path / stage)) - expected).norm() <= learned * moved, stage
        for a, b in zip(before[1:], rows[1:], strict=True):
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=learned) and a["grad_norm"] > 1e-2, stage
            assert b["transitions"] == 24 and b["loss"] == pytest.approx(a["loss"], abs=bound.reward + bound.ratio), stage


def test_resume_equals_uninterrupted(options, tmp_path):
    short = dict(sample__num_steps=2) | SCORES
    expected, rows = result(options("whole", run__iterations=3, **short))
    result(options("parts", run__iterations=2, **short))
    trainer.main([f"--run.dir={tmp_path / 'parts'}", "--resume", "--run.iterations=3"])
    drop = ("eval_reward_mean", "eval_reward_std", "eval_samples", "eval_diversity")  # the short run ended with an evaluation
    strip = [[{k: v for k, v in row.items() if k not in drop} for row in untimed(r)] for r in (rows, read_metrics(tmp_path / "parts"))]
    assert strip[0] == strip[1] and len(rows) == 4
    assert torch.equal(joined(weights(tmp_path / "parts")), expected)


def test_bad_samples_do_not_spoil_the_gradient_of_the_others(options, monkeypatch):
    """Sample 2's latents overflow, sample 1's reward is no number: the same update as the ordinary one's, which leaves them out too."""
    initial_latents = Schedule.initial_latents

    def overflowing(self, shape, seed, sample_ids):
        latents = initial_latents(self, shape, seed, sample_ids)
        latents[sample_ids == 2] = torch.inf
        return latents

    monkeypatch.setattr(Schedule, "initial_latents", overflowing)
    changed = dict(run__iterations=1, sample__batch_size=4)
    results = []
    for name, estimator in (("a", {}), ("b", SCORES)):
        argv = [arg.replace("redness", "sometimes_bad") for arg in options(name, **changed, **estimator)]
        results.append(result(argv))
    (expected, before), (ours, rows) = results
    bound = bounds.of_run(run_dir(options("a")))
    assert rows[1]["bad_rewards"] == 3 and rows[1]["skipped_updates"] == 0 and rows[1]["ratio_error"] == 0
    assert rows[1]["loss"] == pytest.approx(before[1]["loss"], abs=bound.reward + bound.ratio)
    difference = bound.weights(len(expected), bound.learned(before[1]["reward_std"]))
    assert (ours - expected).norm() <= difference < 0.5 * bounds.moved(run_dir(options("a")))


def test_a_gradient_that_is_never_finite_ends_the_run(options, monkeypatch):
    ppo_loss = reference.ppo_loss
    monkeypatch.setattr(reference, "ppo_loss", lambda *args: [x * torch.nan for x in ppo_loss(*args)])
    with pytest.raises(FloatingPointError, match="iteration 1: no update had a finite gradient"):
        result(options(**SCORES))


@pytest.mark.rounding
@pytest.mark.parametrize("dtype, stage", [("fp16", 0), ("fp16", 2), ("bf16", 0)])
def test_half_precision_has_the_gradient_of_fp32(options, tmp_path, monkeypatch, dtype, stage):
    """Of the same advantages, and without guidance, which would multiply the rounding."""
    monkeypatch.setattr(Engine, "FP16_LOSS_SCALE", 2.0**8)  # a tiny model's gradients are large
    short = dict(run__iterations=1, sample__num_samples=4, sample__guidance_scale=1, zero__stage=stage) | SCORES
    short["reward__name"] = f"{tmp_path}/rewards.py:by_place"
    rows = [result(options(name, model__dtype=name, **short))[1][1] for name in ("fp32", dtype)]
    assert rows[1]["skipped_updates"] == rows[1]["ratio_error"] == 0
    bound = bounds.of(parse(options(**short)), DTYPES[dtype]).grad_norm(rows[0]["transitions"])
    assert rows[1]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=bound) and math.isfinite(rows[1]["loss"]) and bound < 0.5


def test_fused_kernels_train_as_the_reference_does(options, tmp_path, monkeypatch):
    """The loss's, that is; the UNet's blocks are slow in Triton's interpreter."""
    monkeypatch.setattr(assembling, "fuse", lambda unet, ops: None)
    model = make_pipeline(tmp_path / "m", channels=(8, 8), latent_size=4, groups=2)
    short = dict(
        model__path=model, sample__num_steps=2, sample__num_samples=4, sample__batch_size=4, train__timestep_fraction=0.5, **SCORES
    )
    (expected, before), (ours, rows) = (result(options(b, kernels__backend=b, **short)) for b in ("reference", "triton"))
    bound = bounds.of_run(run_dir(options("triton")))
    learned = bound.learned(min(row["reward_std"] for row in before[1:]))
    assert (ours - expected).norm() <= bound.weights(len(expected), learned) < 0.5 * bounds.moved(run_dir(options("reference")))
    assert rows[1]["ratio_error"] == 0 and rows[1]["grad_norm"] == pytest.approx(before[1]["grad_norm"], rel=learned)
    assert rows[2]["grad_norm"] == pytest.approx(before[2]["grad_norm"], rel=bounds.turned(learned))  # Adam has moved the weights
