"""The head of the `StylePreference` reward: the more richly shaded of two drawings, the intact rather than the damaged.

    python -m examples.pretraining.heads

About five minutes on two cores. Bradley-Terry on pairs of two kinds. Two drawings of one thing in different art styles:
colours are changed at random and independently on the two sides, so that brightness, contrast, saturation and hue tell
nothing about the winner; blur and noise, which an image decoded from latents has too, are the same on both sides. And a
drawing against a damaged copy of itself, as a diffusion model might draw it that has lost its shape: without these the
reward is climbed by blurring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from rewards.efficientnet import LiteFeatures
from rewards.style_preference import RESOLUTION, WEIGHTS, StylePreference

from .augment import compose, step_generator
from .emoji import Drawings, load_drawings

# Best first.
RANKING = ("fluent-emoji", "noto", "noto-v1", "twemoji", "fluent-emoji-flat", "fxemoji")


@dataclass(frozen=True)
class Views:
    """What the head is trained on: `copies` random views of each of N drawings."""

    features: Tensor  # [copies, N, 1280]
    damaged: Tensor  # [copies, N, 1280], of the same views damaged
    brightness: Tensor  # [copies, N]
    saturation: Tensor  # [copies, N]


def train_style_preference(
    drawings: Drawings, path: Path = WEIGHTS, *, copies: int = 3, ridge: float = 0.03, seed: int = 0
) -> None:
    """Fit the head on the drawings that are not held out and write it to `path`.

    Args:
        drawings: the whole data set.
        path: the safetensors file to write.
        copies: views of each drawing.
        ridge: weight of the squared norm. The larger, the more evenly the scores spread over the drawings: a reward
            that is to be climbed must not saturate the way a classifier does.
        seed: of the views.
    """
    drawings = drawings.select(~drawings.held_out & np.isin(drawings.style, RANKING))
    views = random_views(drawings, LiteFeatures("lite0", resolution=RESOLUTION), copies=copies, seed=seed)
    save_file(fit_preference(views.features, views.damaged, ranked_pairs(drawings), ridge=ridge), path)


def fit_preference(features: Tensor, damaged: Tensor, pairs: Tensor, *, ridge: float) -> dict[str, Tensor]:
    """The linear head's weights, scaled to scores of mean 0 and standard deviation 1 over `features` [copies, N, 1280].

    Minimises the Bradley-Terry loss over `pairs` (better, worse) [P, 2] of drawings, the same over every drawing and
    its `damaged` copy [copies, N, 1280], and `ridge` times the squared norm: convex, so L-BFGS from zero finds the one
    optimum.
    """
    centre, spread = features.mean((0, 1)), features.std((0, 1)) + 1e-3
    inputs, broken = (features - centre) / spread, (damaged - centre) / spread
    weight = nn.Parameter(torch.zeros(inputs.shape[-1]))
    optimizer = torch.optim.LBFGS([weight], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = inputs @ weight
        styles = F.softplus(scores[:, pairs[:, 1]] - scores[:, pairs[:, 0]]).mean()
        damages = F.softplus(broken @ weight - scores).mean()
        loss = styles + damages + ridge * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scale = weight.detach() / (inputs @ weight.detach()).std() / spread
    return {"weight": scale[None], "bias": -(centre @ scale)[None]}


@torch.no_grad()
def evaluate_style_preference(
    drawings: Drawings, reward: StylePreference, *, copies: int = 2, seed: int = 1
) -> dict[str, float]:
    """Shares of pairs ordered as `RANKING` says, and correlations, over views whose colours are not changed.

    Of a pair of seen styles at least one drawing was held out of training; of `emojione` all were.
    """
    held_out_concepts = drawings.concept[drawings.held_out & (drawings.style != "emojione")]
    drawings = drawings.select(np.isin(drawings.concept, held_out_concepts))
    views = random_views(drawings, reward.features, copies=copies, seed=seed, colours=False)
    scores = reward.score_features(views.features)
    new = torch.from_numpy(drawings.held_out & (drawings.style != "emojione"))

    def share_won(ranking: tuple[str, ...], *, held_out_only: bool) -> float:
        pairs = ranked_pairs(drawings, ranking)
        if held_out_only:
            pairs = pairs[new[pairs].any(1)]
        return (scores[:, pairs[:, 0]] > scores[:, pairs[:, 1]]).float().mean().item()

    result = {
        "pairs of seen styles": share_won(RANKING, held_out_only=True),
        "fluent-emoji over any other": np.mean(
            [share_won(("fluent-emoji", other), held_out_only=True) for other in RANKING[1:]]
        ).item(),
        "fluent-emoji over fluent-emoji-flat": share_won(("fluent-emoji", "fluent-emoji-flat"), held_out_only=True),
    }
    result |= {f"{style} over emojione": share_won((style, "emojione"), held_out_only=False) for style in RANKING}
    damaged = reward.score_features(views.damaged)
    result["drawing over its damaged copy"] = (scores > damaged)[:, new].float().mean().item()
    result["correlation with brightness"] = correlation(scores[:, new], views.brightness[:, new])
    result["correlation with saturation"] = correlation(scores[:, new], views.saturation[:, new])
    return result


def ranked_pairs(drawings: Drawings, ranking: tuple[str, ...] = RANKING) -> Tensor:
    """Indices (better, worse) [P, 2] of drawings of one concept in two styles."""
    by_concept: dict[str, dict[int, int]] = {}
    for index, (concept, style) in enumerate(zip(drawings.concept, drawings.style, strict=True)):
        if style in ranking:
            by_concept.setdefault(concept, {})[ranking.index(style)] = index
    pairs = [pair for ranks in by_concept.values() for pair in combinations([ranks[r] for r in sorted(ranks)], 2)]
    return torch.tensor(pairs)


@torch.no_grad()
def random_views(
    drawings: Drawings, features: nn.Module, *, copies: int, seed: int, colours: bool = True, batch: int = 128
) -> Views:
    """Features of `copies` random views of each drawing; blur and noise are shared by a concept's drawings."""
    rgba = torch.from_numpy(drawings.rgba)
    concept = torch.from_numpy(np.unique(drawings.concept, return_inverse=True)[1])
    columns: list[tuple[Tensor, ...]] = []
    for copy in tqdm(range(copies), desc="views", mininterval=5):
        generator = step_generator(seed, copy)
        blur, noise = torch.rand(2, int(concept.max()) + 1, generator=generator)[:, concept]
        for chunk in torch.arange(len(rgba)).split(batch):
            images = compose(rgba[chunk], generator)
            if colours:
                images = change_colours(images, generator)
            images = soften(images, blur[chunk], 0.03 * noise[chunk], generator)
            damaged = features(damage(images, generator))
            columns.append((features(images), damaged, images.mean((1, 2, 3)), saturation(images)))
    stacked = [torch.cat(column).unflatten(0, (copies, len(rgba))) for column in zip(*columns, strict=True)]
    return Views(*stacked)


def change_colours(images: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue of each image changed at random, independently of each other."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator)

    angle = uniform(-1, 1)
    # Red, green and blue turned about the grey axis, which leaves grey alone.
    cos, sin = angle.cos(), angle.sin() / math.sqrt(3)
    grey = images.mean(1, keepdim=True)
    turned = images * cos + grey * (1 - cos) + sin * (images.roll(1, 1) - images.roll(-1, 1))
    saturated = grey + (turned - grey) * uniform(0.3, 1.6)
    centre = saturated.mean((1, 2, 3), keepdim=True)
    contrasted = centre + (saturated - centre) * uniform(0.5, 1.3)
    return (contrasted * uniform(0.5, 1.3)).clamp(0, 1)


def soften(images: Tensor, sigma: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur of `sigma` pixels and additive noise, both [B]."""
    offsets = torch.arange(-3, 4)
    kernels = (-0.5 * (offsets / sigma.clamp(min=0.1)[:, None]).square()).exp()
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(3, 0)
    blurred = F.pad(images, (3, 3, 3, 3), mode="replicate").flatten(0, 1)[None]
    blurred = F.conv2d(blurred, kernels[:, None, None, :], groups=len(kernels))
    blurred = F.conv2d(blurred, kernels[:, None, :, None], groups=len(kernels)).view_as(images)
    return (blurred + noise[:, None, None, None] * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def damage(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image blurred, warped, or covered with smooth colour noise, or several of these, by a random amount."""
    batch, _, height, width = images.shape
    blur, warp, noise = (torch.rand(batch, 1, 1, 1, generator=generator) for _ in range(3))
    # Of the three amounts the largest is kept at least: every copy is visibly worse.
    amounts = torch.cat([blur, warp, noise], 1)
    blur, warp, noise = (amounts * ((amounts == amounts.amax(1, keepdim=True)) | (amounts > 0.6))).split(1, 1)

    def smooth(channels: int, cells: int) -> Tensor:
        coarse = torch.randn(batch, channels, cells, cells, generator=generator)
        return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)

    grid = F.affine_grid(torch.eye(2, 3).expand(batch, 2, 3), [batch, 1, height, width], align_corners=False)
    shift = (0.05 + 0.15 * warp) * (warp > 0) * smooth(2, 8)
    warped = F.grid_sample(images, grid + shift.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    stained = warped + (0.04 + 0.1 * noise) * (noise > 0) * smooth(3, 16)
    sigma = (1 + 2 * blur.flatten()) * (blur.flatten() > 0)
    return soften(stained.clamp(0, 1), sigma, torch.zeros(batch), generator)


def saturation(images: Tensor) -> Tensor:
    """Mean over pixels of HSV's saturation, [B]."""
    highest, lowest = images.amax(1), images.amin(1)
    return ((highest - lowest) / highest.clamp(min=1e-3)).mean((1, 2))


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation over all elements."""
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


if __name__ == "__main__":
    data = load_drawings(Path(".cache/pretraining"))
    train_style_preference(data)
    for key, value in evaluate_style_preference(data, StylePreference()).items():
        print(f"{key}: {value:.3f}")
