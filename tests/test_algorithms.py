"""Reward-weighted regression, group-relative advantages, KL to the reference: each against a calculation of its own, and whole runs."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import bounds
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from ranks import sgd
from runs import BY_PROMPT
from shared import conditions, first_gradient, relative_error, run, untimed, weights
from tiny import SD_BETAS

from ddpo_fast import algorithms
from ddpo_fast import assemble as assembling
from ddpo_fast import train as trainer
from ddpo_fast.assemble import assemble
from ddpo_fast.config.command_line import parse
from ddpo_fast.config.options import BaselineConfig
from ddpo_fast.distributed.ranks import Ranks
from ddpo_fast.kernels.reference import normal_noise
from ddpo_fast.planning.plan import iteration_flop, with_cache
from ddpo_fast.planning.work import Work
from ddpo_fast.policy import Policy
from ddpo_fast.records.metrics import read_metrics
from ddpo_fast.schedule import FIRST_NOISE_STEP, Levels, Noising
from ddpo_fast.updates import objectives
from ddpo_fast.updates.credit import Advantages, PromptBaseline, Weights
from ddpo_fast.updates.objectives import OnTrajectory, denoising_loss, kl_divergence


def changed_weights(run_dir) -> bool:
    """Whether training has moved every B of LoRA, all of which begin as 0."""
    moved = [tensor.any() for name, tensor in weights(run_dir).items() if "lora_B" in name]
    return len(moved) > 0 and all(moved)


PROMPTS, REWARDS = ["a", "b", "a", "c", "b", "a"], torch.tensor([1.0, 5.0, 3.0, 2.0, 5.0, 2.0])


def reward_weights(prompts, rewards, sparse, beta, percentile, by_prompt) -> torch.Tensor:
    own = {"percentile": percentile} if sparse else {"inverse_temperature": beta}
    algorithm = algorithms.find("rwr_sparse" if sparse else "rwr")
    return Weights(algorithm(population="prompt" if by_prompt else "iteration", **own)).of(prompts, rewards)


def softmax(values) -> np.ndarray:
    powers = np.exp(np.asarray(values, dtype=float))
    return powers / powers.sum()


def test_rwr_weights_of_the_whole_iteration():
    found = reward_weights(PROMPTS, REWARDS, False, 0.5, 0.9, by_prompt=False)
    np.testing.assert_allclose(found, 6 * softmax(0.5 * REWARDS.numpy()), rtol=1e-14)
    assert found.dtype == torch.float64


def test_rwr_weights_by_prompt():
    """a: 1, 3, 2 among themselves; b: 5, 5 are equal; c is alone, so it is compared with all six."""
    found = reward_weights(PROMPTS, REWARDS, False, 0.5, 0.9, by_prompt=True)
    expected = np.zeros(6)
    expected[[0, 2, 5]] = 3 * softmax([0.5, 1.5, 1.0])
    expected[[1, 4]] = 1
    expected[3] = 6 * softmax(0.5 * REWARDS.numpy())[3]
    np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize(
    "percentile, by_prompt, expected",
    [  # of all, sorted 1 2 2 3 5 5: the median is 2.5, the 0.2 quantile 2; of a, sorted 1 2 3: 2 and 1.4
        (0.5, False, [0, 1, 1, 0, 1, 0]),
        (0.2, False, [0, 1, 1, 1, 1, 1]),
        (0.5, True, [0, 1, 1, 0, 1, 1]),
        (0.9, True, [0, 1, 1, 0, 1, 0]),
        (0.0, True, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_sparse_weights_are_of_the_percentile(percentile, by_prompt, expected):
    assert reward_weights(PROMPTS, REWARDS, True, 0.2, percentile, by_prompt).tolist() == expected


@pytest.mark.parametrize("by_prompt", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_bad_rewards_get_no_weight_and_change_no_other(sparse, by_prompt):
    kept = [0, 1, 2, 4, 5]
    rewards = REWARDS.clone()
    rewards[3] = torch.nan
    found = reward_weights([*PROMPTS, "a", "b"], torch.cat([rewards, torch.tensor([torch.inf, -torch.inf])]), sparse, 0.7, 0.6, by_prompt)
    clean = reward_weights([PROMPTS[i] for i in kept], REWARDS[kept], sparse, 0.7, 0.6, by_prompt)
    assert torch.equal(found[kept], clean) and found[[3, 6, 7]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("by_prompt", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_weights_do_not_depend_on_the_order_and_do_not_overflow(sparse, by_prompt):
    generator = np.random.default_rng(0)
    prompts, rewards = [str(p) for p in generator.integers(9, size=40)], torch.from_numpy(1e5 * generator.normal(size=40))
    order = generator.permutation(40)
    expected = reward_weights(prompts, rewards, sparse, 0.2, 0.9, by_prompt)
    assert torch.equal(reward_weights([prompts[i] for i in order], rewards[order], sparse, 0.2, 0.9, by_prompt), expected[order])
    assert expected.isfinite().all() and expected.max() >= 1


def test_integer_rewards_have_the_weights_of_floats():
    expected = reward_weights(PROMPTS, REWARDS, False, 0.2, 0.9, True)
    assert torch.equal(reward_weights(PROMPTS, REWARDS.long(), False, 0.2, 0.9, True), expected)


def test_denoising_loss_by_hand():
    """Two samples of one element: guided outputs 1 + 3 (2 - 1) = 4 and 0 + 3 (1 - 0) = 3, targets 1 and 5, errors 9 and 4."""
    noise_pred = torch.tensor([1.0, 0.0, 2.0, 1.0]).view(4, 1, 1, 1).requires_grad_()
    target, sample_weights = torch.tensor([1.0, 5.0]).view(2, 1, 1, 1), torch.tensor([2.0, 0.5])
    loss, figures = denoising_loss(noise_pred, target, sample_weights, 3.0, 0.25)
    assert loss.item() == 0.25 * (2 * 9 + 0.5 * 4) and figures.tolist() == [[18, 2]]
    loss.backward()  # 0.25 w 2 (guided - target), times 1 - 3 and 3
    assert noise_pred.grad.flatten().tolist() == [-2 * 3, -2 * -0.5, 3 * 3, 3 * -0.5]


DIFFUSION = SimpleNamespace(sigmas=None)
"""What the levels of a diffusion model's training need of a recording."""


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noised_samples_are_those_of_the_scheduler(prediction_type):
    """And the target is what, taken as the model's output, gives the sample back."""
    scheduler = DDIMScheduler(**SD_BETAS, clip_sample=False, prediction_type=prediction_type)
    schedule = Noising.of(Levels.of_training(DIFFUSION, scheduler), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(5, 4, 6, 6, generator=generator, dtype=torch.float64)
    timesteps, ids = torch.tensor([0, 1, 481, 998, 999]), torch.arange(5) + (1 << 33)
    x_t, target = schedule.noised(x0, timesteps, 7, ids, 2)
    assert schedule.times.tolist() == list(range(1000))
    noise = normal_noise(7, ids, FIRST_NOISE_STEP + 2000 + timesteps, 144).view(x0.shape)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise.double(), timesteps), rtol=0, atol=1e-5)
    for row, t in enumerate(timesteps.tolist()):
        a = (1 - scheduler.betas.double()).cumprod(0)[t]
        again = {
            "epsilon": (x_t[row] - (1 - a).sqrt() * target[row]) / a.sqrt(),
            "v_prediction": a.sqrt() * x_t[row] - (1 - a).sqrt() * target[row],
            "sample": target[row],
        }[prediction_type]
        torch.testing.assert_close(again, x0[row], rtol=0, atol=1e-9)


def test_noise_of_a_sample_is_new_in_every_pass_and_timestep():
    schedule = Noising.of(Levels.of_training(DIFFUSION, DDIMScheduler(**SD_BETAS)))
    zero, ids = torch.zeros(1, 4, 4, 4), torch.tensor([3])
    draws = [schedule.noised(zero, torch.tensor([t]), 0, ids, epoch)[1] for t in (0, 5, 999) for epoch in (0, 1, 2)]
    draws.append(schedule.noised(zero, torch.tensor([5]), 0, ids + 1, 0)[1])
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 10
    assert torch.equal(draws[3], schedule.noised(zero, torch.tensor([5]), 0, ids, 0)[1])


SMALL = dict(sample__num_samples=4, sample__num_steps=2, eval__num_samples=2)
RWR = dict(train__algorithm="rwr", algorithm__num_timesteps=3, train__num_minibatches=1, lora__targets='["attention"]')


@pytest.mark.parametrize("sampling_scale, training_scale, used", [(3.0, None, 3.0), (1.0, None, 1.0), (3.0, 1.0, 1.0), (1.0, 2.5, 2.5)])
def test_gradient_is_that_of_the_denoising_loss(options, sampling_scale, training_scale, used):
    """Against a loop over samples and timesteps, one at a time, with diffusers' own noising and unchanged UNet call."""
    changed = RWR | SMALL | dict(sample__guidance_scale=sampling_scale, train__micro_batch=7)
    changed |= {} if training_scale is None else {"algorithm__guidance_scale": training_scale}
    first = first_gradient(options(**changed), credit=torch.linspace(0, 2, 4))
    prompts, rollout, sample_weights = first.prompts, first.rollout, first.credit
    assert rollout.latents.shape[1] == 1 and first.row.keys() == {"transitions", "loss", "grad_norm", "skipped_updates"}
    pipe, latents = first.run.policy.pipe, rollout.latents[:, -1]
    (update,) = first.run.updates(first.rollout.schedule, 1)
    rows, timesteps = update.rows, update.steps
    assert len(rows) == 12 and (np.bincount(rows) == 3).all() and 0 <= timesteps.min() and timesteps.max() < 1000
    for row, t in zip(rows.tolist(), timesteps.tolist()):
        embeds, uncond = (pipe.encode_prompt(p, "cpu", 1, False)[0] for p in ([prompts[row]], [""]))
        step = torch.tensor([FIRST_NOISE_STEP + t])
        noise = normal_noise(first.run.config.run.seed, torch.tensor([row]), step, latents[0].numel()).view(1, *latents.shape[1:]).double()
        a = (1 - pipe.scheduler.betas.double()).cumprod(0)[t]
        x_t = a.sqrt() * latents[row] + (1 - a).sqrt() * noise
        cond, free = (pipe.unet(x_t, t, encoder_hidden_states=e).sample for e in (embeds, uncond))
        (sample_weights[row] * (free + used * (cond - free) - noise).square().mean() / len(rows)).backward()
    expected = {n: p.grad for n, p in pipe.unet.named_parameters() if p.grad is not None}
    assert relative_error(first.gradient, expected) <= 1e-6


@pytest.mark.parametrize("micro_batch", [1, 1000])
def test_rwr_gradient_does_not_depend_on_micro_batch(options, micro_batch):
    expected = first_gradient(options(**RWR | SMALL, train__micro_batch=7))
    gradient = first_gradient(options(**RWR | SMALL, train__micro_batch=micro_batch)).gradient
    assert relative_error(gradient, expected.gradient) <= bounds.of(expected.run.config, torch.float64).gradient


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_rank_trains_on_its_part_of_the_same_transitions_and_noise(options, num_ranks):
    made = assemble(parse(options(**RWR | dict(train__num_minibatches=2), train__inner_epochs=2)))

    def transitions(rank, world_size):
        part = replace(made, ranks=Ranks(rank, world_size))
        first = part.first_sample_id(3)
        return [sorted(zip((first + update.rows).tolist(), update.steps.tolist())) for update in part.updates(part.schedule(3), 3)]

    whole, parts = transitions(0, 1), [transitions(rank, num_ranks) for rank in range(num_ranks)]
    assert [sorted(sum(update, [])) for update in zip(*parts)] == whole and len(whole) == 4
    assert whole[0] != whole[2] and {i for i, _ in whole[0] + whole[1]} == set(range(16, 24))


@pytest.mark.parametrize("changed", [{}, dict(train__algorithm="rwr_sparse", algorithm__percentile=0.5, algorithm__population="iteration")])
def test_rwr_runs_and_resumes_bit_for_bit(options, changed):
    argv = RWR | SMALL | dict(train__num_minibatches=2, train__inner_epochs=2) | changed
    whole = run(options("whole", **argv, run__iterations=2))
    rows = read_metrics(whole)
    assert all(math.isfinite(row[key]) for row in rows[1:] for key in ("reward_mean", "eval_reward_mean", "loss") if row[key] is not None)
    for key in ("ratio_error", "ratio_error_step", "clip_fraction", "approx_kl"):
        assert [row[key] for row in rows[1:]] == [None, None]
    assert [row["transitions"] for row in rows[1:]] == [4 * 3 * 2] * 2 and rows[1]["grad_norm"] > 0
    trained = weights(whole)
    assert changed_weights(whole)
    half = run(options("half", **argv, run__iterations=1, eval__every=9))
    trainer.main([f"--run.dir={half}", "--resume", "--run.iterations=2"])
    parts = untimed(read_metrics(half))
    drop = ("eval_reward_mean", "eval_reward_std", "eval_samples", "eval_diversity")  # the short run ended with an evaluation
    assert [{k: v for k, v in row.items() if k not in drop} for row in parts] == [
        {k: v for k, v in row.items() if k not in drop} for row in untimed(rows)
    ]
    assert all(torch.equal(tensor, weights(half)[name]) for name, tensor in trained.items())


def test_rwr_leaves_bad_rewards_out(options, rewards_file):
    argv = RWR | dict(reward__name=f"{rewards_file}:sometimes_bad", sample__batch_size=4, sample__num_steps=2)
    rows = read_metrics(run(options(**argv)))
    assert [row["bad_rewards"] for row in rows] == [0, 4, 6] and all(math.isfinite(row["loss"]) for row in rows[1:])


@pytest.mark.parametrize(
    "stage, extra",
    [
        (2, ["--train.algorithm=rwr", "--algorithm.num_timesteps=2"]),
        *(pytest.param(stage, ["--train.kl_coefficient=3", "--train.clip_range=1e3"], marks=pytest.mark.slow) for stage in (0, 1, 2)),
    ],
)
def test_two_ranks_have_the_gradient_of_one(tiny_model, ranks, tmp_path, stage, extra):
    """One update by SGD with rate 1, unclipped, is the gradient."""
    found = []
    (tmp_path / "reward.py").write_text(BY_PROMPT)
    for number in (1, 2):
        argv = [
            f"--model.path={tiny_model}", f"--run.dir={tmp_path / str(number)}", "--sample.num_samples=8", "--sample.num_steps=2",
            "--eval.num_samples=2", "--eval.every=9", "--run.iterations=1", "--train.num_minibatches=1", "--lora.rank=2",
            "--prompts.limit=4", "--train.micro_batch=3", "--train.learning_rate=1", "--train.max_grad_norm=1e9",
            f"--zero.stage={stage if number > 1 else 0}", f"--reward.name={tmp_path}/reward.py:by_prompt", *extra,
        ]  # fmt: skip
        if number == 1:
            with sgd():
                trainer.main(argv)
        else:
            codes, text = ranks.run(argv, changed="sgd")
            assert codes == [0, 0], text
        found.append((weights(tmp_path / str(number)), read_metrics(tmp_path / str(number))[1]))
    (one, row), (two, other_row) = found
    difference, bound = torch.cat([(one[name] - two[name]).flatten() for name in one]).norm(), bounds.of_run(tmp_path / "1")
    assert difference <= bound.gradient * row["grad_norm"]
    assert other_row["transitions"] == row["transitions"] == 16 and row["grad_norm"] > 1e-3
    for key in ("loss", "grad_norm", "kl_to_reference"):
        assert other_row[key] == (None if row[key] is None else pytest.approx(row[key], rel=bound.gradient, abs=bound.ratio)), key
    assert "kl" not in extra[0] or row["kl_to_reference"] > 1e-3


def test_the_plan_knows_what_is_trained_on():
    argv = ["--train.algorithm=rwr", "--algorithm.num_timesteps=30", "--algorithm.guidance_scale=1", "--lora.scope=mid_up"]
    config = parse(argv)
    work = Work.of(config)
    assert (work.trained_steps, work.rows, work.trained_rows, work.regression, work.kept_latents) == (30, 2, 1, True, 1)
    counts = SimpleNamespace(
        prefix_flop=0.5, forward=SimpleNamespace(row_flop=1.0), update=SimpleNamespace(row_flop=3.0),
        decode=SimpleNamespace(row_flop=0.0), split_fault=None,
    )  # fmt: skip
    assert with_cache(work, config, counts, 1e9, 1, on_gpu=True).held == (0, 0)
    assert iteration_flop(counts, work, 1) == {"sampling": 48 * 2 * 10, "decode": 0, "update": 48 * 30 * 3}


def test_more_timesteps_than_the_model_has_are_refused(options):
    with pytest.raises(ValueError, match="algorithm.num_timesteps=1001: valid is 1 to 1000, the model's training steps"):
        assemble(parse(options(**RWR | dict(algorithm__num_timesteps=1001))))


def advantages_of(limit: float = 1e9, **baseline) -> Advantages:
    return Advantages.of_options(BaselineConfig(**baseline), limit)


def test_group_advantages_are_of_the_iteration_alone():
    """Groups may be of different sizes; what came before does not count, and nothing is remembered."""
    baseline = advantages_of(name="group", buffer_size=16, min_count=16, std="prompt")
    baseline.of(["a", "b", "a"], torch.tensor([1000.0, -50.0, 7.0]))
    found = baseline.of(PROMPTS, REWARDS)
    expected = np.zeros(6)
    expected[[0, 2, 5]] = np.array([-1.0, 1.0, 0.0]) / (math.sqrt(2 / 3) + 1e-6)  # a: 1, 3, 2; b: 5, 5; c: 2
    np.testing.assert_allclose(found, expected, rtol=1e-14)
    assert baseline.state_dict() == {}
    history = advantages_of(name="history", buffer_size=5, min_count=3, std="batch")
    assert vars(history.baseline) == vars(PromptBaseline(5, 3, "batch"))


def test_group_advantages_without_bad_rewards_and_over_the_standard_deviation_of_all():
    rewards = torch.tensor([1.0, 3.0, torch.nan, 4.0, 4.0, torch.inf, 9.0])
    found = advantages_of(name="group", std="batch").of(["a", "a", "a", "b", "b", "b", "c"], rewards)
    expected = np.array([-1, 1, 0, 0, 0, 0, 0]) / (np.std([1.0, 3, 4, 4, 9]) + 1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_a_run_with_group_advantages(options, monkeypatch):
    """The update gets each group's rewards less their mean, over their standard deviation; the checkpoint remembers none."""
    seen, update, batches, open_reward = [], trainer.update, [], assembling.open_reward

    def noting(run, updates, rollout, advantages, iteration):
        seen.append(advantages)
        return update(run, updates, rollout, advantages, iteration)

    def recording(*args):
        reward = open_reward(*args)
        return lambda images, prompts, metadata: batches.append((prompts, reward(images, prompts))) or batches[-1][1]

    monkeypatch.setattr(trainer, "update", noting)
    monkeypatch.setattr(assembling, "open_reward", recording)
    folder = run(options(baseline__name="group", prompts__samples_per_prompt=4, eval__every=9, sample__num_steps=3))
    _, *iterations, _ = batches  # between the evaluations
    assert len(iterations) == len(seen) == 2
    for (prompts, rewards), advantages in zip(iterations, seen):
        prompts, rewards = np.array(prompts), rewards.double().numpy()
        groups = [rewards[prompts == prompt] for prompt in prompts]
        expected = [(reward - group.mean()) / (group.std() + 1e-6) for reward, group in zip(rewards, groups)]
        np.testing.assert_allclose(advantages, expected, rtol=1e-5)
        assert all(len(group) in (4, 8) for group in groups) and np.std(expected) > 0.9
    state = json.loads((folder / "checkpoints" / "2" / "state.json").read_text())
    assert state["credit"] == {} and changed_weights(folder)


TABLE = torch.tensor([[1.1, -0.2, 0.4, 0.0], [1.05, -0.1, 0.3, 0.0]], dtype=torch.float64)  # c_x, c_out, s, unused
CLIPPED = torch.cat([TABLE, torch.tensor([[1.2, -0.9, 0.5], [1.1, -0.4, 0.6]], dtype=torch.float64)], 1)  # q_x, q_out, bound


def kl_of(out, reference, latents, rows, steps, table, guidance_scale) -> torch.Tensor:
    return kl_divergence(out, reference, latents[rows, steps], table, steps, guidance_scale)


def transitions_of(num_branches: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """UNet outputs under both policies, latents of 3 samples x 2 steps, and 4 transitions: samples and steps."""
    generator = torch.Generator().manual_seed(0)
    noise_pred, reference = torch.randn(2, 4 * num_branches, 2, 3, 3, generator=generator, dtype=torch.float64)
    latents = torch.randn(3, 3, 2, 3, 3, generator=generator, dtype=torch.float64)
    return noise_pred, noise_pred + 2 * reference, latents, torch.tensor([0, 2, 1, 2]), torch.tensor([1, 0, 0, 1])


def gaussian(out, latents, row, step, table, guidance_scale) -> torch.distributions.Normal:
    """The policy at one transition, from the table's columns."""
    if guidance_scale != 1:
        free, cond = out.chunk(2)
        out = free + guidance_scale * (cond - free)
    c_x, c_out, std, _, *clip = table[step].tolist()
    x_t = latents[row, step]
    if clip:
        q_x, q_out, bound = clip
        return [
            torch.distributions.Normal((c_x - q_x) * x_t + (c_out - q_out) * o + (q_x * x_t + q_out * o).clamp(-bound, bound), std)
            for o in out
        ]
    return [torch.distributions.Normal(c_x * x_t + c_out * o, std) for o in out]


@pytest.mark.parametrize("table", [TABLE, CLIPPED], ids=["plain", "clip_sample"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_kl_and_its_gradient_are_those_of_the_distributions(guidance_scale, table):
    noise_pred, reference, latents, rows, steps = transitions_of(1 if guidance_scale == 1 else 2)
    noise_pred.requires_grad_()
    divergences = kl_of(noise_pred, reference, latents, rows, steps, table, guidance_scale)
    expected = []
    for i, (row, step) in enumerate(zip(rows.tolist(), steps.tolist())):
        p, q = (gaussian(out, latents, row, step, table, guidance_scale)[i] for out in (noise_pred, reference))
        expected.append(torch.distributions.kl_divergence(p, q).mean())
    torch.testing.assert_close(divergences, torch.stack(expected), rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, noise_pred, retain_graph=True)[0] for value in (divergences.sum(), sum(expected))]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    assert gradients[0].abs().max() > 0.05
    torch.autograd.gradcheck(
        lambda out: kl_of(out, reference, latents, rows, steps, table, guidance_scale).sum(), noise_pred, eps=1e-7, atol=1e-5
    )


def test_kl_by_hand_and_of_samples_that_do_not_count():
    """Means differ by -0.1 x (3 - 1) = -0.2 at s 0.3, and by 0.4 at s 0.4."""
    noise_pred, reference = torch.tensor([3.0, -1.0, 5.0]).view(3, 1, 1, 1), torch.tensor([1.0, 1.0, 9.0]).view(3, 1, 1, 1)
    latents = torch.ones(2, 3, 1, 1, 1)
    counted, rows, steps = torch.tensor([True, False]), torch.tensor([0, 0, 1]), torch.tensor([1, 0, 0])
    ops = SimpleNamespace(ppo_loss=lambda *args: (torch.tensor(7.0), torch.full((4, 3), 5.0)))
    objective = OnTrajectory(algorithms.find("ddpo_is")(), advantages_of(), ops, 1e-4, 1, kl_coefficient=0.5)
    schedule = SimpleNamespace(guidance_scale=1.0)
    rollout = SimpleNamespace(latents=latents, log_probs=None, coefficients=TABLE.float(), good=counted, schedule=schedule)
    part = SimpleNamespace(rows=rows, kept=steps, x_rows=rows, x_kept=steps)
    x, cost = objective.on(rollout, part, 0, torch.ones(2))
    loss, figures = cost(noise_pred, {"reference": reference}, 4.0)
    expected = torch.tensor([0.2**2 / (2 * 0.3**2), 0.4**2 / (2 * 0.4**2), 0.0])
    assert torch.equal(x, latents[rows, steps]) and objective.figures[4] == "kl_to_reference" and (figures[:4] == 5).all()
    torch.testing.assert_close(figures[4], expected)
    torch.testing.assert_close(loss, 7 + 2 * expected.sum())


def test_kl_is_the_mean_log_ratio_of_samples():
    """Monte Carlo: E under the policy of log p - log p_ref, both means over elements, within 5 standard errors."""
    noise_pred, reference, latents, rows, steps = transitions_of(1)
    divergence = kl_of(noise_pred, reference, latents, rows, steps, TABLE, 1.0)[0]
    torch.manual_seed(0)
    p, q = (gaussian(out, latents, 0, 1, TABLE, 1.0)[0] for out in (noise_pred, reference))
    x = p.sample((100_000,))
    log_ratios = (p.log_prob(x) - q.log_prob(x)).mean((1, 2, 3))
    assert abs(log_ratios.mean() - divergence) < 5 * log_ratios.std() / 100_000**0.5 and log_ratios.std() / 100_000**0.5 < 0.01 * divergence


@pytest.mark.parametrize("forward", ["merged", "separate"])
def test_the_reference_is_the_untrained_model(options, tiny_model, forward):
    policy = assemble(parse(options(lora__forward=forward))).policy
    untrained = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    inputs = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor([481, 481]), conditions(policy, ["a", "b"])
    latents, t, _ = inputs
    embeds = policy.pipe.encode_prompt(["a", "b"], "cpu", 1, False)[0]
    names = {name for name, parameter in policy.network.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        expected = untrained(latents, t, encoder_hidden_states=embeds).sample
        for parameter in policy.trainable_parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        trained = policy.predict(*inputs)
        bounds.assert_same_output(policy.predict_under("reference", *inputs), expected, untrained)
        assert torch.equal(policy.predict(*inputs), trained)  # and LoRA is on again
    assert (trained - expected).abs().max() > 1e-2
    assert {name for name, parameter in policy.network.named_parameters() if parameter.requires_grad} == names


@pytest.mark.parametrize("changed", [dict(lora__forward="separate"), dict(train__algorithm="ddpo_sf", sample__guidance_scale=1.0)])
def test_the_update_adds_the_gradient_of_the_kl(options, changed):
    """To that without it; the expected part is autograd's through a plain loop, against the untrained UNet."""
    short = dict(train__num_minibatches=1, lora__targets='["attention"]') | changed
    plain = first_gradient(options(**short, train__micro_batch=11)).gradient
    first = first_gradient(options(**short, train__micro_batch=7, train__kl_coefficient=80.0))
    config, pipe, prompts, rollout = first.run.config, first.run.policy.pipe, first.prompts, first.rollout
    untrained = UNet2DConditionModel.from_pretrained(config.model.path, subfolder="unet").double()
    embeds, uncond = (pipe.encode_prompt(p, "cpu", 1, False)[0] for p in (prompts, [""] * len(prompts)))
    scale, alphas, divergences = config.sample.guidance_scale, (1 - pipe.scheduler.betas.double()).cumprod(0), []
    for step, t in enumerate(rollout.schedule.times.tolist()):
        a_t, a_p = alphas[t], alphas[t - 200] if t >= 200 else alphas[0]
        s = ((1 - a_p) / (1 - a_t) * (1 - a_t / a_p)).sqrt()
        x_t, means = rollout.latents[:, step], []
        for unet in (pipe.unet, untrained):
            e, free = (unet(x_t, t, encoder_hidden_states=given).sample for given in (embeds, uncond))
            e = free + scale * (e - free)
            means.append(a_p.sqrt() * (x_t - (1 - a_t).sqrt() * e) / a_t.sqrt() + (1 - a_p - s**2).sqrt() * e)
        divergences.append(((means[0] - means[1].detach()) ** 2 / (2 * s**2)).mean())
    kl = sum(divergences) / len(divergences)
    (80 * kl).backward()
    expected = {n: p.grad for n, p in pipe.unet.named_parameters() if p.grad is not None}
    assert relative_error({name: first.gradient[name] - plain[name] for name in plain}, expected) <= 1e-6
    assert first.row["kl_to_reference"] == pytest.approx(kl.item(), rel=1e-6) and kl > 1e-6


@pytest.mark.parametrize("changed", [dict(), dict(lora__scope="mid_up", cache__mode="on", train__gradient_checkpointing=True)])
def test_a_run_with_a_kl_penalty(options, changed):
    """Nothing has been left before the first update; a large penalty keeps the policy nearer than none."""
    short = dict(train__num_minibatches=1, train__inner_epochs=2, run__iterations=2, eval__every=9, **SMALL) | changed
    folders = [run(options(str(c), **short, train__kl_coefficient=c)) for c in (1e4, 1e-9)]
    near, far = map(read_metrics, folders)
    for rows in (near, far):
        assert rows[1]["ratio_error"] <= bounds.of_run(folders[0]).ratio and all(math.isfinite(row["loss"]) for row in rows[1:])
        assert 0 < rows[1]["kl_to_reference"] < rows[2]["kl_to_reference"] or rows is near
    assert near[2]["kl_to_reference"] < 0.5 * far[2]["kl_to_reference"]
    assert (near[2]["cache_hit_fraction"] == 1) == bool(changed)


def test_without_a_coefficient_there_is_no_reference(options, monkeypatch):
    monkeypatch.setattr(Policy, "predict_under", lambda *args: pytest.fail("it was computed"))
    monkeypatch.setattr(objectives, "kl_divergence", lambda *args: pytest.fail("it was computed"))
    assert read_metrics(run(options(run__iterations=1, eval__every=9, **SMALL)))[1]["kl_to_reference"] is None
