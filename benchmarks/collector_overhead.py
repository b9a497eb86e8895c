"""Environment + collector against a bare sampling loop with the same network calls, interleaved in one process.

    python -m benchmarks.collector_overhead

With the embedded pipeline's network, with one of a tenth of its parameters and random weights (the smaller the network,
the more the rest weighs), and with none at all, where nothing but the rest is left. Each adds a row to
`benchmarks/results/collector_overhead.csv`; `milliseconds_a_step` is the median difference of a pair over its denoising
steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import UNet2DConditionModel
from torch import Tensor

from agents import make_collector, make_policy
from benchmarks.main_job import append, markdown, provenance
from configs import ModelSettings, SamplingSettings, build_backbone
from diffusion_env import DenoisingEnv, StableDiffusionBackbone, prompt_set

RESULTS = Path(__file__).parent / "results" / "collector_overhead.csv"
Clock = Literal["wall", "processor"]
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
TENTH = {"block_out_channels": (16, 32, 40), "norm_num_groups": 8}  # 0.73 M parameters beside 7.62 M


@dataclass(frozen=True)
class Settings:
    """Size of the comparison."""

    networks: tuple[Literal["embedded", "a tenth", "none"], ...] = ("embedded", "a tenth", "none")
    """Rows."""
    images: int = SamplingSettings.images_per_iteration
    """Images a batch."""
    num_steps: int = SamplingSettings.num_steps
    """Denoising steps."""
    rounds: int = 9
    """Interleaved pairs; the median of their ratios is reported."""
    clock: Clock = "wall"
    """'processor' is this process's processor time: for one thread on a machine that others use, too."""
    results: Path = RESULTS
    """Where rows go."""


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward that costs nothing."""
    return images.mean((1, 2, 3))


def smaller(backbone: StableDiffusionBackbone) -> StableDiffusionBackbone:
    """The same pipeline around a network of a tenth of the parameters, with random weights."""
    pipeline = backbone.pipeline
    network = UNet2DConditionModel.from_config({**pipeline.unet.config, **TENTH})
    pipeline.unet = network.to(memory_format=torch.channels_last)
    return StableDiffusionBackbone(pipeline, guidance_scale=backbone.guidance_scale, lora=backbone.lora)


def idle(backbone: StableDiffusionBackbone) -> StableDiffusionBackbone:
    """`backbone`, which from now on neither denoises nor decodes."""
    backbone.forward = lambda x_t, timestep, conditioning: x_t
    backbone.decode = lambda latents: latents.new_zeros(len(latents), 3, 1, 1)
    return backbone


def compare(backbone: StableDiffusionBackbone, settings: Settings) -> dict[str, object]:
    """Time both ways to sample in turn."""
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

    bare(), next(batches)  # warm up
    pairs = [
        (timed(lambda: next(batches), settings.clock), timed(bare, settings.clock)) for _ in range(settings.rounds)
    ]
    ratios = [collected / sampled for collected, sampled in pairs]
    more = statistics.median(collected - sampled for collected, sampled in pairs)
    return {
        "median_ratio": round(statistics.median(ratios), 4),
        "lowest": round(min(ratios), 4),
        "highest": round(max(ratios), 4),
        "milliseconds_a_step": round(1e3 * more / settings.num_steps, 2),
        "images": settings.images,
        "num_steps": settings.num_steps,
        "rounds": settings.rounds,
        "clock": settings.clock,
    }


def main(settings: Settings) -> None:
    """Time with each network and write the rows."""
    commit, rows = provenance(), []
    change = {"embedded": lambda backbone: backbone, "a tenth": smaller, "none": idle}
    for network in settings.networks:
        backbone = change[network](build_backbone(ModelSettings(device="cpu")))
        rows.append({"network": network, **compare(backbone, settings), **commit})
        append(rows[-1], settings.results)
    print(markdown(rows))


def timed(work: Callable[[], object], clock: Clock = "wall") -> float:
    """Seconds that `work` takes."""
    now = CLOCKS[clock]
    start = now()
    work()
    return now() - start


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
