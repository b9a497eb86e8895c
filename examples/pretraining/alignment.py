"""The projections of the `PromptAlignment` reward: a very small CLIP, trained on captioned drawings.

    python -m examples.pretraining.alignment

A few minutes on two cores: image and text features are frozen, only two projections train. Pictures are the drawings
that are not held out, on plain backgrounds, blurred and noisy as images decoded from latents are; and scenes of an
animal with the thing that an activity needs. A picture is to find its caption among those of its batch, and a caption
its pictures (Radford et al. 2021, arXiv:2103.00020).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from diffusion_env.prompts import ACTIVITIES, ANIMALS, with_article
from rewards.efficientnet import LiteFeatures
from rewards.minilm import SentenceEmbeddings
from rewards.prompt_alignment import RESOLUTION, WEIGHTS, Projections, PromptAlignment

from .augment import compose, soften, step_generator
from .captioned import compose_scenes, list_scenes, random_backgrounds
from .emoji import Drawings, load_drawings

ANIMAL_SHARE, SCENE_SHARE = 0.4, 0.25  # of a training batch; the rest shows other things


@dataclass(frozen=True)
class Copies:
    """How many pictures are made of each animal, each scene and each other thing."""

    animal: int = 12
    scene: int = 4
    other: int = 2


@dataclass(frozen=True)
class Captioned:
    """Features [N, 1280] of pictures, the index [N] of each one's caption, and how often it is drawn [N]."""

    features: Tensor
    caption: Tensor
    weight: Tensor
    captions: list[str]


def train_alignment(drawings: Drawings, path: Path = WEIGHTS) -> None:
    """Fit the projections on the drawings that are not held out and write them to `path`, in half precision."""
    features = LiteFeatures("lite0", resolution=RESOLUTION)
    data = captioned_features(drawings.select(~drawings.held_out), features, Copies(), seed=0)
    projections = fit_projections(data, SentenceEmbeddings()(data.captions))
    save_file({key: value.half() for key, value in projections.state_dict().items()}, path)


@torch.no_grad()
def captioned_features(drawings: Drawings, features: nn.Module, copies: Copies, *, seed: int) -> Captioned:
    """Pictures of all drawings and scenes, softened and seen by `features`."""
    rgba = torch.from_numpy(drawings.rgba)
    is_animal = drawings.animal >= 0
    index = np.repeat(np.arange(len(rgba)), np.where(is_animal, copies.animal, copies.other))
    scenes = list_scenes(drawings) * copies.scene
    columns: list[Tensor] = []
    names: list[str] = []
    chunks = [*torch.from_numpy(index).split(128), *(scenes[n : n + 128] for n in range(0, len(scenes), 128))]
    for step, chunk in enumerate(tqdm(chunks, desc="pictures", mininterval=5)):
        generator = step_generator(seed, step)
        if isinstance(chunk, Tensor):
            background = random_backgrounds(len(chunk), generator)[1]
            images = compose(rgba[chunk], generator, scale=(0.7, 1.0), background=background)
            names += drawings.caption[chunk.numpy()].tolist()
        else:
            images = compose_scenes(rgba, chunk, generator)
            names += [scene_caption(drawings, animal, activity) for animal, _, activity in chunk]
        blur, noise = torch.rand(2, len(images), generator=generator)
        columns.append(features(soften(images, 1.2 * blur, 0.03 * noise, generator)))
    captions = sorted(set(names))
    caption = torch.tensor([captions.index(name) for name in names])
    kinds = torch.tensor([*np.where(is_animal[index], 0, 2), *[1] * len(scenes)])
    return Captioned(torch.cat(columns), caption, batch_shares(kinds, caption), captions)


def scene_caption(drawings: Drawings, animal: int, activity: str) -> str:
    """The prompt of a scene: "a cat riding a bike"."""
    return f"{with_article(ANIMALS[drawings.animal[animal]])} {activity}"


def batch_shares(kinds: Tensor, caption: Tensor) -> Tensor:
    """How often each picture is drawn, [N]: kinds (animal 0, scene 1, other 2) by their shares, captions alike."""
    shares = torch.tensor([ANIMAL_SHARE, SCENE_SHARE, 1 - ANIMAL_SHARE - SCENE_SHARE])
    pictures = torch.bincount(caption)[caption]
    captions_of_kind = torch.stack([(1 / pictures[kinds == kind]).sum() for kind in range(3)])
    return shares[kinds] / captions_of_kind[kinds] / pictures


def fit_projections(
    data: Captioned, sentences: Tensor, *, steps: int = 1500, batch: int = 512, seed: int = 0
) -> Projections:
    """Projections that minimise the symmetric contrastive loss over batches drawn by `data.weight`.

    Args:
        data: pictures and their captions.
        sentences: embeddings [captions, 384] of `data.captions`.
        steps: optimiser steps.
        batch: pictures in each; those of one caption are no negatives of one another.
        seed: of weights, batches and dropout.
    """
    torch.manual_seed(seed)
    model = Projections()
    model.centre.copy_(data.features.mean(0))
    model.spread.copy_(data.features.std(0) + 1e-3)
    log_scale = nn.Parameter(torch.tensor(2.3))
    optimizer = torch.optim.AdamW(
        [
            {"params": model.parameters(), "weight_decay": 0.1},
            {"params": [log_scale], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    for _ in tqdm(range(steps), desc="projections", mininterval=5):
        chosen = torch.multinomial(data.weight, batch, replacement=True)
        captions, caption = data.caption[chosen].unique(return_inverse=True)
        image = model.embed_image(data.features[chosen] + 0.1 * model.spread * torch.randn(batch, 1280))
        logits = log_scale.exp() * image @ model.embed_text(sentences[captions]).T
        positive = F.one_hot(caption, len(captions)).bool()
        # A caption's pictures share its probability: the mean over them of the log-probability of each.
        by_caption = -(logits.log_softmax(0) * positive).sum(0) / positive.sum(0)
        loss = F.cross_entropy(logits, caption) + by_caption.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        log_scale.data.clamp_(max=4.6)
    return model.eval()


@torch.no_grad()
def evaluate_alignment(drawings: Drawings, reward: PromptAlignment, *, seed: int = 1) -> dict[str, float]:
    """Retrieval by the reward, from drawings that it never saw.

    Of pictures of one animal: the right animal's prompt among 45, for held-out drawings of seen styles and for
    `emojione`, a style never seen. Of scenes in that style: the right activity among three, the animal being given; and
    the right prompt among all 135.
    """
    unseen = drawings.style == "emojione"
    result = {}
    animals = reward.projections.embed_text(reward.sentences([with_article(animal) for animal in ANIMALS]))
    for name, mask in {"seen styles": drawings.held_out & ~unseen, "emojione": unseen}.items():
        chosen = drawings.select(mask & (drawings.animal >= 0))
        data = captioned_features(chosen, reward.features, Copies(animal=4, scene=1, other=0), seed=seed)
        image = reward.projections.embed_image(data.features)
        pictures = 4 * len(chosen.rgba)
        right = torch.from_numpy(np.repeat(chosen.animal, 4))
        ranks = image[:pictures] @ animals.T
        result[f"animal among 45, {name}"] = (ranks.argmax(1) == right).float().mean().item()
        result[f"animal among the first 3 of 45, {name}"] = (
            (ranks.topk(3).indices == right[:, None]).any(1).float().mean().item()
        )
    return result | _evaluate_scenes(drawings.select(unseen), reward, seed=seed)


def _evaluate_scenes(drawings: Drawings, reward: PromptAlignment, *, seed: int) -> dict[str, float]:
    scenes = list_scenes(drawings)
    images = compose_scenes(torch.from_numpy(drawings.rgba), scenes, step_generator(seed, 0))
    prompts = [f"{with_article(animal)} {activity}" for animal in ANIMALS for activity in ACTIVITIES]
    text = reward.projections.embed_text(reward.sentences(prompts))
    scores = reward.projections.embed_image(reward.features(images)) @ text.T
    right = torch.tensor([prompts.index(scene_caption(drawings, animal, activity)) for animal, _, activity in scenes])
    of_animal = scores.unflatten(1, (len(ANIMALS), 3))[torch.arange(len(right)), right // 3]
    return {
        "activity among 3, emojione": (of_animal.argmax(1) == right % 3).float().mean().item(),
        "animal and activity among 135, emojione": (scores.argmax(1) == right).float().mean().item(),
    }


if __name__ == "__main__":
    data = load_drawings(Path(".cache/pretraining"))
    train_alignment(data)
    for key, value in evaluate_alignment(data, PromptAlignment()).items():
        print(f"{key}: {value:.3f}")
