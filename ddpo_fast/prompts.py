"""Prompt distributions: which prompts a run trains on and which of them each sample gets."""

from pathlib import Path

import numpy as np

SIMPLE_ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant "
    "butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama "
    "camel bat gorilla hedgehog kangaroo"
).split()
"""The 45 nouns of the paper's aesthetic experiment (DDPO, arXiv:2305.13301, appendix)."""

PROMPT_SETS = {"simple_animals": SIMPLE_ANIMALS}


def load_prompts(name: str | None, file: str | None, limit: int | None = None) -> list[str]:
    """The prompts of `file` (one a line, blank lines left out) or of the named set, at most the first `limit`."""
    if file is not None:
        prompts = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    else:
        prompts = PROMPT_SETS[name]
    return list(prompts[:limit])


def draw_prompts(prompts: list[str], num_samples: int, samples_per_prompt: int, seed: int, iteration: int) -> list[str]:
    """The prompts of all of an iteration's samples, drawn uniformly, each for `samples_per_prompt` samples in a row.

    A function of (seed, iteration): every rank draws the whole list and takes its part of it.
    """
    drawn = np.random.default_rng((0, seed, iteration)).integers(len(prompts), size=num_samples // samples_per_prompt)
    return [prompts[i] for i in drawn for _ in range(samples_per_prompt)]
