"""What grows with what: network evaluations, bytes stored, bytes sent, predicted and measured.

    python -m benchmarks.cost_model

B images an iteration, T denoising steps, L numbers in an image's latents, an adapter of some rank on layers of the
network. Network evaluations have their formulas in `benchmarks.study_methods`; here are the others.

Three sizes of DDPO-IS that trains on every step, on the embedded pipeline with latents of other sizes. Measured are the
latents that go forward through the network (a hook), the bytes of the trajectories' storages when the buffer gets them,
the bytes of the gradients when the optimiser steps (what is summed over several processes), and those of the tensors
that `backbone.save` writes (what has to go to whoever samples elsewhere). A row a size in
`benchmarks/results/cost_model.csv`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from safetensors.torch import load_file
from torch import nn

from agents.policy import denoising_mean
from benchmarks.main_job import append, markdown, provenance
from benchmarks.memory import kept_bytes
from benchmarks.method_costs import counted
from benchmarks.study_methods import METHODS
from configs import RunSettings, build_experiment
from diffusion_env import embedded_folder
from diffusion_env.lora import LORA_FILE

RESULTS = Path(__file__).parent / "results" / "cost_model.csv"
FLOAT32 = 4
# step, prompt_id, group_id: int64; log-probability, reward: float32; done, terminated: bool.
BYTES_A_STEP = 3 * 8 + 2 * 4 + 2 * 1
ADVANTAGE = 4  # float32, one a trajectory
METHOD = METHODS["ddpo-is"]


def stored_bytes(images: int, num_steps: int, latent_numbers: int) -> int:
    """Bytes of B trajectories in the buffer: T + 1 latents each, and little else."""
    return images * (FLOAT32 * (num_steps + 1) * latent_numbers + BYTES_A_STEP * num_steps + ADVANTAGE)


def lora_parameters(weights: Iterable[tuple[int, ...]], rank: int) -> int:
    """Parameters of adapters on layers whose weights have these shapes, (out, in) or (out, in, height, width).

    A linear layer's are rank (in + out). A convolution's first part has the layer's kernel, the second one of 1 x 1.
    """
    return rank * sum(prod(shape[1:]) + shape[0] for shape in weights)


def sent_bytes(parameters: int) -> int:
    """Bytes of so many trained parameters' float32 gradients, or of themselves.

    Each process hands over its gradients once an update; a ring of N processes moves 2 (N - 1) / N times as many in and
    out of each. Adapters go once an update to each worker that samples.
    """
    return FLOAT32 * parameters


@dataclass(frozen=True)
class Size:
    """One row."""

    images: int
    num_steps: int
    latent_side: int
    """Latents are as many numbers high and wide."""
    lora_rank: int


SIZES = (Size(8, 4, 16, 4), Size(16, 8, 8, 16), Size(12, 6, 24, 64))


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    sizes: tuple[Size, ...] = SIZES
    """Rows."""
    model: str = "embedded"
    """'embedded', or a diffusers folder."""
    results: Path = RESULTS
    """Where rows go."""


def adapted_layers(network: nn.Module, targets: Iterable[str]) -> list[tuple[int, ...]]:
    """Shapes of the weights of the network's layers whose names end in one of `targets`, adapter or not."""
    layers = {f".{name}".removesuffix(".base_layer"): module for name, module in network.named_modules()}
    return [
        tuple(module.weight.shape)
        for name, module in layers.items()
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(tuple(f".{target}" for target in targets))
    ]


def resized(pipeline: Path, latent_side: int, folder: Path) -> Path:
    """The pipeline in `folder`, for latents of another size: links, and one number of a configuration."""
    shutil.copytree(pipeline, folder, copy_function=os.symlink)
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text()) | {"sample_size": latent_side}
    file.unlink()
    file.write_text(json.dumps(config))
    return folder


def settings_of(size: Size, pipeline: Path) -> RunSettings:
    """One iteration of that size, training on every step."""
    default = RunSettings()
    return replace(
        default,
        reward="jpeg-compressibility",  # takes images of any size
        held_out=(),
        model=replace(default.model, name=str(pipeline), lora_rank=size.lora_rank),
        sampling=replace(default.sampling, num_steps=size.num_steps, images_per_iteration=size.images),
        training=replace(default.training, iterations=1, min_noise=0.0),
    )


def measure(size: Size, pipeline: Path) -> dict[str, object]:
    """Predict and measure an iteration."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        run = settings_of(size, resized(pipeline, size.latent_side, folder / "pipeline"))
        experiment, loss = METHOD.job(build_experiment(run), run)
        mean = denoising_mean(experiment.policy)
        network, latent_numbers = mean.backbone.unet, prod(mean.backbone.latent_shape)
        stored: list[int] = []
        experiment.advantage.register_forward_hook(lambda module, inputs, data: stored.append(kept_bytes(data)))
        trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        gradients: list[int] = []
        optimizer.register_step_pre_hook(lambda *_: gradients.append(gradient_bytes(trained)))
        with counted(network) as evaluations:
            next(experiment.loop(loss, optimizer))
        experiment.backbone.save(name)
        adapter = sum(each.nbytes for each in load_file(folder / LORA_FILE).values())
    parameters = lora_parameters(adapted_layers(network, run.model.lora_targets), size.lora_rank)
    return {
        "images": size.images,
        "num_steps": size.num_steps,
        "latent_numbers": latent_numbers,
        "lora_rank": size.lora_rank,
        "evaluations_predicted": round(METHOD.cost(run, mean.sampler).network_evaluations),
        "evaluations_measured": evaluations(),
        "stored_predicted": stored_bytes(size.images, size.num_steps, latent_numbers),
        "stored_measured": sum(stored),
        "sent_predicted": sent_bytes(parameters),
        "gradients_measured": sum(gradients),
        "adapter_measured": adapter,
    }


def gradient_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the gradients that are there."""
    return sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)


def main(settings: Settings) -> None:
    """Measure every size."""
    commit = provenance()
    pipeline = embedded_folder() if settings.model == "embedded" else Path(settings.model)
    rows = [{**measure(size, pipeline), **commit} for size in settings.sizes]
    for row in rows:
        append(row, settings.results)
    print(markdown(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
