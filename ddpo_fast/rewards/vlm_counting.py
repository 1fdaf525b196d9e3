"""Whether a picture shows as many animals as its prompt says, judged by asking a vision-language model."""

import re

import torch
from torch import Tensor

from ddpo_fast.prompts import NUMBERS, SIMPLE_ANIMALS, UNSEEN_ANIMALS, plural
from ddpo_fast.scoring.vlm import VLM, VisionLanguageModel


class VlmCounting:
    """0, 1/2 or 1 for a prompt such as "five wolves": half for the number and half for the animal, if a vision-language model names it."""

    def __init__(self, vlm: str = VLM, device: str = "auto", dtype: str = "fp16", batch_size: int = 16):
        """vlm: folder or hub id. device: auto is the pictures' device. Raises ValueError at once for what is missing or damaged."""
        self.vlm = VisionLanguageModel(vlm, device, dtype, batch_size)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], B prompts "{two to eight} {animals}". Returns (B,) fp32.

        Raises ValueError for any other prompt.
        """
        wanted = [parse_count(prompt) for prompt in prompts]
        how_many = self.vlm.answers(images, [f"How many {animals} are there in this image?" for _, animals in wanted])
        which = self.vlm.answers(images, ["What animal is in this image?"] * len(prompts))
        return torch.tensor([
            (names_number(count, number) + names_animal(kind, animals)) / 2
            for count, kind, (number, animals) in zip(how_many, which, wanted)
        ])  # fmt: skip


def parse_count(prompt: str) -> tuple[str, str]:
    """Number and animals of a prompt: ("five", "wolves"). Raises ValueError for another kind of prompt."""
    number, _, animals = prompt.partition(" ")
    if number not in NUMBERS or not animals:
        raise ValueError(f"prompt {prompt!r}: valid for vlm_counting is a number from two to eight and a plural (prompts.name=counting)")
    return number, animals


def names_number(answer: str, number: str) -> bool:
    """Whether an answer contains the number, as a word or a numeral: "5" or "Five"."""
    return any(_contains(answer, form) for form in (number, str(NUMBERS[number])))


def names_animal(answer: str, animals: str) -> bool:
    """Whether an answer contains the animal, in the plural or, for animals of the prompt sets, in the singular."""
    return any(_contains(answer, form) for form in (animals, _SINGULAR.get(animals, animals)))


_SINGULAR = {plural(animal): animal for animal in [*SIMPLE_ANIMALS, *UNSEEN_ANIMALS]}


def _contains(answer: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", answer, re.IGNORECASE) is not None
