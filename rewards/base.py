"""What a reward is: a callable from images and their prompts to one number an image."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


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
