"""The one loop: collect -> advantage -> buffer -> loss -> step -> metrics. Every method runs through it unchanged.

With several processes each has its own trajectories, and an optimiser step and its metrics are those of all together.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.profiler import record_function
from torchrl.data import ReplayBuffer, TensorStorage
from torchrl.envs import Transform
from torchrl.objectives import LossModule
from torchrl.objectives.utils import TargetNetUpdater

from .distributed import gathered, in_step, joined, on_first, sum_gradients
from .equal_weights import check_equal
from .rollout import TransitionSampler
from .sharding import borrowed, clip_gradients, is_sharded, whole

Metrics = dict[str, float]
Check = Callable[[TensorDictBase], Metrics]
SKIPPED = "skipped_updates"


class SkippedUpdateWarning(UserWarning):
    """An optimiser step was left out because its gradient was not finite."""


def train(
    collector: Iterable[TensorDictBase],
    loss: LossModule,
    optimizer: torch.optim.Optimizer,
    *,
    advantage: Callable[[TensorDictBase], TensorDictBase],
    sampler: TransitionSampler,
    updates_per_epoch: int = 1,
    epochs: int = 1,
    micro_batch: int = 64,
    max_grad_norm: float = 1.0,
    transform: Transform | None = None,
    buffer: ReplayBuffer | None = None,
    target_update: TargetNetUpdater | None = None,
    checks: Iterable[Check] = (),
    reward_parts: Callable[[], Mapping[str, Tensor]] = dict,
    prompts: Sequence[str] = (),
) -> Iterator[Metrics]:
    """Improve the policy that `collector` and `loss` share, one iteration a turn.

    Args:
        collector: yields whole trajectories [B, T] of the current policy (with `share_latents` as its `postproc`).
        loss: reads transitions [N] and returns a TensorDict whose `loss_*` entries are summed and minimised; the
            others are logged.
        optimizer: over the loss's trainable parameters; sharded and other ones in groups of their own.
        advantage: writes what the loss needs beside the rollout, once a batch; may leave out whole trajectories.
        sampler: which transitions train.
        updates_per_epoch: optimiser steps in one pass over the chosen transitions.
        epochs: passes over a batch of trajectories.
        micro_batch: transitions that go through the network at a time; gradients are summed to the mean over the
            optimiser step's transitions, so this bounds memory and changes nothing else.
        max_grad_norm: the gradient's global norm is clipped to this.
        transform: what the buffer does to the transitions of an optimiser step when they are drawn, with the policy as
            it then is; `RewardGradient` for Nabla-DB.
        buffer: for off-policy losses. What `sampler` chooses of each batch is added to it, and each optimiser step,
            `epochs * updates_per_epoch` an iteration, trains on what it draws, of any age. Its batch size, capacity and
            transform are its own; it holds `latents` and `action` separately, twice a rollout's memory.
        target_update: TorchRL's `SoftUpdate` or `HardUpdate` of a loss with target networks, stepped after each update.
        checks: called once with the first transitions, before the first update; their results are logged, the largest
            of all processes.
        reward_parts: called once a batch, before anything else can be scored; gives each part's rewards of that batch
            by name, for a reward that has parts.
        prompts: by id, for the warning about a skipped update.

    Raises:
        UnequalWeightsError: several processes start from different weights, see `distributed.share_weights`.

    Yields:
        Metrics of each iteration: `reward`, its `reward_std`, `reward_NAME` of each part, the loss's own, `grad_norm`,
        `skipped_updates` (their number), seconds spent.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    check_equal({f"parameter {number}": weight for number, weight in enumerate(whole(parameters))})
    pending = list(checks)
    batches = iter(collector)
    while True:
        start = time.perf_counter()
        with record_function("sampling"):
            data = next(batches, None)
        if data is None:
            return
        collected = time.perf_counter()
        parts = {f"reward_{name}": joined(value).values.mean().item() for name, value in reward_parts().items()}
        rewards = joined(data["next", "reward"].sum(1)).values
        data = advantage(data)
        with record_function("training"):
            fresh = _served(data, sampler, updates_per_epoch, transform) if len(data) else ()
            sums: dict[str, list[float]] = defaultdict(list)
            nothing = data[:0, 0]
            for minibatch in in_step(_minibatches(fresh, buffer, epochs, updates_per_epoch), nothing):
                first = minibatch[:micro_batch]
                found = _checked(pending, borrowed(first) if pending and is_sharded(parameters) else first)
                made = update(loss, optimizer, parameters, minibatch, micro_batch, max_grad_norm, prompts=prompts)
                for key, value in (found | made).items():
                    sums[key].append(value)
                if target_update is not None:
                    target_update.step()
        yield {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            **parts,
            **{key: sum(values) / (1 if key == SKIPPED else len(values)) for key, values in sums.items()},
            "seconds_sampling": collected - start,
            "seconds_training": time.perf_counter() - collected,
        }


def _served(
    data: TensorDictBase, sampler: TransitionSampler, updates_per_epoch: int, transform: Transform | None
) -> ReplayBuffer:
    """A buffer that deals out what `sampler` chooses of trajectories [B, T], in so many parts."""
    transitions = data.batch_size[0] * sampler.steps_per_trajectory
    return ReplayBuffer(
        storage=TensorStorage(data),
        sampler=sampler,
        batch_size=-(-transitions // updates_per_epoch),
        transform=transform,
    )


def _minibatches(
    fresh: Iterable[TensorDictBase], buffer: ReplayBuffer | None, epochs: int, updates_per_epoch: int
) -> Iterator[TensorDictBase]:
    """The transitions of each optimiser step of an iteration: passes over `fresh`, or draws from `buffer`."""
    if buffer is None:
        for _ in range(epochs):
            yield from fresh
        return
    for chosen in fresh:
        buffer.extend(chosen)
    for _ in range(epochs * updates_per_epoch):
        yield buffer.sample()


def _checked(pending: list[Check], transitions: TensorDictBase) -> Metrics:
    """What the `pending` checks find, the largest of all processes; afterwards there are none."""
    if not pending:
        return {}
    found: Metrics = {}
    for check in pending if len(transitions) else ():
        found |= check(transitions)
    pending.clear()
    rows = gathered(found)
    return {key: max(row[key] for row in rows if key in row) for row in rows for key in row}


def update(
    loss: LossModule,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    minibatch: TensorDictBase,
    micro_batch: int,
    max_grad_norm: float,
    *,
    prompts: Sequence[str] = (),
) -> Metrics:
    """One optimiser step on transitions [N], accumulated over micro-batches.

    Where the gradient is not finite nothing is changed, and a `SkippedUpdateWarning` names the transition to blame.
    With several processes the step is that of all their transitions together, of which one may have more, or none;
    those of a sharded network go through it equally often.

    Returns:
        The averaged loss entries, `grad_norm` and `skipped_updates` 0; of a skipped update `skipped_updates` 1 alone.
    """
    metrics: dict[str, Tensor] = {}
    parts = list(minibatch.split(micro_batch)) if len(minibatch) else []
    counts = gathered(len(minibatch))
    shares = [len(part) / sum(counts) for part in parts]
    if is_sharded(parameters):  # what is filled in has no share
        parts += [borrowed(minibatch)[:1]] * (-(-max(counts) // micro_batch) - len(parts))
    for part, share in zip_longest(parts, shares, fillvalue=0.0):
        losses = loss(part)
        (_objective(losses) * share).backward()
        for key, value in losses.items():
            metrics[key] = metrics.get(key, 0) + share * value.detach().float().mean()
    sum_gradients(whole(parameters))
    norm = clip_gradients(parameters, max_grad_norm)
    if not norm.isfinite():
        optimizer.zero_grad()
        culprit = "which transition is to blame cannot be searched for in a sharded network"
        if not is_sharded(parameters):
            blamed = gathered(_describe(_blame(loss, optimizer, parameters, parts), prompts))
            culprit = next(filter(None, blamed), "no single transition is to blame")
        on_first(warnings.warn)(
            f"an update was skipped, as the gradient's norm is {norm.item()}: {culprit}. Where it happens again, lower "
            "the learning rate, or look for a half-precision reward or network that overflows",
            SkippedUpdateWarning,
            stacklevel=3,
        )
        return {SKIPPED: 1.0}
    optimizer.step()
    optimizer.zero_grad()
    summed: dict[str, float] = defaultdict(float)
    values = torch.stack([*metrics.values(), norm]).tolist()  # all at once: each would wait for the device
    for row in gathered(dict(zip(metrics, values, strict=False))):
        for key, value in row.items():
            summed[key] += value
    return {**summed, "grad_norm": values[-1], SKIPPED: 0.0}


def _objective(losses: TensorDictBase) -> torch.Tensor:
    return sum(value for key, value in losses.items() if key.startswith("loss_"))


def _blame(
    loss: LossModule,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    parts: Sequence[TensorDictBase],
) -> TensorDictBase | None:
    """The first transition [1] whose gradient alone is not finite, found by halving; None if there is none."""

    def broken(part: TensorDictBase) -> bool:
        _objective(loss(part)).backward()
        norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        optimizer.zero_grad()
        return not norm.isfinite()

    part = next((part for part in parts if broken(part)), None)
    while part is not None and len(part) > 1:
        first, second = part.split(-(-len(part) // 2))
        part = first if broken(first) else second if broken(second) else None
    return part


def _describe(transition: TensorDictBase | None, prompts: Sequence[str]) -> str | None:
    if transition is None:
        return None
    prompt = int(transition["prompt_id"])
    text = f" {prompts[prompt]!r}" if prompts else ""
    return f"the first transition to blame is step {int(transition['step'])} of prompt {prompt}{text}"
