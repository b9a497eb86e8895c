"""CLIP's two towers, shared by the rewards that use the same model, and its preprocessing as a function of tensors.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weights import load_model, shared

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_VIT_L = "openai/clip-vit-large-patch14"
CLIP_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
MAX_TOKENS = 77


class ImageTower(nn.Module):
    """Images to embeddings of unit length."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision, self.projection = model.vision_model, model.visual_projection
        self.size = self.vision.embeddings.image_size

    def forward(self, pixels: Tensor) -> Tensor:
        """Float32 images in [0, 1], [B, 3, size, size] (see `clip_crop`), to [B, D]."""
        return F.normalize(self.projection(self.vision(normalise(pixels)).pooler_output), dim=-1)


class TextTower(nn.Module):
    """Prompts to embeddings of unit length; holds the scale that the model was trained to multiply cosines by."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text, self.projection, self.logit_scale = model.text_model, model.text_projection, model.logit_scale

    @torch.no_grad()
    def forward(self, tokenizer: Any, prompts: list[str]) -> Tensor:
        """Embeddings [B, D]; each different prompt is encoded once, cut to 77 tokens."""
        different = list(dict.fromkeys(prompts))
        tokens = tokenizer(different, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        device = self.logit_scale.device
        states = self.text(tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device))
        embedding = F.normalize(self.projection(states.pooler_output), dim=-1)
        return embedding[[different.index(prompt) for prompt in prompts]]


def load_clip(source: str | Path, *, what: str = "the CLIP model", published: str = CLIP_VIT_L) -> Any:
    """A whole `CLIPModel`, frozen, in float32; hold it while both of its towers are taken, and it is read once."""
    from transformers import CLIPModel

    key = ("clip", str(source))
    return shared(key, lambda: load_model(CLIPModel, source, what=what, published=published))


def image_tower(source: str | Path) -> ImageTower:
    """The image tower of the CLIP model at `source`; whoever asks again gets the same module."""
    return shared(("clip image", str(source)), lambda: ImageTower(load_clip(source)))


def text_tower(source: str | Path) -> TextTower:
    """The text tower of the CLIP model at `source`; whoever asks again gets the same module."""
    return shared(("clip text", str(source)), lambda: TextTower(load_clip(source)))


def normalise(pixels: Tensor) -> Tensor:
    """Images in [0, 1], [B, 3, H, W], with CLIP's mean and standard deviation of each channel taken out."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def clip_crop(images: Tensor, size: int) -> Tensor:
    """Shortest edge to `size` (bicubic, antialiased as PIL's) and the centre cut out, [B, 3, size, size] in [0, 1].

    What `CLIPImageProcessor` does, but for its rounding to 8 bits, which would stop gradients: each value is within
    1.5 / 255 of the processor's.
    """
    height, width = images.shape[-2:]
    shortest = min(height, width)
    height, width = int(size * height / shortest), int(size * width / shortest)
    # Width, then height, clamped after each as PIL does: an overshoot of the first pass must not reach the second.
    for shape in ((images.shape[-2], width), (height, width)):
        if shape != images.shape[-2:]:
            images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]
