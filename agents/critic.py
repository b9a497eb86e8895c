"""Critics V(x_t, i, prompt) and Q(x_t, x_prev, i, prompt) for TorchRL's losses, and advantages from V.

    critic = make_critic(policy)
    loss = A2CLoss(policy, critic, entropy_bonus=False)
    train(..., loss, ..., advantage=CriticAdvantage(critic))

`ReinforceLoss`, `A2CLoss`, `ClipPPOLoss` and `KLPENPPOLoss` take policy and critic alike; the last one needs a policy
built with `keep_distribution=True`. Give each `entropy_bonus=False` where it has that argument: the steps' standard
deviation is fixed, so the policy's entropy does not depend on its parameters. `KLPENPPOLoss` adapts its coefficient
`beta` in every forward pass, that is once a micro-batch: a smaller `micro_batch` lets it move faster.
The process is undiscounted; TorchRL's value estimators discount by 0.99 unless told otherwise. A loss that is handed
`advantage` and `value_target`, as here, does not use its own. To use it, give the loss whole trajectories after
`RestoreNext`, and `loss.make_value_estimator(ValueEstimators.GAE, gamma=1.0, lmbda=0.95)` first.
"""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.envs import Transform
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives.value import GAE

from .distributed import joined
from .policy import denoising_mean

STATE_KEYS = ("latents", "step", "prompt_id")
NEXT_KEYS = tuple(("next", key) for key in STATE_KEYS)


class StateValue(nn.Module):
    """A small network (latents, step, prompt_id) -> expected reward; 0 everywhere at first.

    Latents of any shape are flattened; step and prompt are looked up, so the value of a prompt never seen in training
    is that of its random embedding.
    """

    def __init__(self, latent_shape: tuple[int, ...], num_steps: int, num_prompts: int, *, width: int = 128) -> None:
        """Two hidden layers of `width` units."""
        super().__init__()
        self._latent_ndim = len(latent_shape)
        self.latents = nn.Linear(math.prod(latent_shape), width)
        self.step = nn.Embedding(num_steps + 1, width)  # step T is the finished image's
        self.prompt = nn.Embedding(num_prompts, width)
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        for parameter in self.head[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, latents: Tensor, step: Tensor, prompt_id: Tensor) -> Tensor:
        """Values [*batch, 1] of `latents` [*batch, *latent], `step` and `prompt_id` [*batch, 1]."""
        hidden = self.latents(latents.flatten(-self._latent_ndim))
        return self.head(hidden + self.step(step.squeeze(-1)) + self.prompt(prompt_id.squeeze(-1)))


class ActionValue(nn.Module):
    """A small network (latents, action, step, prompt_id) -> expected reward; 0 everywhere at first.

    A `StateValue` of the latents before and after the step.
    """

    def __init__(self, latent_shape: tuple[int, ...], num_steps: int, num_prompts: int, *, width: int = 128) -> None:
        """Two hidden layers of `width` units."""
        super().__init__()
        channels, *rest = latent_shape
        self._channel_dim = -len(latent_shape)
        self.value = StateValue((2 * channels, *rest), num_steps, num_prompts, width=width)

    def forward(self, latents: Tensor, action: Tensor, step: Tensor, prompt_id: Tensor) -> Tensor:
        """Values [*batch, 1] of `latents`, `action` [*batch, *latent], `step` and `prompt_id` [*batch, 1]."""
        return self.value(torch.cat([latents, action], self._channel_dim), step, prompt_id)


def make_critic(policy: ProbabilisticActor, *, width: int = 128) -> ValueOperator:
    """A critic for `policy`'s latents, steps and prompts, on its device; writes `state_value` [*batch, 1]."""
    return _critic(policy, StateValue, STATE_KEYS, width)


def make_q_critic(policy: ProbabilisticActor, *, width: int = 128) -> ValueOperator:
    """A critic of actions, for off-policy losses; writes `state_action_value` [*batch, 1]."""
    return _critic(policy, ActionValue, ("latents", "action", "step", "prompt_id"), width)


def _critic(
    policy: ProbabilisticActor, network: type[StateValue | ActionValue], in_keys: tuple[str, ...], width: int
) -> ValueOperator:
    denoiser = denoising_mean(policy)
    shape, steps = denoiser.backbone.latent_shape, denoiser.sampler.num_steps
    value = network(shape, steps, len(denoiser.conditioning.prompts), width=width)
    return ValueOperator(value.to(denoiser.backbone.device), in_keys=list(in_keys))


class RestoreNext(Transform):
    """Restores the next state, which the collector drops, for value estimators: exactly, and without a copy.

    The next `latents` are the action, the next `step` is one more, the prompt stays. TorchRL's own
    `NextStateReconstructor` knows no last state.
    """

    def __init__(self) -> None:
        super().__init__(in_keys=["action", "step", "prompt_id"], out_keys=list(NEXT_KEYS))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write `NEXT_KEYS` to transitions of any batch shape."""
        values = (tensordict["action"], tensordict["step"] + 1, tensordict["prompt_id"])
        for key, value in zip(NEXT_KEYS, values, strict=True):
            tensordict.set(key, value)
        return tensordict


class CriticAdvantage(nn.Module):
    """The loop's `advantage`: generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16).

    Undiscounted, with TorchRL's `GAE`.
    """

    def __init__(self, critic: ValueOperator, *, lmbda: float = 0.95, standardize: bool = True) -> None:
        """Judge by `critic`.

        Args:
            critic: of `make_critic`; the loss trains it.
            lmbda: 0 trusts the critic's next value, 1 the reward at the end.
            standardize: mean 0 and standard deviation 1 over all transitions of a batch, that of all processes.
        """
        super().__init__()
        if not 0 <= lmbda <= 1:
            raise ValueError(f"lmbda is {lmbda}; it must lie between 0 (next value) and 1 (reward at the end)")
        self._restore = RestoreNext()
        self._standardize = standardize
        self._estimator = GAE(gamma=1.0, lmbda=lmbda, value_network=critic)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write `advantage`, `value_target` and `state_value`, each [B, T, 1], to whole trajectories [B, T]."""
        data = self._estimator(self._restore(tensordict)).exclude(*NEXT_KEYS)
        if not self._standardize:
            return data
        advantage = joined(data["advantage"]).values  # which TorchRL's `average_gae` knows of one process only
        return data.set("advantage", (data["advantage"] - advantage.mean()) / advantage.std().clamp(min=1e-4))
