"""ImageReward (Xu et al. 2023, arXiv:2304.05977): BLIP with cross-attention from prompt to picture, and a rating head.

The published checkpoint has the names of BLIP's original code; they are translated to transformers' BLIP here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import RewardCard, Scorer
from .clip import clip_crop, normalise
from .laion import AestheticHead
from .weights import fill, find_weights, load_tokenizer, read_weights

IMAGE_REWARD = "THUDM/ImageReward"
FILES = ("ImageReward.pt", "ImageReward.safetensors")
BERT = "google-bert/bert-base-uncased"
MAX_TOKENS = 35
# Of the raw scores over the authors' validation pairs, taken out of every score.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
HEAD_WIDTH = 64  # of an attention head, in BERT and in BLIP's vision transformers of either size

VISION_NAMES = (
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.norm1\.", ".layer_norm1."),
    (r"\.norm2\.", ".layer_norm2."),
    (r"^norm\.", "post_layernorm."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^cls_token$", "embeddings.class_embedding"),
)


class ImageReward(Scorer):
    """Human preference for a picture given its prompt, with mean 0 and standard deviation 1 over the authors' pairs.

    Args:
        weights: the published checkpoint: a file, a folder that holds it, or a name on the hub.
        tokenizer: BERT's, a name on the hub or a local folder.
    """

    name: ClassVar[str] = "image-reward"
    differentiable: ClassVar[bool] = True
    card: ClassVar[RewardCard] = RewardCard(
        typical_range=(-2.0, 2.0),
        source="Xu et al. 2023, arXiv:2304.05977",
        licence="Apache-2.0",
        needs="transformers; ImageReward v1.0 (BLIP), BERT's tokenizer",
        download_mb=1790,
    )

    def __init__(self, weights: str | Path = IMAGE_REWARD, tokenizer: str | Path = BERT) -> None:
        super().__init__()
        from transformers import BlipTextModel, BlipVisionModel

        path = find_weights("the ImageReward checkpoint", weights, FILES, published=f"{IMAGE_REWARD} {FILES[0]}")
        checkpoint = read_weights(path)
        vision = rename(below("blip.visual_encoder.", checkpoint), VISION_NAMES)
        text = below("blip.text_encoder.", checkpoint)
        text.pop("embeddings.position_ids", None)  # a table of 0, 1, 2, ... that older files hold
        what = f"the ImageReward checkpoint {path}"
        self.vision = fill(BlipVisionModel(vision_config(vision)), vision, what=what)
        self.text = fill(BlipTextModel(text_config(text), add_pooling_layer=False), text, what=what)
        self.head = fill(AestheticHead(self.text.config.hidden_size), below("mlp.", checkpoint), what=what)
        self.tokenizer = load_tokenizer(tokenizer, published=BERT)
        self.train(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]."""
        pixels = normalise(clip_crop(images, self.vision.config.image_size))
        picture = self.vision(pixels).last_hidden_state
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(images.device)
        states = self.text(
            tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=picture,
            encoder_attention_mask=torch.ones(picture.shape[:-1], dtype=torch.long, device=images.device),
        ).last_hidden_state
        return (self.head(states[:, 0]).squeeze(-1) - MEAN) / STD


def vision_config(weights: dict[str, Tensor]) -> Any:
    """The configuration of a BLIP vision transformer with weights of these shapes."""
    from transformers import BlipVisionConfig

    width, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    patches = weights["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=count_layers(weights, "encoder.layers"),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * round(patches**0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,  # BLIP's own; the default of transformers is another
    )


def text_config(weights: dict[str, Tensor]) -> Any:
    """The configuration of a BLIP text encoder, with cross-attention, with weights of these shapes."""
    from transformers import BlipTextConfig

    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(weights["encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=count_layers(weights, "encoder.layer"),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
        is_decoder=True,  # what transformers calls a text model that has cross-attention
    )


def below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def rename(weights: dict[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The weights with every rule (a pattern, its replacement) applied to their names."""
    result = {}
    for key, value in weights.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result


def count_layers(weights: dict[str, Tensor], prefix: str) -> int:
    """How many different numbers follow `prefix.` in the names."""
    return len({key.removeprefix(f"{prefix}.").split(".")[0] for key in weights if key.startswith(f"{prefix}.")})
