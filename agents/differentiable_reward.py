"""The reward as a differentiable function of clean latents: decode, score; and whether a gradient comes back at all."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_env import checked_reward
from diffusion_env.scoring import Reward

from .policy import DenoisingMean


def score(reward: Reward, denoiser: DenoisingMean, clean: Tensor, prompt_id: Tensor) -> Tensor:
    """Rewards float32 [N] of the images of clean latents [N, *latent], differentiable in them.

    Raises:
        ValueError: the reward is not one finite number an image.
    """
    prompts = [denoiser.conditioning.prompts[i] for i in prompt_id.tolist()]
    return score_images(reward, denoiser.backbone.decode(clean), prompts)


def score_images(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """Rewards float32 [N] of images [N, 3, H, W], differentiable in them; in float32 also within autocast.

    Raises:
        ValueError: the reward is not one finite number an image.
    """
    with torch.autocast(images.device.type, enabled=False):
        values = reward(images.float(), prompts)
    checked_reward(values, prompts)
    return values.float()


def check_differentiable(reward: Reward, denoiser: DenoisingMean) -> None:
    """Decode and score one image, so that a missing gradient shows before anything is sampled.

    Raises:
        ValueError: the decoder or the reward stops the gradient, or the reward says of itself that it does.
    """
    with torch.enable_grad():
        backbone = denoiser.backbone
        images = backbone.decode(torch.zeros(1, *backbone.latent_shape, device=backbone.device, requires_grad=True))
        if not images.requires_grad:
            raise ValueError(
                "the backbone's decode stops gradients, so that none reaches the policy; let it decode without "
                "torch.no_grad() and .detach()"
            )
        says_so = not getattr(reward, "differentiable", True)  # any callable is a reward, most say nothing
        if says_so or not score_images(reward, images, [denoiser.conditioning.prompts[0]]).requires_grad:
            raise ValueError(
                f"the reward {getattr(reward, 'name', type(reward).__name__)!r} is not differentiable: no gradient "
                "reaches the images, and nothing would train. Take a differentiable reward, or a method that needs no "
                "gradient (policy gradient, reward-weighted regression)"
            )
