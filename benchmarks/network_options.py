"""What each option of the network costs or gains on the CPU: the guided network with and without gradient.

    python -m benchmarks.network_options                    # the TRL comparison's adapters: rank 4 on the attention
    python -m benchmarks.network_options --main-job         # the main job's: rank 16, convolutions too
    python -m benchmarks.network_options --compile          # `torch.compile` as well, which takes minutes first

Every variant computes the same batches in turn in one process. `benchmarks/results/network_options.csv` has a row each:
processor milliseconds an image of a sampling step (forward) and of a training step (forward and backward), medians over
rounds, which other work on the machine disturbs less than wall-clock times, and their ratios to the plain network's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.collector_overhead import timed
from benchmarks.main_job import append, provenance
from configs import PRESETS, ModelSettings
from configs.build import build_backbone
from diffusion_env import prompt_set

RESULTS = Path(__file__).parent / "results" / "network_options.csv"
PLAIN: dict[str, Any] = {"channels_last": False, "fold_lora": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "channels_last": {**PLAIN, "channels_last": True},
    "fold_lora": {**PLAIN, "fold_lora": True},
    "both": {},
    "both, gradient_checkpointing": {"gradient_checkpointing": True},
    "channels_last, bfloat16": {"dtype": "bfloat16"},
}
COMPILED = {"both, compile": {"compile": True}}


@dataclass(frozen=True)
class Settings:
    """Size of the measurement."""

    images: int = 16
    """Images a batch; guidance makes it twice as many latents."""
    rounds: int = 5
    """Times that each variant is measured, in turn."""
    main_job: bool = False
    """The main job's adapters rather than the TRL comparison's."""
    compile: bool = False
    """Measure `torch.compile` too."""


def model_settings(main_job: bool) -> ModelSettings:
    """The network without options."""
    preset = PRESETS["embedded"]().model
    if main_job:
        return preset
    return replace(preset, lora_rank=4, lora_alpha=4.0, lora_targets=("to_q", "to_k", "to_v", "to_out.0"))


def workloads(model: ModelSettings, images: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A sampling step and a training step of the network with these settings."""
    torch.manual_seed(0)
    backbone = build_backbone(model)
    conditioning = backbone.conditioning(prompt_set("animals"))
    states = conditioning(torch.arange(images) % len(conditioning.prompts))
    x_t, timestep = torch.randn(images, *backbone.latent_shape), torch.full((images,), 500)

    def sampling() -> None:
        with torch.no_grad():
            backbone(x_t, timestep, states)

    def training() -> None:
        backbone(x_t, timestep, states).square().mean().backward()
        backbone.zero_grad()

    return sampling, training


def main(settings: Settings) -> None:
    """Measure every variant and write."""
    commit, plain = provenance(), model_settings(settings.main_job)
    variants = VARIANTS | (COMPILED if settings.compile else {})
    pairs = {name: workloads(replace(plain, **options), settings.images) for name, options in variants.items()}
    times: dict[str, list[list[float]]] = {name: [[], []] for name in pairs}
    for number in range(settings.rounds + 1):
        for name, pair in pairs.items():
            for into, work in zip(times[name], pair, strict=True):
                seconds = timed(work, "processor")
                if number:  # the first round warms up
                    into.append(1000 * seconds / settings.images)
    medians = {name: [statistics.median(each) for each in both] for name, both in times.items()}
    for name, (sampling, training) in medians.items():
        row = {
            "variant": name,
            "adapters": "main job" if settings.main_job else "attention, rank 4",
            "sampling_ms": round(sampling, 2),
            "training_ms": round(training, 2),
            "sampling_of_plain": round(sampling / medians["plain"][0], 3),
            "training_of_plain": round(training / medians["plain"][1], 3),
            "images": settings.images,
            "rounds": settings.rounds,
            **commit,
        }
        append(row, RESULTS)
        print(row)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
