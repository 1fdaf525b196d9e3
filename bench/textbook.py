"""The plain loops that others run, one timestep at a time, eager, on diffusers' modules as they are loaded.

`TextbookLoop` is DDPO on a UNet. It follows the structure of the authors' PyTorch port (kvablack/ddpo-pytorch): host-side step constants,
every latent stored twice, a forward and backward for each timestep of each batch. `FlowGRPOLoop` is Flow-GRPO on a Stable Diffusion 3. Its
public code (yifan123/flow_grpo) has the same structure. They are the baselines that ours should beat in speed. They use none of ddpo_fast's
steps and losses, so they are also the oracles that ours must agree with. Shape letters: B samples, S steps, of which K are trained, (C, H,
W) a sample's latents, L tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, pstdev

import torch
from torch import Tensor, nn

Texts = tuple[Tensor, ...]
"""What the network is given of B prompts, (B, ...) each."""


@dataclass
class Trajectories:
    """What a rollout leaves for the update."""

    latents: Tensor
    """(B, K, C, H, W) before each trained step."""
    next_latents: Tensor
    """(B, K, C, H, W) after each trained step."""
    log_probs: Tensor
    """(B, K)."""
    texts: Texts

    @classmethod
    def cat(cls, parts: list["Trajectories"]) -> "Trajectories":
        """The trajectories of several batches as one."""
        texts = tuple(map(torch.cat, zip(*(part.texts for part in parts))))
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "next_latents", "log_probs")), texts)


class Loop:
    """Sampling and PPO loss of a pipeline, step by step, with classifier-free guidance by a doubled batch.

    Output: o = o_uncond + w (o_cond - o_uncond). The log-prob is the mean over a latent's elements.
    """

    num_trained: int
    """K: the first steps are trained, those after them have no noise."""

    def __init__(self, pipe, network: nn.Module, num_steps: int, guidance_scale: float):
        self.pipe, self.network, self.guidance_scale = pipe, network, guidance_scale
        pipe.scheduler.set_timesteps(num_steps)
        self.timesteps = pipe.scheduler.timesteps.to(pipe.device)
        self.shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)

    def encode(self, prompts: list[str]) -> Texts:
        """What the network is given of the prompts."""
        raise NotImplementedError

    def call(self, latents: Tensor, timestep: Tensor, texts: Texts) -> Tensor:
        """The network's output (B, C, H, W)."""
        raise NotImplementedError

    def gaussian(self, output: Tensor, step: int, latents: Tensor) -> tuple[Tensor, float]:
        """Mean (B, C, H, W) and standard deviation of the next latents; 0 of a step that is not trained."""
        raise NotImplementedError

    def predict(self, latents: Tensor, step: int, texts: Texts, uncond: Texts) -> Tensor:
        """The guided output (B, C, H, W) fp32; one call of the network."""
        dtype, timestep = self.network.dtype, self.timesteps[step]
        with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32):
            if self.guidance_scale == 1:
                return self.call(latents.to(dtype), timestep, texts).float()
            both = tuple(torch.cat([without.expand_as(part), part]) for without, part in zip(uncond, texts))
            without, cond = self.call(torch.cat([latents.to(dtype)] * 2), timestep, both).float().chunk(2)
        return without + self.guidance_scale * (cond - without)

    def rounding(self) -> float:
        """How far fp32 may take two gradients apart that are computed in another order, relative, in 2-norm; tests/bounds.py derives it.

        delta = 0.2 eps sqrt(2 sum (K / 2 + 1)) over the layers that sum K products is the output's, five times in the network's part. A
        step's log-prob adds |c_out| / s times guidance's |w| + |w - 1| of it, and what its own fp32 loses.
        """
        eps, worst = torch.finfo(torch.float32).eps, 0.0
        terms = [layer.weight[0].numel() for layer in self.network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        delta = 0.2 * eps * math.sqrt(2 * sum(count / 2 + 1 for count in terms))
        branches = 1 if self.guidance_scale == 1 else abs(self.guidance_scale) + abs(self.guidance_scale - 1)
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for step in range(self.num_trained):
            (c_out, std), (c_x, _) = self.gaussian(one, step, zero), self.gaussian(zero, step, one)
            guided = branches * abs(c_out.item())
            worst = max(worst, (guided * delta + 0.2 * eps * (abs(c_x.item()) + guided + 1)) / std)
        return worst + 5 * delta

    @staticmethod
    def log_prob(sample: Tensor, mean: Tensor, std: float) -> Tensor:
        """(B,)."""
        density = -((sample - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
        return density.mean(dim=(1, 2, 3))

    @torch.no_grad()
    def rollout(self, texts: Texts, uncond: Texts, draw: Callable[[int], Tensor]) -> tuple[Trajectories, Tensor]:
        """Denoises B samples: what the update needs, and the final latents. draw: step -> (B, C, H, W) noise, -1 -> the first latents."""
        latents, log_probs = [draw(-1)], []
        for step in range(len(self.timesteps)):
            output = self.predict(latents[-1], step, texts, uncond)
            mean, std = self.gaussian(output, step, latents[-1])
            latents.append(mean + std * draw(step) if std else mean)
            if step < self.num_trained:
                log_probs.append(self.log_prob(latents[-1], mean, std))
        states = torch.stack(latents[: self.num_trained + 1], 1)
        return Trajectories(states[:, :-1], states[:, 1:], torch.stack(log_probs, 1), texts), latents[-1]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) fp32 in [0, 1]."""
        vae = self.pipe.vae
        shift = vae.config.get("shift_factor") or 0.0
        return (vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift).sample.float() / 2 + 0.5).clamp(0, 1)

    def loss(self, data: Trajectories, rows: Tensor, step: int, advantages: Tensor, uncond: Texts, clip_range: float):
        """PPO's clipped loss of one step of some samples: its mean, and the importance ratios (len(rows),)."""
        latents = data.latents[rows, step]
        output = self.predict(latents, step, tuple(part[rows] for part in data.texts), uncond)
        log_prob = self.log_prob(data.next_latents[rows, step], *self.gaussian(output, step, latents))
        ratio = torch.exp(log_prob - data.log_probs[rows, step])
        unclipped = -advantages[rows] * ratio
        clipped = -advantages[rows] * torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
        return torch.maximum(unclipped, clipped).mean(), ratio.detach()

    def backward(
        self, data: Trajectories, minibatch: Tensor, batch_size: int, advantages: Tensor, uncond: Texts, clip_range: float,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> Tensor:  # fmt: skip
        """Adds the gradient of a minibatch's mean loss, `batch_size` samples at a time; returns all importance ratios."""
        ratios = []
        for rows in minibatch.split(batch_size):
            for step in range(self.num_trained):
                loss, ratio = self.loss(data, rows, step, advantages, uncond, clip_range)
                scale(loss * len(rows) / (len(minibatch) * self.num_trained)).backward()
                ratios.append(ratio)
        return torch.cat(ratios)


class TextbookLoop(Loop):
    """DDPO on a Stable Diffusion pipeline (epsilon prediction, eta 1).

    The step's Gaussian: DDPO (arXiv:2305.13301) section 4.2 with the DDIM mean and variance (arXiv:2010.02502, eq. 12 and 16).
    """

    def __init__(self, pipe, num_steps: int, guidance_scale: float):
        if pipe.scheduler.config.prediction_type != "epsilon":
            raise ValueError(f"prediction_type={pipe.scheduler.config.prediction_type}: the textbook loop has epsilon only")
        super().__init__(pipe, pipe.unet, num_steps, guidance_scale)
        self.num_trained = num_steps
        self.stride = pipe.scheduler.config.num_train_timesteps // num_steps

    def encode(self, prompts: list[str]) -> Texts:
        return (self.pipe.encode_prompt(prompts, self.pipe.device, 1, False)[0],)

    def call(self, latents: Tensor, timestep: Tensor, texts: Texts) -> Tensor:
        return self.network(latents, timestep, *texts).sample

    def gaussian(self, output: Tensor, step: int, latents: Tensor) -> tuple[Tensor, float]:
        timestep = int(self.timesteps[step])
        alphas, previous = self.pipe.scheduler.alphas_cumprod, timestep - self.stride
        a_t = alphas[timestep].item()
        a_p = (alphas[previous] if previous >= 0 else self.pipe.scheduler.final_alpha_cumprod).item()
        std = math.sqrt((1 - a_p) / (1 - a_t) * (1 - a_t / a_p))
        x0 = (latents - math.sqrt(1 - a_t) * output) / math.sqrt(a_t)
        return math.sqrt(a_p) * x0 + math.sqrt(max(0.0, 1 - a_p - std**2)) * output, std


class FlowGRPOLoop(Loop):
    """Flow-GRPO (arXiv:2505.05470) on a Stable Diffusion 3 pipeline, without its penalty: all steps but the last are trained.

    The step's Gaussian is equation 9. At pure noise, where 1 - sigma is 0, the next level's is taken, as in the paper's code.
    """

    def __init__(self, pipe, num_steps: int, guidance_scale: float, eta: float, num_trained: int, max_sequence_length: int):
        super().__init__(pipe, pipe.transformer, num_steps, guidance_scale)
        self.eta, self.num_trained, self.max_sequence_length = eta, num_trained, max_sequence_length
        self.sigmas = pipe.scheduler.sigmas.tolist()

    def encode(self, prompts: list[str]) -> Texts:
        given = dict(do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length)
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, None, None, **given)
        return embeds, pooled

    def call(self, latents: Tensor, timestep: Tensor, texts: Texts) -> Tensor:
        return self.network(latents, *texts, timestep.expand(len(latents))).sample

    def gaussian(self, output: Tensor, step: int, latents: Tensor) -> tuple[Tensor, float]:
        sigma, next_sigma = self.sigmas[step : step + 2]
        delta = sigma - next_sigma
        if step >= self.num_trained:
            return latents - delta * output, 0.0
        rate = self.eta**2 * sigma / (1 - (next_sigma if sigma == 1 else sigma))
        mean = latents * (1 - rate * delta / (2 * sigma)) - output * (1 + rate * (1 - sigma) / (2 * sigma)) * delta
        return mean, math.sqrt(rate * delta)


def group_advantages(prompts: list[str], rewards: list[float], limit: float) -> list[float]:
    """Flow-GRPO's: the distance to the mean of the prompt's rewards, over the standard deviation of all, clamped to +-limit."""
    spread = pstdev(rewards) + 1e-4
    means = {prompt: fmean(r for p, r in zip(prompts, rewards) if p == prompt) for prompt in prompts}
    return [min(max((r - means[p]) / spread, -limit), limit) for p, r in zip(prompts, rewards)]
