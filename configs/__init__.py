"""Settings, named presets, and the functions that build objects from them."""

from .build import build_backbone, build_experiment, build_folder, build_held_out, build_reward
from .presets import PRESETS, backpropagating, parse_settings
from .schema import ModelSettings, RunSettings, SamplingSettings, TrainingSettings

__all__ = [
    "PRESETS",
    "ModelSettings",
    "RunSettings",
    "SamplingSettings",
    "TrainingSettings",
    "backpropagating",
    "build_backbone",
    "build_experiment",
    "build_folder",
    "build_held_out",
    "build_reward",
    "parse_settings",
]
