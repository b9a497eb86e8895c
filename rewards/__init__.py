"""Rewards: images and prompts to one number an image. Importing this imports torch and nothing heavier."""

from .base import NamedReward, Reward, RewardCard
from .clip_features import CLIPFeatures
from .clip_score import CLIPScore
from .combine import Clip, Mix, Scale, Threshold
from .dreamsim import DreamSimFeatures
from .efficientnet import LiteFeatures
from .hps import HPSv2, HPSv21
from .image_reward import ImageReward
from .jpeg import JPEGCompressibility, JPEGIncompressibility
from .laion import LAIONAesthetic
from .llava import LLaVABERTScore, LLaVACounting
from .pick_score import PickScore
from .prompt_alignment import PromptAlignment
from .prompt_fidelity import PromptFidelity
from .registry import REWARDS, make_reward
from .remote import HTTPReward
from .style_preference import StylePreference

__all__ = [
    "REWARDS",
    "CLIPFeatures",
    "CLIPScore",
    "Clip",
    "DreamSimFeatures",
    "HPSv2",
    "HPSv21",
    "HTTPReward",
    "ImageReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "LAIONAesthetic",
    "LLaVABERTScore",
    "LLaVACounting",
    "LiteFeatures",
    "Mix",
    "NamedReward",
    "PickScore",
    "PromptAlignment",
    "PromptFidelity",
    "Reward",
    "RewardCard",
    "Scale",
    "StylePreference",
    "Threshold",
    "make_reward",
]
