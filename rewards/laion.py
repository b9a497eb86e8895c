"""The LAION aesthetic predictor, the reward of most published fine-tuning results (arXiv:2305.13301, section 5.2)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from .base import RewardCard, Scorer
from .clip import CLIP_VIT_L, clip_crop, image_tower
from .weights import fill, find_weights, read_weights

HEAD = "trl-lib/ddpo-aesthetic-predictor"
HEAD_FILES = (
    "aesthetic-model.pth",
    "sac+logos+ava1-l14-linearMSE.pth",
    "sa_0_4_vit_l_14_linear.pth",
    "model.safetensors",
)


class LAIONAesthetic(Scorer):
    """Predicted human rating, about 1 to 10, from CLIP ViT-L/14's image embedding.

    The images are prepared as CLIP's own processor does, yet without its rounding to 8 bits, so that gradients reach
    them.

    Args:
        clip: the CLIP model, a name on the hub or a local folder; shared with other rewards that use it.
        head: the rating head: a `.pth` or `.safetensors` file, a folder that holds one, or a name on the hub. Version 2
            (`sac+logos+ava1-l14-linearMSE`, five layers) and version 1 (`sa_0_4_vit_l_14_linear`, one) both fit.
    """

    name: ClassVar[str] = "laion-aesthetic"
    differentiable: ClassVar[bool] = True
    card: ClassVar[RewardCard] = RewardCard(
        typical_range=(3.0, 8.0),
        source="LAION-Aesthetics; Schuhmann et al. 2022, arXiv:2210.08402",
        licence="MIT (CLIP), Apache-2.0 (head)",
        needs="transformers; CLIP ViT-L/14, rating head",
        download_mb=1715,
    )

    def __init__(self, clip: str | Path = CLIP_VIT_L, head: str | Path = HEAD) -> None:
        super().__init__()
        path = find_weights("the aesthetic head", head, HEAD_FILES, published=HEAD)
        weights = read_weights(path)
        module = AestheticHead() if "layers.0.weight" in weights else nn.Linear(768, 1)
        self.head = fill(module, weights, what=f"the aesthetic head {path}")
        self.image_tower = image_tower(clip)
        self.train(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Ratings [B]."""
        return self.head(self.image_tower(clip_crop(images, self.image_tower.size))).squeeze(-1)


class AestheticHead(nn.Module):
    """The published head: five linear layers and no activation between them, so affine once dropout is off.

    ImageReward has the same head.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, width], for LAION's rating embeddings of unit length, to ratings [B, 1]."""
        return self.layers(features)
