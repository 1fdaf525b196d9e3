"""The DDIM table, step and log-density against published constants, torch.distributions and diffusers."""

import math

import bounds
import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from ddpo_fast.kernels import reference as ops
from ddpo_fast.pipelines.ddim import changed_steps, ddim_scheduler
from ddpo_fast.schedule import Levels, Schedule

SD_CONFIG = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, timestep_spacing="leading",
    steps_offset=1, set_alpha_to_one=False, clip_sample=False,
)  # fmt: skip
SHAPE = (4, 16, 16)
SEED = 1234
EPS = torch.finfo(torch.float32).eps

# Stable Diffusion's schedule at eta 1: (S, row, t, s, c_x, c_eps, E[log p])
SD_CONSTANTS = [
    (10, 0, 901, 0.7763321643, 1.615411122, -1.003424867, -1.16576373),
    (10, 1, 801, 0.7264817361, 1.497142773, -0.844784451, -1.099396597),
    (10, 2, 701, 0.6678874553, 1.396768598, -0.7105553195, -1.015302933),
    (10, 3, 601, 0.6011876862, 1.311761522, -0.5994094221, -0.9100904298),
    (10, 4, 501, 0.5276089816, 1.240062988, -0.5092985155, -0.7795386983),
    (10, 5, 401, 0.4480899881, 1.179998467, -0.4377347872, -0.6161773328),
    (10, 6, 301, 0.3617921782, 1.130210991, -0.3827313731, -0.4022532078),
    (10, 7, 201, 0.2609568708, 1.089608975, -0.3451799957, -0.0755384018),
    (10, 8, 101, 0.04098418662, 1.057325423, -0.3409653164, 1.775630446),
    (10, 9, 1, 0.02064832017, 1.000427623, -0.02071416579, 2.461182778),
    (20, 0, 951, 0.644391014, 1.310472371, -0.5496344756, -0.9794889607),
    (20, 1, 901, 0.6241038991, 1.283658739, -0.5082067302, -0.9475001137),
    (20, 7, 601, 0.482937827, 1.153870978, -0.3133517023, -0.691071177),
    (20, 13, 301, 0.3144084917, 1.068421891, -0.2065735664, -0.2618763238),
    (20, 18, 51, 0.0405967319, 1.024821091, -0.2204771489, 1.785129177),
    (20, 19, 1, 0.02064832017, 1.000427623, -0.02071416579, 2.461182778),
    (50, 0, 981, 0.4544632724, 1.122851701, -0.2329357774, -0.6303003558),
    (50, 1, 961, 0.4482824431, 1.118964106, -0.2261051123, -0.6166067414),
    (50, 25, 481, 0.2876852737, 1.046156724, -0.1080790238, -0.1730503372),
    (50, 40, 181, 0.1770676562, 1.018642517, -0.07924407099, 0.3122848477),
    (50, 47, 41, 0.09988730924, 1.01010016, -0.1016113168, 0.8847741028),
    (50, 48, 21, 0.03947954614, 1.009095535, -0.1292871356, 1.813034027),
    (50, 49, 1, 0.02064832017, 1.000427623, -0.02071416579, 2.461182778),
]


def take_step(schedule, noise_pred, latents, steps, ids) -> tuple[torch.Tensor, torch.Tensor]:
    """x_p and log p."""
    return ops.ddim_step(noise_pred, latents, schedule.coefficients, steps, SEED, ids)[:2]


def log_prob_of(out, latents, next_latents, table, steps) -> torch.Tensor:
    """log p (B,) of given transitions, as the update sees it: the score-function loss with advantage -1 is log p."""
    count = len(latents)
    trajectories = torch.zeros(count, len(table) + 1, *latents.shape[1:], dtype=latents.dtype)
    rows = torch.arange(count)
    trajectories[rows, steps], trajectories[rows, steps + 1] = latents, next_latents
    old = torch.zeros(count, len(table), dtype=latents.dtype)
    loss, statistics = ops.ppo_loss(out, trajectories, old, -torch.ones_like(old[:, 0]), table, rows, steps, score_function=True)
    return loss if out.requires_grad else statistics[0]


def log_prob_rounding(schedule: Schedule, step: int, latents: torch.Tensor) -> float:
    """Of log p in fp32, see bounds.py: of the mean, of which z gets 1 / s, and of log p itself. Latents and outputs are 1 in rms."""
    c_x, c_out, s, log_norm, *_ = schedule.coefficients[step].abs().tolist()
    eta, root = 0.2 * EPS * (c_x + c_out + math.hypot(c_x, c_out, s)) / s, math.sqrt(latents.numel())
    return bounds.SIGMAS * eta / root + EPS * (log_norm + 1.5 + 0.1 * root / math.sqrt(2))


every_process = pytest.mark.parametrize(
    "prediction_type, num_steps, eta",
    [(p, s, e) for p in ("epsilon", "v_prediction", "sample") for s in (7, 10, 20, 50) for e in (0.3, 1.0)],
)


def sd_scheduler(**overrides) -> DDIMScheduler:
    return DDIMScheduler(**{**SD_CONFIG, **overrides})


def fp64_alphas(scheduler: DDIMScheduler) -> DDIMScheduler:
    """The scheduler with its cumulative alphas in fp64, which makes all of its arithmetic fp64."""
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def process(num_steps: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """One row for every step: (noise_pred, latents, steps, sample_ids)."""
    generator = torch.Generator().manual_seed(num_steps)
    noise_pred, latents = torch.randn(2, num_steps, *SHAPE, generator=generator, dtype=dtype)
    return noise_pred, latents, torch.arange(num_steps), 1000 + torch.arange(num_steps)


def gaussian(scheduler, num_steps: int, eta: float, step: int, x_t, out) -> torch.distributions.Normal:
    """The transition of one step in fp64, through x0 and e: DDIM (arXiv:2010.02502) eq. 12 and 16."""
    alphas = fp64_alphas(scheduler).alphas_cumprod
    scheduler.set_timesteps(num_steps)
    t = int(scheduler.timesteps[step])
    previous = t - 1000 // num_steps
    a_t, a_p = alphas[t], alphas[max(previous, 0)]
    x_t, out = x_t.double(), out.double()
    if scheduler.config.prediction_type == "epsilon":
        x0, e = (x_t - (1 - a_t).sqrt() * out) / a_t.sqrt(), out
    elif scheduler.config.prediction_type == "v_prediction":
        x0, e = a_t.sqrt() * x_t - (1 - a_t).sqrt() * out, a_t.sqrt() * out + (1 - a_t).sqrt() * x_t
    else:
        x0, e = out, (x_t - a_t.sqrt() * out) / (1 - a_t).sqrt()
    s = eta * ((1 - a_p) / (1 - a_t) * (1 - a_t / a_p)).sqrt()
    return torch.distributions.Normal(a_p.sqrt() * x0 + (1 - a_p - s**2).sqrt() * e, s)


def textbook_table(scheduler: DDIMScheduler, num_steps: int, eta: float) -> torch.Tensor:
    """(c_x, c_out, s, log(s sqrt(2 pi))) by DDIM's own formulas, prediction type by prediction type, in fp64 and then rounded to fp32."""
    scheduler.set_timesteps(num_steps)
    alphas = torch.cumprod(1 - scheduler.betas.double(), 0)
    a_t, a_p = alphas[scheduler.timesteps], alphas[(scheduler.timesteps - 1000 // num_steps).clamp(min=0)]
    s = eta * ((1 - a_p) / (1 - a_t) * (1 - a_t / a_p)).sqrt()
    direction, signal = (1 - a_p - s**2).clamp(min=0).sqrt(), a_p.sqrt()
    match scheduler.config.prediction_type:
        case "epsilon":
            columns = signal / a_t.sqrt(), -signal * (1 - a_t).sqrt() / a_t.sqrt() + direction
        case "v_prediction":
            columns = signal * a_t.sqrt() + direction * (1 - a_t).sqrt(), -signal * (1 - a_t).sqrt() + direction * a_t.sqrt()
        case "sample":
            columns = direction / (1 - a_t).sqrt(), signal - direction * a_t.sqrt() / (1 - a_t).sqrt()
    return torch.stack([*columns, s, s.log() + 0.5 * math.log(2 * math.pi)], 1).float()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_five_numbers_and_two_are_ddims_own_formulas_to_the_bit(prediction_type, spacing):
    scheduler = sd_scheduler(prediction_type=prediction_type, timestep_spacing=spacing)
    for num_steps in (1, 2, 3, 7, 10, 20, 30, 50, 100, 125, 250):
        for eta in (0.05, 0.3, 0.7, 1.0):
            table = Schedule.of(Levels.of_steps(scheduler, num_steps), "ddim", eta).coefficients
            assert torch.equal(table, textbook_table(scheduler, num_steps, eta)), (num_steps, eta)


def test_a_first_step_from_pure_noise_keeps_none_of_it():
    """At zero signal-to-noise and eta = 1, s = b': h is 0, and not the root of what rounding leaves of b'^2 - s^2."""
    scheduler = sd_scheduler(prediction_type="sample", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    assert Schedule.of(Levels.of_steps(scheduler, 10), "ddim", 1.0).coefficients[0, 0] == 0


@pytest.mark.parametrize("num_steps, row, t, std, coef_x, coef_eps, mean_logp", SD_CONSTANTS)
def test_table_of_stable_diffusion(num_steps, row, t, std, coef_x, coef_eps, mean_logp):
    schedule = Schedule.of(Levels.of_steps(sd_scheduler(), num_steps), "ddim", eta=1.0)
    assert schedule.num_steps == num_steps
    assert schedule.times[row] == t
    c_x, c_out, s, log_norm = schedule.coefficients[row].tolist()
    assert (c_x, c_out, s, -0.5 - log_norm) == pytest.approx((coef_x, coef_eps, std, mean_logp), rel=0, abs=1e-6)


@pytest.mark.rounding
@every_process
def test_step_and_log_prob_are_the_gaussian_of_every_step(prediction_type, num_steps, eta):
    scheduler = sd_scheduler(prediction_type=prediction_type)
    schedule = Schedule.of(Levels.of_steps(scheduler, num_steps), "ddim", eta)
    noise_pred, latents, steps, ids = process(num_steps)
    next_latents, log_prob = take_step(schedule, noise_pred, latents, steps, ids)
    noise = ops.normal_noise(SEED, ids, steps, math.prod(SHAPE)).view_as(latents).double()
    for step in range(num_steps):
        normal = gaussian(scheduler, num_steps, eta, step, latents[step], noise_pred[step])
        torch.testing.assert_close(next_latents[step].double(), normal.mean + normal.stddev * noise[step], rtol=1e-6, atol=1e-6)
        expected = normal.log_prob(next_latents[step].double()).mean()
        rounding = log_prob_rounding(schedule, step, latents[step])
        assert log_prob[step].item() == pytest.approx(expected.item(), rel=0, abs=rounding), f"step {step}"
        assert rounding < 3e-6


@pytest.mark.parametrize("clip", [dict(), dict(clip_sample=True, clip_sample_range=0.7)], ids=["", "x0 clipped"])
@every_process
def test_step_is_that_of_diffusers(prediction_type, num_steps, eta, clip):
    scheduler = fp64_alphas(sd_scheduler(prediction_type=prediction_type, **clip))
    schedule = Schedule.of(Levels.of_steps(scheduler, num_steps), "ddim", eta)
    noise_pred, latents, steps, ids = process(num_steps)
    next_latents, _ = take_step(schedule, noise_pred, latents, steps, ids)
    noise = ops.normal_noise(SEED, ids, steps, math.prod(SHAPE)).view_as(latents).double()
    scheduler.set_timesteps(num_steps)
    assert schedule.times.tolist() == scheduler.timesteps.tolist()
    for step, t in enumerate(scheduler.timesteps):
        out, x_t, z = noise_pred[step].double(), latents[step].double(), noise[step]
        expected = scheduler.step(out, t, x_t, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(next_latents[step].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_log_prob_of_a_step_is_that_of_its_result_bit_for_bit(dtype):
    schedule = Schedule.of(Levels.of_steps(sd_scheduler(), 50), "ddim", eta=1.0)
    noise_pred, latents, steps, ids = process(50)
    next_latents, log_prob = take_step(schedule, noise_pred.to(dtype), latents, steps, ids)
    assert next_latents.dtype == log_prob.dtype == torch.float32
    assert torch.equal(log_prob, log_prob_of(noise_pred.to(dtype), latents, next_latents, schedule.coefficients, steps))


@pytest.mark.rounding
def test_rows_do_not_depend_on_the_batch_they_are_in():
    """To rounding: noise and the mean over a row may be computed in another order."""
    schedule = Schedule.of(Levels.of_steps(sd_scheduler(), 50), "ddim", eta=1.0)
    noise_pred, latents, steps, ids = process(50)
    together = take_step(schedule, noise_pred, latents, steps, ids)
    for row in (0, 23, 48):
        one = slice(row, row + 1)
        alone = take_step(schedule, noise_pred[one], latents[one], steps[one], ids[one])
        s, size = schedule.coefficients[row, 2].item(), together[0][one].abs() + latents[one].abs() + noise_pred[one].abs()
        assert ((alone[0] - together[0][one]).abs() <= EPS * size + 8 * EPS * s * (1 + size / s)).all()
        assert alone[1].item() == pytest.approx(together[1][row].item(), rel=0, abs=log_prob_rounding(schedule, row, latents[0]))


def test_log_prob_gradient_in_fp64():
    schedule = Schedule.of(Levels.of_steps(sd_scheduler(), 50), "ddim", eta=1.0)
    table, steps = schedule.coefficients.double(), torch.tensor([0, 25, 48])
    generator = torch.Generator().manual_seed(0)
    noise_pred, latents, z = torch.randn(3, 3, 2, 3, 5, generator=generator, dtype=torch.float64)
    c_x, c_out, s, _ = (column.view(-1, 1, 1, 1) for column in table[steps].unbind(1))
    next_latents = c_x * latents + c_out * noise_pred + s * z
    noise_pred = (noise_pred + 0.1).requires_grad_()

    assert torch.autograd.gradcheck(lambda out: log_prob_of(out, latents, next_latents, table, steps), noise_pred)

    (gradient,) = torch.autograd.grad(log_prob_of(noise_pred, latents, next_latents, table, steps), noise_pred)
    mean = c_x * latents + c_out * noise_pred.detach()
    closed_form = c_out * (next_latents - mean) / s**2 / latents[0].numel()
    torch.testing.assert_close(gradient, closed_form, rtol=1e-12, atol=1e-12)


def test_initial_latents_are_the_noise_before_every_step():
    schedule = Schedule.of(Levels.of_steps(sd_scheduler(), 10), "ddim", eta=1.0)
    ids = torch.tensor([5, 2**40])
    latents = schedule.initial_latents((4, 3, 5), SEED, ids)
    assert latents.shape == (2, 4, 3, 5) and latents.dtype == torch.float32
    assert torch.equal(latents[1:], schedule.initial_latents((4, 3, 5), SEED, ids[1:]))
    for step in range(10):
        assert not torch.isclose(latents.flatten(1), ops.normal_noise(SEED, ids, torch.full_like(ids, step), 60)).any()


@pytest.mark.parametrize("eta, reason", [(0, "deterministic"), (0.0, "deterministic"), (-0.5, "valid is"), (1.01, "0 < eta <= 1")])
def test_eta_without_a_density_is_refused(eta, reason):
    with pytest.raises(ValueError, match=rf"sample\.eta={eta}: .*{reason}"):
        Schedule.of(Levels.of_steps(sd_scheduler(), 50), "ddim", eta)


@pytest.mark.parametrize(
    "num_steps, spacing",
    [
        (-1, "leading"),
        (0, "leading"),
        (1001, "leading"),
        (1000, "leading"),  # an offset of 1 asks for the step t = 1000, which does not exist
        (61, "trailing"),  # diffusers rounds to 62 steps, of which the last is t = -1
        (1000, "trailing"),  # the last is t = 0, from where there is no way to go
    ],
)
def test_number_of_steps_that_does_not_fit_the_model_is_refused(num_steps, spacing):
    with pytest.raises(ValueError, match=rf"sample\.num_steps={num_steps}: valid is"):
        Schedule.of(Levels.of_steps(sd_scheduler(timestep_spacing=spacing), num_steps), "ddim", eta=1.0)


@pytest.mark.parametrize("num_steps", [1, 999])
def test_extreme_numbers_of_steps_work(num_steps):
    schedule = Schedule.of(Levels.of_steps(sd_scheduler(), num_steps), "ddim", eta=1.0)
    assert schedule.num_steps == num_steps and schedule.coefficients.isfinite().all()


ZERO_SNR = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")


@pytest.mark.parametrize(
    "config, reason",
    [
        (dict(thresholding=True), "thresholding must be false"),
        (dict(prediction_type="flow"), "prediction_type=flow: valid are epsilon, v_prediction, sample"),
        (ZERO_SNR, "rescale_betas_zero_snr needs prediction_type v_prediction or sample"),
    ],
)
def test_scheduler_without_a_density_is_refused(config, reason):
    with pytest.raises(ValueError, match="scheduler_config.json: .*" + reason):
        Schedule.of(Levels.of_steps(sd_scheduler(**config), 50), "ddim", eta=1.0)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("num_steps", [7, 10, 50])
def test_zero_snr_starts_from_pure_noise(prediction_type, num_steps):
    scheduler = fp64_alphas(sd_scheduler(**ZERO_SNR, prediction_type=prediction_type))
    schedule = Schedule.of(Levels.of_steps(scheduler, num_steps), "ddim", eta=0.9)
    assert schedule.times[0] == 999 and schedule.coefficients.isfinite().all()
    noise_pred, latents, steps, ids = process(num_steps)
    next_latents, _ = take_step(schedule, noise_pred, latents, steps, ids)
    noise = ops.normal_noise(SEED, ids, steps, math.prod(SHAPE)).view_as(latents).double()
    scheduler.set_timesteps(num_steps)
    for step, t in enumerate(scheduler.timesteps):
        out, x_t, z = noise_pred[step].double(), latents[step].double(), noise[step]
        expected = scheduler.step(out, t, x_t, eta=0.9, variance_noise=z).prev_sample
        torch.testing.assert_close(next_latents[step].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheduler_class", [PNDMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_any_scheduler_of_the_model_gives_the_ddim_table(scheduler_class, prediction_type):
    config = {**SD_CONFIG, "prediction_type": prediction_type}
    expected = Schedule.of(Levels.of_steps(DDIMScheduler(**config), 50), "ddim", eta=1.0)
    schedule = Schedule.of(Levels.of_steps(scheduler_class.from_config(config), 50), "ddim", eta=1.0)
    assert torch.equal(schedule.times, expected.times)
    assert torch.equal(schedule.coefficients, expected.coefficients)


SAMPLERS = "DPMSolverMultistep UniPCMultistep DEISMultistep EulerDiscrete DDPM".split()


@pytest.mark.parametrize("scheduler_class", [getattr(diffusers, f"{name}Scheduler") for name in SAMPLERS])
@pytest.mark.parametrize(
    "saved",
    [
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "linspace", "set_alpha_to_one": True, "steps_offset": 0},
        {"steps_offset": 0},
        {"set_alpha_to_one": True},
        {"timestep_spacing": "something new"},
    ],
)
def test_steps_without_a_density_are_stable_diffusions(scheduler_class, saved):
    """Whatever sampler was saved with the model, and with its object or its config."""
    expected, config = Schedule.of(Levels.of_steps(sd_scheduler(), 50), "ddim", eta=1.0), {**SD_CONFIG, **saved}
    schedule = Schedule.of(Levels.of_steps(ddim_scheduler(config), 50), "ddim", eta=1.0)
    assert torch.equal(schedule.times, expected.times) and torch.equal(schedule.coefficients, expected.coefficients)
    assert changed_steps(config, ddim_scheduler(config)) == {key: SD_CONFIG[key] for key in saved}
    assert torch.equal(
        Schedule.of(Levels.of_steps(scheduler_class.from_config(config), 50), "ddim", eta=1.0).coefficients, expected.coefficients
    )


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_a_samplers_own_defaults_do_not_count(scheduler_class):
    """What a config of 2022 does not state is as Stable Diffusion has it."""
    betas = {key: SD_CONFIG[key] for key in ("beta_schedule", "beta_start", "beta_end")}
    scheduler = scheduler_class.from_config({**betas, "clip_sample": False})
    expected = Schedule.of(Levels.of_steps(sd_scheduler(), 50), "ddim", eta=1.0)
    assert torch.equal(Schedule.of(Levels.of_steps(scheduler, 50), "ddim", eta=1.0).coefficients, expected.coefficients)
    assert changed_steps(scheduler.config, ddim_scheduler(scheduler.config)) == {}


@pytest.mark.parametrize(
    "saved",
    [{}, {"steps_offset": 2}, {"steps_offset": 10}, {"timestep_spacing": "trailing"}, {"timestep_spacing": "trailing", "steps_offset": 0}],
)
@pytest.mark.parametrize("num_steps", [7, 50])
def test_steps_with_a_density_stay_as_they_are_saved(saved, num_steps):
    config = {**SD_CONFIG, **saved}
    schedule, own = Schedule.of(Levels.of_steps(ddim_scheduler(config), num_steps), "ddim", eta=1.0), DDIMScheduler(**config)
    own.set_timesteps(num_steps)
    assert torch.equal(schedule.times, own.timesteps) and changed_steps(config, ddim_scheduler(config)) == {}


def test_zero_snr_keeps_its_first_step():
    """Stable Diffusion's steps would begin at t = 981, where such a model has not all of the noise."""
    config = {**SD_CONFIG, **ZERO_SNR, "prediction_type": "v_prediction"}
    expected = Schedule.of(Levels.of_steps(ddim_scheduler(config), 50), "ddim", eta=1.0)
    schedule = Schedule.of(Levels.of_steps(ddim_scheduler(config | {"timestep_spacing": "linspace"}), 50), "ddim", eta=1.0)
    assert schedule.times[0] == 999 and torch.equal(schedule.coefficients, expected.coefficients)


@pytest.mark.parametrize("dtype, wide", [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 5.0, 7.5])
def test_guidance_and_its_gradient_through_both_branches(dtype, wide, guidance_scale):
    generator = torch.Generator().manual_seed(0)
    uncond, cond, upstream = torch.randn(3, 3, 2, 5, 3, generator=generator, dtype=torch.float64).to(dtype)
    noise_pred = torch.cat([uncond, cond]).requires_grad_()
    guided = ops.guide(noise_pred, 3, guidance_scale)
    assert guided.dtype == wide
    exact = uncond.double() + guidance_scale * (cond.double() - uncond.double())
    tolerance = 8 * torch.finfo(wide).eps
    torch.testing.assert_close(guided.double(), exact, rtol=tolerance, atol=tolerance * max(1, guidance_scale))
    (gradient,) = torch.autograd.grad(guided, noise_pred, upstream.to(wide))
    expected = torch.cat([(1 - guidance_scale) * upstream.to(wide), guidance_scale * upstream.to(wide)]).to(dtype)
    torch.testing.assert_close(gradient, expected)
