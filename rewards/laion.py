"""The LAION aesthetic predictor, the reward of most published fine-tuning results (arXiv:2305.13301, section 5.2)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import check_batch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_FILES = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth", "model.safetensors")


class LAIONAesthetic(nn.Module):
    """Predicted human rating, about 1 to 10, from CLIP ViT-L/14's image embedding.

    Computed in float32 on the device that the module is moved to. The images are prepared as CLIP's own processor
    does, yet without its rounding to 8 bits, so that gradients reach them.

    Args:
        clip: the CLIP model, a name on the hub or a local folder.
        head: the rating head: a `.pth` or `.safetensors` file, a folder that holds one, or a name on the hub.
    """

    name = "laion_aesthetic"
    differentiable = True

    def __init__(
        self,
        clip: str | Path = "openai/clip-vit-large-patch14",
        head: str | Path = "trl-lib/ddpo-aesthetic-predictor",
    ) -> None:
        super().__init__()
        self.head = AestheticHead()
        self.head.load_state_dict(_read_head(_find_head(head)))
        self.vision, self.projection, self.size = _load_clip(clip)
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> LAIONAesthetic:
        """Stay in evaluation mode whatever a training loop asks: the head has dropout."""
        return super().train(False)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score a batch, see `Reward`."""
        check_batch(images, prompts)
        pixels = clip_crop(images.float(), self.size)
        mean, std = (images.new_tensor(values, dtype=torch.float32)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        embedding = self.projection(self.vision((pixels - mean) / std).pooler_output)
        return self.head(F.normalize(embedding, dim=-1)).squeeze(-1)


class AestheticHead(nn.Module):
    """The published head: five linear layers and no activation between them, so affine once dropout is off."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(768, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """Unit-length embeddings [B, 768] to ratings [B, 1]."""
        return self.layers(embedding)


def clip_crop(images: Tensor, size: int) -> Tensor:
    """Shortest edge to `size` (bicubic, antialiased as PIL's) and the centre cut out, [B, 3, size, size] in [0, 1]."""
    height, width = images.shape[-2:]
    shortest = min(height, width)
    height, width = int(size * height / shortest), int(size * width / shortest)
    # Width, then height, clamped after each as PIL does: an overshoot of the first pass must not reach the second.
    for shape in ((images.shape[-2], width), (height, width)):
        if shape != images.shape[-2:]:
            images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]


def _find_head(head: str | Path) -> Path:
    path = Path(head)
    for candidate in (path, *(path / name for name in HEAD_FILES)):
        if candidate.is_file():
            return candidate
    if isinstance(head, Path) or head.count("/") != 1 or path.suffix or path.exists():
        raise FileNotFoundError(_advice("the aesthetic head", head, "trl-lib/ddpo-aesthetic-predictor"))
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(head, HEAD_FILES[0]))
    except OSError as error:  # offline, or no such repository: the hub's own errors derive from OSError
        raise FileNotFoundError(_advice("the aesthetic head", head, head)) from error


def _read_head(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_clip(clip: str | Path) -> tuple[nn.Module, nn.Module, int]:
    """CLIP's image tower, its projection and its input size; the text tower, a third of the model, is let go."""
    from transformers import CLIPModel

    try:
        model = CLIPModel.from_pretrained(clip, dtype=torch.float32)
    except OSError as error:
        raise FileNotFoundError(_advice("the CLIP model", clip, "openai/clip-vit-large-patch14")) from error
    vision = model.vision_model
    return vision, model.visual_projection, vision.embeddings.image_size


def _advice(what: str, sought: str | Path, repository: str) -> str:
    return (
        f"{what} was looked for at {str(sought)!r} (a local path, else a name on the hub) and not found there: "
        f"fetch it with `hf download {repository}`, or pass the path of a local copy."
    )
