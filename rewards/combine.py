"""Rewards made of other rewards: a mixture of several, or one that is clipped, scaled or cut at a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Reward, check_batch


class RunningStatistics(nn.Module):
    """Takes the mean out of several quantities and divides by their standard deviation, of all values so far."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, quantities: int) -> None:
        super().__init__()
        for buffer in ("count", "mean", "squares"):
            self.register_buffer(buffer, torch.zeros(quantities, dtype=torch.float64))

    def forward(self, values: Tensor) -> Tensor:
        """Values [quantities, B] after the statistics have taken this batch in."""
        new = values.detach().double()
        mean, squares, count = new.mean(1), new.var(1, correction=0) * new.shape[1], new.shape[1]
        total = self.count + count
        shift = mean - self.mean
        self.squares += squares + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count.copy_(total)
        std = (self.squares / self.count).sqrt().clamp(min=1e-6)
        return (values - self.mean.float()[:, None]) / std.float()[:, None]


class Mix(nn.Module):
    """Weighted sum of rewards.

    With `normalise` each part first loses the mean and is divided by the standard deviation of all the images that
    this object has scored so far, those of the batch included: weights then say how much a part counts, whatever its
    unit, and a part that varies little is not drowned. The statistics settle as images come in, so early scores are on
    another scale than late ones; they are constants to a gradient and the one way in which a score depends on other
    images. They are in `statistics`, which a run's checkpoints hold.

    `last_parts` holds every part's own values for the latest batch, [B] by name; training logs their means.

    Args:
        parts: rewards (plain functions too) and their weights.
        normalise: take each part's running mean and scale out before the sum.
    """

    name = "mix"

    def __init__(self, parts: Sequence[tuple[Reward, float]], *, normalise: bool = False) -> None:
        super().__init__()
        self._names = [name_of(reward) for reward, _ in parts]
        if not parts or len(set(self._names)) < len(parts):
            raise ValueError(f"the parts are {self._names}: give at least one, and no two of one name.")
        if "std" in self._names:
            raise ValueError(
                "a part is called 'std', and would be logged as reward_std, the spread of the whole reward: rename it."
            )
        # Modules among the parts move and are saved with this one; functions just come along.
        self._modules_among = nn.ModuleList([reward for reward, _ in parts if isinstance(reward, nn.Module)])
        self._parts = tuple(parts)
        self.statistics = RunningStatistics(len(parts)) if normalise else None
        self.last_parts: dict[str, Tensor] = {}

    @property
    def differentiable(self) -> bool:
        """Whether gradients of every part reach the images."""
        return all(is_differentiable(reward) for reward, _ in self._parts)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score a batch, see `Reward`.

        Raises:
            ValueError: a part did not give one finite number an image.
        """
        check_batch(images, prompts)
        values, self.last_parts = [], {}
        for name, (reward, _) in zip(self._names, self._parts, strict=True):
            value = checked(reward(images, prompts), len(images), name).float()
            values.append(value)
            self.last_parts |= {name: value.detach()} | getattr(reward, "last_parts", {})
        stacked = torch.stack(values)
        if self.statistics is not None:
            stacked = self.statistics(stacked)
        weights = stacked.new_tensor([weight for _, weight in self._parts])
        return weights @ stacked


class _Changed(nn.Module):
    """One reward with its values changed; a subclass gives `change`."""

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.reward = reward
        self.name = name_of(reward)

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the images."""
        return is_differentiable(self.reward)

    @property
    def statistics(self) -> nn.Module | None:
        """Those of the reward within, where it is a `Mix` that normalises."""
        return getattr(self.reward, "statistics", None)

    @property
    def last_parts(self) -> dict[str, Tensor]:
        """The parts of the reward within, where it is a `Mix`."""
        return getattr(self.reward, "last_parts", {})

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score a batch, see `Reward`."""
        check_batch(images, prompts)
        return self.change(self.reward(images, prompts).float())

    def change(self, values: Tensor) -> Tensor:
        """New values [B]."""
        raise NotImplementedError


class Clip(_Changed):
    """A reward that stays within `low` and `high`; its gradient is 0 beyond them."""

    def __init__(self, reward: Reward, low: float, high: float) -> None:
        super().__init__(reward)
        if not low < high:
            raise ValueError(f"the bounds are {low} and {high}; the lower one comes first.")
        self._low, self._high = low, high

    def change(self, values: Tensor) -> Tensor:
        """Values clamped, [B]."""
        return values.clamp(self._low, self._high)


class Scale(_Changed):
    """A reward times `factor` plus `offset`; a negative factor turns it round."""

    def __init__(self, reward: Reward, factor: float, offset: float = 0.0) -> None:
        super().__init__(reward)
        self._factor, self._offset = factor, offset

    def change(self, values: Tensor) -> Tensor:
        """Values scaled and shifted, [B]."""
        return values * self._factor + self._offset


class Threshold(_Changed):
    """1 where a reward is at least `at`, else 0: passed or not. Has no gradient."""

    differentiable = False

    def __init__(self, reward: Reward, at: float) -> None:
        super().__init__(reward)
        self._at = at

    def change(self, values: Tensor) -> Tensor:
        """0 or 1, [B]."""
        return (values >= self._at).float()


def name_of(reward: Any) -> str:
    """The reward's own name, else its function's, else its class's."""
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__))


def is_differentiable(reward: Any) -> bool:
    """What the reward says of itself; a plain function says nothing and passes."""
    return getattr(reward, "differentiable", True)


def checked(values: Any, count: int, name: str) -> Tensor:
    """`values`, when they are `count` finite numbers; otherwise an error that names the part to blame."""
    if not isinstance(values, Tensor) or values.shape != (count,):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"the reward {name!r} returned {got}, expected a tensor of shape ({count},).")
    if not values.isfinite().all():
        first = int((~values.isfinite()).nonzero()[0])
        raise ValueError(f"the reward {name!r} is {values[first].item()} for image {first}, expected a finite number.")
    return values
