"""Settings, named presets, and the functions that build objects from them."""

from .build import build_backbone, build_experiment, build_folder, build_held_out, build_reward
from .experiments import EXPERIMENTS, with_experiment
from .presets import PRESETS, backpropagating, parse_settings
from .schema import ModelSettings, RunSettings, SamplingSettings, TrainingSettings

__all__ = [
    "EXPERIMENTS",
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
    "with_experiment",
]
