"""How well a picture fits its prompt, judged by a CLIP: CLIPScore (arXiv:2104.08718)."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

from ddpo_fast.scoring.pretrained import ClipPixels, check_batch_size, check_device, load, load_model


class ClipScore:
    """cos(picture, prompt), the cosine of a CLIP's two embeddings; with `scaled` CLIP's logit, exp(logit_scale) cos(picture, prompt)."""

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        scaled: bool = False,
        device: str = "auto",
        dtype: str = "fp32",
        batch_size: int = 32,
    ):
        """model: folder or hub id of a CLIP. processor: folder or hub id of a tokenizer and preprocessor_config.json, by default `model`.

        device: auto is the pictures' device. dtype: fp32, fp16 or bf16. Raises ValueError at once for what is missing or damaged.
        """
        if not isinstance(scaled, bool):
            raise ValueError(f"reward.kwargs.scaled={scaled}: valid is true or false")
        self.scaled, self.device, self.batch_size = scaled, check_device(device), check_batch_size(batch_size)
        option, source = ("reward.kwargs.model", model) if processor is None else ("reward.kwargs.processor", processor)
        self.pixels = ClipPixels(source, option)
        self.tokenizer = load(AutoTokenizer.from_pretrained, source, option, "a folder or hub id of a CLIP with its tokenizer")
        self.model = load_model(CLIPModel, model, "reward.kwargs.model", "a folder or hub id of a CLIP in transformers' format", dtype)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], B prompts, of which CLIP reads the first 77 tokens. Returns (B,) fp32 on the CPU."""
        device = self.device or images.device
        self.model.to(device)
        parts = [slice(i, i + self.batch_size) for i in range(0, len(prompts), self.batch_size)]
        return torch.cat([self._score(images[part].to(device), prompts[part]).cpu() for part in parts])

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        model, length = self.model, self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(images.device)
        picture = model.visual_projection(model.vision_model(self.pixels(images).to(model.dtype)).pooler_output)
        text = model.text_projection(model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output)
        cosine = F.cosine_similarity(picture.float(), text.float())
        return cosine * model.logit_scale.float().exp() if self.scaled else cosine
