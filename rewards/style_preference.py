"""stub"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .base import check_batch
from .efficientnet import LiteFeatures

WEIGHTS = Path(__file__).with_name("style_preference.safetensors")
RESOLUTION = 64


class StylePreference(nn.Module):
    """stub"""

    name = "style_preference"
    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        from safetensors.torch import load_file

        self.features = LiteFeatures("lite0", resolution=RESOLUTION)
        self.head = nn.Linear(1280, 1)
        self.head.load_state_dict(load_file(WEIGHTS))
        self.requires_grad_(False)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score a batch, see `Reward`."""
        check_batch(images, prompts)
        return self.score_features(self.features(images))

    def score_features(self, features: Tensor) -> Tensor:
        """Scores of features [..., 1280] of `LiteFeatures`."""
        return self.head(features).squeeze(-1)
