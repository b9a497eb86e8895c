"""Which denoising steps have something to learn from? The policy gradient of each, from two halves of the images.

    python -m benchmarks.gradient_signal

For each step the score-function gradient is averaged over either half of the images, their rewards centred by prompt.
Half a gradient is signal plus independent noise: the cosine of the two is the share of the signal in its square, and
two pure noises have a cosine near 0. Writes `benchmarks/results/gradient_signal.csv`, a row a step; what it shows is
what `--training.min-noise` stands for. Five minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.modules import ProbabilisticActor

from benchmarks.main_job import append, provenance
from configs import RunSettings, build_experiment

RESULTS = Path(__file__).parent / "results" / "gradient_signal.csv"


@dataclass(frozen=True)
class Settings:
    """How much is sampled."""

    batches: int = 10
    """Batches of the main job's size; even ones are one half, odd ones the other."""
    seed: int = 0
    """Of prompts, noise and adapters."""
    results: Path = RESULTS
    """Where rows go."""


def centred_rewards(batches: Sequence[TensorDictBase]) -> list[Tensor]:
    """Rewards [B] of each batch less the mean of the prompt's other images, over their standard deviation."""
    rewards = torch.cat([batch["next", "reward"][:, -1, 0] for batch in batches])
    prompts = torch.cat([batch["prompt_id"][:, 0, 0] for batch in batches])
    same = prompts[:, None] == prompts
    same.fill_diagonal_(False)
    others = same.float() @ rewards / same.sum(1).clamp(min=1)
    centred = torch.where(same.any(1), rewards - others, 0)
    return list((centred / centred.std()).split([len(batch) for batch in batches]))


def step_gradient(
    policy: ProbabilisticActor, batches: Sequence[TensorDictBase], weights: Sequence[Tensor], step: int
) -> Tensor:
    """Gradient of the mean of weight times log-probability of the decisions at `step`, over what trains, [P]."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    total = torch.zeros(sum(parameter.numel() for parameter in parameters))
    for batch, weight in zip(batches, weights, strict=True):
        decision = batch[:, step].clone()
        log_prob = policy.get_dist(decision).log_prob(decision["action"])
        gradients = torch.autograd.grad((log_prob * weight).mean(), parameters)
        total += torch.cat([gradient.flatten() for gradient in gradients]) / len(batches)
    return total


def main(settings: Settings) -> None:
    """Sample once; then a row for each step that has a density."""
    run = RunSettings(seed=settings.seed, held_out=())
    experiment = build_experiment(run)
    collected = iter(experiment.collector)
    batches = [next(collected).clone() for _ in range(settings.batches)]
    experiment.collector.shutdown()
    weights = centred_rewards(batches)
    for step, std in enumerate(experiment.backbone.sampler(run.sampling.num_steps, run.sampling.eta).std.tolist()):
        if std == 0:
            continue
        halves = [step_gradient(experiment.policy, batches[h::2], weights[h::2], step) for h in (0, 1)]
        row: dict[str, object] = {
            "step": step,
            "std": round(std, 4),
            "gradient_norm": round(sum(half.norm().item() for half in halves) / 2, 5),
            "cosine_of_halves": round(torch.cosine_similarity(*halves, dim=0).item(), 4),
            "images": sum(len(batch) for batch in batches),
        }
        print(row)
        append(row | provenance(), settings.results)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
