"""The samplers on flow models: published steps and formulas, what noise they leave; and that policy gradients by them are those of E[R]."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny import SD_BETAS
from torch import Tensor

from ddpo_fast import samplers
from ddpo_fast.kernels import reference as ops
from ddpo_fast.schedule import Levels, Schedule

NUM_STEPS = 10


def sd3_scheduler(num_steps: int = NUM_STEPS) -> FlowMatchEulerDiscreteScheduler:
    """Stable Diffusion 3's levels, as its pipeline asks for them; the shift is applied twice."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    return scheduler


def sd3_levels(num_steps: int = NUM_STEPS) -> Levels:
    scheduler = sd3_scheduler(num_steps)
    return Levels.of_flow(scheduler.timesteps, scheduler.sigmas.double())


def table_of(levels: Levels, sampler: str, eta: float) -> Tensor:
    return Schedule.of(levels, sampler, eta, dtype=torch.float64).coefficients


def noise_left(levels: Levels, table: Tensor) -> Tensor:
    """Standard deviation of the noise in the next x where the network is right, over that of its level: 1 where the marginal is kept."""
    c_x, c_out, s, _ = table.unbind(1)
    return torch.hypot(c_x * levels.b + c_out * levels.q, s) / levels.next_b


# At Stable Diffusion 3's 10 steps, from the exact fractions of the shift: (sampler, eta, row, s, noise left, |c_out| / s)
CONSTANTS = [
    ("flow_sde", 0.7, 0, 0.7, 1.04226036, 0.0569581281),
    ("flow_sde", 0.7, 1, 0.7429641, 1.06362377, 0.0783908044),
    ("flow_sde", 0.7, 4, 0.391794301, 1.02523661, 0.264033421),
    ("flow_sde", 0.7, 7, 0.282006768, 1.2280254, 0.824802651),
    ("flow_sde", 0.7, 8, 0.225360484, 26.8746407, 1.48674983),
    ("flow_sde", 0.7, 9, 0.00627809003, math.inf, 1.77061357),
    ("cps", 0.8, 0, 0.913137237, 1, 0.0436634145),
    ("cps", 0.8, 1, 0.868646467, 1, 0.082822071),
    ("cps", 0.8, 4, 0.672661808, 1, 0.275830237),
    ("cps", 0.8, 7, 0.264440105, 1, 1.09529152),
    ("cps", 0.8, 8, 0.00849157604, 1, 32.2171384),
    ("dance_sde", 0.3, 0, 0.0599029387, 1.00007934, 0.665588208),
    ("dance_sde", 0.3, 1, 0.0648863066, 1.00012583, 0.722306208),
    ("dance_sde", 0.3, 4, 0.0864758994, 1.00080782, 0.972311457),
    ("dance_sde", 0.3, 7, 0.129670555, 1.04481433, 1.51541655),
    ("dance_sde", 0.3, 8, 0.155630392, 17.8568211, 1.93127305),
]


@pytest.mark.parametrize("sampler, eta, row, s, noise, sensitivity", CONSTANTS)
def test_steps_of_stable_diffusion_3(sampler, eta, row, s, noise, sensitivity):
    levels = sd3_levels()
    table = table_of(levels, sampler, eta)
    found = table[row, 2], noise_left(levels, table)[row], table[row, 1].abs() / table[row, 2]
    assert tuple(map(float, found)) == pytest.approx((s, noise, sensitivity), rel=1e-6)


@pytest.mark.parametrize("sampler, eta", [("cps", 0.8), ("precise", 0.7), ("ode", 1.0)])
def test_samplers_that_keep_the_marginal(sampler, eta):
    """Also on the last step, which ends at the picture: it has c_x = a' + h and c_out = -b a' + h a with h = s = 0, and no density."""
    levels = sd3_levels()
    table = table_of(levels, sampler, eta)
    torch.testing.assert_close(noise_left(levels, table)[:-1], torch.ones(NUM_STEPS - 1, dtype=torch.float64), rtol=1e-12, atol=0)
    assert table[-1].tolist() == [1, -levels.b[-1].item(), 0, 0]
    if samplers.find(sampler).STOCHASTIC:
        assert Schedule.of(levels, sampler, eta).trained.tolist() == list(range(NUM_STEPS - 1))


@pytest.mark.parametrize("sampler, eta", [("flow_sde", 0.7), ("dance_sde", 0.3)])
def test_steps_of_an_sde_are_the_published_ones(sampler, eta):
    """Flow-GRPO's code: x' = x (1 + g^2 dt / (2 sigma)) + v (1 + g^2 (1 - sigma) / (2 sigma)) dt + g sqrt(-dt) z, dt = sigma' - sigma."""
    levels = sd3_levels()
    for row, (c_x, c_out, s, _) in enumerate(table_of(levels, sampler, eta).tolist()):
        sigma, dt = levels.b[row].item(), (levels.next_b - levels.b)[row].item()
        clear = 1 - (levels.b[1].item() if sigma == 1 else sigma)
        g = {"flow_sde": eta * math.sqrt(sigma / clear), "dance_sde": eta}[sampler]
        expected = 1 + g**2 * dt / (2 * sigma), (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt, g * math.sqrt(-dt)
        assert (c_x, c_out, s) == pytest.approx(expected, rel=1e-12, abs=1e-12), row


@pytest.mark.parametrize("sampler", ["cps", "precise"])
def test_steps_that_keep_the_marginal_are_the_published_ones(sampler):
    """x' = (1 - sigma') x0 + h e + s z with x0 = x - sigma v and e = x + (1 - sigma) v."""
    levels, eta = sd3_levels(), 0.8
    for row, (c_x, c_out, s, _) in enumerate(table_of(levels, sampler, eta).tolist()):
        sigma, following = levels.b[row].item(), levels.next_b[row].item()
        if sampler == "cps":
            h, expected = following * math.cos(eta * math.pi / 2), following * math.sin(eta * math.pi / 2)
        else:
            rho = (following * (1 - sigma) / (sigma * (1 - following))) ** (eta**2 / 2)
            h, expected = following * rho, following * math.sqrt(1 - rho**2)
        columns = (1 - following) + h, -sigma * (1 - following) + h * (1 - sigma), expected
        assert (c_x, c_out, s) == pytest.approx(columns, rel=1e-12, abs=1e-12), row


def test_the_ode_is_euler_s_step_of_diffusers():
    scheduler = sd3_scheduler()
    x, v = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for t, (c_x, c_out, *_) in zip(scheduler.timesteps, table_of(sd3_levels(), "ode", 1.0)):
        torch.testing.assert_close((c_x * x + c_out * v).float(), scheduler.step(v, t, x).prev_sample, rtol=1e-6, atol=1e-6)


def test_from_pure_noise_in_any_number_of_steps():
    """sigma = 1 is level 0 of flow models; with one step it is the last one, too."""
    for sampler in samplers.CHOICES:
        for num_steps in (1, 2, 50):
            if samplers.find(sampler).PROCESS != "diffusion":
                table = table_of(sd3_levels(num_steps), sampler, 0.6)
                assert table.isfinite().all(), (sampler, num_steps)
    h, s = samplers.find("precise").noise(sd3_levels(), 0.6)
    assert h[0] == 0 and s[0] == sd3_levels().next_b[0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_precise_at_root_2_is_ddim_at_1(prediction_type):
    """At another eta, precise at sqrt(2) eta is DDIM to first order in u, the share of the variance that DDIM at 1 draws anew.

    h^2 / b'^2 is (1 - u)^p and 1 - p u, with p = eta^2: p (1 - p) / 2 u^2 apart.
    """
    levels = Levels.of_steps(DDIMScheduler(**SD_BETAS, clip_sample=False, prediction_type=prediction_type), 500)
    found, expected = (table_of(levels, name, eta) for name, eta in (("precise", math.sqrt(2)), ("ddim", 1.0)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    share = 0.6**2
    found, expected = (samplers.find(name).noise(levels, eta)[0] ** 2 for name, eta in (("precise", 0.6 * math.sqrt(2)), ("ddim", 0.6)))
    anew = (samplers.find("ddim").noise(levels, 1.0)[1] / levels.next_b) ** 2
    few = anew < 0.05
    assert few.sum() > 200
    torch.testing.assert_close(
        ((expected - found) / levels.next_b**2 / anew**2)[few], torch.full_like(anew[few], share * (1 - share) / 2), rtol=0.05, atol=0
    )


def test_precise_is_the_sde_of_flow_sde_in_the_limit():
    """The noise that a step draws differs by a part that is halved where the step is."""
    apart = []
    for num_steps in (100, 200):
        levels = Levels.of_flow(torch.arange(num_steps), torch.linspace(0.9, 0.1, num_steps + 1, dtype=torch.float64))
        exact, euler = (samplers.find(name).noise(levels, 0.7)[1] for name in ("precise", "flow_sde"))
        apart.append((exact / euler - 1).abs().max())
    assert apart[1] < 0.05 and 1.8 < apart[0] / apart[1] < 2.2


# --- What policy gradients are unbiased for: a network linear in x and in its parameters, and a smooth reward -----------------------------

TARGET = torch.tensor([0.8, -0.5], dtype=torch.float64)
WEIGHTS = torch.tensor([[0.6, 0.3, 0.3], [-0.2, 0.5, -0.4]], dtype=torch.float64)
"""The network's output is A x + c; these are [A | c]."""
NUM_SAMPLES = 100_000


def reward(x: Tensor) -> Tensor:
    return (-(x - TARGET).square().sum(-1) / 2).exp()


def output(x: Tensor, weights: Tensor) -> Tensor:
    return x @ weights[:, :2].T + weights[:, 2]


def expected_reward(table: Tensor, weights: Tensor) -> Tensor:
    """E[R] in closed form: x stays Gaussian from step to step, and so does its reward's integral. weights: (S, 2, 3), one set a step."""
    mean, variance = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    for (c_x, c_out, s, _), own in zip(table, weights):
        step = c_x * torch.eye(2) + c_out * own[:, :2]
        mean, variance = step @ mean + c_out * own[:, 2], step @ variance @ step.T + s**2 * torch.eye(2)
    wide = torch.eye(2) + variance
    return (-(mean - TARGET) @ torch.linalg.solve(wide, mean - TARGET) / 2).exp() / torch.linalg.det(wide).sqrt()


def sampled(schedule: Schedule, baseline: float) -> tuple[Tensor, Tensor]:
    """Gradients of E[R] by the trainer's step and loss, (NUM_SAMPLES, 2, 3), of rewards less `baseline` as advantages; and the rewards."""
    table, ids, log_probs = schedule.coefficients, torch.arange(NUM_SAMPLES), []
    states = [schedule.initial_latents((2, 1, 1), 0, ids)]
    for step in range(schedule.num_steps):
        out = output(states[-1].flatten(1), WEIGHTS).view(-1, 2, 1, 1)
        following, log_prob, _ = ops.ddim_step(out, states[-1], table, torch.full_like(ids, step), 0, ids)
        states.append(following)
        log_probs.append(log_prob)
    rewards, latents = reward(states[-1].flatten(1)), torch.stack(states, 1)
    rows, steps = ids.repeat(len(schedule.trained)), torch.tensor(schedule.trained).repeat_interleave(NUM_SAMPLES)
    x = latents[rows, steps].flatten(1)
    out = output(x, WEIGHTS).view(-1, 2, 1, 1).requires_grad_()
    loss, _ = ops.ppo_loss(out, latents, torch.stack(log_probs, 1), rewards - baseline, table, rows, steps)
    (by_output,) = torch.autograd.grad(-2 * loss, out)  # log p is a mean over the 2 elements
    of_transitions = by_output.flatten(1)[:, :, None] * torch.cat([x, torch.ones_like(x[:, :1])], 1)[:, None]
    return of_transitions.view(len(schedule.trained), NUM_SAMPLES, 2, 3).sum(0), rewards


@pytest.mark.parametrize(
    "sampler, eta, end, window, missing",
    [
        ("flow_sde", 0.7, 0.0, slice(None), 0.0),
        ("cps", 0.8, 0.1, slice(None), 0.0),
        ("cps", 0.8, 0.0, slice(None), 0.3169),
        ("flow_sde", 0.7, 0.0, slice(1, 3), 0.4242),
        ("cps", 0.8, 0.0, slice(0, 2), 0.5816),
    ],
)
def test_the_mean_policy_gradient_is_the_derivative_of_the_expected_reward(record_property, sampler, eta, end, window, missing):
    """It is that of the steps that have a density, with the network of the other steps held fixed. Those are the steps outside a window,
    and a last one of cps that ends at the picture. `missing`: how far that is from the whole derivative, over its norm."""
    levels = Levels.of_flow(torch.arange(4), torch.tensor([1.0, 0.75, 0.5, 0.25, end], dtype=torch.float64))
    schedule = Schedule.of(levels, sampler, eta, stochastic=window, dtype=torch.float64)
    weights = WEIGHTS.repeat(schedule.num_steps, 1, 1).requires_grad_()
    value = expected_reward(schedule.coefficients, weights)
    (by_step,) = torch.autograd.grad(value, weights)
    exact, whole = by_step[schedule.trained].sum(0), by_step.sum(0)
    gradients, rewards = sampled(schedule, value.item())
    error = gradients.std(0) / math.sqrt(NUM_SAMPLES)
    assert ((gradients.mean(0) - exact).abs() <= 5 * error).all() and exact.norm() > 20 * error.norm()
    assert (rewards.mean() - value).abs() <= 5 * rewards.std() / math.sqrt(NUM_SAMPLES)
    apart = ((exact - whole).norm() / whole.norm()).item()
    record_property("missing", apart)
    assert apart == pytest.approx(missing, abs=1e-4)


def test_a_sampler_of_diffusion_models_is_refused_for_a_flow_model():
    with pytest.raises(ValueError, match="^sample.sampler=ddim: it is for diffusion models, and this is a flow model; valid is cps, "):
        Schedule.of(sd3_levels(), "ddim", 1.0)
