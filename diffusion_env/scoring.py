"""The reward of finished images: asked, checked, and computed by a thread while other images are denoised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Reward = Callable[[Tensor, list[str]], Tensor]
Scores = tuple[Tensor, dict[str, Tensor]]


@torch.no_grad()
def score(reward: Reward, images: Tensor, prompts: list[str]) -> Scores:
    """Rewards float32 [B] of images [B, 3, H, W], and by name those of its parts, where it has any (`last_parts`).

    Raises:
        ValueError: the reward is not one finite number an image.
    """
    try:
        values = reward(images, prompts)
    except Exception as error:
        error.add_note(f"Raised by the reward {_name(reward)} for {len(prompts)} images, the first {prompts[0]!r}")
        raise
    return checked_reward(values, prompts), dict(getattr(reward, "last_parts", {}))


class BackgroundScorer:
    """Scores one batch of images after another in a thread of its own.

    One batch is scored at a time, in the order they came: a reward that remembers something (a `Mix` that normalises)
    gives exactly what it gives without a thread, and no more than one batch waits in memory.
    """

    def __init__(self) -> None:
        """Start nothing yet."""
        self._thread = ThreadPoolExecutor(1, "reward")
        self._running: Future[Scores] | None = None
        self._finished: list[Scores] = []

    def submit(self, reward: Reward, images: Tensor, prompts: list[str]) -> None:
        """Begin with a batch, once the one before is done; raises whatever `score` raised for that one."""
        self._wait()
        self._running = self._thread.submit(score, reward, images, prompts)

    def results(self) -> Scores:
        """What `score` gives for all batches since the last call, joined in their order."""
        self._wait()
        finished, self._finished = self._finished, []
        names = finished[0][1]
        return (
            torch.cat([values for values, _ in finished]),
            {name: torch.cat([parts[name] for _, parts in finished]) for name in names},
        )

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        try:
            self._finished.append(running.result())
        except BaseException:
            self._finished = []  # they belong to a batch of trajectories that will never be whole
            raise


def _name(reward: Reward) -> str:
    return str(getattr(reward, "name", None) or getattr(reward, "__qualname__", type(reward).__name__))


def checked_reward(values: Tensor, prompts: Sequence[str]) -> Tensor:
    """`values` as float32 if they are one finite number a prompt.

    Raises:
        ValueError: they are not; the message names the prompt and says what to do.
    """
    if not isinstance(values, Tensor):
        raise ValueError(f"the reward returned {type(values).__name__}, expected a tensor of shape ({len(prompts)},)")
    if values.shape != (len(prompts),):
        raise ValueError(
            f"the reward returned shape {tuple(values.shape)}, expected ({len(prompts)},): one number an image; "
            "drop or average the other dimensions"
        )
    if values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"the reward returned {values.dtype}, expected real numbers; convert it with .float()")
    broken = (~values.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"the reward is {values[broken[0]].item()} for prompt {prompts[broken[0]]!r} (image {broken[0]}, "
            f"{len(broken)} of {len(prompts)} images); return a finite number for every image, also for a black one"
        )
    return values.detach().float()
