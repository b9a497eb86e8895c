"""Build the embedded pipeline from emoji art: data, VAE, UNet, reward head, judge.

    pip install -e .[pretraining]       # resvg-py; npm fetches the drawings
    python examples/pretrain_embedded.py

Resumable: a run that was stopped goes on where it was and ends with the same weights. About two hours on two CPU cores.
The results go to `diffusion_env/embedded/`, `rewards/` and `examples/pretraining/`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from examples.pretraining.emoji import load_drawings
from examples.pretraining.unet import PHASES, build_scheduler, train_unet
from examples.pretraining.vae import psnr, train_vae

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Settings:
    """What to build and how long to train."""

    cache: Path = ROOT / ".cache" / "pretraining"
    """Where drawings, latents and checkpoints are kept."""
    output: Path = ROOT / "diffusion_env" / "embedded"
    """Where the pipeline's weights go."""
    vae_steps: int = 2200
    """Optimiser steps of the autoencoder, batches of 16."""
    unet_steps: tuple[int, int] = (PHASES[0].steps, PHASES[1].steps)
    """Optimiser steps of the two phases of the denoiser, batches of 64."""


def main(settings: Settings) -> None:
    """Train whatever is not there yet."""
    drawings = load_drawings(settings.cache)
    vae = train_vae(drawings, settings.cache, steps=settings.vae_steps)
    print(f"VAE: {psnr(vae, drawings):.1f} dB on held-out drawings")
    phases = [replace(phase, steps=steps) for phase, steps in zip(PHASES, settings.unet_steps, strict=True)]
    unet = train_unet(drawings, vae, settings.cache, phases=phases)
    # Half precision on disk: half the size, and what is loaded is exactly what was measured.
    unet.half().save_pretrained(settings.output / "unet")
    vae.half().save_pretrained(settings.output / "vae")
    build_scheduler().save_pretrained(settings.output / "scheduler")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
