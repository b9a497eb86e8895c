"""The denoising process of a text-to-image diffusion model as a reinforcement-learning environment."""

from .backbones import StableDiffusionBackbone
from .conditioning import ConditioningCache
from .correction import CorrectionUNet
from .embedded import embedded_folder
from .env import DenoisingEnv
from .gym import GymDenoisingEnv
from .lora import LoRA
from .prompts import load_prompts, prompt_set
from .samplers import DDIMSampler, GaussianStep, NoisingStep, Reduction, StepCoefficients, normal_kl, normal_log_prob
from .scoring import checked_reward

__all__ = [
    "ConditioningCache",
    "CorrectionUNet",
    "DDIMSampler",
    "DenoisingEnv",
    "GaussianStep",
    "GymDenoisingEnv",
    "LoRA",
    "NoisingStep",
    "Reduction",
    "StableDiffusionBackbone",
    "StepCoefficients",
    "checked_reward",
    "embedded_folder",
    "load_prompts",
    "normal_kl",
    "normal_log_prob",
    "prompt_set",
]
