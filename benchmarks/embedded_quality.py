"""How good is the embedded pipeline? The figures of its model card, by one fixed protocol.

    python -m benchmarks.embedded_quality

32 samples a prompt, 20 steps, the preset's guidance. About ten minutes on two cores. Appends a row to
`benchmarks/results/embedded_quality.csv` and draws `animals.png`, `activities.png` and `neighbours.png` beside it.
Needs the drawings, which `examples/pretrain_embedded.py` fetches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from agents import Evaluation, Evaluator, make_policy
from agents.metrics import diversity
from agents.run_folder import pyplot
from benchmarks.main_job import append, provenance
from configs import RunSettings
from diffusion_env import DenoisingEnv, StableDiffusionBackbone, embedded_folder
from diffusion_env.prompts import ANIMALS, animal_activities, animals
from examples.pretraining.augment import compose, step_generator
from examples.pretraining.emoji import Drawings, load_drawings
from examples.pretraining.heads import correlation, saturation
from examples.pretraining.judge import AnimalJudge, evaluate_judge
from examples.pretraining.vae import psnr
from rewards import StylePreference

RESULTS = Path(__file__).parent / "results"
UNSEEN_WORDS = {"a puppy": "dog", "a kitten": "cat", "a pony": "horse"}
SHOWN_ACTIVITIES = ("cat", "lion", "bear", "pig", "dog", "monkey", "zebra", "tiger", "fox")


@dataclass(frozen=True)
class Settings:
    """Size of the measurement."""

    samples: int = 32
    """Images a prompt."""
    num_steps: int = 20
    """Denoising steps."""
    cache: Path = Path(".cache/pretraining")
    """Where the drawings are."""


@torch.no_grad()
def main(settings: Settings) -> None:
    """Measure everything, write the row, draw the sheets."""
    drawings = load_drawings(settings.cache)
    judge = AnimalJudge()
    guidance = RunSettings().model.guidance_scale
    backbone = StableDiffusionBackbone.from_pretrained(embedded_folder(), guidance_scale=guidance)
    start = time.perf_counter()
    samples = sample(backbone, animals(), settings)
    seconds = (time.perf_counter() - start) / len(samples.images) * 64
    label = torch.arange(len(ANIMALS)).repeat(settings.samples)
    features = judge.describe(samples.images)
    named = judge.probe(features).argmax(1)
    few_steps = sample(backbone, animals(), settings, num_steps=RunSettings().sampling.num_steps)
    unseen = sample(backbone, tuple(UNSEEN_WORDS), settings)
    word_of = torch.arange(len(UNSEEN_WORDS)).repeat(settings.samples)
    seen_as = judge.predict(unseen.images)
    neighbours, nearer = nearest_drawings(drawings, judge, samples.images, features, label)
    row = {
        "judged_accuracy": (named == label).float().mean().item(),
        "judged_accuracy_main_job_steps": (judge.predict(few_steps.images) == label).float().mean().item(),
        **{f"judge: {name}": value for name, value in evaluate_judge(drawings, judge).items()},
        "diversity_of_real": diversity(features, label) / real_diversity(drawings, judge),
        "nearer_to_training": nearer,
        **{
            f"{word} judged {animal}": (seen_as[word_of == i] == ANIMALS.index(animal)).float().mean().item()
            for i, (word, animal) in enumerate(UNSEEN_WORDS.items())
        },
        "vae_psnr": psnr(backbone.pipeline.vae, drawings),
        "reward_mean": few_steps.mean,
        "reward_std": few_steps.std,
        "reward_brightness": correlation(few_steps.rewards, few_steps.images.mean((1, 2, 3))),
        "reward_saturation": correlation(few_steps.rewards, saturation(few_steps.images)),
        "seconds_for_64_images": seconds,
    }
    rounded: dict[str, object] = {key: round(value, 3) for key, value in row.items()}
    append(
        rounded | {"samples": settings.samples, "num_steps": settings.num_steps} | provenance(),
        RESULTS / "embedded_quality.csv",
    )
    for key, value in rounded.items():
        print(f"{key}: {value}")
    by_animal = {animal: (named[label == i] == i).float().mean().item() for i, animal in enumerate(ANIMALS)}
    print(", ".join(f"{animal} {share:.0%}" for animal, share in sorted(by_animal.items(), key=lambda item: -item[1])))
    draw_grid(samples.images.unflatten(0, (settings.samples, -1))[:6].transpose(0, 1), ANIMALS, RESULTS / "animals.png")
    prompts = tuple(p for p in animal_activities() if p.split()[1] in SHOWN_ACTIVITIES)
    scenes = sample(backbone, prompts, settings, samples=4).images.unflatten(0, (4, -1)).transpose(0, 1)
    draw_grid(scenes, prompts, RESULTS / "activities.png", columns=3)
    draw_grid(torch.stack(list(neighbours.values())), tuple(neighbours), RESULTS / "neighbours.png")


def sample(
    backbone: StableDiffusionBackbone,
    prompts: tuple[str, ...],
    settings: Settings,
    *,
    num_steps: int | None = None,
    samples: int | None = None,
) -> Evaluation:
    """Images of each prompt with DDPM's noise; image n has prompt n modulo the number of prompts."""
    steps = num_steps or settings.num_steps
    policy = make_policy(backbone, backbone.sampler(steps), backbone.conditioning(prompts))
    env = DenoisingEnv(backbone, steps, StylePreference(), prompts, batch_size=64)
    return Evaluator(env, samples_per_prompt=samples or settings.samples, seed=1)(policy)


def real_diversity(drawings: Drawings, judge: AnimalJudge, *, copies: int = 8) -> float:
    """`diversity` of views of the training drawings, each animal's drawings drawn equally often."""
    real = drawings.select(~drawings.held_out & (drawings.animal >= 0))
    features = torch.cat([view_features(real, judge, seed=copy) for copy in range(copies)])
    return diversity(features, torch.from_numpy(real.animal).repeat(copies))


def view_features(drawings: Drawings, judge: AnimalJudge, *, seed: int) -> Tensor:
    """Judge's features [N, 1280] of one random view of each drawing, placed as in the denoiser's training."""
    images = compose(torch.from_numpy(drawings.rgba), step_generator(100, seed), scale=(0.9, 1.0))
    return judge.describe(images)


def nearest_drawings(
    drawings: Drawings, judge: AnimalJudge, images: Tensor, features: Tensor, label: Tensor, *, copies: int = 8
) -> tuple[dict[str, Tensor], float]:
    """Whether samples lie nearer to training drawings than to drawings never seen.

    For each animal as many training as held-out drawings (chosen at random, eight views each), nearest in the judge's
    features; without copying half of the samples would have the training drawing nearer. Most held-out drawings are of
    a style never seen, which alone makes them farther.

    Returns:
        By animal [3, 3, 64, 64]: its first sample, the nearest training drawing, the nearest held-out one; the share.
    """
    rng = np.random.default_rng(0)
    triples, nearer = {}, []
    for animal, name in enumerate(ANIMALS):
        held = np.flatnonzero((drawings.animal == animal) & drawings.held_out)
        seen = np.flatnonzero((drawings.animal == animal) & ~drawings.held_out)
        count = min(len(held), len(seen))
        if not count:
            continue
        of_animal = features[label == animal]
        distances, triple = [], [images[label == animal][0]]
        for pool in (rng.permutation(seen)[:count], rng.permutation(held)[:count]):
            chosen = drawings.select(np.isin(np.arange(len(drawings.animal)), pool))
            views = torch.stack([view_features(chosen, judge, seed=copy) for copy in range(copies)]).flatten(0, 1)
            distance, index = torch.cdist(of_animal, views).min(1)
            distances.append(distance)
            triple.append(
                compose(torch.from_numpy(chosen.rgba), step_generator(0, 0), scale=(0.9, 1.0))[index[0] % count]
            )
        nearer.append(distances[0] < distances[1])
        triples[name] = torch.stack(triple)
    return triples, torch.cat(nearer).float().mean().item()


def draw_grid(pictures: Tensor, titles: tuple[str, ...], path: Path, *, columns: int = 5) -> None:
    """Write rows of pictures [N, K, 3, H, W], each row of K under its title."""
    plt = pyplot()
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * 0.45 * pictures.shape[1], 0.62 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, row, title in zip(axes.flat, pictures, titles, strict=False):
        axis.imshow(torch.cat(list(row), 2).permute(1, 2, 0).numpy())
        axis.set_title(title, fontsize=6, pad=1)
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
