"""CLIPScore (Hessel et al. 2021, arXiv:2104.08718): how well CLIP finds that picture and prompt go together."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor

from .base import RewardCard, Scorer
from .clip import CLIP_VIT_L, clip_crop, image_tower, load_clip, text_tower
from .weights import load_tokenizer


class CLIPScore(Scorer):
    """2.5 times the cosine of CLIP's embeddings of picture and prompt.

    Two things differ from the paper's equation 1, which measures captions: the prompt goes in as it is, without "A
    photo depicts", and a negative cosine is not cut to 0, where a gradient would end. The CLIP is ViT-L/14, which the
    aesthetic predictor uses too, not the paper's ViT-B/32: scores are somewhat lower.

    Args:
        clip: the CLIP model with its tokenizer, a name on the hub or a local folder; shared with other rewards.
    """

    name: ClassVar[str] = "clip-score"
    differentiable: ClassVar[bool] = True
    card: ClassVar[RewardCard] = RewardCard(
        typical_range=(0.3, 0.9),
        source="Hessel et al. 2021, arXiv:2104.08718",
        licence="MIT",
        needs="transformers; CLIP ViT-L/14",
        download_mb=1715,
    )

    def __init__(self, clip: str | Path = CLIP_VIT_L) -> None:
        super().__init__()
        model = load_clip(clip)  # held while both towers are taken from it
        self.image_tower, self.text_tower = image_tower(clip), text_tower(clip)
        del model
        self.tokenizer = load_tokenizer(clip, published=CLIP_VIT_L)
        self.train(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]."""
        image = self.image_tower(clip_crop(images, self.image_tower.size))
        return 2.5 * (image * self.text_tower(self.tokenizer, prompts)).sum(-1)
