"""Pictures and their captions, as the denoiser learns them: drawings of one thing, and composed scenes.

A caption is "a(n) <name>", in part of the pictures with a word for the art style ("a glossy cat") or for the
background ("a cat on a red background"). Scenes put an animal beside the thing that an activity of DDPO's prompts
needs. Half of the animals are never seen in a scene: what the model makes of "a dog riding a bike" is generalisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion_env.prompts import ACTIVITIES, ANIMALS, with_article

from .augment import compose, over, place, random_flips, step_generator
from .emoji import Drawings

STYLE_WORDS = {
    "fluent-emoji": "glossy",
    "fluent-emoji-flat": "flat",
    "noto": "shaded",
    "noto-v1": "rounded",
    "fxemoji": "bold",
    "twemoji": "simple",
}
COLOURS = {
    "white": (1.0, 1.0, 1.0),
    "grey": (0.6, 0.6, 0.6),
    "black": (0.08, 0.08, 0.08),
    "red": (0.85, 0.2, 0.2),
    "orange": (0.95, 0.6, 0.2),
    "yellow": (0.95, 0.88, 0.35),
    "green": (0.35, 0.7, 0.35),
    "blue": (0.3, 0.5, 0.9),
    "purple": (0.6, 0.35, 0.8),
    "pink": (0.97, 0.65, 0.8),
    "brown": (0.55, 0.38, 0.25),
}
ANIMALS_IN_SCENES = ANIMALS[::2]


@dataclass(frozen=True)
class Layout:
    """Where a scene's animal and thing go: sizes as shares of the picture, centres in [-1, 1] (x right, y down)."""

    concept: str  # Unicode code point of the thing
    thing_size: float
    thing_centre: tuple[float, float]
    animal_size: float
    animal_centre: tuple[float, float]


LAYOUTS = {
    "washing the dishes": Layout("1f37d", 0.5, (0.45, 0.48), 0.72, (-0.22, -0.2)),
    "riding a bike": Layout("1f6b2", 0.64, (0.0, 0.36), 0.6, (0.0, -0.38)),
    "playing chess": Layout("265f", 0.5, (0.5, 0.46), 0.72, (-0.25, -0.1)),
}
assert set(LAYOUTS) == set(ACTIVITIES)


@dataclass(frozen=True)
class Mixture:
    """How many pictures are made of each drawing, and what share of the training batches each kind has."""

    animal_copies: int = 24
    scene_copies: int = 6
    other_copies: int = 2
    animal_share: float = 0.68
    scene_share: float = 0.08
    scale: tuple[float, float] = (0.9, 1.0)
    """Size of a drawing: nearly filling the picture, so that shapes are learned soon."""


@dataclass(frozen=True)
class Pictures:
    """A chunk of the training set: images [B, 3, 64, 64], a caption each, and how often each is to be drawn [B]."""

    images: Tensor
    captions: list[str]
    weight: Tensor


def training_pictures(drawings: Drawings, mixture: Mixture, *, seed: int, chunk: int = 256) -> Iterator[Pictures]:
    """All pictures of the training set, in chunks; held-out drawings take no part.

    Weights add up to one: animals share alike, however many drawings each has, and so do scenes and other things.
    """
    drawings = drawings.select(~drawings.held_out)
    rgba = torch.from_numpy(drawings.rgba)
    is_animal = drawings.animal >= 0
    per_animal = np.bincount(drawings.animal[is_animal], minlength=len(ANIMALS))
    drawings_alike = np.maximum(per_animal[drawings.animal], 1)
    other_share = 1 - mixture.animal_share - mixture.scene_share
    weight = np.where(
        is_animal,
        mixture.animal_share / (np.count_nonzero(per_animal) * drawings_alike * mixture.animal_copies),
        other_share / (np.count_nonzero(~is_animal) * mixture.other_copies),
    )
    index = np.repeat(np.arange(len(rgba)), np.where(is_animal, mixture.animal_copies, mixture.other_copies))
    for step, chosen in enumerate(torch.from_numpy(index).split(chunk)):
        generator = step_generator(seed, step)
        colour_names, background = random_backgrounds(len(chosen), generator)
        images = compose(rgba[chosen], generator, scale=mixture.scale, background=background)
        names = drawings.caption[chosen.numpy()].tolist()
        styles = drawings.style[chosen.numpy()].tolist()
        captions = describe(names, styles, colour_names, generator)
        yield Pictures(images, captions, torch.from_numpy(weight[chosen.numpy()]))
    scenes = list_scenes(drawings) * mixture.scene_copies
    for step, start in enumerate(range(0, len(scenes), chunk)):
        generator = step_generator(seed + 1, step)
        part = scenes[start : start + chunk]
        images = compose_scenes(rgba, part, generator)
        captions = [f"{with_article(ANIMALS[drawings.animal[animal]])} {activity}" for animal, _, activity in part]
        yield Pictures(images, captions, torch.full((len(part),), mixture.scene_share / len(scenes)))


def random_backgrounds(count: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """Names and colours [B, 3] of plain backgrounds: half white, half another colour of `COLOURS`, varied a little."""
    palette = torch.tensor(list(COLOURS.values()))
    coloured = torch.rand(count, generator=generator) < 0.5
    chosen = torch.randint(1, len(palette), (count,), generator=generator) * coloured
    shift = 0.16 * (torch.rand(count, 3, generator=generator) - 0.5) * coloured[:, None]
    names = list(COLOURS)
    return [names[index] for index in chosen.tolist()], (palette[chosen] + shift).clamp(0, 1)


def describe(captions: list[str], styles: list[str], colours: list[str], generator: torch.Generator) -> list[str]:
    """Captions with the style's word in a fifth of them and the background in a quarter, independently."""
    say_style, say_colour = torch.rand(2, len(captions), generator=generator)
    result = []
    for caption, style, colour, p, q in zip(captions, styles, colours, say_style, say_colour, strict=True):
        if p < 0.2:
            caption = with_article(f"{STYLE_WORDS[style]} {caption.split(' ', 1)[1]}")
        result.append(f"{caption} on a {colour} background" if q < 0.25 else caption)
    return result


def list_scenes(drawings: Drawings) -> list[tuple[int, int, str]]:
    """(animal drawing, thing drawing, activity): every drawing of `ANIMALS_IN_SCENES` with a thing of its own style.

    A style that lacks the thing borrows it from the first style that has it.
    """
    things: dict[str, dict[str, int]] = {}
    for index, (concept, style) in enumerate(zip(drawings.concept, drawings.style, strict=True)):
        things.setdefault(concept, {})[style] = index
    scenes = []
    for index, animal in enumerate(drawings.animal):
        if animal < 0 or ANIMALS[animal] not in ANIMALS_IN_SCENES:
            continue
        for activity, layout in LAYOUTS.items():
            if candidates := things.get(layout.concept):
                thing = candidates.get(drawings.style[index], next(iter(candidates.values())))
                scenes.append((index, thing, activity))
    return scenes


def compose_scenes(rgba: Tensor, scenes: list[tuple[int, int, str]], generator: torch.Generator) -> Tensor:
    """Images [B, 3, H, W] of `list_scenes`' entries: the animal over the thing, sizes and places varied a little."""
    animal, thing = (torch.tensor(column) for column in list(zip(*scenes, strict=True))[:2])
    layouts = [LAYOUTS[activity] for _, _, activity in scenes]
    count = len(scenes)
    flip = random_flips(count, generator)

    def placed(drawing: Tensor, sizes: list[float], centres: list[tuple[float, float]]) -> Tensor:
        size = torch.tensor(sizes) * (0.95 + 0.1 * torch.rand(count, generator=generator))
        centre = torch.tensor(centres) + 0.06 * (torch.rand(count, 2, generator=generator) - 0.5)
        return place(rgba[drawing], size, torch.stack([centre[:, 0] * flip, centre[:, 1]], 1), flip)

    _, background = random_backgrounds(count, generator)
    things = placed(thing, [layout.thing_size for layout in layouts], [layout.thing_centre for layout in layouts])
    animals = placed(animal, [layout.animal_size for layout in layouts], [layout.animal_centre for layout in layouts])
    return over(animals, over(things, background[:, :, None, None]))
