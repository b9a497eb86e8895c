"""Reward-weighted regression: the denoising loss on the model's own images, the better ones weighing more.

Peters and Schaal 2007; for diffusion models Lee et al. 2023, arXiv:2302.12192, and Black et al. 2023,
arXiv:2305.13301, section 4.2 and appendix D, whose two weightings are here:

    RWR         w = exp(beta r) / Z, over all images of a batch or over those of one prompt; Z makes their mean 1
    RWR-sparse  w = 1 where r is at or above a percentile, else 0: those images are dropped

Minimise E w ||target - out_theta(x_t, t)||^2 / D, x_t the clean latents noised to a uniform training timestep, D their
number of elements. No log-probability takes part, so that any sampler does, also a deterministic one.
Details: `out` is the guided output, as in all of DDPO's published configurations; beta = 0.2, the 90th percentile and
global weights as there (the paper's text says per prompt). On one batch several passes (`epochs`) are usual.
Metric: `denoising_error`, the squared error without weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor

from .distributed import joined
from .policy import denoising_mean
from .policy_loss import PolicyLoss
from .rollout import TransitionSampler


def exponential_weights(rewards: Tensor, inverse_temperature: float) -> Tensor:
    """exp(beta r) / Z of rewards [N], float32 [N] with mean 1 (Black et al. 2023, appendix D.2)."""
    return (inverse_temperature * rewards.float()).softmax(0) * len(rewards)


def at_or_above_percentile(rewards: Tensor, percentile: float) -> Tensor:
    """Which of rewards [N] reach their `percentile` in [0, 1], bool [N] with at least one True (appendix D.3)."""
    return rewards >= rewards.quantile(percentile)


def weighted_regression(out: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over [N] of `weight` [N] times the mean squared error of `out`, `target` [N, *latent]; a scalar."""
    return (weight * (out - target).square().flatten(1).mean(1)).mean()


class ExponentialWeights(nn.Module):
    """RWR's weights, computed once over the whole batch, that of all processes: the loop's `advantage`."""

    def __init__(self, *, inverse_temperature: float = 0.2, per_prompt: bool = False) -> None:
        """Weigh images by exp(`inverse_temperature` * reward), over the batch or within each prompt.

        Raises:
            ValueError: the inverse temperature is negative; worse images would weigh more.
        """
        super().__init__()
        if inverse_temperature < 0:
            raise ValueError(f"inverse_temperature is {inverse_temperature}; it must be at least 0 (0 = all alike)")
        self._inverse_temperature, self._per_prompt = inverse_temperature, per_prompt

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write `weight` [B, T, 1] to whole trajectories [B, T]."""
        rewards, own = joined(_returns(tensordict))
        weight = torch.empty_like(rewards)
        for rows in _groups(tensordict, self._per_prompt):
            weight[rows] = exponential_weights(rewards[rows], self._inverse_temperature)
        return _with_weight(tensordict, weight[own])


class BestTrajectories(nn.Module):
    """RWR-sparse's selection, made once over the whole batch, that of all processes: the loop's `advantage`."""

    def __init__(self, *, percentile: float = 0.9, per_prompt: bool = False) -> None:
        """Keep images whose reward reaches the `percentile` of the batch's, or of their prompt's.

        Raises:
            ValueError: the percentile is not in [0, 1].
        """
        super().__init__()
        if not 0 <= percentile <= 1:
            raise ValueError(
                f"percentile is {percentile}; it must lie in [0, 1], 0.9 keeps the best tenth (not 90: a share)"
            )
        self._percentile, self._per_prompt = percentile, per_prompt

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The kept ones [K, T] of whole trajectories [B, T], with `weight` [K, T, 1] of 1; K may be 0."""
        rewards, own = joined(_returns(tensordict))
        kept = torch.zeros_like(rewards, dtype=torch.bool)
        for rows in _groups(tensordict, self._per_prompt):
            kept[rows] = at_or_above_percentile(rewards[rows], self._percentile)
        mine = kept[own]
        return _with_weight(tensordict[mine], torch.ones_like(rewards[own][mine]))


class RWRLoss(PolicyLoss):
    """`weighted_regression` over finished images: transitions of the last step, their `action` the clean latents.

    Reads `action`, `step`, `prompt_id` and the `weight` that `ExponentialWeights` or `BestTrajectories` wrote; draws
    noise and a training timestep for each.
    """

    @dataclass
    class _AcceptedKeys:
        action: NestedKey = "action"
        step: NestedKey = "step"
        prompt_id: NestedKey = "prompt_id"
        weight: NestedKey = "weight"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    out_keys = ["loss_objective", "denoising_error"]

    def __init__(self, policy: ProbabilisticActor) -> None:
        """Train `policy`'s network."""
        super().__init__()
        self.convert_to_functional(policy, "actor_network")
        self._denoiser = (denoising_mean(policy),)  # in a tuple: its parameters are listed as the policy's
        self._last_step = self._denoiser[0].sampler.num_steps - 1

    @property
    def in_keys(self) -> list[NestedKey]:
        """What `forward` reads."""
        keys = self.tensor_keys
        return [keys.action, keys.step, keys.prompt_id, keys.weight]

    def transition_sampler(self) -> TransitionSampler:
        """For the loop: the last transition of each trajectory."""
        return TransitionSampler([self._last_step])

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The loss of last transitions [N].

        Raises:
            ValueError: a transition is not the last one, so that its action is no finished image; or `weight` is not
                one number a transition.
        """
        clean, step, prompt_id, weight = (tensordict[key] for key in self.in_keys)
        if (step != self._last_step).any():
            raise ValueError(
                f"transitions of steps {sorted(set(step.flatten().tolist()))} came, but only those of the last step, "
                f"{self._last_step}, end in a finished image; draw them with this loss's transition_sampler()"
            )
        if weight.shape != step.shape:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, expected {tuple(step.shape)}: one weight a transition, [N, 1]"
            )
        denoiser = self._denoiser[0]
        timestep = torch.randint(denoiser.sampler.num_train_timesteps, (len(clean),), device=clean.device)
        noised = denoiser.sampler.add_noise(clean, torch.randn_like(clean), timestep)
        with self.actor_network_params.to_module(self.actor_network):
            out = denoiser.output(noised.x_t, timestep, prompt_id.flatten())
        error = (out.detach() - noised.target).square().mean()
        loss = weighted_regression(out, noised.target, weight.flatten())
        return TensorDict({"loss_objective": loss, "denoising_error": error})


def _returns(tensordict: TensorDictBase) -> Tensor:
    """Rewards [B] of whole trajectories [B, T]."""
    return tensordict["next", "reward"].sum(1).flatten()


def _groups(tensordict: TensorDictBase, per_prompt: bool) -> list[Tensor]:
    """Which trajectories of all processes are weighed against each other, bool [sum of B] for each group."""
    prompt_id = joined(tensordict["prompt_id"][:, 0].flatten()).values
    if not per_prompt:
        return [torch.ones_like(prompt_id, dtype=torch.bool)]
    return [prompt_id == one for one in prompt_id.unique()]


def _with_weight(tensordict: TensorDictBase, weight: Tensor) -> TensorDictBase:
    return tensordict.set("weight", weight[:, None, None].expand(tensordict["next", "reward"].shape))
