"""Rewards by a model that looks at a picture and answers: DDPO (arXiv:2305.13301) section 5.3, "prompt-image alignment", and counting."""

import re

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from ddpo_fast.prompts import NUMBERS, SIMPLE_ANIMALS, UNSEEN_ANIMALS, plural
from ddpo_fast.scoring.bert_recall import BertRecall
from ddpo_fast.scoring.pixels import to_pixels
from ddpo_fast.scoring.pretrained import check_batch_size, check_device, load, load_model

VLM = "llava-hf/llava-1.5-7b-hf"
JPEG_QUALITY = 80
MAX_NEW_TOKENS = 64
_VALID = f"a folder or hub id of a vision-language model with its processor and chat template, such as {VLM}"


class VisionLanguageModel:
    """Answers a question about each picture, greedily, in at most 64 tokens. Pictures are re-encoded as JPEG of quality 80."""

    def __init__(self, vlm: str, device: str, dtype: str, batch_size: int):
        """vlm: folder or hub id. Raises ValueError for what is missing or damaged."""
        self.device, self.batch_size = check_device(device), check_batch_size(batch_size)
        self.processor = load(AutoProcessor.from_pretrained, vlm, "reward.kwargs.vlm", _VALID)
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(f"reward.kwargs.vlm={vlm}: its processor has no chat template; valid is {_VALID}")
        self.processor.tokenizer.padding_side = "left"  # where a new token belongs is the right
        self.model = load_model(AutoModelForImageTextToText, vlm, "reward.kwargs.vlm", _VALID, dtype)

    def answers(self, images: Tensor, questions: list[str]) -> list[str]:
        """images (B, 3, H, W) in [0, 1] and a question for each: B answers."""
        device, pictures = self.device or images.device, [through_jpeg(rgb) for rgb in to_pixels(images)]
        self.model.to(device)
        answers = []
        for start in range(0, len(pictures), self.batch_size):
            part = slice(start, start + self.batch_size)
            answers += self._answer(pictures[part], questions[part], device)
        return answers

    def _answer(self, pictures: list[Image.Image], questions: list[str], device: torch.device) -> list[str]:
        texts = [self._prompted(question) for question in questions]
        begun = str(self.processor.tokenizer.bos_token)  # which some templates write, and others leave to the tokenizer
        inputs = self.processor(
            images=pictures, text=texts, padding=True, return_tensors="pt", add_special_tokens=not texts[0].startswith(begun)
        ).to(device, self.model.dtype)
        tokens = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=MAX_NEW_TOKENS)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [answer.strip() for answer in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _prompted(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def through_jpeg(rgb: np.ndarray) -> Image.Image:
    """A picture (H, W, 3) uint8 as it is after JPEG compression."""
    jpeg = cv2.imencode(".jpg", rgb[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return Image.fromarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR)[:, :, ::-1])


class VlmAlignment:
    """BERTScore recall of "The image contains {prompt}" in what a vision-language model says is going on in the picture."""

    def __init__(
        self,
        vlm: str = VLM,
        bert: str = "microsoft/deberta-xlarge-mnli",
        layer: int = 40,
        question: str = "Answer concisely: what is going on in this image?",
        device: str = "auto",
        dtype: str = "fp16",
        batch_size: int = 16,
    ):
        """vlm, bert: folders or hub ids. layer: of bert, 40 being bert-score's for DeBERTa-xlarge-MNLI. dtype: the vlm's; bert's is fp32.

        device: auto is the pictures'. Raises ValueError for what is missing or damaged, before it is needed.
        """
        self.recall = BertRecall(bert, layer)
        self.vlm, self.question = VisionLanguageModel(vlm, device, dtype, batch_size), question

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], B prompts. Returns (B,) fp32 on the CPU, at most 1."""
        answers = self.vlm.answers(images, [self.question] * len(prompts))
        self.recall.to(self.vlm.model.device)
        parts = [slice(start, start + self.vlm.batch_size) for start in range(0, len(prompts), self.vlm.batch_size)]
        return torch.cat([self.recall(answers[part], [f"The image contains {prompt}" for prompt in prompts[part]]) for part in parts])


class VlmCounting:
    """Of a prompt such as "five wolves", how many of the two, number and animal, a vision-language model names when asked: 0, 1/2 or 1."""

    def __init__(self, vlm: str = VLM, device: str = "auto", dtype: str = "fp16", batch_size: int = 16):
        """vlm: folder or hub id. device: auto is the pictures'. Raises ValueError for what is missing or damaged, before it is needed."""
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
        raise ValueError(f"prompt {prompt!r}: vlm_counting's are a number from two to eight and a plural, as in prompts.name=counting")
    return number, animals


def names_number(answer: str, number: str) -> bool:
    """Whether an answer contains the number, as a word or a numeral: "5" or "Five"."""
    return any(_contains(answer, form) for form in (number, str(NUMBERS[number])))


def names_animal(answer: str, animals: str) -> bool:
    """Whether an answer contains the animal, in the plural or, for those of the prompt sets, in the singular."""
    return any(_contains(answer, form) for form in (animals, _SINGULAR.get(animals, animals)))


_SINGULAR = {plural(animal): animal for animal in [*SIMPLE_ANIMALS, *UNSEEN_ANIMALS]}


def _contains(answer: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", answer, re.IGNORECASE) is not None
