"""What test_workers.py has made in other processes."""

from pathlib import Path

import torch

from agents import make_policy
from diffusion_env import DenoisingEnv, LoRA, StableDiffusionBackbone
from rewards import Mix

STEPS, PROMPTS = 3, ("a cat", "a goat", "a horse")


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) + 0.1 * torch.tensor([float(len(prompt)) for prompt in prompts])


def make(folder: Path, images: int, seed: int):
    """Environment and policy; the adapter's weights are random numbers that no seed of a worker gives."""
    backbone = StableDiffusionBackbone.from_pretrained(folder, guidance_scale=2.0, lora=LoRA(rank=2))
    policy = make_policy(backbone, backbone.sampler(STEPS), backbone.conditioning(PROMPTS))
    reward = Mix([(brightness, 1.0), (redness, 0.5)])
    env = DenoisingEnv(backbone, STEPS, reward, PROMPTS, batch_size=images, samples_per_prompt=2, seed=seed)
    return env, policy
