"""How far rounding alone may take two results of one calculation apart. Every bound follows from dtype, shapes and schedule.

Equal bits are promised for the same shapes, the same code, the same number of threads and the same machine. A call with other rows,
another instruction set or another order of summation rounds differently. The derivation, for a network of L layers that sum K_l products:

1. One rounding is off by 0.2 eps of its result in root mean square (rms): it is uniform within eps / 2 of a mantissa between 1 and 2.
2. A sum of K terms of random signs, one after the other (no order is worse), is off by 0.2 eps sqrt(K / 2) of the result's rms: partial
   sum j has sqrt(j / K) of it. Rounding a layer's result adds 0.2 eps.
3. Layers pass on the relative error that they are given (they are normalised, residual ones) and round independently (Higham and Mary
   2019, SIAM J. Sci. Comput. 41). Two calls round twice. So two outputs differ by
       delta = 0.2 eps sqrt(2 sum_l (K_l / 2 + 1))
   of the output's rms. In fp16 and bf16 sums are fp32, but inputs, weights and outputs are rounded: 0.2 eps sqrt(3 L).
4. Guidance g makes a = |g| + |g - 1| of it. Outputs are about as large as noise, 1. Latents have rms X_k, which the table gives.
5. log p is a mean of -z^2 / 2 with z = (x_p - c_x x_t - c_out out) / s over N elements. Rounding moves every z by eta in rms:
       eta_k = w_k a delta + 0.2 eps (|c_x| X_k + |c_out| a + X_{k+1}) / s_k,  w_k = |c_out| / s_k
   The first part is the network's, the second that of the mean in fp32. s is smallest, and w largest, at the end.
6. What moves out at step k was computed before z_k was drawn, so mean(z eta) is 0 within eta / sqrt(N); five of these are exceeded with
   probability 6e-7 a transition. log p itself is an fp32 number, whose mean of N terms is off by 0.2 eps sqrt(N / 2) / 2:
       |ratio - 1| <= exp(5 eta / sqrt(N) + eta^2 / 2 + eps (|log p| + 1 + 0.1 sqrt(N / 2))) - 1
7. A weight's gradient is the product of what came in and what comes back. It is off by delta five times: in what came in, in what the
   loss makes of the output, in the derivatives at layers' inputs, in the products on the way back, and in the sum over rows. What the
   loss makes of the output is d log p / d out = z c_out / (s N), with eta in z; together eta + 5 delta, relative, in 2-norm.
8. A reward that is the difference of two means of pixels is off by no more than twice the pixels' rms error. A file's size is not such a
   reward: it jumps. Advantages are rewards over their standard deviation, so they, and the gradient, are off by that over it.
9. Adam divides by the gradient's size, so that little more than its sign counts. The signs of two Gaussians, one of which is the other
   and an error of the relative size r, differ with probability arctan(r) / pi; each such weight is off by twice the learning rate.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ddpo_fast.assemble import find
from ddpo_fast.config.command_line import parse
from ddpo_fast.config.options import Config
from ddpo_fast.pipelines.folders import Model
from ddpo_fast.pipelines.model_parts import latent_size
from ddpo_fast.pipelines.skeleton import on_meta
from ddpo_fast.pipelines.template import Asked
from ddpo_fast.schedule import Levels, Schedule, Window

SIGMAS = 5
BACKWARD = 5
"""Deltas in a gradient, see 7."""
HALF = (torch.float16, torch.bfloat16)


def assert_same_noise(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Box-Muller of the same words: a logarithm, halved by the square root, and a cosine within 4 units in the last place each, which is
    what vector libraries promise; an angle of at most pi / 4 rounded twice, times a radius of at most 5.7."""
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(actual, expected, rtol=8 * eps, atol=8 * eps)


def network_rounding(network: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    """delta, see 3: how far two calls' outputs are apart, both rms, relative. `network` may be on the meta device."""
    eps = torch.finfo(dtype).eps
    terms = [layer.weight[0].numel() for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d)]
    if dtype in HALF:
        return 0.2 * eps * math.sqrt(3 * len(terms))
    return 0.2 * eps * math.sqrt(2 * sum(count / 2 + 1 for count in terms))


def assert_same_output(actual: torch.Tensor, expected: torch.Tensor, network: nn.Module) -> None:
    """Two calls of `network`, or of one that computes the same in another order: every element is within SIGMAS deltas."""
    size = expected.double().square().mean().sqrt().item()
    bound = SIGMAS * network_rounding(network, expected.dtype) * size
    assert actual.shape == expected.shape and (actual.double() - expected.double()).abs().max() <= bound


def assert_same_network(results: list[torch.Tensor], expected: list[torch.Tensor], network: nn.Module) -> None:
    """Outputs, which come first, and gradients of `network` by two ways to compute it.

    All gradients joined, because those of layers that hardly matter are differences of others.
    """
    assert [result is None for result in results] == [exact is None for exact in expected]
    (output, *results), (exact, *expected) = ([tensor for tensor in tensors if tensor is not None] for tensors in (results, expected))
    assert_same_output(output, exact, network)
    assert [result.shape for result in results] == [exact.shape for exact in expected]
    ours, exact = (torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (results, expected))
    assert (ours - exact).norm() <= BACKWARD * network_rounding(network, output.dtype) * exact.norm() and exact.norm() > 0


def turned(gradient: float) -> float:
    """How far a step of Adam by a gradient that is off by `gradient` is off, in 2-norm, relative, see 9."""
    return 2 * math.sqrt(gradient / math.pi)


@dataclass(frozen=True)
class Rounding:
    """What rounding may do to a run, of the options `of` reads."""

    eps: float
    network: float
    """delta of the network."""
    decoder: float
    """delta of the VAE's decoder."""
    eta: float
    """Largest of all steps."""
    log_prob: float
    """Largest |log p| of all steps."""
    num_elements: int
    latents: float
    """Error of the final latents, of samples or of evaluation pictures, relative, rms."""
    rate: float
    """Of all Adam's updates together: the learning rate times their number."""

    @property
    def ratio(self) -> float:
        """Of |ratio - 1| before an update."""
        root = math.sqrt(self.num_elements)
        rounding = self.eps * (self.log_prob + 1 + 0.1 * root / math.sqrt(2))
        return math.expm1(SIGMAS * self.eta / root + self.eta**2 / 2 + rounding)

    @property
    def gradient(self) -> float:
        """Of a gradient, in 2-norm, relative."""
        return self.eta + BACKWARD * self.network

    @property
    def picture(self) -> float:
        """Of any element of a picture in [0, 1], which is at most 1/2 from grey."""
        return SIGMAS * (self.latents + self.decoder) / 2

    @property
    def reward(self) -> float:
        """Of a difference of two means of pixels, see 8."""
        return self.latents + self.decoder

    def learned(self, reward_std: float) -> float:
        """Of a gradient whose advantages are of rewards that were rounded, too, in 2-norm, relative."""
        return self.gradient + 2 * self.reward / reward_std

    def grad_norm(self, num_transitions: int) -> float:
        """Of a gradient's norm, relative. What is orthogonal to the gradient counts by its square."""
        return SIGMAS * self.gradient / math.sqrt(self.num_elements * num_transitions) + self.gradient**2 / 2

    def weights(self, count: int, gradient: float) -> float:
        """Of `count` weights after all of Adam's updates by gradients that are off by `gradient`, in 2-norm, absolute, see 9."""
        return turned(gradient) * self.rate * math.sqrt(count)


def moved(run_dir: Path) -> float:
    """How far a run has moved its LoRA's B from where they began, 0, in 2-norm: what a bound on weights must be well below."""
    tensors = load_file(run_dir / "lora" / "pytorch_lora_weights.safetensors")
    return torch.cat([tensor.flatten() for name, tensor in tensors.items() if "lora_B" in name]).norm().item()


def _of_steps(schedule: Schedule, g: float, delta: float, eps: float) -> tuple[float, float, float]:
    """Of the steps with a density the largest eta and the largest |log p|, 0 without any; of the final latents the relative error.

    g: of guidance, see 4; 1 without an unconditional branch.
    """
    table = schedule.coefficients.double().abs()
    a = 1 if g == 1 else abs(g) + abs(g - 1)
    eta, size, error = 0.0, 1.0, 0.0
    for c_x, c_out, s in table[:, :3].tolist():
        next_size = math.hypot(c_x * size, c_out, s)
        mean = 0.2 * eps * (c_x * size + c_out * a + next_size)
        error = c_x * error + c_out * a * delta + mean
        eta = max(eta, (c_out * a * delta + mean) / s if s > 0 else 0.0)
        size = next_size
    return eta, max((table[schedule.trained, 3] + 0.5).tolist(), default=0.0), error / size


def _guidance_and_levels(options, model: Model) -> tuple[float, Levels]:
    """Of the pictures that `options`, config.sample or config.evaluation, ask for."""
    if model.family.process == "diffusion":
        return options.guidance_scale, Levels.of_steps(model.scheduler, options.num_steps)
    recording = model.record(Asked.of(options))
    return recording.guidance_scale, Levels.of(recording, model.scheduler)


def of(config: Config, dtype: torch.dtype = torch.float32) -> Rounding:
    """What rounding in `dtype` may do to a run with these options. Its model is a folder."""
    model, train, seed = find(config), config.train, config.run.seed
    network, vae = (on_meta(model.classes[part], model.configs[part]) for part in (model.family.network, "vae"))
    accumulated = torch.finfo(torch.float32 if dtype in HALF else dtype).eps
    delta = network_rounding(network, dtype)

    def of_steps(options, iterations: range) -> list[tuple[float, float, float]]:
        guidance, levels = _guidance_and_levels(options, model)
        window = Window.of(options.window, options.num_steps)
        tables = [Schedule.of(levels, options.sampler, options.eta, guidance, window.steps(seed, iteration)) for iteration in iterations]
        return [_of_steps(table, guidance, delta, accumulated) for table in tables]

    etas, log_probs, latents = zip(*of_steps(config.sample, range(1, 1 + (config.run.iterations if config.sample.window else 1))))
    ((*_, evaluated),) = of_steps(config.evaluation, range(1, 2))
    flow = model.family.process == "flow"
    shape = model.record(Asked.of(config.sample)).shape if flow else (network.config.in_channels, *latent_size(model.configs["unet"]))
    updates = config.run.iterations * train.num_minibatches * train.inner_epochs
    return Rounding(
        eps=accumulated, network=delta, decoder=network_rounding(vae.decoder, dtype), eta=max(etas),
        log_prob=max(log_probs), latents=max(*latents, evaluated), rate=train.learning_rate * updates,
        num_elements=math.prod(shape),
    )  # fmt: skip


def of_run(run_dir: Path, dtype: torch.dtype = torch.float32) -> Rounding:
    """What rounding in `dtype` may do to the run of this directory."""
    return of(parse([f"--config={run_dir / 'config.yaml'}", f"--run.dir={run_dir}-bounds"]), dtype)
