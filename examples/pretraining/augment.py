"""Drawings on backgrounds: what every model of the embedded pipeline is trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compose(rgba: Tensor, generator: torch.Generator, *, scale: tuple[float, float] = (0.75, 1.0)) -> Tensor:
    """Place each drawing, flipped, scaled and shifted at random, on a white or a random plain background.

    Args:
        rgba: uint8 [B, H, W, 4], straight alpha.
        generator: source of all randomness, so that step n of a resumed run draws what it would have drawn.
        scale: least and greatest size of the drawing as a share of the picture.

    Returns:
        float32 images in [0, 1], [B, 3, H, W].
    """
    batch = rgba.shape[0]
    drawing = rgba.permute(0, 3, 1, 2).float() / 255
    premultiplied = torch.cat([drawing[:, :3] * drawing[:, 3:], drawing[:, 3:]], 1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    size = scale[0] + (scale[1] - scale[0]) * uniform(batch)
    flip = torch.where(uniform(batch) < 0.5, -1.0, 1.0)
    shift = (2 * uniform(batch, 2) - 1) * (1 - size)[:, None]
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = flip / size, 1 / size
    theta[:, 0, 2], theta[:, 1, 2] = -shift[:, 0] * flip / size, -shift[:, 1] / size
    grid = F.affine_grid(theta, list(premultiplied.shape), align_corners=False)
    placed = F.grid_sample(premultiplied, grid, mode="bilinear", align_corners=False)
    background = torch.where(uniform(batch, 1) < 0.5, torch.ones(batch, 3), uniform(batch, 3))
    return placed[:, :3] + (1 - placed[:, 3:]) * background[:, :, None, None]


def step_generator(seed: int, step: int) -> torch.Generator:
    """Randomness of one training step, a function of seed and step alone: resuming needs no saved state."""
    return torch.Generator().manual_seed((seed << 32) + step)
