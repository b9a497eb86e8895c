"""CLIP's image embedding as features, for diversity and distances between sets of images."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .laion import clip_crop


class CLIPFeatures(nn.Module):
    """Unit-length image embeddings of CLIP, in float32: squared distances are 2 (1 - cosine).

    Args:
        clip: the CLIP model, a name on the hub or a local folder.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: str | Path = "openai/clip-vit-large-patch14") -> None:
        super().__init__()
        from transformers import CLIPModel
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        try:
            model = CLIPModel.from_pretrained(clip, dtype=torch.float32)
        except OSError as error:
            raise FileNotFoundError(
                f"the CLIP model was looked for at {str(clip)!r} (a local path, else a name on the hub) and not found "
                "there: fetch it with `hf download`, or pass the path of a local copy."
            ) from error
        self.vision, self.projection = model.vision_model, model.visual_projection  # the text tower is let go
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Float images in [0, 1], [B, 3, H, W], to embeddings [B, D]."""
        pixels = clip_crop(images.float(), self.vision.embeddings.image_size)
        return F.normalize(self.projection(self.vision((pixels - self.mean) / self.std).pooler_output), dim=-1)
