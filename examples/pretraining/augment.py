"""Drawings on backgrounds: what every model of the embedded pipeline is trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compose(
    rgba: Tensor,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = (0.75, 1.0),
    background: Tensor | None = None,
) -> Tensor:
    """Place each drawing, flipped, scaled and shifted at random, on a plain background.

    Args:
        rgba: uint8 [B, H, W, 4], straight alpha.
        generator: source of all randomness, so that step n of a resumed run draws what it would have drawn.
        scale: least and greatest size of the drawing as a share of the picture.
        background: colours in [0, 1], [B, 3]; by default half are white, half drawn uniformly.

    Returns:
        float32 images in [0, 1], [B, 3, H, W].
    """
    batch = rgba.shape[0]
    size = scale[0] + (scale[1] - scale[0]) * torch.rand(batch, generator=generator)
    flip = random_flips(batch, generator)
    shift = (2 * torch.rand(batch, 2, generator=generator) - 1) * (1 - size)[:, None]
    if background is None:
        white = torch.rand(batch, 1, generator=generator) < 0.5
        background = torch.where(white, torch.ones(batch, 3), torch.rand(batch, 3, generator=generator))
    return over(place(rgba, size, shift, flip), background[:, :, None, None])


def place(rgba: Tensor, size: Tensor, centre: Tensor, flip: Tensor) -> Tensor:
    """Drawings scaled by `size` [B], mirrored where `flip` [B] is -1, moved to `centre` [B, 2] within [-1, 1].

    Returns:
        float32 premultiplied RGBA, [B, 4, H, W].
    """
    drawing = rgba.permute(0, 3, 1, 2).float() / 255
    premultiplied = torch.cat([drawing[:, :3] * drawing[:, 3:], drawing[:, 3:]], 1)
    theta = torch.zeros(len(rgba), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = flip / size, 1 / size
    theta[:, 0, 2], theta[:, 1, 2] = -centre[:, 0] * flip / size, -centre[:, 1] / size
    grid = F.affine_grid(theta, list(premultiplied.shape), align_corners=False)
    return F.grid_sample(premultiplied, grid, mode="bilinear", align_corners=False)


def over(placed: Tensor, picture: Tensor) -> Tensor:
    """Premultiplied RGBA `placed` [B, 4, H, W] painted over an opaque `picture` [B, 3, H or 1, W or 1]."""
    return placed[:, :3] + (1 - placed[:, 3:]) * picture


def random_flips(batch: int, generator: torch.Generator) -> Tensor:
    """1 or -1 with equal chance, [B]."""
    return torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Randomness of one training step, a function of seed and step alone: resuming needs no saved state."""
    return torch.Generator().manual_seed((seed << 32) + step)


def soften(images: Tensor, sigma: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur of `sigma` pixels and additive noise, both [B]."""
    offsets = torch.arange(-3, 4)
    kernels = (-0.5 * (offsets / sigma.clamp(min=0.1)[:, None]).square()).exp()
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(3, 0)
    blurred = F.pad(images, (3, 3, 3, 3), mode="replicate").flatten(0, 1)[None]
    blurred = F.conv2d(blurred, kernels[:, None, None, :], groups=len(kernels))
    blurred = F.conv2d(blurred, kernels[:, None, :, None], groups=len(kernels)).view_as(images)
    return (blurred + noise[:, None, None, None] * torch.randn(images.shape, generator=generator)).clamp(0, 1)
