"""The autoencoder: 64 x 64 pixels to 8 channels of 16 x 16."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from .augment import compose, step_generator
from .emoji import Drawings
from .trainer import fit

LATENT_CHANNELS = 8
KL_WEIGHT = 1.92e-3  # per image element; the reconstruction error is a mean over image elements too


def build_vae() -> AutoencoderKL:
    """Two halvings, no attention: its cost is the full-resolution convolutions, so those are narrow.

    A third halving (32 channels of 8 x 8, as many numbers) learned far more slowly: 15 dB where this has 18.
    """
    channels = (16, 32, 64)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )
    with torch.no_grad():
        vae.quant_conv.bias[LATENT_CHANNELS:] = -4.0  # the log variance: latents that are no pure noise at the start
    return vae.to(memory_format=torch.channels_last)


def train_vae(
    drawings: Drawings, folder: Path, *, steps: int, device: str = "cpu", batch: int = 8, seed: int = 0
) -> AutoencoderKL:
    """Train on every drawing that is not held out, then set `scaling_factor` so that latents have unit variance."""
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    path = folder / "vae"
    if path.exists():
        return AutoencoderKL.from_pretrained(path).to(device, memory_format=torch.channels_last)
    rgba = torch.from_numpy(drawings.select(~drawings.held_out).rgba)

    def loss_at(step: int) -> Tensor:
        generator = step_generator(seed, step)
        chosen = torch.randint(len(rgba), (batch,), generator=generator)
        images = (compose(rgba[chosen], generator) * 2 - 1).to(device).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        return reconstruction_loss(decoded, images) + KL_WEIGHT * posterior.kl().mean() / decoded[0].numel()

    fit(vae, loss_at, folder / "vae.pt", steps=steps, learning_rate=2e-3)
    with torch.no_grad():
        images = compose(rgba[:: max(1, len(rgba) // 512)], step_generator(seed, steps)) * 2 - 1
        std = vae.encode(images.to(device)).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=round(1 / std.item(), 4))
    vae.save_pretrained(path)
    return vae


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 + 4 x squared error + half the L1 of the image gradients, which keeps outlines sharp."""
    error = decoded - images
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 4 * F.mse_loss(decoded, images) + 0.5 * edges


@torch.no_grad()
def psnr(vae: AutoencoderKL, drawings: Drawings, *, seed: int = 1) -> float:
    """Mean peak signal-to-noise ratio in dB of the decoded posterior mean over the held-out drawings of seen styles."""
    rgba = torch.from_numpy(drawings.select(drawings.held_out & (drawings.style != "emojione")).rgba)
    images = compose(rgba, step_generator(seed, 0)).to(vae.device)
    decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample.clamp(-1, 1) / 2 + 0.5
    return (-10 * (decoded - images).square().mean((1, 2, 3)).log10()).mean().item()
