"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): a CLIP fine-tuned on which of two pictures people picked."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor

from .base import RewardCard, Scorer
from .clip import CLIP_VIT_H, ImageTower, TextTower, clip_crop, load_clip
from .weights import load_tokenizer

PICK_SCORE = "yuvalkirstain/PickScore_v1"


class PickScore(Scorer):
    """Cosine of the fine-tuned ViT-H/14's embeddings, times its logit scale (about 100), as in the authors' code.

    A difference of 1 between two pictures means odds of e : 1 that people prefer the better one.

    Args:
        model: the fine-tuned CLIP, a name on the hub or a local folder.
        tokenizer: the tokenizer of the model that it was made from, a name on the hub or a local folder.
    """

    name: ClassVar[str] = "pick-score"
    differentiable: ClassVar[bool] = True
    card: ClassVar[RewardCard] = RewardCard(
        typical_range=(17.0, 25.0),
        source="Kirstain et al. 2023, arXiv:2305.01569",
        licence="MIT",
        needs="transformers; PickScore v1 (CLIP ViT-H/14)",
        download_mb=3950,
    )

    def __init__(self, model: str | Path = PICK_SCORE, tokenizer: str | Path = CLIP_VIT_H) -> None:
        super().__init__()
        clip = load_clip(model, what="the PickScore model", published=PICK_SCORE)
        self.image_tower, self.text_tower = ImageTower(clip), TextTower(clip)
        self.tokenizer = load_tokenizer(tokenizer, published=CLIP_VIT_H)
        self.train(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]."""
        image = self.image_tower(clip_crop(images, self.image_tower.size))
        cosine = (image * self.text_tower(self.tokenizer, prompts)).sum(-1)
        return self.text_tower.logit_scale.exp() * cosine
