"""Steps that draw noise among steps of the ODE (sample.window), and evaluation pictures that are made otherwise than samples (eval.*)."""

import bounds
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from shared import CPU, first_gradient, joined, kept, relative_error, run, sampled, textbook_log_prob, untimed, weights
from tiny import SD_BETAS

from ddpo_fast import samplers
from ddpo_fast.assemble import assemble
from ddpo_fast.config.command_line import parse
from ddpo_fast.planning.work import Work
from ddpo_fast.prompts import Prompts
from ddpo_fast.records.metrics import read_metrics
from ddpo_fast.rollout import collect
from ddpo_fast.schedule import Levels, Schedule, Window
from ddpo_fast.timing import StageTimer

WINDOW = "{size: 2, among: 4}"
SHORT = dict(sample__num_samples=4, sample__num_steps=5, eval__num_samples=2, sample__window=WINDOW)


def test_a_window_is_a_function_of_seed_and_iteration_and_moves_every_so_often():
    window = Window(3, 7, every=4)
    starts = np.array([[window.steps(seed, iteration).start for iteration in range(1, 401)] for seed in range(3)])
    blocks = starts.reshape(3, 100, 4)
    assert (blocks == blocks[:, :, :1]).all() and set(starts.ravel()) == set(range(5))
    assert not np.array_equal(starts[0], starts[1]) and np.bincount(blocks[:, :, 0].ravel()).min() > 30
    assert window.steps(0, 9) == slice(blocks[0, 2, 0], blocks[0, 2, 0] + 3)


@pytest.mark.parametrize(
    "option, expected", [(None, Window(6, 6, 1)), ({"size": 2}, Window(2, 6, 1)), ({"size": 1, "every": 3}, Window(1, 6, 3))]
)
def test_what_a_window_leaves_out_is_all_steps(option, expected):
    assert Window.of(option, 6) == expected


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_steps_outside_are_those_of_the_ode(prediction_type):
    levels = Levels.of_steps(DDIMScheduler(**SD_BETAS, prediction_type=prediction_type), 6)
    whole, ode = (Schedule.of(levels, name, 0.7) for name in ("ddim", "ode"))
    mixed = Schedule.of(levels, "ddim", 0.7, stochastic=slice(2, 4))
    expected = torch.cat([ode.coefficients[:2], whole.coefficients[2:4], ode.coefficients[4:]])
    assert torch.equal(mixed.coefficients, expected) and mixed.trained.tolist() == [2, 3]
    assert (ode.coefficients[:, 2:4] == 0).all() and not len(ode.trained) and whole.trained.tolist() == list(range(6))


def test_the_ode_is_ddim_at_eta_0_of_diffusers():
    scheduler = DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    table = Schedule.of(Levels.of_steps(scheduler, 6), "ode", 1.0, dtype=torch.float64).coefficients
    scheduler.set_timesteps(6)
    x, out = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t, (c_x, c_out, *_) in zip(scheduler.timesteps, table):
        torch.testing.assert_close(c_x * x + c_out * out, scheduler.step(out, t, x, eta=0.0).prev_sample, rtol=1e-5, atol=1e-5)


def test_a_rollout_keeps_the_window_and_nothing_else(options):
    made = assemble(parse(options(**SHORT)))
    window = made.schedule(1).trained
    assert len(window) == 2 == Work.of(made.config).trained_steps and Work.of(made.config).kept_latents == 3
    rollout, whole = kept(made, ["a", "b"]), kept(assemble(parse(options(**SHORT | dict(sample__window="null")))), ["a", "b"])
    assert rollout.latents.shape[1] == 3 and rollout.log_probs.shape[1] == 2 and rollout.first_kept == window[0]
    assert whole.latents.shape[1] == 6 and (rollout.log_probs != 0).all()
    assert torch.equal(rollout.latents[:, 0], whole.latents[:, 0]) == (window[0] == 0)


@pytest.mark.parametrize("algorithm, guidance_scale", [("ddpo_is", 3.0), ("ddpo_sf", 1.0)])
def test_gradient_is_that_of_the_window_s_steps_alone(options, algorithm, guidance_scale):
    """Against a loop over them, formulas written out anew from the cumulative alphas."""
    changed = SHORT | dict(train__algorithm=algorithm, sample__guidance_scale=guidance_scale, train__num_minibatches=1)
    first = first_gradient(options(**changed))
    rollout, pipe, window = first.rollout, first.run.policy.pipe, first.rollout.schedule.trained
    for place, step in enumerate(window):
        t = int(rollout.schedule.times[step])
        x_t, next_x = rollout.latents[:, place], rollout.latents[:, place + 1]
        log_prob = textbook_log_prob(pipe, first.prompts, x_t, next_x, (t, t - 200), guidance_scale)
        ratio = (log_prob - rollout.log_probs[:, place].double()).exp()
        (-(first.credit * ratio).mean() / len(window)).backward()
    expected = {n: p.grad for n, p in pipe.unet.named_parameters() if p.grad is not None}
    assert relative_error(first.gradient, expected) <= 1e-6 and first.row["transitions"] == 8
    assert first.row["ratio_error_step"] in window or first.row["ratio_error"] == 0


def test_score_accumulation_has_the_gradient_of_the_window(options):
    """And the same where only a half of it is trained on."""
    for fraction in (1, 0.5):
        changed = SHORT | dict(train__num_minibatches=1, train__timestep_fraction=fraction, sample__batch_size=3)
        expected, found = (first_gradient(options(**changed, train__estimator=name)) for name in ("ppo", "score_accumulation"))
        assert relative_error(found.gradient, expected.gradient) <= bounds.of(expected.run.config, torch.float64).gradient
        assert found.row["transitions"] == expected.row["transitions"] == (8 if fraction == 1 else 4)


@pytest.mark.parametrize("changed", [{}, dict(lora__scope="mid_up", cache__mode="on"), dict(train__timestep_fraction=0.5)])
def test_a_run_with_a_window(options, changed):
    folder = run(options(**SHORT, run__iterations=3, train__inner_epochs=2, **changed))
    rows = read_metrics(folder)[1:]
    steps = 2 * changed.get("train__timestep_fraction", 1)
    assert [row["transitions"] for row in rows] == [4 * steps * 2] * 3
    assert all(row["ratio_error"] <= bounds.of_run(folder).ratio and row["grad_norm"] > 0 for row in rows)
    assert not changed.get("cache__mode") or [row["cache_hit_fraction"] for row in rows] == [1] * 3


def test_a_run_with_a_window_resumes_bit_for_bit(options):
    whole = run(options("whole", **SHORT, run__iterations=3, eval__every=9))
    parts = run(options("parts", **SHORT, run__iterations=1, eval__every=9))
    run([f"--run.dir={parts}", "--resume", "--run.iterations=3"])
    drop = ("eval_reward_mean", "eval_reward_std", "eval_samples", "eval_diversity")  # the short run ended with an evaluation
    rows = [[{k: v for k, v in row.items() if k not in drop} for row in untimed(read_metrics(folder))] for folder in (whole, parts)]
    assert rows[0] == rows[1] and torch.equal(joined(weights(whole)), joined(weights(parts)))


def test_evaluation_has_no_window(options):
    made = assemble(parse(options(**SHORT)))
    assert made.evaluating.schedule(0, 1).trained.tolist() == list(range(5)) and len(made.schedule(1).trained) == 2


def test_evaluation_pictures_are_made_as_eval_says(options):
    """By the ODE in 3 steps without guidance: those that a run with these very options would sample."""
    otherwise = dict(eval__sampler="ode", eval__num_steps=3, eval__guidance_scale=1)
    made = assemble(parse(options(**SHORT, **otherwise)))
    schedule = made.evaluating.schedule(0, 1)
    assert (schedule.num_steps, schedule.guidance_scale, schedule.num_branches, len(schedule.trained)) == (3, 1, 1, 0)
    direct = assemble(parse(options("other", **SHORT | dict(
        sample__num_steps=3, sample__guidance_scale=1, sample__sampler="ode", sample__window="null", train__algorithm="rwr"
    ))))  # fmt: skip
    _, _, pictures = collect(made, schedule, 0, Prompts(["a", "b"]), StageTimer(CPU), "eval")
    assert torch.equal(pictures, sampled(direct, ["a", "b"])[2])
    rows = read_metrics(run(options("run", **SHORT, **otherwise, eval__every=1, run__iterations=1, train__learning_rate=1e-30)))
    assert rows[0]["eval_reward_mean"] == rows[1]["eval_reward_mean"] and rows[1]["ratio_error"] >= 0


@pytest.mark.parametrize("option", ["sample.num_steps", "eval.num_steps"])
def test_steps_that_the_model_does_not_have_are_the_option_s(options, option):
    with pytest.raises(ValueError, match=f"^{option}=1001: valid is 1 to 1000"):
        assemble(parse([*options(), f"--{option}=1001"]))


def test_what_is_not_said_of_evaluation_is_as_in_sample(options):
    made = assemble(parse(options(sample__num_steps=4, sample__guidance_scale=2.5)))
    expected, found = made.schedule(1), made.evaluating.schedule(0, 1)
    assert torch.equal(found.coefficients, expected.coefficients) and found.guidance_scale == 2.5
    assert made.evaluating.sampler in samplers.CHOICES
