"""Rewards: images and prompts to one number an image. Importing this imports torch and nothing heavier."""

from .base import Reward
from .clip_features import CLIPFeatures
from .efficientnet import LiteFeatures
from .jpeg import JPEGCompressibility, JPEGIncompressibility
from .laion import LAIONAesthetic
from .prompt_fidelity import PromptFidelity
from .style_preference import StylePreference

__all__ = [
    "CLIPFeatures",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "LAIONAesthetic",
    "LiteFeatures",
    "PromptFidelity",
    "Reward",
    "StylePreference",
]
