"""BERTScore's recall (Zhang et al. 2020, arXiv:1904.09675): how much of a reference sentence another one says.

Numbers are those of the authors' package `bert-score` 0.3.13, without baseline rescaling and without idf weights.
torchmetrics 1.9.0's `bert_score` is not used: it lets no token match the special ones, pads every sentence to 512
tokens, and restores the order of sentences that it sorted by length with the sorting permutation instead of its
inverse, so that candidates meet others' references.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weights import load_model, load_tokenizer

DEBERTA = "microsoft/deberta-xlarge-mnli"
LAYERS = 40  # of 48: the layer that agrees best with people, in the authors' table


def greedy_recall(candidate: Tensor, candidate_mask: Tensor, reference: Tensor, reference_mask: Tensor) -> Tensor:
    """Mean over the reference's tokens of each one's best cosine with a token of the candidate, [B].

    Args:
        candidate: token states [B, M, D].
        candidate_mask: bool [B, M], the tokens that may be matched.
        reference: token states [B, N, D].
        reference_mask: bool [B, N], the tokens that are to be found; at least one.
    """
    cosine = F.normalize(reference, dim=-1) @ F.normalize(candidate, dim=-1).transpose(1, 2)
    best = cosine.masked_fill(~candidate_mask[:, None], -torch.inf).amax(-1)
    return (best * reference_mask).sum(-1) / reference_mask.sum(-1)


class BERTScoreRecall(nn.Module):
    """Recall of reference sentences in candidates, from a frozen DeBERTa.

    Args:
        model: a name on the hub or a local folder of a DeBERTa and its tokenizer.
        layers: how many of its layers are used.
    """

    def __init__(self, model: str | Path = DEBERTA, *, layers: int = LAYERS) -> None:
        super().__init__()
        from transformers import AutoModel

        self.tokenizer = load_tokenizer(model, published=DEBERTA)
        self.model = load_model(AutoModel, model, what="the DeBERTa model", published=DEBERTA)
        found = len(self.model.encoder.layer)
        if found < layers:
            raise ValueError(f"the model at {str(model)!r} has {found} layers, fewer than layers={layers}.")
        self.model.encoder.layer = self.model.encoder.layer[:layers]

    @torch.no_grad()
    def forward(self, candidates: list[str], references: list[str]) -> Tensor:
        """Recall float32 [B] of each reference in its candidate; 0 where the candidate is empty.

        As in the authors' package a token of the reference may match the candidate's [CLS] and [SEP], which themselves
        need not be found.
        """
        candidate, candidate_mask, _ = self._encode(candidates)
        reference, _, words = self._encode(references)
        recall = greedy_recall(candidate, candidate_mask, reference, words)
        said = torch.tensor([bool(text.strip()) for text in candidates], device=recall.device)
        return recall * said

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """States [B, L, D]; bool [B, L]: tokens that are not padding; bool [B, L]: those but the special ones."""
        tokens = self.tokenizer(
            [text.strip() for text in texts],
            padding=True,
            truncation=True,
            max_length=512,
            return_special_tokens_mask=True,
            return_tensors="pt",
        ).to(self.model.device)
        special = tokens.pop("special_tokens_mask").bool()
        states = self.model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"].bool()
        return states, mask, mask & ~special
