"""Human Preference Score v2 and v2.1 (Wu et al. 2023, arXiv:2306.09341): ViT-H/14 CLIPs fine-tuned on preferences."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from .base import RewardCard, Scorer
from .clip import CLIP_VIT_H, ImageTower, TextTower
from .open_clip import from_open_clip
from .weights import explained, fill, find_weights, load_tokenizer, read_weights

HPS = "xswu/HPSv2"


class HPSv2(Scorer):
    """Cosine of the fine-tuned CLIP's embeddings of picture and prompt, without its logit scale, as in the package.

    Pictures are resized so that the longer edge fits and padded with black, as in the authors' code: nothing is cut.

    Args:
        weights: the checkpoint in OpenCLIP's format: a file, a folder that holds it, or a name on the hub.
        base: where configuration and tokenizer of the original CLIP are: a name on the hub or a local folder. Its
            weights are not needed.
    """

    name: ClassVar[str] = "hpsv2"
    differentiable: ClassVar[bool] = True
    card: ClassVar[RewardCard] = RewardCard(
        typical_range=(0.2, 0.35),
        source="Wu et al. 2023, arXiv:2306.09341",
        licence="Apache-2.0",
        needs="transformers; HPS v2 (CLIP ViT-H/14)",
        download_mb=1980,
    )
    file: ClassVar[str] = "HPS_v2_compressed.pt"

    def __init__(self, weights: str | Path = HPS, base: str | Path = CLIP_VIT_H) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        path = find_weights("the HPS checkpoint", weights, [self.file], published=f"{HPS} {self.file}")
        only = f"{CLIP_VIT_H} --include '*.json' '*.txt'"
        with explained("the configuration of CLIP ViT-H/14", base, only):
            config = CLIPConfig.from_pretrained(base)
        checkpoint = read_weights(path)
        converted = from_open_clip(checkpoint.get("state_dict", checkpoint))  # type: ignore[arg-type]
        clip = fill(CLIPModel(config), converted, what=f"the HPS checkpoint {path}")
        self.image_tower, self.text_tower = ImageTower(clip), TextTower(clip)
        self.tokenizer = load_tokenizer(base, published=only)
        self.train(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]."""
        image = self.image_tower(fit_and_pad(images, self.image_tower.size))
        return (image * self.text_tower(self.tokenizer, prompts)).sum(-1)


class HPSv21(HPSv2):
    """Version 2.1: the same network trained on better data."""

    name: ClassVar[str] = "hpsv2.1"
    card: ClassVar[RewardCard] = RewardCard(
        typical_range=(0.2, 0.35),
        source="Wu et al. 2023, arXiv:2306.09341",
        licence="Apache-2.0",
        needs="transformers; HPS v2.1 (CLIP ViT-H/14)",
        download_mb=1980,
    )
    file: ClassVar[str] = "HPS_v2.1_compressed.pt"


def fit_and_pad(images: Tensor, size: int) -> Tensor:
    """Longest edge to `size` (bicubic, antialiased), the rest black, [B, 3, size, size]."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        height, width = round(height * scale), round(width * scale)
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))
