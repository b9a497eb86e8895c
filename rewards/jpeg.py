"""JPEG file size as a reward, as in DDPO (Black et al. 2023, arXiv:2305.13301): kB = 1000 bytes, quality 95."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import RewardCard, check_batch, to_uint8


@dataclass(frozen=True)
class JPEGIncompressibility:
    """Size in kB of each image saved by PIL as a JPEG of this quality, with PIL's default chroma subsampling."""

    quality: int = 95
    name: ClassVar[str] = "jpeg-incompressibility"
    differentiable: ClassVar[bool] = False
    card: ClassVar[RewardCard] = RewardCard(
        typical_range=(0.0, 250.0),  # at 512 x 512 pixels
        source="Black et al. 2023, arXiv:2305.13301",
        licence="no weights",
        needs="pillow",
        download_mb=0,
    )

    def __post_init__(self) -> None:
        _check_quality(self.quality)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score a batch, see `Reward`."""
        check_batch(images, prompts)
        return jpeg_kilobytes(images, self.quality)


@dataclass(frozen=True)
class JPEGCompressibility:
    """Minus the size that `JPEGIncompressibility` rewards."""

    quality: int = 95
    name: ClassVar[str] = "jpeg-compressibility"
    differentiable: ClassVar[bool] = False
    card: ClassVar[RewardCard] = RewardCard(
        typical_range=(-250.0, 0.0),  # at 512 x 512 pixels
        source="Black et al. 2023, arXiv:2305.13301",
        licence="no weights",
        needs="pillow",
        download_mb=0,
    )

    def __post_init__(self) -> None:
        _check_quality(self.quality)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score a batch, see `Reward`."""
        check_batch(images, prompts)
        return -jpeg_kilobytes(images, self.quality)


def jpeg_kilobytes(images: Tensor, quality: int) -> Tensor:
    """JPEG sizes of float images [B, 3, H, W] in thousands of bytes, float32 [B] on the images' device."""
    pixels = to_uint8(images.detach()).permute(0, 2, 3, 1).cpu().numpy()
    with ThreadPoolExecutor() as pool:  # PIL frees the interpreter lock while it encodes
        sizes = list(pool.map(partial(_jpeg_bytes, quality=quality), pixels))
    return torch.tensor(sizes, dtype=torch.float32, device=images.device) / 1000


def _jpeg_bytes(pixels: Any, quality: int) -> int:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.tell()


def _check_quality(quality: int) -> None:
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality is {quality}, expected 1 (smallest file) to 100 (best image); DDPO uses 95.")
