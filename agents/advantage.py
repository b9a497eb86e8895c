"""Advantages: what a trajectory's reward is worth beside others of the same prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from diffusion_env import DDIMSampler


class PromptAdvantage(nn.Module):
    """Per-prompt normalised reward (Black et al. 2023, arXiv:2305.13301, appendix D; `PerPromptStatTracker`).

    Each prompt remembers its last `buffer_size` rewards across iterations. The batch's rewards enter first; then
    A = (r - mean) / (std + 1e-6) with the prompt's mean and population standard deviation, or with the batch's while
    the prompt has fewer than `min_count` rewards; at last A is clipped to +-`clip`.
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
        returns = tensordict["next", "reward"].sum(1).flatten()
        prompts = tensordict["prompt_id"][:, 0].flatten().tolist()
        advantage = self.update(prompts, returns.cpu()).to(returns)
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


class NoiseAwareWeight(nn.Module):
    """Weights each step's advantage so that all steps pull equally at the network (He et al. 2025, arXiv:2508.04324).

    The score of step i is the sampling noise times b_i / sigma_i times the network's Jacobian. With eta = 1 that factor
    grows tenfold from the first step to the last but one, so that without weights the gradient, and its noise, is
    nearly all about the last touches, and what the early steps decide (layout, style) is hardly learned. The weights
    are sigma_i / |b_i|, scaled to a mean of 1 over the trained steps.
    """

    weight: Tensor

    def __init__(self, sampler: DDIMSampler, steps: Sequence[int]) -> None:
        """Weights for `steps` of `sampler`, the decisions that train; the others are left as they are."""
        super().__init__()
        index = torch.as_tensor(steps)
        weight = torch.ones(sampler.num_steps)
        ratio = sampler.std.cpu()[index] / sampler.mean_out.cpu()[index].abs()
        weight[index] = ratio / ratio.mean()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Multiply `advantage` [..., 1] by the weight of `step` [..., 1]."""
        weight = self.weight.to(tensordict["advantage"].device)[tensordict["step"]]
        return tensordict.set("advantage", tensordict["advantage"] * weight)
