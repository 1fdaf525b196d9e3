"""A model that looks at a picture and answers questions about it."""

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

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
        self.processor.tokenizer.padding_side = "left"  # new tokens go to the right
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
        begun = str(self.processor.tokenizer.bos_token)  # some templates write it, others leave it to the tokenizer
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
    """A picture (H, W, 3) uint8 after JPEG compression."""
    jpeg = cv2.imencode(".jpg", rgb[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return Image.fromarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR)[:, :, ::-1])
