"""Sampling under the current policy: a batch is denoised, and scored while the next one is.

Shape letters: B samples of a batch, M of this rank, S denoising steps, G network rows of a sample (2 with guidance), *shape one sample's
latents.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ddpo_fast.kernels import Ops
from ddpo_fast.policy import Policy
from ddpo_fast.prompts import Prompts
from ddpo_fast.run import Run
from ddpo_fast.schedule import Schedule
from ddpo_fast.scoring.scorer import Scorer
from ddpo_fast.timing import StageTimer, progress_bar
from ddpo_fast.updates.gradients import NO_GRADIENTS, Gradients, NoGradients
from ddpo_fast.updates.transitions import Rollout


@torch.no_grad()
def generate(
    policy: Policy,
    ops: Ops,
    schedule: Schedule,
    seed: int,
    sample_ids: Tensor,
    prompts: list[str],
    gradients: Gradients | NoGradients = NO_GRADIENTS,
    progress: Callable[[int], object] = lambda n: None,
) -> tuple[Rollout, Tensor]:
    """Denoises one batch of samples. Returns its Rollout and the final latents decoded: images (B, 3, H, W) fp32 in [0, 1] where good.

    sample_ids: (B,) int64, which with `seed` fix all noise. gradients, whose batch these samples are, calls the network and says which
    latents are kept. `progress(n)` is called with B after every step.
    """
    recording = schedule.recording
    texts, rows = policy.texts(recording, prompts)
    conditions = texts.conditions(rows)
    x_t = schedule.initial_latents(recording.shape, seed, sample_ids)
    x_in = x_t.to(policy.dtype).repeat(schedule.num_branches, *[1] * (x_t.dim() - 1))
    times = schedule.times[:, None].expand(-1, len(x_in)).unbind()
    every_step = torch.arange(schedule.num_steps, device=policy.device)[:, None].repeat(1, len(prompts)).unbind()
    first, end = (schedule.trained[0], schedule.trained[-1] + 1) if gradients.keeps == "trajectory" else (schedule.num_steps, 0)
    kept, log_probs = [], []
    for k, (steps, t) in enumerate(zip(every_step, times)):
        inputs = x_in, t, conditions
        out = gradients.predict(k, lambda rows: policy.predict(*(part[rows] for part in inputs)))  # noqa: B023
        next_x, log_prob, x_in = ops.ddim_step(
            out, x_t, schedule.coefficients, steps, seed, sample_ids, schedule.guidance_scale, policy.dtype
        )
        gradients.stepped(k, x_t, next_x, log_prob)
        if first <= k < end:
            kept.append(x_t)
            log_probs.append(log_prob)
        x_t = next_x
        if k + 1 == end or gradients.keeps == "final" and k + 1 == schedule.num_steps:
            kept.append(x_t)
        progress(len(prompts))
    images = policy.decode(x_t, recording)
    latents = torch.stack(kept, 1) if kept else x_t[:, None][:, :0]
    log_probs = torch.stack(log_probs, 1) if log_probs else latents.new_empty(len(latents), 0)
    good = images.flatten(1).isfinite().all(1) & x_t.flatten(1).isfinite().all(1) & latents.flatten(1).isfinite().all(1)
    latents[~good], log_probs[~good] = 0.0, 0.0
    return Rollout(prompts, sample_ids, latents, log_probs, good, schedule, int(first)), images


def collect(
    run: Run,
    schedule: Schedule,
    first_id: int,
    prompts: Prompts,
    timer: StageTimer,
    stage: str,
    gradients: Gradients | NoGradients = NO_GRADIENTS,
) -> tuple[Rollout, Tensor, Tensor]:
    """Samples of `prompts`, numbered from `first_id`, and their rewards.

    A batch is scored while the next one is denoised; the timer's "reward" is what the loop waited for that.
    Returns the Rollout, rewards (M,) fp64 and images (M, 3, H, W) uint8, the latter two on the CPU. A sample that is not good gets no
    reward.
    """
    policy, seed = run.policy, run.config.run.seed
    rollouts, pictures, scorer, start = [], [], Scorer(run.task.reward), 0
    with progress_bar(stage, len(prompts) * schedule.num_steps, "step", run.ranks.is_first) as bar:

        def denoise(size: int) -> tuple[Rollout, Tensor]:
            batch = prompts.texts[start : start + size]
            ids = torch.arange(first_id + start, first_id + start + len(batch), device=policy.device)
            gradients.begin_batch(slice(start, start + len(batch)))
            return generate(policy, run.ops, schedule, seed, ids, batch, gradients, bar.update)

        while start < len(prompts):
            with timer("sample"):
                size = min(run.config.sample.batch_size, len(prompts) - start)
                rollout, images = run.room.attempt("sample.batch_size", size, denoise)
                gradients.drop(~rollout.good)
                rollouts.append(rollout)
                pictures.append((images.nan_to_num() * 255).round().to("cpu", torch.uint8))
            with timer("reward"):
                batch = prompts[start : start + len(images)]
                scorer.add(images, batch.texts, batch.metadata)
            start += len(images)
    rollout = Rollout.cat(rollouts)
    with timer("reward"):
        rewards = scorer.rewards().masked_fill(~rollout.good.cpu(), torch.nan)
    return rollout, rewards, torch.cat(pictures)
