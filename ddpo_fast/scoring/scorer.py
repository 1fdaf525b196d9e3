"""Scores pictures by a reward, (images (B, 3, H, W) fp32 in [0, 1], prompts: B strings) -> (B,) numbers, higher is better.

If the prompts have metadata, a reward that takes it also gets `metadata`, B JSON objects.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial

import torch
from torch import Tensor

from ddpo_fast.memory import release_memory
from ddpo_fast.places import is_address
from ddpo_fast.scoring.function import RewardError, RewardMemoryError, load_reward
from ddpo_fast.scoring.isolated import IsolatedReward
from ddpo_fast.scoring.remote import RemoteReward
from ddpo_fast.scoring.threaded import ThreadedReward, in_background

logger = logging.getLogger(__name__)

Metadata = list[dict] | None
"""B JSON objects, {} for a prompt that has none; None if there is no metadata at all."""
Reward = Callable[..., Tensor]
"""(images, prompts, metadata=None) -> (B,) fp64 on the CPU; a failed call raises RewardError, after its timeout at the latest."""


def open_reward(name: str, kwargs: dict, timeout_s: float, isolate: bool, without_metadata: str | None = None) -> Reward:
    """The reward of a name. It is called in this process, or in a separate one with `isolate`; if the name is an http address, on a server.

    without_metadata: see `load_reward`; not checked for a server. Raises ValueError, naming the option at fault.
    """
    if is_address(name):
        if isolate:
            raise ValueError("reward.isolate=True: valid is False for a remote reward, which runs in another process already")
        if kwargs:
            raise ValueError(f"reward.kwargs={kwargs}: valid is {{}} for a remote reward; its server is given them")
        return ThreadedReward(partial(RemoteReward, name, timeout_s), timeout_s)
    if isolate:
        return IsolatedReward(name, kwargs, timeout_s, without_metadata)
    return ThreadedReward(partial(load_reward, name, kwargs, without_metadata), timeout_s)


class BadRewards(RuntimeError):
    """Too few samples have a reward to learn from."""


_last_failure = ""


def last_failure() -> str:
    """Why rewards are missing in the last batch where some are; empty if there is no such batch."""
    return _last_failure


def score_or_nan(reward: Reward, images: Tensor, prompts: list[str], metadata: Metadata = None, last: bool = True) -> Tensor:
    """A batch's rewards. A call that fails is logged and gives NaN, which leaves its samples out of the update.

    Raises RewardMemoryError if memory runs out, unless this is the `last` attempt.
    """
    global _last_failure
    try:
        rewards = reward(images, prompts, metadata=metadata)
    except RewardError as error:
        if isinstance(error, RewardMemoryError) and not last:
            raise
        _last_failure = " ".join(str(error).split())  # one line
        logger.warning("%s; its %d samples are left out", error, len(prompts), exc_info=error.__cause__)
        return torch.full((len(prompts),), torch.nan, dtype=torch.float64)
    if bad := int((~rewards.isfinite()).sum()):
        _last_failure = f"{bad} of {len(prompts)} rewards are not finite"
        logger.warning("%s; these samples are left out", _last_failure)
    return rewards


class Scorer:
    """Scores batches of pictures in order, one at a time, while the caller goes on.

    A batch that runs out of memory is scored again when the caller waits.
    """

    def __init__(self, reward: Reward):
        self.reward = reward
        self.scored: list[Future[Tensor | tuple[Tensor, list[str], Metadata]]] = []
        """The rewards of each batch, or the batch itself if it ran out of memory."""

    def add(self, images: Tensor, prompts: list[str], metadata: Metadata = None) -> None:
        """Begins to score a batch when the batch before is done. So a reward need not be thread-safe, and pictures do not pile up."""
        wait(self.scored[-1:])
        self.scored.append(in_background("scorer", self._score, images, prompts, metadata))

    def _score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor | tuple[Tensor, list[str], Metadata]:
        try:
            return score_or_nan(self.reward, images, prompts, metadata, last=False)
        except RewardMemoryError:
            return images, prompts, metadata

    def rewards(self) -> Tensor:
        """Waits for all batches. Returns their rewards in the order in which they were added: (B,) fp64, on the CPU."""
        results = [rewards.result() for rewards in self.scored]
        if any(isinstance(result, tuple) for result in results):
            logger.warning("the reward ran out of memory beside the denoising: a smaller sample.batch_size saves scoring again")
            release_memory()
        return torch.cat([score_or_nan(self.reward, *result) if isinstance(result, tuple) else result for result in results])
