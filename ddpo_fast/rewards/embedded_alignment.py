"""Prompt-image alignment for the embedded model: the probability that a picture shows what its prompt names."""

import torch

from ddpo_fast.embedded.scorer import log_probs, subject_of
from ddpo_fast.embedded.vocabulary import SUBJECTS


def embedded_alignment(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """p(subject of the prompt | picture) among the subjects of `ddpo_fast/embedded/vocabulary.py`, calibrated.

    Args:
        images: (B, 3, H, W) in [0, 1], any H, W, any device (the network runs there).
        prompts: B prompts, each naming a subject ("cat", "a polar bear riding a bike").

    Returns:
        (B,) float32 on the CPU, in [0, 1].

    Raises:
        ValueError: a prompt names no known subject.
    """
    columns = torch.tensor([SUBJECTS.index(subject_of(prompt)) for prompt in prompts])
    return log_probs(images).cpu().gather(1, columns[:, None])[:, 0].exp()
