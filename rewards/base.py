"""What a reward is: a callable from images and their prompts to one number an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn


class Reward(Protocol):
    """Scores images; every scorer of this package, and any object shaped like one, fits."""

    @property
    def name(self) -> str:
        """Short name for logs and tables."""

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the images."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score a batch.

        Args:
            images: float in [0, 1], [B, 3, H, W].
            prompts: B strings; a reward that looks at the image alone ignores them.

        Returns:
            float32 [B] on the images' device, higher is better.
        """


@dataclass(frozen=True)
class RewardCard:
    """What one should know of a reward before using it; `python -m rewards` prints it."""

    typical_range: tuple[float, float]
    """Where scores of ordinary pictures lie; no bound unless the reward's docstring says so."""
    source: str
    """The paper."""
    licence: str
    """Of the weights, where there are any."""
    needs: str
    """Models and packages beyond torch."""
    download_mb: int
    """Roughly what is fetched on first use, in 10^6 bytes; 0 where everything comes with the installation."""


class NamedReward(Protocol):
    """A reward of this package: its class has a card, and a name under which the registry makes it."""

    name: ClassVar[str]
    differentiable: ClassVar[bool]
    card: ClassVar[RewardCard]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score a batch, see `Reward`."""


class Scorer(nn.Module):
    """A reward that is a frozen network; a subclass gives `score`.

    Scores are computed in float32, within autocast too, on the device that the module is moved to. Nothing in it
    trains, and it stays in evaluation mode: dropout or batch statistics would make scores drift.
    """

    def train(self, mode: bool = True) -> Scorer:
        """Stay in evaluation mode whatever a training loop asks."""
        return super().train(False)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score a batch, see `Reward`."""
        check_batch(images, prompts)
        with torch.autocast(images.device.type, enabled=False):
            return self.score(images.float(), prompts)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of a batch that has been checked, images in float32."""
        raise NotImplementedError


def check_batch(images: Tensor, prompts: list[str]) -> None:
    """Refuse what no reward can score: another layout or dtype, or another number of prompts than of images."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}, expected floats in [0, 1], [B, 3, H, W]: "
            f"divide uint8 by 255, put channels first, repeat a single grey channel."
        )
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images came with {len(prompts)} prompts: pass one prompt per image.")


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] to 0..255, rounded (not truncated) and clamped as DDPO's published PyTorch code does."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def to_pil(images: Tensor) -> list[Any]:
    """PIL pictures of float images [B, 3, H, W], for processors that want them."""
    from PIL import Image

    pixels = to_uint8(images.detach()).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]
