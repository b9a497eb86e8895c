"""The independent judge: which of the 45 animals a picture shows. Measures what fine-tuning forgets; never a reward.

    python -m examples.pretraining.judge

A linear probe on frozen EfficientNet-Lite2 features, a network that no reward uses, trained on the drawings that are
not held out, softened because it judges pictures decoded from latents. It names 100 % of the drawings it was trained
on in new views, 72 % of the held-out drawings of seen styles (only 16), 52 % of a style never seen (chance 2.2 %): read
it for whether samples still look like the animals of the pretraining data, and compare, rather than trust its level.
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

from .augment import compose, soften, step_generator
from .emoji import Drawings, load_drawings

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
    def describe(self, images: Tensor) -> Tensor:
        """Features [B, 1280], computed 64 images at a time."""
        return torch.cat([self.features(chunk) for chunk in images.split(64)])

    def predict(self, images: Tensor) -> Tensor:
        """Indices into `ANIMALS`, [B]."""
        return self.probe(self.describe(images)).argmax(1)


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


def train_judge(drawings: Drawings, path: Path = WEIGHTS, *, copies: int = 20, seed: int = 0) -> None:
    """Fit the probe on the animals that are not held out and write it to `path`."""
    drawings = drawings.select(~drawings.held_out & (drawings.animal >= 0))
    features = softened_features(drawings, LiteFeatures("lite2", resolution=RESOLUTION), copies=copies, seed=seed)
    save_file(fit_probe(features.flatten(0, 1), torch.from_numpy(drawings.animal).repeat(copies)), path)


def fit_probe(features: Tensor, labels: Tensor, *, ridge: float = 1e-3) -> dict[str, Tensor]:
    """Weights of a linear classifier of `features` [N, 1280]: cross-entropy plus `ridge` times the squared norm.

    Convex, so L-BFGS from zero finds the one optimum.
    """
    centre, spread = features.mean(0), features.std(0) + 1e-3
    inputs = (features - centre) / spread
    weight = nn.Parameter(torch.zeros(inputs.shape[1], len(ANIMALS)))
    bias = nn.Parameter(torch.zeros(len(ANIMALS)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, labels) + ridge * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scaled = (weight.detach().T / spread).contiguous()
    return {"weight": scaled, "bias": bias.detach() - scaled @ centre}


@torch.no_grad()
def softened_features(drawings: Drawings, features: nn.Module, *, copies: int, seed: int) -> Tensor:
    """Features [copies, N, 1280] of each drawing flipped, scaled, shifted, on a plain background, blurred, noisy."""
    rgba = torch.from_numpy(drawings.rgba)
    views = []
    for copy in tqdm(range(copies), desc="views", mininterval=5):
        generator = step_generator(seed, copy)
        images = compose(rgba, generator, scale=(0.6, 1.0))
        blur, noise = torch.rand(2, len(rgba), generator=generator)
        images = soften(images, 1.2 * blur, 0.03 * noise, generator)
        views.append(torch.cat([features(chunk) for chunk in images.split(64)]))
    return torch.stack(views)


@torch.no_grad()
def evaluate_judge(drawings: Drawings, judge: AnimalJudge, *, copies: int = 4, seed: int = 1) -> dict[str, float]:
    """Top-1 accuracy on new views of the training drawings, on held-out ones of seen styles, on an unseen style."""
    animals = drawings.select(drawings.animal >= 0)
    unseen_style = animals.style == "emojione"
    masks = {
        "training drawings, new views": ~animals.held_out,
        "held-out drawings, seen styles": animals.held_out & ~unseen_style,
        "emojione, a style never seen": unseen_style,
    }
    result = {}
    for name, mask in masks.items():
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
