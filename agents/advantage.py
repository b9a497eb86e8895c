"""Advantages: what a trajectory's reward is worth beside others of the same prompt."""

from __future__ import annotations

from collections import deque

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.objectives.llm import MCAdvantage

from .distributed import joined


class PromptAdvantage(nn.Module):
    """Per-prompt normalised reward (Black et al. 2023, arXiv:2305.13301, appendix D; `PerPromptStatTracker`).

    Each prompt remembers its last `buffer_size` rewards across iterations. The batch's rewards enter first; then
    A = (r - mean) / (std + 1e-6) with the prompt's mean and population standard deviation, or with the batch's while
    the prompt has fewer than `min_count` rewards; at last A is clipped to +-`clip`. With several processes the batch is
    that of all of them, and each has the whole memory.
    """

    def __init__(self, *, buffer_size: int = 32, min_count: int = 16, clip: float = 5.0) -> None:
        """Start without memory.

        Raises:
            ValueError: the minimum can never be reached, or nothing is left after clipping.
        """
        super().__init__()
        if not 1 <= min_count <= buffer_size:
            raise ValueError(f"min_count={min_count} must lie between 1 and buffer_size={buffer_size}")
        if clip <= 0:
            raise ValueError(f"clip is {clip}; it must be above 0")
        self._buffer_size, self._min_count, self._clip = buffer_size, min_count, clip
        self._rewards: dict[int, deque[float]] = {}

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write `advantage` [B, T, 1], the same for every step of a trajectory.

        Args:
            tensordict: whole trajectories [B, T] with `prompt_id` and `("next", "reward")`.
        """
        returns, own = joined(tensordict["next", "reward"].sum(1).flatten())
        prompts, _ = joined(tensordict["prompt_id"][:, 0].flatten())
        advantage = self.update(prompts.tolist(), returns.cpu()).to(returns)[own]
        shape = tensordict["next", "reward"].shape
        return tensordict.set("advantage", advantage[:, None, None].expand(shape))

    def update(self, prompt_ids: list[int], rewards: Tensor) -> Tensor:
        """Remember `rewards` [B] of `prompt_ids` and return their advantages [B]."""
        for prompt, reward in zip(prompt_ids, rewards.tolist(), strict=True):
            self._rewards.setdefault(prompt, deque(maxlen=self._buffer_size)).append(reward)
        batch = (rewards.mean(), rewards.std(correction=0))
        statistics = {prompt: self._statistics(prompt, batch) for prompt in set(prompt_ids)}
        mean, std = (torch.stack([statistics[prompt][k] for prompt in prompt_ids]) for k in (0, 1))
        return ((rewards - mean) / (std + 1e-6)).clamp(-self._clip, self._clip)

    def _statistics(self, prompt: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        remembered = torch.tensor(self._rewards[prompt])
        if len(remembered) < self._min_count:
            return batch
        return remembered.mean(), remembered.std(correction=0)

    def get_extra_state(self) -> dict[int, list[float]]:
        """The remembered rewards, for `state_dict`."""
        return {prompt: list(rewards) for prompt, rewards in self._rewards.items()}

    def set_extra_state(self, state: dict[int, list[float]]) -> None:
        """Restore what `get_extra_state` returned."""
        self._rewards = {prompt: deque(rewards, maxlen=self._buffer_size) for prompt, rewards in state.items()}


class GroupAdvantage(nn.Module):
    """Group-relative advantage, with TorchRL's `MCAdvantage` (GRPO: Shao et al. 2024, arXiv:2402.03300, section 4.1.2).

    A = (R - mean) / std over the images of one `group_id`, R the trajectory's summed reward and std with Bessel's
    correction; TorchRL's default would normalise over single steps, nearly all of which have reward 0. No memory. With
    several processes nothing is exchanged: a group is on one of them.
    """

    def __init__(self, samples_per_prompt: int) -> None:
        """Expect groups of `samples_per_prompt` images, the environment's number.

        Raises:
            ValueError: a group has a single image, which there is nothing to compare with.
        """
        super().__init__()
        if samples_per_prompt < 2:
            raise ValueError(f"samples_per_prompt is {samples_per_prompt}; a group needs at least 2 images to compare")
        self._estimator = MCAdvantage(samples_per_prompt, prompt_key="group_id", trajectory_return="sum")

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write `advantage` [B, T, 1], the same for every step of a trajectory, to whole trajectories [B, T].

        Raises:
            ValueError: the batch's groups are of another size.
        """
        # The estimator copies what it is given and puts it in another order: the latents stay out of it.
        needed = tensordict.select("group_id", ("next", "reward"), ("next", "done"))
        row = torch.arange(len(tensordict), device=tensordict.device)
        done = self._estimator.inv(needed.set("row", row[:, None].expand(tensordict.shape)))
        incomplete = self._estimator.queued_trajectories
        self._estimator.clear_queues()
        if incomplete or len(done) != tensordict.numel():
            raise ValueError(
                f"{incomplete} of {len(tensordict)} trajectories are in groups of fewer than "
                f"{self._estimator.grpo_size} images; give GroupAdvantage the environment's samples_per_prompt"
            )
        steps = done.reshape(tensordict.shape)
        order = steps["row"][:, 0].argsort()
        return tensordict.set("advantage", steps["advantage"][order])
