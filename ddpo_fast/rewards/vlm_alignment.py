"""DDPO (arXiv:2305.13301) section 5.3, "prompt-image alignment": a model says what it sees, a text encoder compares that to the prompt."""

import torch
from torch import Tensor

from ddpo_fast.scoring.bert_recall import BertRecall
from ddpo_fast.scoring.vlm import VLM, VisionLanguageModel


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
        """vlm, bert: folders or hub ids. layer: of bert; bert-score takes 40 for DeBERTa-xlarge-MNLI. dtype: the vlm's; bert's is fp32.

        device: auto is the pictures' device. Raises ValueError for what is missing or damaged, before it is needed.
        """
        self.recall = BertRecall(bert, layer)
        self.vlm, self.question = VisionLanguageModel(vlm, device, dtype, batch_size), question

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], B prompts. Returns (B,) fp32 on the CPU, at most 1."""
        answers = self.vlm.answers(images, [self.question] * len(prompts))
        self.recall.to(self.vlm.model.device)
        parts = [slice(start, start + self.vlm.batch_size) for start in range(0, len(prompts), self.vlm.batch_size)]
        return torch.cat([self.recall(answers[part], [f"The image contains {prompt}" for prompt in prompts[part]]) for part in parts])
