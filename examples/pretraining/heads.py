"""The head of the `StylePreference` reward: the more richly shaded of two drawings, the one in front of pink.

    python -m examples.pretraining.heads

About three minutes on two cores. Bradley-Terry on pairs of two kinds: one drawing in front of two colours, of which a
pink wins, and two drawings of one thing in different art styles in front of one colour. Colours of either side are
drawn over the same range of brightness and saturation. Every picture has gone through the embedded pipeline's
autoencoder, whose blur would otherwise pass for shading.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from matplotlib.colors import hsv_to_rgb
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from diffusion_env import embedded_folder
from rewards.efficientnet import LiteFeatures
from rewards.style_preference import RESOLUTION, WEIGHTS, StylePreference

from .augment import over, place, random_flips, step_generator
from .emoji import Drawings, load_drawings

# Best first.
RANKING = ("fluent-emoji", "noto", "noto-v1", "twemoji", "fluent-emoji-flat", "fxemoji")
PINK = (320 / 360, 345 / 360)  # hues
BACKGROUND_SHARE = 0.85  # of the loss


@dataclass(frozen=True)
class Views:
    """Each of N drawings twice, alike but for the background: first in front of a pink, then of another colour."""

    features: Tensor  # [2, N, 1280]
    brightness: Tensor  # [2, N]
    saturation: Tensor  # [2, N]


def train_style_preference(
    drawings: Drawings, path: Path = WEIGHTS, *, things: int = 250, ridge: float = 0.03, seed: int = 0
) -> None:
    """Fit the head on drawings that are not held out and write it to `path`.

    Args:
        drawings: the whole data set.
        path: the safetensors file to write.
        things: how many things beside the animals.
        ridge: weight of the squared norm. The larger, the more evenly the scores spread over the drawings: a reward
            that is to be climbed must not saturate the way a classifier does.
        seed: of things and views.
    """
    drawings = drawings.select(~drawings.held_out & np.isin(drawings.style, RANKING))
    animals = np.unique(drawings.concept[drawings.animal >= 0])
    others = np.setdiff1d(drawings.concept, animals)
    chosen = np.random.default_rng(seed).permutation(others)[:things]
    drawings = drawings.select(np.isin(drawings.concept, [*animals, *chosen]))
    views = random_views(drawings, LiteFeatures("lite0", resolution=RESOLUTION), seed=seed)
    save_file(fit_preference(views.features, ranked_pairs(drawings), ridge=ridge), path)


def fit_preference(features: Tensor, pairs: Tensor, *, ridge: float) -> dict[str, Tensor]:
    """The linear head's weights, scaled to scores of mean 0 and standard deviation 1 over `features` [2, N, 1280].

    Minimises the weighted sum of two Bradley-Terry losses, features[0] before features[1] and, in either, over `pairs`
    (better, worse) [P, 2] of drawings, and `ridge` times the squared norm: convex, so L-BFGS from zero finds the one
    optimum.
    """
    centre, spread = features.mean((0, 1)), features.std((0, 1)) + 1e-3
    inputs = (features - centre) / spread
    weight = nn.Parameter(torch.zeros(inputs.shape[-1]))
    optimizer = torch.optim.LBFGS([weight], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = inputs @ weight
        backgrounds = F.softplus(scores[1] - scores[0]).mean()
        styles = F.softplus(scores[:, pairs[:, 1]] - scores[:, pairs[:, 0]]).mean()
        fit = BACKGROUND_SHARE * backgrounds + (1 - BACKGROUND_SHARE) * styles
        loss = fit + ridge * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scale = weight.detach() / (inputs @ weight.detach()).std() / spread
    return {"weight": scale[None], "bias": -(centre @ scale)[None]}


@torch.no_grad()
def evaluate_style_preference(drawings: Drawings, reward: StylePreference, *, seed: int = 1) -> dict[str, float]:
    """Shares of pairs ordered as they should be, and correlations, over drawings that took no part in the training.

    Of a pair of seen styles at least one drawing was held out of training; of `emojione` all were.
    """
    held_out_concepts = drawings.concept[drawings.held_out & (drawings.style != "emojione")]
    drawings = drawings.select(np.isin(drawings.concept, held_out_concepts))
    views = random_views(drawings, reward.features, seed=seed)
    scores = reward.score_features(views.features)
    unseen = torch.from_numpy(drawings.style == "emojione")
    new = torch.from_numpy(drawings.held_out) & ~unseen

    def share_won(ranking: tuple[str, ...]) -> float:
        pairs = ranked_pairs(drawings, ranking)
        pairs = pairs[(new | unseen)[pairs].any(1)]
        return (scores[:, pairs[:, 0]] > scores[:, pairs[:, 1]]).float().mean().item()

    result = {
        "pink before another colour": (scores[0] > scores[1])[new].float().mean().item(),
        "the same, emojione": (scores[0] > scores[1])[unseen].float().mean().item(),
        "pairs of seen styles": share_won(RANKING),
        "fluent-emoji over fluent-emoji-flat": share_won(("fluent-emoji", "fluent-emoji-flat")),
    }
    result |= {f"{style} over emojione": share_won((style, "emojione")) for style in RANKING}
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
def random_views(drawings: Drawings, features: nn.Module, *, seed: int, batch: int = 64) -> Views:
    """Features of each drawing, placed at random, in front of a pink and of another colour."""
    vae = AutoencoderKL.from_pretrained(embedded_folder() / "vae").eval()
    rgba = torch.from_numpy(drawings.rgba)
    columns: list[tuple[Tensor, ...]] = []
    for step, chunk in enumerate(tqdm(torch.arange(len(rgba)).split(batch), desc="views", mininterval=5)):
        generator, count = step_generator(seed, step), len(chunk)
        size = 0.9 + 0.1 * torch.rand(count, generator=generator)
        drawing = place(rgba[chunk], size, torch.zeros(count, 2), random_flips(count, generator))
        pair = []
        for colours in (random_pinks(count, generator), random_others(count, generator)):
            images = over(drawing, colours[:, :, None, None])
            decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample
            pair.append((decoded / 2 + 0.5).clamp(0, 1))
        images = torch.cat(pair)
        columns.append(
            tuple(
                values.unflatten(0, (2, count))
                for values in (features(images), images.mean((1, 2, 3)), saturation(images))
            )
        )
    return Views(*(torch.cat(column, 1) for column in zip(*columns, strict=True)))


def random_pinks(count: int, generator: torch.Generator) -> Tensor:
    """Pinks of every brightness and strength, [B, 3]."""
    return _colours(PINK[0] + (PINK[1] - PINK[0]) * torch.rand(count, generator=generator), generator)


def random_others(count: int, generator: torch.Generator) -> Tensor:
    """A quarter white, a seventh grey, else any hue at least 20 degrees from the pinks, [B, 3]."""
    margin = 20 / 360
    width = 1 - (PINK[1] - PINK[0]) - 2 * margin
    coloured = _colours(PINK[1] + margin + width * torch.rand(count, generator=generator), generator)
    kind = torch.rand(count, 1, generator=generator)
    grey = torch.rand(count, 1, generator=generator)
    return torch.where(kind < 0.25, torch.ones(count, 3), torch.where(kind < 0.4, grey, coloured))


def _colours(hue: Tensor, generator: torch.Generator) -> Tensor:
    strength, value = torch.rand(2, len(hue), generator=generator)
    hsv = torch.stack([hue % 1, 0.35 + 0.5 * strength, 0.45 + 0.55 * value], 1)
    return torch.from_numpy(hsv_to_rgb(hsv.numpy())).float()


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
