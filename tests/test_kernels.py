"""The Triton kernels of the latent operations, on a GPU or in Triton's interpreter, against fp64, the PyTorch twin and diffusers."""

import itertools
import math

import bounds
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_schedule import SD_CONSTANTS, SHAPE, fp64_alphas, sd_scheduler

from ddpo_fast import kernels
from ddpo_fast.kernels import ddim_step, launch, ppo_loss, reference
from ddpo_fast.schedule import Levels, Schedule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
LAYOUTS = ("contiguous", "channels_last", "transposed", "expanded", "rows of more", "channels of more", "channels_last rows of more")
SHAPES = (
    (1, 1, 1, 1), (3, 4, 5, 7), (2, 1, 1, 2), (1, 4, 8, 8), (5, 3, 3, 3), (2, 2, 33, 31), (4, 1, 1, 17), (1, 2, 32, 32), (1, 1, 3, 683),
    (2, 3, 37, 41), (6, 5, 1, 9),
)  # fmt: skip

every_backend = pytest.mark.parametrize(
    "backend", [(ddim_step.ddim_step, ppo_loss.ppo_loss), (reference.ddim_step, reference.ppo_loss)], ids=["triton", "reference"]
)
examples = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)  # fmt: skip


def name(value) -> str:
    return str(value).removeprefix("torch.").replace(" ", "_")


def cases(clip_choices=(False, True)) -> list[tuple]:
    """(shape, dtype, guided, layout, prediction type, S, x0 clipping, steps): every pair of kinds, each shape and layout in turn."""
    kinds = itertools.product(FLOATS, (False, True), PREDICTIONS, clip_choices)
    mixed = [
        (SHAPES[i % 11], dtype, guided, LAYOUTS[i % 7], prediction, (50, 10, 20)[i % 3], clip, ("mixed", "first", "last")[i % 4 % 3])
        for i, (dtype, guided, prediction, clip) in enumerate(kinds)
    ]
    layouts = [
        ((3, 4, 5, 6), dtype, dtype != torch.float32, layout, "epsilon", 50, False, "mixed")
        for layout in LAYOUTS
        for dtype in (torch.float32, torch.float16)
    ]
    few_steps = [
        ((2, 3, 5, 5), torch.float32, False, "contiguous", prediction, s, True, "last") for prediction in PREDICTIONS for s in (1, 2)
    ]
    large = [
        ((2, 4, 64, 64), torch.float16, True, "channels_last", "epsilon", 50, False, "mixed"),
        ((1, 4, 64, 64), torch.bfloat16, False, "contiguous", "v_prediction", 20, True, "last"),
        ((1, 1, 1, 16384), torch.float32, True, "contiguous", "epsilon", 50, False, "last"),
    ]
    return mixed + layouts + few_steps + large


CASE = "shape, dtype, guided, layout, prediction, num_steps, clip, which"
CASE_STRATEGIES = dict(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(FLOATS),
    guided=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    prediction=st.sampled_from(PREDICTIONS),
    num_steps=st.sampled_from((1, 2, 10, 50)),
    clip=st.booleans(),
    which=st.sampled_from(("mixed", "first", "last")),
    guidance_scale=st.floats(-2, 10, width=32),
    generator_seed=st.integers(0, 1000),
)


def table_of(prediction="epsilon", num_steps=50, clip=False) -> torch.Tensor:
    """Stable Diffusion's table."""
    scheduler = sd_scheduler(prediction_type=prediction, clip_sample=clip, clip_sample_range=0.7)
    return Schedule.of(Levels.of_steps(scheduler, num_steps), "ddim", eta=1.0, device=DEVICE).coefficients


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The tensor in a memory layout; what lies between its elements is NaN."""
    size, kind = list(tensor.shape), layout.removeprefix("channels_last ")
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    if kind == "rows of more":
        size[0], part = 2 * size[0] + 1, (slice(1, None, 2),)
    elif kind == "channels of more":
        size[1], part = size[1] + 3, (slice(None), slice(2, -1))
    else:
        return tensor
    more = tensor.new_full(size, math.nan)
    if kind != layout:
        more = more.contiguous(memory_format=torch.channels_last)
    more[part].copy_(tensor)
    return more[part]


def step_case(shape, dtype, guided, layout, prediction, num_steps, clip, which, guidance_scale=7.5, generator_seed=0) -> dict:
    """Arguments of `ddim_step`."""
    generator = torch.Generator().manual_seed(generator_seed)
    rows = shape[0]
    noise_pred = torch.randn((1 + guided) * rows, *shape[1:], generator=generator).to(DEVICE, dtype)
    latents = torch.randn(shape, generator=generator).to(DEVICE)
    steps = torch.randint(num_steps, (rows,), generator=generator)
    steps = {"mixed": steps, "first": torch.zeros_like(steps), "last": torch.full_like(steps, num_steps - 1)}[which]
    sample_ids = torch.randint(2**62, (rows,), generator=generator)
    return dict(
        noise_pred=laid_out(noise_pred, layout), latents=laid_out(latents, layout), coefficients=table_of(prediction, num_steps, clip),
        steps=steps.to(DEVICE), seed=12345 + (generator_seed << 40), sample_ids=sample_ids.to(DEVICE), guidance_scale=guidance_scale,
    )  # fmt: skip


def loss_case(shape, dtype, guided, layout, prediction, num_steps, clip, which, guidance_scale=7.5, generator_seed=0, **options) -> dict:
    """Arguments of `ppo_loss`: transitions that the policy would make, their ratios well inside or outside of the clip range."""
    step = step_case(shape, dtype, guided, layout, prediction, num_steps, clip, which, guidance_scale, generator_seed)
    generator = torch.Generator().manual_seed(generator_seed + 1)
    num_samples = (shape[0] + 1) // 2
    rows = torch.randint(num_samples, shape[:1], generator=generator).to(DEVICE)
    latents = torch.randn(num_samples, num_steps + 1, *shape[1:], generator=generator).to(DEVICE)
    old_log_probs = torch.randn(num_samples, num_steps, generator=generator).to(DEVICE)
    noise_pred, coefficients, steps = step["noise_pred"], step["coefficients"], step["steps"]
    for b in steps.argsort().tolist():  # an earlier step ends where a later one of the same sample starts
        row, step_index = rows[b], steps[b]
        mean, s, log_norm, *_ = exact_gaussian(
            noise_pred[b :: shape[0]], latents[row, step_index][None], coefficients, steps[b : b + 1], guidance_scale
        )
        x_p = mean[0] + s[0] * torch.randn(shape[1:], generator=generator).to(DEVICE)
        latents[row, step_index + 1] = x_p
        offset = (0.0, 0.03, -0.03, 0.2, -0.2)[b % 5]
        old_log_probs[row, step_index] = exact_log_prob(latents[row, step_index + 1][None], mean, s, log_norm)[0] + offset
    return dict(
        noise_pred=noise_pred, latents=latents if "channels_last" in layout else laid_out(latents, layout), old_log_probs=old_log_probs,
        advantages=torch.randn(num_samples, generator=generator).to(DEVICE), coefficients=coefficients, rows=rows, steps=steps,
        guidance_scale=guidance_scale, clip_range=0.1, weight=0.25, **options,
    )  # fmt: skip


def exact_gaussian(noise_pred, latents, coefficients, steps, guidance_scale) -> tuple[torch.Tensor, ...]:
    """In fp64: a step's mean, s, log(s sqrt(2 pi)), the size of the summands of the mean, and which elements are at x0 clipping's kink."""
    out, x = noise_pred.double(), latents.double()
    size = out.abs()
    if len(out) > len(x):
        uncond, cond = out.chunk(2)
        out, size = uncond + guidance_scale * (cond - uncond), uncond.abs() + abs(guidance_scale) * (cond.abs() + uncond.abs())
    c_x, c_out, s, log_norm, *clip = coefficients.double()[steps].T[..., None, None, None]
    mean = c_x * x + c_out * out
    if not clip:
        return mean, s, log_norm, (c_x * x).abs() + c_out.abs() * size, torch.zeros_like(mean, dtype=torch.bool)
    q_x, q_out, bound = clip
    scaled_x0 = q_x * x + q_out * out
    size = (c_x.abs() + 2 * q_x.abs()) * x.abs() + (c_out.abs() + 2 * q_out.abs()) * size
    return mean - scaled_x0 + scaled_x0.clamp(-bound, bound), s, log_norm, size, (scaled_x0.abs() - bound).abs() < 4 * EPS * (size + bound)


def exact_log_prob(next_latents, mean, s, log_norm) -> torch.Tensor:
    return -0.5 * ((next_latents.double() - mean) / s).square().flatten(1).mean(1) - log_norm.flatten()


def log_prob_rounding(log_prob, next_latents, mean, s, size) -> torch.Tensor:
    """What rounding alone may do to log p: to its sum, and through the fp32 mean, whose errors are independent across elements."""
    amplified = ((next_latents.double() - mean) / s * (size + next_latents.abs()) / s).flatten(1)
    return EPS * (log_prob.abs() + 1) + 2 * EPS * amplified.norm(dim=1) / amplified.shape[1]


def assert_accurate(what: str, actual, twin, exact, floor) -> None:
    """No row's error against fp64 is above twice that of the PyTorch twin and what rounding alone may do."""
    rows = len(floor) if floor.dim() else 1
    error, twin_error = ((value.double() - exact).abs().reshape(rows, -1).amax(1) for value in (actual, twin))
    bound = 2 * twin_error + floor.reshape(rows, -1).amax(1)
    assert actual.isfinite().all() and (error <= bound).all(), f"{what}: error {error.tolist()}, valid to {bound.tolist()}"


def gradient_of(op, arguments: dict, upstream=1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, statistics and d upstream * loss / d noise_pred."""
    noise_pred = arguments["noise_pred"].detach().requires_grad_()
    loss, statistics = op(**{**arguments, "noise_pred": noise_pred})
    (gradient,) = torch.autograd.grad(loss, noise_pred, torch.full_like(loss, upstream))
    return loss.detach(), statistics, gradient


def stored_as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As a kernel stores fp32: Triton's interpreter, unlike a GPU and torch, truncates to bf16."""
    if dtype == torch.bfloat16 and launch.interpreted():
        tensor = (tensor.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return tensor.to(dtype)


@pytest.fixture
def poison(monkeypatch):
    """The memory that kernels get is NaN, and so it must still be before and after each tensor."""
    empty, everything = torch.empty, []

    def poisoned(*args, **kwargs):
        strides = empty(*args, **{**kwargs, "device": "meta"})
        memory = empty(strides.numel() + 128, dtype=strides.dtype, device=kwargs.get("device")).fill_(math.nan)
        everything.append((memory, strides.numel()))
        return memory.as_strided(strides.shape, strides.stride(), 64)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
    monkeypatch.undo()
    assert everything
    for memory, count in everything:
        assert memory[:64].isnan().all() and memory[64 + count :].isnan().all(), "written outside of a tensor"


# ---- one denoising step


def check_step(arguments: dict, dtype=None) -> None:
    noise_pred, latents, coefficients, steps, seed, ids, guidance_scale = arguments.values()
    x_p, log_prob, unet_input = ddim_step.ddim_step(**arguments, dtype=dtype)
    twin_x_p, twin_log_prob, twin_unet_input = reference.ddim_step(**arguments, dtype=dtype)
    mean, s, log_norm, size, _ = exact_gaussian(noise_pred, latents, coefficients, steps, guidance_scale)
    noise = reference.normal_noise(seed, ids, steps, latents[0].numel()).view_as(latents).double()
    exact = mean + s * noise
    floor = 2 * EPS * (size + (s * noise).abs()) + 8 * EPS * s * (1 + noise.abs())  # see bounds.assert_same_noise
    assert_accurate("x_p", x_p, twin_x_p, exact, floor)

    log_probs = [exact_log_prob(value, mean, s, log_norm) for value in (x_p, twin_x_p)]
    rounding = log_prob_rounding(log_probs[0], x_p, mean, s, size)
    assert_accurate("log p", log_prob - log_probs[0], twin_log_prob - log_probs[1], torch.zeros_like(rounding), rounding)

    copies = len(noise_pred) // len(latents)
    coarse = floor + torch.finfo(unet_input.dtype).eps * exact.abs()
    assert_accurate("UNet input", unet_input, twin_unet_input, exact.repeat(copies, 1, 1, 1), coarse.repeat(copies, 1, 1, 1))
    assert torch.equal(unet_input, stored_as(x_p, unet_input.dtype).repeat(copies, 1, 1, 1))

    assert x_p.dtype == log_prob.dtype == torch.float32 and unet_input.dtype == (dtype or noise_pred.dtype)
    assert x_p.shape == latents.shape and log_prob.shape == steps.shape and unet_input.shape == noise_pred.shape
    for layout in (torch.contiguous_format, torch.channels_last):
        assert unet_input.is_contiguous(memory_format=layout) or not noise_pred.is_contiguous(memory_format=layout)
    assert x_p.is_contiguous()


@pytest.mark.parametrize(CASE, cases(), ids=name)
@pytest.mark.usefixtures("poison")
def test_step_against_fp64(shape, dtype, guided, layout, prediction, num_steps, clip, which):
    check_step(step_case(shape, dtype, guided, layout, prediction, num_steps, clip, which))


@given(**CASE_STRATEGIES)
@examples
@pytest.mark.usefixtures("poison")
def test_any_step_against_fp64(**case):
    check_step(step_case(**case))


@pytest.mark.parametrize("dtype, unet_dtype", list(itertools.product(FLOATS, FLOATS)), ids=name)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.usefixtures("poison")
def test_unet_input_in_another_dtype(dtype, unet_dtype, guided):
    check_step(step_case((2, 4, 3, 5), dtype, guided, "channels_last", "epsilon", 50, False, "mixed"), unet_dtype)


@pytest.mark.parametrize("layouts", [("channels_last", "contiguous"), ("contiguous", "channels_last"), ("transposed", "rows of more")])
@pytest.mark.usefixtures("poison")
def test_step_with_layouts_that_differ_and_strided_vectors(layouts):
    arguments = step_case((4, 3, 5, 7), torch.float16, True, "contiguous", "epsilon", 50, True, "mixed")
    arguments["noise_pred"], arguments["latents"] = (laid_out(arguments[k], v) for k, v in zip(("noise_pred", "latents"), layouts))
    arguments["coefficients"] = arguments["coefficients"][:, :4]
    for key in ("steps", "sample_ids"):
        arguments[key] = torch.stack([arguments[key], torch.full_like(arguments[key], -1)], 1)[:, 0]
    check_step(arguments)


@pytest.mark.rounding
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("num_steps", [7, 50])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_step_is_that_of_diffusers(prediction, num_steps, clip):
    scheduler = fp64_alphas(sd_scheduler(prediction_type=prediction, clip_sample=clip, clip_sample_range=0.7))
    coefficients = table_of(prediction, num_steps, clip)
    generator = torch.Generator().manual_seed(0)
    noise_pred, latents = torch.randn(2, num_steps, *SHAPE, generator=generator).to(DEVICE)
    steps = torch.arange(num_steps, device=DEVICE)
    x_p, *_ = ddim_step.ddim_step(noise_pred, latents, coefficients, steps, 7, steps)
    noise = reference.normal_noise(7, steps, steps, latents[0].numel()).view_as(latents).double()
    scheduler.set_timesteps(num_steps)
    for step, t in enumerate(scheduler.timesteps):
        z = noise[step].cpu()
        expected = scheduler.step(noise_pred[step].double().cpu(), t, latents[step].double().cpu(), eta=1.0, variance_noise=z).prev_sample
        torch.testing.assert_close(x_p[step].double().cpu(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_clipping_columns_are_those_of_the_alphas(prediction, clip):
    """From DDIM's equations, not from `Schedule`: x0 scaled by sqrt(a_p) and its bound."""
    alphas = fp64_alphas(sd_scheduler()).alphas_cumprod
    schedule = Schedule.of(
        Levels.of_steps(sd_scheduler(prediction_type=prediction, clip_sample=clip, clip_sample_range=0.7), 10), "ddim", eta=1.0
    )
    assert schedule.coefficients.shape == (10, 7 if clip else 4)
    for t, columns in zip(schedule.times.tolist(), schedule.coefficients[:, 4:]):
        a_t, a_p = alphas[t].item(), alphas[max(t - 100, 0)].item()
        x0_of_x, x0_of_out = {
            "epsilon": (a_t**-0.5, -(((1 - a_t) / a_t) ** 0.5)),
            "v_prediction": (a_t**0.5, -((1 - a_t) ** 0.5)),
            "sample": (0.0, 1.0),
        }[prediction]
        expected = [a_p**0.5 * x0_of_x, a_p**0.5 * x0_of_out, a_p**0.5 * 0.7]
        assert not clip or columns.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_table_of_stable_diffusion_through_the_kernel(num_steps):
    """The same noise comes out of every call, so differences between calls are the coefficients."""
    listed = [constants for constants in SD_CONSTANTS if constants[0] == num_steps]
    coefficients, steps = table_of(num_steps=num_steps), torch.tensor([row for _, row, *_ in listed], device=DEVICE)
    zero = torch.zeros(len(steps), 1, 8, 8, device=DEVICE)
    noise = reference.normal_noise(3, steps, steps, 64).double()

    def step(out, x):
        x_p, log_prob, _ = ddim_step.ddim_step(out, x, coefficients, steps, 3, steps)
        return x_p.double().flatten(1), log_prob.double()

    origin, log_prob = step(zero, zero)
    c_x, c_out = ((step(*inputs)[0] - origin).mean(1) for inputs in ((zero, zero + 1), (zero + 1, zero)))
    s = (origin * noise).sum(1) / noise.square().sum(1)
    mean_log_prob = log_prob + 0.5 * noise.square().mean(1) - 0.5
    assert listed
    for place, (_, row, _, *expected) in enumerate(listed):
        actual = [column[place].item() for column in (s, c_x, c_out, mean_log_prob)]
        assert actual == pytest.approx(expected, rel=0, abs=1e-6), f"row {row}"


# ---- noise


def noise_of(seed, ids, steps, shape) -> torch.Tensor:
    """The noise (B, N) that the kernel draws."""
    ids, steps = torch.as_tensor(ids, device=DEVICE), torch.as_tensor(steps, device=DEVICE)
    coefficients = torch.tensor([[0.0, 0.0, 1.0, 0.0]], device=DEVICE).repeat(int(steps.max()) + 1, 1)
    zero = torch.zeros(len(ids), *shape, device=DEVICE)
    x_p, log_prob, _ = ddim_step.ddim_step(zero, zero, coefficients, steps, seed, ids)
    torch.testing.assert_close(log_prob, -0.5 * x_p.square().flatten(1).mean(1), rtol=1e-6, atol=0)
    return x_p.flatten(1)


IDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 5, 2**62 + 2**33 + 9, 2**63 - 1]


@pytest.mark.rounding
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 3), (3, 5, 7), (1, 33, 63)])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1])
def test_noise_is_that_of_the_specification(seed, shape):
    steps = torch.arange(len(IDS)) * 37 % 50
    expected = reference.normal_noise(seed, torch.tensor(IDS), steps, math.prod(shape))
    bounds.assert_same_noise(noise_of(seed, IDS, steps, shape).cpu(), expected)


@given(seed=st.integers(0, 2**63 - 1), ids=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3), step=st.integers(0, 999))
@settings(examples, max_examples=20)
def test_noise_of_any_counter(seed, ids, step):
    steps = torch.full((len(ids),), step)
    expected = reference.normal_noise(seed, torch.tensor(ids), steps, 9)
    bounds.assert_same_noise(noise_of(seed, ids, steps, (1, 3, 3)).cpu(), expected)


def test_moments_of_the_noise():
    z = noise_of(7, list(range(8)), [3] * 8, (4, 64, 64)).double().flatten()
    n = len(z)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert z.pow(power).mean().item() == pytest.approx(expected, abs=5 * (variance / n) ** 0.5), f"power {power}"
    assert z.abs().max() > 4


@pytest.mark.parametrize(
    "ids, steps", [(range(16), [5] * 16), ([i << 32 for i in range(16)], [5] * 16), ([9] * 16, range(16))], ids=["ids", "distant", "steps"]
)
def test_noise_is_uncorrelated_across(ids, steps):
    z = noise_of(0, list(ids), list(steps), (4, 32, 32)).double()
    for values in (z, z.square()):  # the squares: Box-Muller pairs share a radius
        correlation = torch.corrcoef(values) - torch.eye(16, device=DEVICE)
        assert correlation.abs().max() < 5 / 4096**0.5
    assert len(z.unique()) > 0.99 * z.numel()


# ---- rows are independent of the batch


@pytest.mark.parametrize(
    "shape, clip, guided", [((64, 3, 5, 7), True, False), ((64, 3, 5, 7), False, True), ((64, 1, 33, 63), False, True)]
)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(shape, clip, guided):
    case = (shape, torch.float16, guided, "channels_last", "epsilon", 50, clip, "mixed")
    together, batch = step_case(*case), loss_case(*case)
    x_p, log_prob, unet_input = ddim_step.ddim_step(**together)
    _, statistics, gradient = gradient_of(ppo_loss.ppo_loss, batch, 1.5)
    for row in (0, 17, 63):
        branches, one = slice(row, None, 64), slice(row, row + 1)
        rows_of = {"noise_pred": branches, "latents": one, "steps": one, "sample_ids": one}
        alone = {k: v[rows_of[k]] if k in rows_of else v for k, v in together.items()}
        expected = x_p[one], log_prob[one], unet_input[branches]
        assert all(torch.equal(a, b) for a, b in zip(ddim_step.ddim_step(**alone), expected))
        alone = {**batch, "noise_pred": batch["noise_pred"][branches], "rows": batch["rows"][one], "steps": batch["steps"][one]}
        _, one_statistics, one_gradient = gradient_of(ppo_loss.ppo_loss, alone, 1.5)
        assert torch.equal(one_statistics, statistics[:, one]) and torch.equal(one_gradient, gradient[branches])


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "shape, steps, clip",
    [
        ((3, 5, 7), range(50), False),
        ((3, 5, 7), range(40, 50), True),
        ((1, 1, 1), (0, 25, 48, 49), False),
        ((4, 64, 64), (0, 25, 48, 49), False),
    ],
    ids=["odd", "odd clipped", "one", "16384"],
)
def test_ratio_of_the_policy_to_itself_is_one(dtype, guided, shape, steps, clip):
    """Stable Diffusion's steps; at step 48, t = 21, and at the last one, s is 0.04 and 0.02."""
    steps = torch.tensor(list(steps), device=DEVICE)
    count, every = len(steps), torch.arange(len(steps), device=DEVICE)
    case = step_case((count, *shape), dtype, guided, "contiguous", "epsilon", 50, clip, "mixed")
    x_p, log_prob, _ = ddim_step.ddim_step(**{**case, "steps": steps})
    latents = torch.full((count, 51, *shape), math.nan, device=DEVICE)
    latents[every, steps], latents[every, steps + 1] = case["latents"], x_p
    old = torch.full((count, 50), math.nan, device=DEVICE)
    old[every, steps] = log_prob
    _, (_, ratio, clipped, kl) = ppo_loss.ppo_loss(
        case["noise_pred"], latents, old, torch.ones(count, device=DEVICE), case["coefficients"], every, steps, 7.5
    )
    assert (ratio.double() - 1).abs().max() <= 2.4e-7
    assert not clipped.any() and kl.max() < 1e-12


# ---- the loss


def check_loss(arguments: dict, upstream: float) -> None:
    noise_pred, latents, old_log_probs, advantages, coefficients, rows, steps, *numbers = arguments.values()
    guidance_scale, clip_range, weight, score_function = (*numbers, False)[:4]
    loss, statistics, gradient = gradient_of(ppo_loss.ppo_loss, arguments, upstream)
    twin_loss, twin_statistics, twin_gradient = gradient_of(reference.ppo_loss, arguments, upstream)

    exact_noise_pred = noise_pred.double().requires_grad_()
    x_p = latents[rows, steps + 1]
    mean, s, log_norm, size, kink = exact_gaussian(exact_noise_pred, latents[rows, steps], coefficients, steps, guidance_scale)
    log_prob = exact_log_prob(x_p, mean, s, log_norm)
    advantage, old = advantages[rows].double(), old_log_probs[rows, steps].double()
    log_ratio = log_prob - old
    ratio = log_ratio.clamp(-20, 20).exp()
    surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
    losses = -advantage * log_prob if score_function else surrogate
    clipped = ((ratio - 1).abs() > clip_range).double()
    (exact_gradient,) = torch.autograd.grad(upstream * weight * losses.sum(), exact_noise_pred)
    mean, log_prob, log_ratio, ratio, losses, size = (value.detach() for value in (mean, log_prob, log_ratio, ratio, losses, size))

    rounding = log_prob_rounding(log_prob, x_p, mean, s, size) + EPS * old.abs()
    floors = (
        advantage.abs() * (ratio + 1) * rounding + 2 * EPS * losses.abs(),
        ratio * (rounding + 2 * EPS),
        torch.zeros_like(ratio),
        (log_ratio.abs() + rounding) * rounding + 2 * EPS * log_ratio.square(),
    )
    exact_statistics = (losses, ratio, clipped, 0.5 * log_ratio.square())
    for what, *values in zip(("losses", "ratio", "clipped", "kl"), statistics, twin_statistics, exact_statistics, floors):
        assert_accurate(what, *values)
    assert_accurate("loss", loss, twin_loss, weight * losses.sum(), abs(weight) * (floors[0] + 2 * EPS * losses.abs()).sum())

    copies, tiny = len(noise_pred) // len(rows), torch.finfo(noise_pred.dtype).smallest_normal * torch.finfo(noise_pred.dtype).eps
    slope = abs(upstream * weight) * advantage.abs() * (ratio if not score_function else 1)
    per_row = coefficients.double()[steps].abs()[:, [1, 5] if coefficients.shape[1] == 7 else [1]].sum(1) * max(1, abs(guidance_scale) + 1)
    difference = 2 * EPS * (size + x_p.abs()) * (slope * per_row)[:, None, None, None] / (s**2 * mean[0].numel())
    floor = difference.repeat(copies, 1, 1, 1)
    floor = floor + (2 * torch.finfo(noise_pred.dtype).eps + rounding.repeat(copies)[:, None, None, None]) * exact_gradient.abs() + tiny
    kink = kink.repeat(copies, 1, 1, 1)
    assert kink.double().mean() < 0.01 or kink.numel() < 100
    gradient, twin_gradient, exact_gradient = (g.masked_fill(kink, 0) for g in (gradient, twin_gradient, exact_gradient))
    assert_accurate("gradient", gradient, twin_gradient, exact_gradient, floor)
    assert gradient.dtype == noise_pred.dtype and gradient.shape == noise_pred.shape
    assert loss.shape == () and statistics.shape == (4, len(rows)) and not statistics.requires_grad


@pytest.mark.parametrize(CASE, cases(), ids=name)
@pytest.mark.usefixtures("poison")
def test_loss_against_fp64(shape, dtype, guided, layout, prediction, num_steps, clip, which):
    check_loss(loss_case(shape, dtype, guided, layout, prediction, num_steps, clip, which), upstream=-1.7)


@given(
    **CASE_STRATEGIES, score_function=st.booleans(), weight=st.floats(2**-10, 4, width=32), upstream=st.floats(-1e4, 1e4, width=32)
)  # fmt: skip
@examples
@pytest.mark.usefixtures("poison")
def test_any_loss_against_fp64(weight, upstream, score_function, dtype, **case):
    arguments = loss_case(dtype=dtype, **case, score_function=score_function)
    check_loss({**arguments, "weight": weight}, upstream if dtype != torch.float16 else math.copysign(1, upstream))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.usefixtures("poison")
def test_score_function_against_fp64(guided, clip):
    case = loss_case((5, 3, 5, 7), torch.float32, guided, "contiguous", "epsilon", 50, clip, "mixed", score_function=True)
    check_loss(case, upstream=2.5)


@pytest.mark.usefixtures("poison")
def test_loss_with_strided_arguments():
    case = loss_case((5, 3, 5, 7), torch.float32, True, "contiguous", "epsilon", 50, False, "mixed")
    case["coefficients"] = torch.cat([case["coefficients"], torch.full((50, 3), math.nan, device=DEVICE)], 1)[:, :4]
    for key in ("rows", "steps", "advantages"):
        case[key] = torch.stack([case[key], torch.full_like(case[key], -1)], 1)[:, 0]
    case["old_log_probs"] = case["old_log_probs"].T.contiguous().T
    check_loss(case, upstream=1.0)


@pytest.mark.parametrize("score_function", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.usefixtures("poison")
def test_transitions_of_one_sample_in_one_micro_batch(score_function, guided, clip):
    case = loss_case((7, 2, 3, 5), torch.float32, guided, "contiguous", "epsilon", 10, clip, "mixed", score_function=score_function)
    case["rows"] = torch.zeros_like(case["rows"])
    case["steps"] = torch.tensor([3, 4, 5, 3, 9, 0, 5], device=DEVICE)
    mean, s, log_norm, *_ = exact_gaussian(
        case["noise_pred"], case["latents"][case["rows"], case["steps"]], case["coefficients"], case["steps"], case["guidance_scale"]
    )
    log_prob = exact_log_prob(case["latents"][case["rows"], case["steps"] + 1], mean, s, log_norm)
    case["old_log_probs"][0, case["steps"]] = log_prob.float()  # of two transitions that share a step, one has the other's
    check_loss(case, upstream=1.0)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("score_function", [False, True])
def test_gradient_of_the_reference_by_finite_differences(clip, guided, score_function):
    case = loss_case((3, 2, 2, 3), torch.float32, guided, "contiguous", "epsilon", 10, clip, "mixed", score_function=score_function)
    case = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()}
    if clip:
        q_x, q_out, bound = case["coefficients"][case["steps"]].T[4:, :, None, None, None]
        out = reference.guide(case["noise_pred"], 3, 7.5)
        scaled_x0 = q_x * case["latents"][case["rows"], case["steps"]] + q_out * out
        inside = scaled_x0.abs() < bound
        assert ((scaled_x0.abs() - bound).abs() > 1e-3).all() and inside.any() and not inside.all()
    noise_pred = case.pop("noise_pred").requires_grad_()
    assert torch.autograd.gradcheck(lambda out: reference.ppo_loss(out, **case)[0], noise_pred)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 5, 7), (2, 4, 64, 64)], ids=name)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("score_function", [False, True])
def test_gradient_is_autograds_through_the_unfused_expression(shape, guided, clip, score_function):
    """Early steps: at the last ones, s = 0.02, the rounding of the fp32 mean alone is above 1e-6 of x_p - mean, fused or not."""
    case = loss_case(shape, torch.float32, guided, "contiguous", "epsilon", 10, clip, "first", 2.0, score_function=score_function)
    case["clip_range"] = 0.5
    _, _, gradient = gradient_of(ppo_loss.ppo_loss, case, 1.3)
    _, _, expected = gradient_of(reference.ppo_loss, case, 1.3)
    assert (gradient - expected).norm() <= 1e-6 * expected.norm() and expected.norm() > 0


def scalar_case(log_ratio, advantages, clip_range, **options) -> dict:
    """Transitions with log p = 0 and d log p / d out = 1 exactly: one element, x_p - mean = s = 1."""
    log_ratio, advantages = torch.as_tensor(log_ratio), torch.as_tensor(advantages)
    count = len(log_ratio)
    return dict(
        noise_pred=torch.zeros(count, 1, 1, 1, device=DEVICE), latents=torch.ones(count, 2, 1, 1, 1, device=DEVICE),
        old_log_probs=-log_ratio.float()[:, None].to(DEVICE), advantages=advantages.float().to(DEVICE),
        coefficients=torch.tensor([[0.0, 1.0, 1.0, -0.5]], device=DEVICE), rows=torch.arange(count, device=DEVICE),
        steps=torch.zeros(count, dtype=torch.int64, device=DEVICE), clip_range=clip_range, **options,
    )  # fmt: skip


@pytest.mark.parametrize("clip_range", [1e-4, 1e-2, 0.2])
def test_gradient_is_zero_exactly_where_the_surrogate_is_clipped(clip_range):
    low, high = math.log(1 - clip_range), math.log(1 + clip_range)
    # exp within 4 units in the last place, as vector libraries promise, and a product
    log_ratio = [high * 1.01, high * 0.99, low * 1.01, low * 0.99, high * 3, low * 3, 0.0] * 3
    advantages = [2.0] * 7 + [-2.0] * 7 + [0.0] * 7
    loss, statistics, gradient = gradient_of(ppo_loss.ppo_loss, scalar_case(log_ratio, advantages, clip_range, weight=0.5), 3.0)
    flat = [True, False, False, False, True, False, False] + [False, False, True, False, False, True, False] + [True] * 7
    assert (gradient.flatten() == 0).tolist() == flat
    assert statistics[2].tolist() == [1, 0, 1, 0, 1, 1, 0] * 3
    for a, expected_log_ratio, zero, rho, slope in zip(advantages, log_ratio, flat, statistics[1].tolist(), gradient.flatten().tolist()):
        assert rho == pytest.approx(math.exp(expected_log_ratio), rel=5 * EPS)
        assert slope == pytest.approx(0 if zero else 1.5 * -a * math.exp(expected_log_ratio), rel=5 * EPS)
    bounded = [min(max(math.exp(value), 1 - clip_range), 1 + clip_range) for value in log_ratio]
    expected = [max(-a * math.exp(value), -a * b) for a, value, b in zip(advantages, log_ratio, bounded)]
    assert statistics[0].tolist() == pytest.approx(expected, rel=5 * EPS) and loss.item() == pytest.approx(0.5 * sum(expected), abs=1e-5)


@pytest.mark.parametrize("log_ratio", [0.25, -0.25, 0.0])
def test_a_ratio_on_the_boundary_of_the_clip_range_is_not_clipped(log_ratio):
    ratio = ppo_loss.ppo_loss(**scalar_case([log_ratio], [1.0], 0.5))[1][1].item()
    _, statistics, gradient = gradient_of(ppo_loss.ppo_loss, scalar_case([log_ratio] * 2, [1.0, -1.0], abs(ratio - 1)))
    assert gradient.flatten().tolist() == [-ratio, ratio] and statistics[2].tolist() == [0, 0]


@pytest.mark.parametrize("score_function", [False, True])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_huge_and_tiny_ratios_are_finite(score_function, advantage):
    log_ratio = [1e4, -1e4, 20.5, -20.5, 88.0, -104.0]
    case = scalar_case(log_ratio, [advantage] * 6, 0.2, score_function=score_function)
    loss, statistics, gradient = gradient_of(ppo_loss.ppo_loss, case)
    twin_loss, twin_statistics, twin_gradient = gradient_of(reference.ppo_loss, case)
    assert all(value.isfinite().all() for value in (loss, statistics, gradient))
    assert gradient.flatten().tolist() == ([-advantage] * 6 if score_function else [0] * 6)
    torch.testing.assert_close((loss, statistics, gradient), (twin_loss, twin_statistics, twin_gradient), rtol=4e-6, atol=0)
    assert statistics[1].tolist() == pytest.approx([math.exp(math.copysign(20, value)) for value in log_ratio], rel=4e-6)


@pytest.mark.parametrize("old", [1e4, -1e4])
@pytest.mark.parametrize("guided", [False, True])
def test_old_log_probs_far_away_are_finite(old, guided):
    case = loss_case((3, 4, 5, 7), torch.float16, guided, "contiguous", "epsilon", 50, False, "mixed")
    case["old_log_probs"] += old
    loss, statistics, gradient = gradient_of(ppo_loss.ppo_loss, case)
    assert loss.isfinite() and statistics.isfinite().all() and not gradient.any()


@pytest.mark.parametrize("score_function", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_a_nan_stays_in_its_row(score_function, guided, clip):
    case = loss_case((4, 3, 5, 7), torch.float16, guided, "contiguous", "epsilon", 50, clip, "mixed", score_function=score_function)
    _, clean_statistics, clean_gradient = gradient_of(ppo_loss.ppo_loss, case)
    case["noise_pred"][2, 1, 2, 3] = math.nan
    loss, statistics, gradient = gradient_of(ppo_loss.ppo_loss, case)
    others = torch.tensor([0, 1, 3], device=DEVICE)
    assert loss.isnan() and statistics[[0, 1, 3], 2].isnan().all() and torch.equal(statistics[:, others], clean_statistics[:, others])
    wrong = gradient.isnan().flatten(1).any(1)
    assert wrong.tolist() == [row % 4 == 2 for row in range(len(gradient))] and torch.equal(gradient[~wrong], clean_gradient[~wrong])


def test_a_nan_in_the_step_stays_in_its_row():
    case = step_case((4, 3, 5, 7), torch.float16, True, "contiguous", "epsilon", 50, True, "mixed")
    clean = ddim_step.ddim_step(**case)
    case["noise_pred"][6, 1, 2, 3] = math.nan
    x_p, log_prob, unet_input = ddim_step.ddim_step(**case)
    assert log_prob.isnan().tolist() == [False, False, True, False]
    for value, expected, wrong in ((x_p, clean[0], 1), (log_prob, clean[1], 1), (unet_input, clean[2], 2)):
        assert value.isnan().sum() == wrong and torch.equal(value[~value.isnan()], expected[~value.isnan()])


# ---- torch.library and torch.compile


def step_operands(**changes) -> tuple:
    case = step_case(
        **{**dict(shape=(3, 4, 5, 7), dtype=torch.float16, guided=True, layout="contiguous", prediction="epsilon", num_steps=10,
                  clip=False, which="mixed"), **changes}
    )  # fmt: skip
    return (*case.values(), torch.float16)


def loss_operands(requires_grad=False, score_function=False, **changes) -> tuple:
    case = loss_case(
        **{**dict(shape=(3, 4, 5, 7), dtype=torch.float32, guided=True, layout="contiguous", prediction="epsilon", num_steps=10,
                  clip=False, which="mixed"), **changes}
    )  # fmt: skip
    case["noise_pred"].requires_grad_(requires_grad)
    return (*case.values(), score_function)


torch_warns_of_itself = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
"""For opcheck under torch 2.15, which reads `.grad` of its own tensors in test_aot_dispatch_dynamic."""

VARIATIONS = [
    dict(),
    dict(guided=False, clip=True),
    dict(layout="channels_last"),
    dict(layout="transposed"),
    dict(shape=(1, 1, 1, 1), guided=False),
]


@torch_warns_of_itself
@pytest.mark.parametrize("changes", VARIATIONS, ids=name)
def test_opcheck_of_the_step(changes):
    torch.library.opcheck(torch.ops.ddpo_fast.ddim_step.default, step_operands(**changes))


@torch_warns_of_itself
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("changes", VARIATIONS, ids=name)
def test_opcheck_of_the_loss(changes, requires_grad):
    torch.library.opcheck(torch.ops.ddpo_fast.ppo_loss.default, loss_operands(requires_grad, **changes))


@torch_warns_of_itself
@pytest.mark.parametrize("changes", VARIATIONS, ids=name)
def test_opcheck_of_the_backward_of_the_loss(changes):
    noise_pred, latents, _, _, coefficients, rows, steps, guidance_scale, *_ = loss_operands(**changes)
    slopes = torch.randn(len(rows), device=DEVICE)
    upstream = torch.tensor(1.5, device=DEVICE)
    torch.library.opcheck(
        torch.ops.ddpo_fast.ppo_loss_backward.default, (upstream, slopes, noise_pred, latents, coefficients, rows, steps, guidance_scale)
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("guided", [False, True])
def test_compiled_is_eager(guided, layout):
    torch._dynamo.reset()
    case = ((3, 4, 5, 7), torch.float16, guided, layout, "epsilon", 10, True, "mixed")
    step, loss = step_case(*case), loss_case(*case)

    def surrounded(noise_pred, **others):
        value, statistics = ppo_loss.ppo_loss(noise_pred * 1.001, **others)
        return value * 3, statistics

    for _ in range(2):
        compiled = torch.compile(ddim_step.ddim_step, fullgraph=True, backend="aot_eager", dynamic=False)
        results, expected = compiled(**step), ddim_step.ddim_step(**step)
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(results, expected))
        compiled = torch.compile(surrounded, fullgraph=True, backend="aot_eager", dynamic=False)
        assert all(torch.equal(a, b) for a, b in zip(gradient_of(compiled, loss), gradient_of(surrounded, loss)))
        assert gradient_of(compiled, loss)[2].any()


def test_number_of_launches():
    step = step_case((3, 4, 64, 64), torch.float16, True, "channels_last", "epsilon", 50, True, "mixed")
    loss = loss_case((3, 4, 8, 8), torch.float16, True, "channels_last", "epsilon", 50, True, "mixed")
    with launch.record_launches() as launches:
        ddim_step.ddim_step(**step)
    assert len(launches) == 1
    loss["noise_pred"].requires_grad_()
    with launch.record_launches() as launches:
        value, _ = ppo_loss.ppo_loss(**loss)
        assert len(launches) == 1
        value.backward()
    assert len(launches) == 2
    with launch.record_launches() as launches:
        ppo_loss.ppo_loss(**{**loss, "noise_pred": loss["noise_pred"].detach()})
    assert len(launches) == 1


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_replayed_cuda_graph_is_eager():
    case = ((3, 4, 64, 64), torch.float16, True, "channels_last", "epsilon", 50, True, "mixed")
    step, loss = step_case(*case), loss_case(*case)

    def both():
        return *ddim_step.ddim_step(**step), *gradient_of(ppo_loss.ppo_loss, loss)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for generator_seed in (1, 2, 3):
        for arguments, new in ((step, step_case(*case, 7.5, generator_seed)), (loss, loss_case(*case, 7.5, generator_seed))):
            for key, value in new.items():
                if isinstance(value, torch.Tensor):
                    arguments[key].copy_(value)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, both()))


# ---- what is refused


def valid_arguments() -> tuple[dict, dict]:
    """Of `ddim_step` and of `ppo_loss`, on the CPU, where values are looked at too."""
    latents, table, index = torch.randn(2, 3, 4, 5), table_of(num_steps=5).cpu(), torch.tensor([0, 4])
    step = dict(noise_pred=latents.clone(), latents=latents, coefficients=table, steps=index, seed=0, sample_ids=index)
    loss = dict(
        noise_pred=latents.clone(), latents=torch.randn(3, 6, 3, 4, 5), old_log_probs=torch.zeros(3, 5), advantages=torch.ones(3),
        coefficients=table, rows=torch.tensor([2, 0]), steps=index,
    )  # fmt: skip
    return step, loss


def without_density(table: torch.Tensor) -> torch.Tensor:
    table = table.clone()
    table[4, 2] = 0.0
    return table


TABLES = [lambda t: t[:, :3], lambda t: t[:0], lambda t: t[0], lambda t: t.repeat(1, 2), torch.Tensor.double, torch.Tensor.half]
PREDICTED = [lambda t: t[:1], lambda t: t.repeat(3, 1, 1, 1), lambda t: t[:, :2], lambda t: t[0], torch.Tensor.long]
INDICES = [lambda t: t[:1], lambda t: t[:, None], torch.Tensor.int, torch.Tensor.float]
REFUSED_STEPS = {
    "noise_pred": [*PREDICTED, lambda t: t.mT],
    "latents": [lambda t: t[0], lambda t: t[:0], lambda t: t[..., :0], torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.long],
    "coefficients": [*TABLES, torch.Tensor.neg, lambda t: t * math.nan],
    "steps": [*INDICES, lambda t: t - 1, lambda t: t + 1, lambda t: t + 2**40],
    "seed": [lambda seed: seed - 1, lambda seed: seed + 2**63],
    "sample_ids": INDICES,
}
REFUSED_LOSSES = {
    "noise_pred": PREDICTED,
    "latents": [lambda t: t[0], lambda t: t[:0], lambda t: t[:, :1], lambda t: t[..., :0], torch.Tensor.half],
    "old_log_probs": [lambda t: t[:2], lambda t: t[:, :4], lambda t: t[0], torch.Tensor.double, torch.Tensor.half],
    "advantages": [lambda t: t[:2], lambda t: t[:, None], torch.Tensor.double, torch.Tensor.half],
    "coefficients": [*TABLES, lambda t: t[:4], without_density, lambda t: t * math.nan],
    "rows": [lambda t: t[:0], lambda t: t[:, None], torch.Tensor.int, lambda t: t + 1, lambda t: t - 1, lambda t: t + 2**40],
    "steps": [*INDICES, lambda t: t - 1, lambda t: t + 1],
}


@every_backend
@pytest.mark.parametrize(
    "which, argument, change",
    [(which, k, f) for which, table in enumerate((REFUSED_STEPS, REFUSED_LOSSES)) for k, changes in table.items() for f in changes],
)
def test_an_argument_that_does_not_fit_is_named(backend, which, argument, change):
    arguments = valid_arguments()[which]
    arguments[argument] = change(arguments[argument])
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        backend[which](**arguments)


@every_backend
@pytest.mark.parametrize("which", [0, 1])
def test_arguments_on_another_device_are_named(backend, which):
    tensors = [key for key, value in valid_arguments()[which].items() if isinstance(value, torch.Tensor)]
    for argument in tensors:
        arguments = valid_arguments()[which]
        arguments[argument] = arguments[argument].to("meta")
        with pytest.raises(ValueError, match=rf"\b{argument}\b.* on "):
            backend[which](**arguments)


@every_backend
@pytest.mark.parametrize("which", [0, 1])
def test_the_valid_arguments_are_valid(backend, which):
    if DEVICE == "cuda":
        pytest.skip("kernels do not run on a CPU here")
    assert all(value.isfinite().all() for value in backend[which](**valid_arguments()[which]))


@pytest.mark.parametrize("wrong", [-1, 50, 2**32, 2**40 + 3, -(2**40)])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.usefixtures("poison")
def test_a_step_that_the_table_does_not_have_gives_nan_in_its_row_alone(monkeypatch, wrong, clip):
    """As on a GPU, where values are not looked at."""
    for module in (ddim_step, ppo_loss):
        monkeypatch.setattr(module, "check_values", lambda *args, **kwargs: None)
    case = ((4, 3, 5, 7), torch.float16, True, "contiguous", "epsilon", 50, clip, "mixed")
    step, loss = step_case(*case), loss_case(*case)
    others = torch.tensor([0, 1, 3], device=DEVICE)
    x_p, log_prob, unet_input = ddim_step.ddim_step(**step)
    _, statistics, gradient = gradient_of(ppo_loss.ppo_loss, loss)
    changed = step["steps"].clone()
    changed[2] = wrong
    wrong_x_p, wrong_log_prob, wrong_unet_input = ddim_step.ddim_step(**{**step, "steps": changed})
    assert wrong_log_prob[2].isnan() and wrong_x_p[2].isnan().all()
    assert torch.equal(wrong_log_prob[others], log_prob[others]) and torch.equal(wrong_x_p[others], x_p[others])
    for branch in (0, 4):
        assert torch.equal(wrong_unet_input[branch + others], unet_input[branch + others])
    wrongs = [{"steps": changed}]
    if not 0 <= wrong < len(loss["latents"]):
        wrongs.append({"rows": torch.where(torch.arange(4, device=DEVICE) == 2, wrong, loss["rows"])})
    for index in wrongs:
        wrong_loss, wrong_statistics, wrong_gradient = gradient_of(ppo_loss.ppo_loss, {**loss, **index})
        assert wrong_loss.isnan() and wrong_statistics[[0, 1, 3], 2].isnan().all()
        assert torch.equal(wrong_statistics[:, others], statistics[:, others])
        assert wrong_gradient[2].isnan().all() and torch.equal(wrong_gradient[others], gradient[others])


@every_backend
@pytest.mark.parametrize("clip", [False, True])
def test_a_step_without_noise_is_its_mean_and_no_loss(backend, monkeypatch, clip):
    """Its log p is 0, and its row in the loss NaN, where values are not looked at; the other rows stay as they are."""
    for module in (reference, ppo_loss):
        monkeypatch.setattr(module, "check_values", lambda *args, **kwargs: None)
    case = ((4, 3, 5, 7), torch.float32, True, "contiguous", "epsilon", 50, clip, "mixed")
    step, loss = step_case(*case), loss_case(*case)
    none = torch.tensor([1, 3], device=DEVICE)
    others = (step["steps"][:, None] != step["steps"][none]).all(1)
    assert others.any()
    still = step["coefficients"].clone()
    still[step["steps"][none], 2:4] = 0.0
    x_p, log_prob, unet_input = backend[0](**{**step, "coefficients": still})
    before = backend[0](**step)
    mean, *_ = exact_gaussian(step["noise_pred"], step["latents"], still, step["steps"], 7.5)
    torch.testing.assert_close(x_p[none].double(), mean[none], rtol=1e-5, atol=1e-5)
    assert (log_prob[none] == 0).all() and torch.equal(unet_input[none], x_p[none])
    assert torch.equal(x_p[others], before[0][others]) and torch.equal(log_prob[others], before[1][others])
    _, statistics, gradient = gradient_of(backend[1], loss)
    wrong_loss, wrong_statistics, wrong_gradient = gradient_of(backend[1], {**loss, "coefficients": still})
    assert wrong_loss.isnan() and wrong_statistics[[0, 1, 3]][:, none].isnan().all() and wrong_gradient[none].isnan().all()
    assert torch.equal(wrong_statistics[:, others], statistics[:, others]) and torch.equal(wrong_gradient[:4][others], gradient[:4][others])


@every_backend
@pytest.mark.parametrize("shape", [(4, 105), (4, 15, 7), (4, 3, 1, 5, 7)])
def test_latents_of_any_shape(backend, shape):
    """As transformers have them: tokens (B, L, C), or pictures with a frame. The same numbers in another shape have the same bits."""
    case = ((4, 3, 5, 7), torch.float32, True, "contiguous", "epsilon", 50, False, "mixed")
    step, loss = step_case(*case), loss_case(*case)
    reshaped = {**step, "noise_pred": step["noise_pred"].reshape(8, *shape[1:]), "latents": step["latents"].reshape(shape)}
    for found, expected in zip(backend[0](**reshaped), backend[0](**step)):
        assert found.shape == (expected.shape if expected.dim() == 1 else (len(expected), *shape[1:]))
        assert torch.equal(found.flatten(), expected.flatten())
    reshaped = {**loss, "noise_pred": reshaped["noise_pred"], "latents": loss["latents"].reshape(*loss["latents"].shape[:2], *shape[1:])}
    for found, expected in zip(gradient_of(backend[1], reshaped), gradient_of(backend[1], loss)):
        assert torch.equal(found.flatten(), expected.flatten())


def test_kernels_after_a_wrong_step_are_right_again():
    """The counters that programs meet at are left at zero."""
    case = step_case((2, 2, 33, 33), torch.float32, False, "contiguous", "epsilon", 50, False, "mixed")
    loss = loss_case((2, 2, 33, 33), torch.float32, False, "contiguous", "epsilon", 50, False, "mixed")
    first = *ddim_step.ddim_step(**case), *gradient_of(ppo_loss.ppo_loss, loss)
    again = *ddim_step.ddim_step(**case), *gradient_of(ppo_loss.ppo_loss, loss)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not launch.counters(16, case["latents"].device).any()


# ---- which implementation runs


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_unknown_backend_is_refused(device):
    with pytest.raises(ValueError, match="kernels.backend=nonsense: valid is auto, triton or reference"):
        kernels.select("nonsense", torch.device(device))


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="kernels.backend=triton: .*TRITON_INTERPRET"):
        kernels.select("triton", torch.device("cpu"))


@pytest.mark.parametrize(
    "backend, device, selected",
    [("auto", "cpu", "reference"), ("auto", "cuda", "triton"), ("reference", "cpu", "reference"), ("reference", "cuda", "reference")],
)
def test_selected_backend(backend, device, selected):
    operations = kernels.select(backend, torch.device(device))
    expected = reference if selected == "reference" else None
    assert operations.backend == selected
    assert operations.ddim_step is (expected or ddim_step).ddim_step and operations.ppo_loss is (expected or ppo_loss).ppo_loss


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is for machines without a GPU")
def test_triton_is_selected_in_its_interpreter():
    assert kernels.select("triton", torch.device("cpu")).backend == "triton"


@pytest.mark.parametrize("which, op", [(0, ddim_step.ddim_step), (1, ppo_loss.ppo_loss)])
def test_fp64_is_for_the_twins_alone(which, op):
    arguments = valid_arguments()[which]
    floats = {key: value.double() for key, value in arguments.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}
    with pytest.raises(ValueError, match="latents: dtype torch.float64; valid in Triton is torch.float32"):
        op(**arguments | floats)
