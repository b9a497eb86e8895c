"""DreamSim's features, in which the papers of this field measure diversity.

Fu et al. 2023, "DreamSim: Learning New Dimensions of Human Visual Similarity using Synthetic Data", arXiv:2306.09344.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESOLUTION = 224


class DreamSimFeatures(nn.Module):
    """Frozen embeddings of the `dreamsim` package's ensemble of three ViT-B/16, centred and of unit length.

    The package fetches its weights (0.5 GB) into torch's hub folder on first use.

    Args:
        device: where the network runs.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        super().__init__()
        if importlib.util.find_spec("dreamsim") is None:
            raise ImportError(
                "DreamSim's features need the package dreamsim, which is not installed: pip install dreamsim==0.2.1 "
                "(it brings torchvision, timm and open-clip-torch), or take other features"
            )
        from dreamsim import dreamsim

        cache = Path(torch.hub.get_dir()) / "dreamsim"
        self.network, _ = dreamsim(device=str(device), cache_dir=str(cache))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Float images in [0, 1], [B, 3, H, W], to float32 features [B, D]."""
        return self.network.embed(prepared(images)).reshape(len(images), -1).float()


def prepared(images: Tensor) -> Tensor:
    """Images as the package's own preprocessing gives them, but for its rounding to 8 bits: [B, 3, 224, 224]."""
    size = (RESOLUTION, RESOLUTION)
    return F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
