"""The independent judge: which of the 45 animals a picture shows. Measures what fine-tuning forgets; never a reward.

    python -m examples.pretraining.judge

A linear probe on frozen EfficientNet-Lite2 features, a network that no reward uses, trained on the drawings that are
not held out, softened because it judges pictures decoded from latents.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from diffusion_env.prompts import ANIMALS
from rewards.efficientnet import LiteFeatures

from .augment import compose, step_generator
from .emoji import Drawings, load_drawings
from .heads import soften

WEIGHTS = Path(__file__).with_name("judge.safetensors")
RESOLUTION = 128


class AnimalJudge(nn.Module):
    """Logits over `ANIMALS` for float images [B, 3, H, W] in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = LiteFeatures("lite2", resolution=RESOLUTION)
        self.probe = nn.Linear(1280, len(ANIMALS))
        self.probe.load_state_dict(load_file(WEIGHTS))
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 45]."""
        return self.probe(self.features(images))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Indices into `ANIMALS`, [B]."""
        return torch.cat([self(chunk).argmax(1) for chunk in images.split(64)])


def judged_accuracy(images: Tensor, prompts: list[str]) -> float:
    """Share of the images in which the judge sees the animal that their prompt names."""
    named = torch.tensor([animal_in(prompt) for prompt in prompts], device=images.device)
    return (_judge().to(images.device).predict(images) == named).float().mean().item()


def animal_in(prompt: str) -> int:
    """Index of the first word of `prompt` that is one of `ANIMALS`: "a cat", "an ant", "cat"."""
    for word in prompt.lower().split():
        if word in ANIMALS:
            return ANIMALS.index(word)
    raise ValueError(f"the prompt {prompt!r} names none of the 45 animals that the judge knows: {', '.join(ANIMALS)}.")


def train_judge(drawings: Drawings, path: Path = WEIGHTS, *, copies: int = 16, seed: int = 0) -> None:
    """Fit the probe on the animals that are not held out and write it to `path`."""
    drawings = drawings.select(~drawings.held_out & (drawings.animal >= 0))
    features = softened_features(drawings, LiteFeatures("lite2", resolution=RESOLUTION), copies=copies, seed=seed)
    save_file(fit_probe(features.flatten(0, 1), torch.from_numpy(drawings.animal).repeat(copies)), path)


def fit_probe(features: Tensor, labels: Tensor, *, steps: int = 300) -> dict[str, Tensor]:
    """Weights of a linear classifier of `features` [N, 1280], fitted on all of them at once from zero."""
    centre, spread = features.mean(0), features.std(0) + 1e-3
    inputs = (features - centre) / spread
    probe = nn.Linear(inputs.shape[1], len(ANIMALS))
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3, weight_decay=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(probe(inputs), labels, label_smoothing=0.1).backward()
        optimizer.step()
    weight = probe.weight.detach() / spread
    return {"weight": weight, "bias": probe.bias.detach() - weight @ centre}


@torch.no_grad()
def softened_features(drawings: Drawings, features: nn.Module, *, copies: int, seed: int) -> Tensor:
    """Features [copies, N, 1280] of each drawing flipped, scaled, shifted, on a plain background, blurred, noisy."""
    rgba = torch.from_numpy(drawings.rgba)
    views = []
    for copy in tqdm(range(copies), desc="views", mininterval=5):
        generator = step_generator(seed, copy)
        images = compose(rgba, generator, scale=(0.6, 0.95))
        blur, noise = torch.rand(2, len(rgba), generator=generator)
        images = soften(images, 1.2 * blur, 0.03 * noise, generator)
        views.append(torch.cat([features(chunk) for chunk in images.split(64)]))
    return torch.stack(views)


@torch.no_grad()
def evaluate_judge(drawings: Drawings, judge: AnimalJudge, *, copies: int = 4, seed: int = 1) -> dict[str, float]:
    """Top-1 accuracy on the held-out drawings of seen styles and on `emojione`, a style never seen."""
    animals = drawings.select(drawings.held_out & (drawings.animal >= 0))
    result = {}
    for name, mask in (("seen styles", animals.style != "emojione"), ("emojione", animals.style == "emojione")):
        chosen = animals.select(mask)
        logits = judge.probe(softened_features(chosen, judge.features, copies=copies, seed=seed))
        result[name] = (logits.argmax(-1) == torch.from_numpy(chosen.animal)).float().mean().item()
    return result


@cache
def _judge() -> AnimalJudge:
    return AnimalJudge()


if __name__ == "__main__":
    data = load_drawings(Path(".cache/pretraining"))
    train_judge(data)
    for key, value in evaluate_judge(data, AnimalJudge()).items():
        print(f"accuracy, {key}: {value:.3f}")
