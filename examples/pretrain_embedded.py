"""Build the embedded pipeline from emoji art: data, VAE, UNet, reward heads, judge.

    pip install -e .[pretraining]       # resvg-py; npm fetches the drawings
    python examples/pretrain_embedded.py

Resumable: a run that was stopped goes on where it was and ends with the same weights. Some two and a half hours on two
cores.
The results go to `diffusion_env/embedded/`, `rewards/` and `examples/pretraining/`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from examples.pretraining import alignment, heads, judge
from examples.pretraining.captioned import Mixture
from examples.pretraining.emoji import load_drawings
from examples.pretraining.unet import build_scheduler, train_unet
from examples.pretraining.vae import psnr, train_vae

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Settings:
    """What to build and how long to train."""

    cache: Path = ROOT / ".cache" / "pretraining"
    """Where drawings, latents and checkpoints are kept."""
    output: Path = ROOT / "diffusion_env" / "embedded"
    """Where the pipeline's weights go."""
    vae_steps: int = 4600
    """Optimiser steps of the autoencoder, batches of 8."""
    unet_steps: int = 7500
    """Optimiser steps of the denoiser, batches of 64."""
    mixture: Mixture = field(default_factory=Mixture)
    """What the denoiser is shown."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where VAE and denoiser train."""


def main(settings: Settings) -> None:
    """Train whatever is not there yet."""
    drawings = load_drawings(settings.cache)
    vae = train_vae(drawings, settings.cache, steps=settings.vae_steps, device=settings.device)
    print(f"VAE: {psnr(vae, drawings):.1f} dB on held-out drawings")
    unet = train_unet(
        drawings, vae, settings.cache, steps=settings.unet_steps, mixture=settings.mixture, device=settings.device
    )
    publish(unet, settings.output / "unet")
    publish(vae, settings.output / "vae")
    build_scheduler().save_pretrained(settings.output / "scheduler")
    for train, weights in (
        (heads.train_style_preference, heads.WEIGHTS),
        (alignment.train_alignment, alignment.WEIGHTS),
        (judge.train_judge, judge.WEIGHTS),
    ):
        trained = settings.cache / weights.name
        if not trained.exists():
            train(drawings, trained)
        shutil.copyfile(trained, weights)


def publish(model: ModelMixin, folder: Path) -> None:
    """Write `model` in half precision: half the size, and what is loaded is exactly what was measured."""
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)  # where it lay on the machine that made it
    path.write_text(json.dumps(config, indent=2) + "\n")
    (folder / SAFETENSORS_WEIGHTS_NAME).chmod(0o644)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
