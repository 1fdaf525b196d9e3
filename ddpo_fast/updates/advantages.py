"""Advantages: rewards against a running baseline of their own prompt."""

import torch
from torch import Tensor


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

    def state_dict(self) -> dict[str, list[float]]:
        return self.buffers

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.buffers = state


def make_baseline(name: str, buffer_size: int, min_count: int, std: str) -> PromptBaseline:
    """What baseline.name asks for: "history", a prompt's last rewards, or "group", its rewards of the iteration alone."""
    return PromptBaseline(0, 1, std) if name == "group" else PromptBaseline(buffer_size, min_count, std)
