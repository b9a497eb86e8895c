"""Reward backpropagation: the reward's own gradient, through the decoder and the last denoising steps.

The collector's state x_s is where the gradient stops; from there x' = mu_theta(x) + sigma z is differentiable. With
x_0 what is scored and r the reward, minimised is

    DRaFT, DRaFT-K  -E r(x_0), x_0 sampled from x_{T-K}; DRaFT is K = T    Clark et al. 2023, arXiv:2309.17400, sec. 4.1
    DRaFT-LV        the same for K = 1, averaged over the sampler's last step and `noises` fresh ones        sec. 4.2
    AlignProp       DRaFT-K with K drawn once per trajectory           Prabhudesai et al. 2023, arXiv:2310.03739, sec. 4
    ReFL            E max(0, c - r(x_0)), x_0 the one-step prediction at one random late step
                                                                           Xu et al. 2023, arXiv:2304.05977, algorithm 1

Details: steps are checkpointed, so that memory does not grow with K (one more forward pass a step); DRaFT-LV averages
where the paper sums, a factor that Adam does not see; AlignProp's |r - 10| for the aesthetic score is -r as long as
r < 10; ReFL's denoising loss on images from outside is left out, as in the authors' released loop.
Metrics: `backprop_reward`, mean reward of the images that were differentiated; ReFL's `clipped_fraction`, share of them
that give no gradient because their reward exceeds c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchrl.modules import ProbabilisticActor

from diffusion_env.scoring import Reward

from .differentiable_reward import check_differentiable, score
from .policy import denoising_mean
from .policy_loss import PolicyLoss
from .rollout import TransitionSampler
from .sharding import refuse_sharded


def clipped_shortfall(reward: Tensor, ceiling: float) -> Tensor:
    """ReFL's phi (Xu et al. 2023, algorithm 1): mean of max(0, ceiling - reward) over rewards [N]; a scalar."""
    return (ceiling - reward).relu().mean()


class RewardBackpropLoss(PolicyLoss):
    """What the losses of this file share; each says where it starts and, if not by sampling, how it gets clean latents.

    Reads states [N]: `latents`, `step`, `prompt_id`. The steps it may start from are `start_steps`, one a trajectory;
    `transition_sampler()` draws them. Noise is drawn anew, so that the images are those of the current policy.
    """

    @dataclass
    class _AcceptedKeys:
        latents: NestedKey = "latents"
        step: NestedKey = "step"
        prompt_id: NestedKey = "prompt_id"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    out_keys = ["loss_objective", "backprop_reward"]

    def __init__(
        self, policy: ProbabilisticActor, reward: Reward, start_steps: range, *, gradient_checkpointing: bool
    ) -> None:
        """Train `policy` on `reward`, (images in [0, 1], prompts) -> [N], from states of decisions `start_steps` on.

        `gradient_checkpointing` keeps the activations of one step at a time. A reward or a decoder that gives no
        gradient is refused with a ValueError.
        """
        super().__init__()
        self.convert_to_functional(policy, "actor_network")
        self.start_steps = start_steps
        self._checkpointing = gradient_checkpointing
        # In a tuple: the denoiser's parameters are listed as the policy's, a scorer's weights are not what trains.
        self._tools = (denoising_mean(policy), reward)
        check_differentiable(reward, self._tools[0])

    @property
    def in_keys(self) -> list[NestedKey]:
        """What `forward` reads."""
        return [self.tensor_keys.latents, self.tensor_keys.step, self.tensor_keys.prompt_id]

    def transition_sampler(self) -> TransitionSampler:
        """For the loop: from each trajectory one state, its step drawn uniformly from `start_steps`."""
        return TransitionSampler(self.start_steps, 1 / len(self.start_steps))

    def clean_latents(self, latents: Tensor, step: Tensor, prompt_id: Tensor) -> Tensor:
        """What is scored, differentiable in the policy: [k N, *latent] for some k, from states [N]. Here samples."""
        return self._denoised(latents, step, prompt_id)

    def objective(self, reward: Tensor) -> TensorDict:
        """`loss_objective` and metrics of rewards [N]."""
        return TensorDict({"loss_objective": -reward.mean(), "backprop_reward": reward.detach().mean()})

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The loss of states [N]; a ValueError where one is of another step than `start_steps`."""
        step = tensordict[self.tensor_keys.step]
        latents = tensordict[self.tensor_keys.latents].flatten(0, step.ndim - 2)
        prompt_id = tensordict[self.tensor_keys.prompt_id].reshape(-1)
        clean = self.clean_latents(latents, self._checked(step.reshape(-1)), prompt_id)
        prompts = prompt_id.repeat(len(clean) // len(prompt_id))
        denoiser, reward = self._tools
        return self.objective(score(reward, denoiser, clean, prompts))

    def _checked(self, step: Tensor) -> Tensor:
        """`step` on the CPU, where the number of steps to take is decided."""
        step = step.cpu()
        others = sorted(set(step.tolist()) - set(self.start_steps))
        if others:
            raise ValueError(
                f"states of steps {others} came, but the gradient starts at steps {list(self.start_steps)}; draw them "
                "with this loss's transition_sampler()"
            )
        return step

    def _denoised(self, latents: Tensor, step: Tensor, prompt_id: Tensor) -> Tensor:
        """Samples [N, *latent], each row from its own `step` (int64 [N], CPU) on; late rows wait for early ones."""
        x_t = latents
        for i in range(int(step.min()), self._tools[0].sampler.num_steps):
            rows = (step <= i).nonzero()[:, 0].to(x_t.device)
            x_t = x_t.index_copy(0, rows, self._next(x_t[rows], i, prompt_id[rows]))
        return x_t

    def _next(self, x_t: Tensor, i: int, prompt_id: Tensor) -> Tensor:
        """A sample of decision `i`, differentiable in `x_t` and in the policy."""
        inputs = (x_t, torch.full_like(prompt_id, i), prompt_id, torch.randn_like(x_t))
        if self._checkpointing:
            return checkpoint(self._reparametrised, *inputs, use_reentrant=False)
        return self._reparametrised(*inputs)

    def _reparametrised(self, x_t: Tensor, step: Tensor, prompt_id: Tensor, noise: Tensor) -> Tensor:
        # The parameters go in here rather than around the loop: a checkpoint runs this again in the backward pass.
        with self.actor_network_params.to_module(self.actor_network):
            mean, std, _ = self._tools[0](x_t, step[:, None], prompt_id[:, None])
        return mean + std * noise


class DRaFTLoss(RewardBackpropLoss):
    """DRaFT-K: through the last `backprop_steps` steps; DRaFT: through all of them."""

    def __init__(
        self,
        policy: ProbabilisticActor,
        reward: Reward,
        *,
        backprop_steps: int | None = None,
        gradient_checkpointing: bool = True,
    ) -> None:
        """Train `policy` on the differentiable `reward` through K = `backprop_steps` steps, 1 to T; None is T."""
        start_steps = _start_steps(policy, backprop_steps, backprop_steps)
        super().__init__(policy, reward, start_steps, gradient_checkpointing=gradient_checkpointing)


class AlignPropLoss(RewardBackpropLoss):
    """AlignProp: DRaFT-K with K drawn for each trajectory once, uniformly from `min_steps` to `max_steps`."""

    def __init__(
        self,
        policy: ProbabilisticActor,
        reward: Reward,
        *,
        min_steps: int = 1,
        max_steps: int | None = None,
        gradient_checkpointing: bool = True,
    ) -> None:
        """Train `policy` on the differentiable `reward`; the largest K is T where `max_steps` is None."""
        start_steps = _start_steps(policy, min_steps, max_steps)
        if len(start_steps) > 1:
            refuse_sharded(policy, "AlignProp")
        super().__init__(policy, reward, start_steps, gradient_checkpointing=gradient_checkpointing)


class DRaFTLVLoss(RewardBackpropLoss):
    """DRaFT-LV: the last step's gradient, from the sampler's last latents and from fresh ones at the same noise."""

    def __init__(self, policy: ProbabilisticActor, reward: Reward, *, noises: int = 2) -> None:
        """Average over the sampler's own last step and `noises` >= 1 fresh ones, 2 in the paper."""
        if noises < 1:
            raise ValueError(f"noises is {noises}; it must be at least 1. Without any use DRaFTLoss, backprop_steps=1")
        super().__init__(policy, reward, _start_steps(policy, 1, 1), gradient_checkpointing=False)
        self._noises = noises

    def clean_latents(self, latents: Tensor, step: Tensor, prompt_id: Tensor) -> Tensor:
        """Samples [(1 + noises) N, *latent], the sampler's own first."""
        own = self._denoised(latents, step, prompt_id)
        sampler, last = self._tools[0].sampler, self.start_steps[0]
        clean, prompts = own.detach().repeat(self._noises, *[1] * (own.ndim - 1)), prompt_id.repeat(self._noises)
        timestep = sampler.timesteps[last].expand(len(clean))
        noisy = sampler.add_noise(clean, torch.randn_like(clean), timestep).x_t
        return torch.cat([own, self._next(noisy, last, prompts)])


class ReFLLoss(RewardBackpropLoss):
    """ReFL: the one-step prediction at a random one of the last steps, its reward clipped from above."""

    out_keys = ["loss_objective", "backprop_reward", "clipped_fraction"]

    def __init__(
        self, policy: ProbabilisticActor, reward: Reward, *, last_steps: int = 10, ceiling: float = 2.0
    ) -> None:
        """Train `policy` on the differentiable `reward` until predicted images reach `ceiling`.

        Args:
            policy: the denoising policy.
            reward: what is maximised.
            last_steps: the step is drawn from this many last ones, 10 of 40 in the authors' code.
            ceiling: c, above which an image gives no gradient. It belongs to the reward's scale: 2 for ImageReward.
        """
        super().__init__(policy, reward, _start_steps(policy, 1, last_steps), gradient_checkpointing=False)
        self._ceiling = ceiling

    def clean_latents(self, latents: Tensor, step: Tensor, prompt_id: Tensor) -> Tensor:
        """One-step predictions [N, *latent]."""
        mean = self._tools[0]
        i = step.to(latents.device)
        with self.actor_network_params.to_module(self.actor_network):
            out = mean.output(latents, mean.sampler.timesteps[i], prompt_id)
        return mean.sampler.to_x0(latents, out, i)

    def objective(self, reward: Tensor) -> TensorDict:
        """`clipped_shortfall` and metrics of rewards [N]."""
        clipped = (reward.detach() > self._ceiling).float().mean()
        metrics = {"backprop_reward": reward.detach().mean(), "clipped_fraction": clipped}
        return TensorDict({"loss_objective": clipped_shortfall(reward, self._ceiling), **metrics})


def _start_steps(policy: ProbabilisticActor, fewest: int | None, most: int | None) -> range:
    """The decisions with `fewest` to `most` steps to the end, their own included; None is all T."""
    total = denoising_mean(policy).sampler.num_steps
    fewest, most = (total if count is None else count for count in (fewest, most))
    if not 1 <= fewest <= most <= total:
        asked = str(most) if fewest == most else f"{fewest} to {most}"
        raise ValueError(
            f"the gradient should go through the last {asked} steps of a trajectory of {total}; choose numbers from 1 "
            f"to {total} or sample with more steps"
        )
    return range(total - most, total - fewest + 1)
