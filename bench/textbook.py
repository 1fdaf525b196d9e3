"""The plain loop that others run: DDPO one timestep at a time, eager, on diffusers' modules as they are loaded.

It follows the structure of the authors' PyTorch port (kvablack/ddpo-pytorch): host-side step constants, every latent stored twice, a
forward and backward for each timestep of each batch. It is the baseline that ours should beat in speed. It uses none of ddpo_fast's steps
and losses, so it is also the oracle that ours must agree with. Shape letters: B samples, S steps, (C, H, W) a sample's latents, L tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Trajectories:
    """What a rollout leaves for the update."""

    timesteps: Tensor
    """(S,) int64."""
    latents: Tensor
    """(B, S, C, H, W) before each step."""
    next_latents: Tensor
    """(B, S, C, H, W) after each step."""
    log_probs: Tensor
    """(B, S)."""
    prompt_embeds: Tensor
    """(B, L, E)."""


class TextbookLoop:
    """Sampling and PPO loss of a Stable Diffusion pipeline (epsilon prediction, eta 1), step by step.

    noise prediction: e = e_uncond + w (e_cond - e_uncond). The step's Gaussian: DDPO (arXiv:2305.13301) section 4.2 with the DDIM mean
    and variance (arXiv:2010.02502, eq. 12 and 16); the log-prob is the mean over a latent's elements.
    """

    def __init__(self, pipe, num_steps: int, guidance_scale: float):
        if pipe.scheduler.config.prediction_type != "epsilon":
            raise ValueError(f"prediction_type={pipe.scheduler.config.prediction_type}: the textbook loop has epsilon only")
        self.pipe, self.guidance_scale = pipe, guidance_scale
        pipe.scheduler.set_timesteps(num_steps)
        self.timesteps = pipe.scheduler.timesteps.to(pipe.device)
        self.stride = pipe.scheduler.config.num_train_timesteps // num_steps

    def encode(self, prompts: list[str]) -> Tensor:
        """(B, L, E)."""
        return self.pipe.encode_prompt(prompts, self.pipe.device, 1, False)[0]

    def noise_pred(self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, uncond_embeds: Tensor) -> Tensor:
        """The guided noise prediction (B, C, H, W) fp32; one call of the UNet."""
        dtype = self.pipe.unet.dtype
        with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32):
            if self.guidance_scale == 1:
                return self.pipe.unet(latents.to(dtype), timestep, prompt_embeds).sample.float()
            embeds = torch.cat([uncond_embeds.expand_as(prompt_embeds), prompt_embeds])
            uncond, cond = self.pipe.unet(torch.cat([latents.to(dtype)] * 2), timestep, embeds).sample.float().chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)

    def gaussian(self, noise_pred: Tensor, timestep: int, latents: Tensor) -> tuple[Tensor, float]:
        """Mean (B, C, H, W) and standard deviation of p(x_{t-1} | x_t)."""
        alphas, previous = self.pipe.scheduler.alphas_cumprod, timestep - self.stride
        a_t = alphas[timestep].item()
        a_p = (alphas[previous] if previous >= 0 else self.pipe.scheduler.final_alpha_cumprod).item()
        std = math.sqrt((1 - a_p) / (1 - a_t) * (1 - a_t / a_p))
        x0 = (latents - math.sqrt(1 - a_t) * noise_pred) / math.sqrt(a_t)
        return math.sqrt(a_p) * x0 + math.sqrt(max(0.0, 1 - a_p - std**2)) * noise_pred, std

    @staticmethod
    def log_prob(sample: Tensor, mean: Tensor, std: float) -> Tensor:
        """(B,)."""
        density = -((sample - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
        return density.mean(dim=(1, 2, 3))

    @torch.no_grad()
    def rollout(self, prompt_embeds: Tensor, uncond_embeds: Tensor, generator: torch.Generator) -> Trajectories:
        """Denoises B samples with noise from `generator`."""
        unet = self.pipe.unet.config
        shape = (len(prompt_embeds), unet.in_channels, unet.sample_size, unet.sample_size)
        latents = [torch.randn(shape, generator=generator, device=self.pipe.device)]
        log_probs = []
        for t in self.timesteps:
            noise_pred = self.noise_pred(latents[-1], t, prompt_embeds, uncond_embeds)
            mean, std = self.gaussian(noise_pred, int(t), latents[-1])
            latents.append(mean + std * torch.randn(shape, generator=generator, device=self.pipe.device))
            log_probs.append(self.log_prob(latents[-1], mean, std))
        states = torch.stack(latents, 1)
        return Trajectories(self.timesteps, states[:, :-1], states[:, 1:], torch.stack(log_probs, 1), prompt_embeds)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) fp32 in [0, 1]."""
        vae = self.pipe.vae
        return (vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float() / 2 + 0.5).clamp(0, 1)

    def loss(self, data: Trajectories, rows: Tensor, step: int, advantages: Tensor, uncond_embeds: Tensor, clip_range: float):
        """PPO's clipped loss of one step of some samples: its mean, and the importance ratios (len(rows),)."""
        t, latents = data.timesteps[step], data.latents[rows, step]
        noise_pred = self.noise_pred(latents, t, data.prompt_embeds[rows], uncond_embeds)
        log_prob = self.log_prob(data.next_latents[rows, step], *self.gaussian(noise_pred, int(t), latents))
        ratio = torch.exp(log_prob - data.log_probs[rows, step])
        unclipped = -advantages[rows] * ratio
        clipped = -advantages[rows] * torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
        return torch.maximum(unclipped, clipped).mean(), ratio.detach()

    def backward(
        self, data: Trajectories, minibatch: Tensor, batch_size: int, advantages: Tensor, uncond_embeds: Tensor, clip_range: float,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> Tensor:  # fmt: skip
        """Adds the gradient of a minibatch's mean loss, `batch_size` samples at a time; returns all importance ratios."""
        num_steps, ratios = len(data.timesteps), []
        for rows in minibatch.split(batch_size):
            for step in range(num_steps):
                loss, ratio = self.loss(data, rows, step, advantages, uncond_embeds, clip_range)
                scale(loss * len(rows) / (len(minibatch) * num_steps)).backward()
                ratios.append(ratio)
        return torch.cat(ratios)
