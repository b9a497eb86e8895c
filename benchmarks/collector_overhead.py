"""Environment + collector against a bare sampling loop with the same network calls, interleaved in one process.

python -m benchmarks.collector_overhead
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from agents import make_collector, make_policy
from benchmarks.main_job import append, provenance
from diffusion_env import DenoisingEnv, LoRA, StableDiffusionBackbone, embedded_folder, prompt_set

RESULTS = Path(__file__).parent / "results" / "collector_overhead.csv"


@dataclass(frozen=True)
class Settings:
    """Size of the comparison."""

    images: int = 64
    """Images a batch."""
    num_steps: int = 10
    """Denoising steps."""
    rounds: int = 9
    """Interleaved pairs; the median of their ratios is reported."""


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward that costs nothing."""
    return images.mean((1, 2, 3))


def main(settings: Settings) -> None:
    """Time both and write the ratio."""
    backbone = StableDiffusionBackbone.from_pretrained(embedded_folder(), guidance_scale=3.0, lora=LoRA())
    sampler, conditioning = backbone.sampler(settings.num_steps), backbone.conditioning(prompt_set("animals"))
    policy = make_policy(backbone, sampler, conditioning)
    env = DenoisingEnv(backbone, settings.num_steps, brightness, conditioning.prompts, batch_size=settings.images)
    batches = iter(make_collector(env, policy, iterations=settings.rounds + 1))

    @torch.no_grad()
    def bare() -> None:
        prompt_id = torch.randint(len(conditioning.prompts), (settings.images,))
        x = torch.randn(settings.images, *backbone.latent_shape)
        for index, t in enumerate(sampler.timesteps):
            out = backbone(x, t.expand(settings.images), conditioning(prompt_id))
            mean, std = sampler.step(x, out, torch.full((settings.images,), index))
            x = mean + std * torch.randn_like(mean)
        brightness(backbone.decode(x), [conditioning.prompts[i] for i in prompt_id.tolist()])

    timed(bare), timed(lambda: next(batches))  # warm up
    ratios = [timed(lambda: next(batches)) / timed(bare) for _ in range(settings.rounds)]
    row = {
        "median_ratio": round(statistics.median(ratios), 4),
        "lowest": round(min(ratios), 4),
        "highest": round(max(ratios), 4),
        "images": settings.images,
        "num_steps": settings.num_steps,
        **provenance(),
    }
    append(row, RESULTS)
    print(row)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
