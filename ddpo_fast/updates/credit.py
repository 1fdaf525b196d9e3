"""What a sample's reward counts in the loss: its advantage over a baseline of its prompt, or a regression's weight."""

from typing import Protocol

import torch
from torch import Tensor

from ddpo_fast.algorithms import Regression


class Credit(Protocol):
    """Turns rewards into each sample's factor in the loss. It may remember rewards of earlier iterations."""

    def of(self, prompts: list[str], rewards: Tensor) -> Tensor:
        """(N,) fp64 of a whole iteration's rewards (N,), all ranks', by sample id; 0 where a reward is not finite."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class PromptBaseline:
    """Per prompt, the last `buffer_size` rewards; A = (r - mean) / (std + 1e-6), DDPO (arXiv:2305.13301) appendix.

    The current rewards enter the buffer first. A prompt with fewer than `min_count` rewards uses the mean and (population)
    standard deviation of the whole current batch. With std="batch" the standard deviation is the batch's in any case. A buffer
    never drops a reward of the current iteration, even if that brings more than it holds. Non-finite rewards enter nothing and
    get advantage 0.

    With buffer_size=0 and min_count=1 a prompt's baseline is its group, the current rewards alone: the advantages of GRPO
    (arXiv:2402.03300).
    """

    def __init__(self, buffer_size: int, min_count: int, std: str = "prompt"):
        self.buffer_size, self.min_count, self.std = buffer_size, min_count, std
        self.buffers: dict[str, list[float]] = {}

    def update(self, prompts: list[str], rewards: Tensor) -> Tensor:
        """Adds a whole iteration's rewards (all ranks, by sample id) and returns their advantages.

        prompts: N strings. rewards: (N,) of any dtype, reward's units. Returns (N,) fp64, standard deviations.
        """
        rewards = rewards.double()
        good = rewards.isfinite()
        advantages = torch.zeros_like(rewards)
        rows_of = {}
        for row, prompt in enumerate(prompts):
            if good[row]:
                rows_of.setdefault(prompt, []).append(row)
        for prompt, rows in rows_of.items():
            current = rewards[rows]
            buffer = self.buffers.get(prompt, []) + current.tolist()
            buffer = buffer[-max(self.buffer_size, len(rows)) :]
            if self.buffer_size:
                self.buffers[prompt] = buffer
            population = rewards[good] if len(buffer) < self.min_count else torch.tensor(buffer, dtype=torch.float64)
            # sorted, so that the sums, too, do not depend on the order in which samples were gathered
            population = population.sort().values
            spread = population if self.std == "prompt" else rewards[good].sort().values
            advantages[rows] = (current - population.mean()) / (spread.std(correction=0) + 1e-6)
        return advantages


class Advantages:
    """Advantages by a `PromptBaseline`, clamped to +-limit."""

    def __init__(self, baseline: PromptBaseline, limit: float):
        self.baseline, self.limit = baseline, limit

    @classmethod
    def of_options(cls, options, limit: float) -> "Advantages":
        """What `options`, config.baseline, ask for: "history", a prompt's last rewards, or "group", its rewards of the iteration alone."""
        sizes = (0, 1) if options.name == "group" else (options.buffer_size, options.min_count)
        return cls(PromptBaseline(*sizes, options.std), limit)

    def of(self, prompts: list[str], rewards: Tensor) -> Tensor:
        return self.baseline.update(prompts, rewards).clamp(-self.limit, self.limit)

    def state_dict(self) -> dict[str, list[float]]:
        return self.baseline.buffers

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.baseline.buffers = {prompt: [1.0 * reward for reward in rewards] for prompt, rewards in state.items()}


class Weights:
    """A regression's weights, which remember nothing.

    With algorithm.population=iteration a reward is compared with all rewards of the iteration. With prompt it is compared with the rewards
    of the same prompt; if its prompt has no other good sample, with all rewards of the iteration. A reward that is not finite is left out,
    and its sample gets weight 0.
    """

    def __init__(self, algorithm: Regression):
        self.algorithm = algorithm

    def of(self, prompts: list[str], rewards: Tensor) -> Tensor:
        rewards, by_prompt = rewards.double(), self.algorithm.population == "prompt"
        good = rewards.isfinite()
        weights, rows_of = torch.zeros_like(rewards), {}
        for row in good.nonzero()[:, 0].tolist():
            rows_of.setdefault(prompts[row], []).append(row)
        everybody = [row for rows in rows_of.values() for row in rows]
        groups = [rows for rows in rows_of.values() if by_prompt and len(rows) > 1]
        others = [row for row in everybody if not by_prompt or len(rows_of[prompts[row]]) == 1]
        for rows, population in [*zip(groups, groups), (others, everybody)]:
            if rows:  # in order, so that sums do not depend on the order of the samples
                weights[rows] = self.algorithm.weigh(rewards[rows], rewards[population].sort().values)
        return weights

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass
