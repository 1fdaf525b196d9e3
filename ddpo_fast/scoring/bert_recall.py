"""How much of a sentence another sentence says, judged by a text encoder: the recall of BERTScore (arXiv:1904.09675)."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from ddpo_fast.scoring.pretrained import load, load_model


class BertRecall:
    """1/|x| sum over tokens i of the reference x of max over tokens j of the candidate y of cos(x_i, y_j), in fp32.

    x_i, y_j are the hidden states of one layer. The reference's first and last token, [CLS] and [SEP], do not count. There are no idf
    weights and no rescaling. The bert-score package gives the same numbers, but its version 0.3.13 does not run with transformers 5.
    """

    def __init__(self, bert: str, layer: int):
        """bert: folder or hub id of a BERT, RoBERTa or DeBERTa. layer: whose output is used. Raises ValueError for what is not there."""
        valid = "a folder or hub id of a text encoder such as microsoft/deberta-xlarge-mnli"
        self.tokenizer = load(AutoTokenizer.from_pretrained, bert, "reward.kwargs.bert", valid)
        self.model = load_model(AutoModel, bert, "reward.kwargs.bert", valid, "fp32", unused=("pooler.",))
        if not isinstance(layer, int) or not 1 <= layer <= self.model.config.num_hidden_layers:
            raise ValueError(f"reward.kwargs.layer={layer}: valid is 1 to {self.model.config.num_hidden_layers}, the layers of {bert}")
        self.layer = layer

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    def __call__(self, candidates: list[str], references: list[str]) -> Tensor:
        """The recall of each reference in its candidate: (B,) fp32 on the CPU, in [-1, 1]; 0 for an empty candidate."""
        x, x_mask = self._embed(references)
        y, y_mask = self._embed(candidates)
        similarity = torch.einsum("bid,bjd->bij", x, y).masked_fill(~y_mask[:, None], -torch.inf)
        words = x_mask.clone()
        words[:, 0] = False
        words[torch.arange(len(words)), x_mask.sum(1) - 1] = False
        recall = similarity.amax(2).masked_fill(~words, 0).sum(1) / words.sum(1)
        return recall.masked_fill(y_mask.sum(1) <= 2, 0).cpu()

    def _embed(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        length = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        sentences = [sentence.strip() for sentence in sentences]
        tokens = self.tokenizer(sentences, padding=True, padding_side="right", truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        states = self.model(tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True).hidden_states[self.layer]
        return F.normalize(states, dim=-1), tokens.attention_mask.bool()
