"""All rewards of this package by name: the one list that settings, the table and the server read."""

from __future__ import annotations

from .base import NamedReward
from .clip_score import CLIPScore
from .hps import HPSv2, HPSv21
from .image_reward import ImageReward
from .jpeg import JPEGCompressibility, JPEGIncompressibility
from .laion import LAIONAesthetic
from .llava import LLaVABERTScore, LLaVACounting
from .pick_score import PickScore
from .prompt_alignment import PromptAlignment
from .style_preference import StylePreference

_ALL: tuple[type[NamedReward], ...] = (
    StylePreference,
    PromptAlignment,
    JPEGCompressibility,
    JPEGIncompressibility,
    LAIONAesthetic,
    CLIPScore,
    PickScore,
    HPSv2,
    HPSv21,
    ImageReward,
    LLaVABERTScore,
    LLaVACounting,
)
REWARDS: dict[str, type[NamedReward]] = {reward.name: reward for reward in _ALL}


def make_reward(name: str) -> NamedReward:
    """The reward called `name` with its published weights, on the CPU.

    Raises:
        ValueError: there is none of that name.
        FileNotFoundError: its weights are not there; the message says which command fetches them.
    """
    if name not in REWARDS:
        raise ValueError(f"there is no reward {name!r}; the names are {', '.join(REWARDS)}.")
    return REWARDS[name]()


def table() -> str:
    """The rewards with their cards, a line each, columns aligned."""
    rows = [("name", "gradient", "typical", "download", "needs", "licence", "source")]
    for name, reward in REWARDS.items():
        card = reward.card
        low, high = card.typical_range
        size = f"{card.download_mb / 1000:.1f} GB" if card.download_mb else "-"
        gradient = "yes" if reward.differentiable else "no"
        rows.append((name, gradient, f"{low:g} to {high:g}", size, card.needs, card.licence, card.source))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
