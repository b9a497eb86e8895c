"""What test_distributed.py runs on two processes, `torchrun ranks.py PIPELINE RESULTS`, and itself on a single one.

Both make the same data; of two processes the first takes the leading rows, the second the others.
"""

import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn

from agents import (
    BestTrajectories,
    CriticAdvantage,
    Evaluator,
    ExponentialWeights,
    PromptAdvantage,
    ScoreFunctionLoss,
    TransitionSampler,
    make_collector,
    make_critic,
    make_policy,
    train,
)
from agents.distributed import draw_apart, gathered, join, rank, rank_seed, share_weights, size, sum_gradients
from agents.equal_weights import EqualWeights, UnequalWeightsError
from agents.stopping import StopRequest
from agents.training import update
from diffusion_env import DenoisingEnv, LoRA, StableDiffusionBackbone

PROMPTS = ("a cat", "a dog", "an ant")
STEPS = 3
IMAGES = 10


def own(rows, first):
    """Rows `first` and following are the second process's."""
    return rows if size() == 1 else rows[:first] if rank() == 0 else rows[first:]


def brightness(images, prompts):
    return images.mean((1, 2, 3))


class Bench:
    """A policy with random adapters, a rollout of it, a loss."""

    def __init__(self, pipeline):
        self.backbone = StableDiffusionBackbone.from_pretrained(pipeline, lora=LoRA(3, 5.0), guidance_scale=2.0)
        sampler, conditioning = self.backbone.sampler(STEPS), self.backbone.conditioning(PROMPTS)
        self.policy = make_policy(self.backbone, sampler, conditioning)
        self.loss = ScoreFunctionLoss(self.policy)
        self.parameters = [parameter for parameter in self.loss.parameters() if parameter.requires_grad]
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters:
            nn.init.normal_(parameter, std=0.3, generator=generator)
        self.start = self.values()
        self.env = DenoisingEnv(self.backbone, STEPS, brightness, PROMPTS, batch_size=IMAGES, seed=0)
        torch.manual_seed(1)
        collector = make_collector(self.env, self.policy, iterations=1)
        (self.rollout,) = collector
        collector.shutdown()
        self.rollout["advantage"] = torch.randn(IMAGES, 1, 1, generator=generator).expand(IMAGES, STEPS, 1).clone()

    def values(self):
        """What trains, as one vector."""
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters])

    def restart(self):
        """The weights and rollout as they were."""
        nn.utils.vector_to_parameters(self.start.clone(), self.parameters)  # which makes them views of it
        return self.rollout.clone()


def updates(bench):
    """Optimiser steps on ten transitions, divided unequally: weights and metrics, by optimiser and division."""
    found = {}
    # Adam divides by the gradient's size plus eps: with the usual 1e-8 it magnifies what is rounding alone.
    optimizers = {"sgd": torch.optim.SGD, "adamw": partial(torch.optim.AdamW, eps=1e-2)}
    for name, make_optimizer in optimizers.items():
        for first in (6, 10, 3):
            data = own(bench.restart().reshape(-1)[:10], first)
            optimizer = make_optimizer(bench.parameters, lr=1e-2)
            metrics = update(bench.loss, optimizer, bench.parameters, data, 4, 1.0)
            found[f"{name} {first}"] = {"weights": bench.values(), "metrics": metrics}
    return found


def broken(bench):
    """An update with one transition that is not finite, the second process's."""
    data = bench.restart().reshape(-1)[:10]
    data["advantage"][8] = float("nan")
    optimizer = torch.optim.AdamW(bench.parameters, lr=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = update(bench.loss, optimizer, bench.parameters, own(data, 6), 4, 1.0, prompts=PROMPTS)
    unchanged = torch.equal(bench.values(), bench.start) and not optimizer.state
    return {"metrics": metrics, "unchanged": unchanged, "warnings": [str(each.message) for each in caught]}


def unused(_):
    """Gradients of three parameters, of which one has none on the second process and one has none anywhere."""
    parameters = [nn.Parameter(torch.full((2,), float(n))) for n in range(3)]
    weight = 1.0 if size() == 1 else 0.25 + 0.5 * rank()
    (weight * parameters[0].sum()).backward()
    if rank() == 0:
        parameters[1].sum().backward()
    sum_gradients(parameters)
    return [parameter.grad for parameter in parameters]


def advantages(bench):
    """What each kind of advantage writes over two batches, and what is remembered."""
    torch.manual_seed(2)
    critic = make_critic(bench.policy, width=8)
    nn.init.normal_(critic.module.head[-1].weight)
    kinds = {
        "prompt": PromptAdvantage(buffer_size=6, min_count=3),
        "exponential": ExponentialWeights(inverse_temperature=9.0),
        "exponential, by prompt": ExponentialWeights(inverse_temperature=9.0, per_prompt=True),
        "best": BestTrajectories(percentile=0.8),
        "critic": CriticAdvantage(critic),
    }
    found = {}
    for name, kind in kinds.items():
        for batch, first in enumerate((7, 2)):
            data = bench.restart()
            data["next", "reward"][:, -1, 0] = torch.sin(torch.arange(IMAGES) * (batch + 1.3))
            data = kind(own(data, first))
            written = data["weight" if "weight" in data.keys() else "advantage"]
            found[f"{name} {batch}"] = torch.cat(gathered(written.detach()))
    return found | {"memory": kinds["prompt"].get_extra_state()}


def loop(bench):
    """Two iterations of the loop; the selection leaves the second process nothing, then less than there are updates."""

    def select(data):
        kept = torch.zeros(IMAGES, dtype=torch.bool)
        kept[: (6, 8)[len(rows)]] = True
        return data[own(kept, 7)]

    rows, seen = [], []

    def recording(part):
        seen.append(len(part))
        return bench.loss(part)

    batches = [own(bench.restart(), 7) for _ in range(2)]
    made = train(
        batches,
        recording,
        torch.optim.SGD(bench.parameters, lr=1e-2),
        advantage=select,
        sampler=TransitionSampler(range(STEPS)),
        updates_per_epoch=1,
        micro_batch=4,
        checks=[lambda part: {"checked": float(len(part))}],
        reward_parts=lambda: {"part": own(torch.arange(10.0), 7)},
    )
    for row in made:
        rows.append({key: value for key, value in row.items() if not key.startswith("seconds")})
    return {"rows": rows, "weights": bench.values(), "transitions": sum(map(sum, gathered(seen)))}


def unequal_start(bench):
    """What `train` says when the second process starts from other weights."""
    bench.restart()
    with torch.no_grad():
        bench.parameters[1].add_(1e-6 * rank())
    started = train(
        [], bench.loss, torch.optim.SGD(bench.parameters), advantage=None, sampler=TransitionSampler(range(STEPS))
    )
    try:
        return list(started)
    except UnequalWeightsError as error:
        return str(error)


def evaluation(bench):
    """An evaluation in three chunks."""
    bench.restart()
    env = DenoisingEnv(bench.backbone, STEPS, brightness, PROMPTS, batch_size=4, seed=0)
    features = nn.Flatten()
    made = Evaluator(env, samples_per_prompt=3, held_out={"b": brightness}, features=features, kl_trajectories=5)(
        bench.policy
    )
    return [made.images, made.rewards, made.held_out["b"], made.features, made.kl, made.prompts]


def comparison(bench):
    """At which update, of those that compare every second one, a difference of the second process is found."""
    layer = nn.Linear(2, 2)
    share_weights(layer.state_dict())
    compare = EqualWeights(layer.state_dict, every=2)
    for number in range(1, 5):
        if number == 3 and rank() == 1:
            layer.bias.data[1] += 1e-7
        try:
            compare()
        except UnequalWeightsError as error:
            return [number, str(error)]
    return None


def random_numbers(_):
    """Seeds, and what the generators draw when the processes have parted."""
    torch.manual_seed(5)
    same = torch.rand(2)
    draw_apart()
    return {"seeds": [rank_seed(seed) for seed in (0, 1, -1)], "same": same, "apart": torch.rand(2)}


def stopping(_):
    """A signal that comes to the last process alone."""
    with StopRequest() as stop:
        if rank() == size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return str(stop.received().name)


CASES = (updates, broken, unused, advantages, loop, unequal_start, evaluation, comparison, random_numbers, stopping)


def run(pipeline):
    """Every case's results by name."""
    bench = Bench(pipeline)
    return {case.__name__: case(bench) for case in CASES}


if __name__ == "__main__":
    join("cpu")
    torch.save(run(sys.argv[1]), Path(sys.argv[2]) / f"{rank()}.pt")
