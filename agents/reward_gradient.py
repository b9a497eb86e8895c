"""The reward's gradient with respect to the latents, which Nabla-DB regresses on.

Liu et al. 2025, "Efficient Diversity-Preserving Diffusion Alignment via Gradient-Informed GFlowNets", arXiv:2412.07775:
the gradient of x -> r(decode(x0(x)), prompt), with x0(x) the one-step prediction of the clean latents.
Details: each sample's own prompt; the reward in float32, whatever the network computes in; the raw gradient, since
    strength beta and attenuation gamma belong to the loss; pixels that decoding cuts to [0, 1] have no gradient.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Composite
from torchrl.envs import Transform
from torchrl.modules import ProbabilisticActor

from diffusion_env.scoring import Reward

from .differentiable_reward import check_differentiable, score_images
from .policy import denoising_mean


class RewardGradient(Transform):
    """Writes `reward_grad` at `latents` and `("next", "reward_grad")` at `action`, both [*batch, *latent], float32.

    Call it on transitions or trajectories, or give it to a replay buffer, where it sees the drawn transitions and the
    policy of the moment. On an environment (`TransformedEnv`) it does the work for every step of every image, which is
    for inspection and few steps. After the last step the latents are clean and the gradient is the true one there.
    """

    def __init__(
        self,
        policy: ProbabilisticActor,
        reward: Reward,
        *,
        jacobian: bool = True,
        final_image: bool = False,
        noisy_copies: int = 0,
        noise_std: float = 2e-3,
        max_norm: float | None = None,
        before: bool = True,
        micro_batch: int = 16,
    ) -> None:
        """Differentiate `reward` through the network of `policy` and the decoder.

        Args:
            policy: the policy, made by `make_policy`.
            reward: (images in [0, 1] of shape [B, 3, H, W], prompts) -> one number an image, [B], differentiable.
            jacobian: differentiate the network too, as Nabla-DB's authors do; False holds the network's output fixed,
                which costs no backward pass through it (VGG-Flow, Liu et al. 2025, arXiv:2512.05116).
            final_image: the gradient at the trajectory's finished image for all of its steps, instead of one at each
                step's prediction (Reward Score Matching, arXiv:2604.17415). Needs whole trajectories [B, T].
            noisy_copies: average the gradient over this many copies of the image with noise on their pixels (3 in the
                paper as others quote it); 0 takes the image as it is, as the authors' published code does.
            noise_std: standard deviation of that noise, images being in [0, 1]; 2e-3 in Nabla-R2D3's code.
            max_norm: gradients of a larger Euclidean norm are shortened to this, each sample's by itself (an option of
                Nabla-R2D3's code); None leaves them.
            before: write `reward_grad` too, which only backward matching reads.
            micro_batch: samples that go through the networks at a time.

        Raises:
            ValueError: the reward is not differentiable, or a number is out of range.
        """
        super().__init__(
            in_keys=["latents", "action", "step", "prompt_id"], out_keys=["reward_grad", ("next", "reward_grad")]
        )
        if noisy_copies < 0 or noise_std < 0 or micro_batch < 1:
            raise ValueError(
                f"noisy_copies={noisy_copies} and noise_std={noise_std} must be at least 0, micro_batch={micro_batch} "
                "at least 1"
            )
        if max_norm is not None and max_norm <= 0:
            raise ValueError(f"max_norm is {max_norm}; it must be above 0, or None for no clipping")
        check_differentiable(reward, denoising_mean(policy))
        self._tools = (denoising_mean(policy), reward)  # in a tuple: the policy's parameters are not the transform's
        self._jacobian, self._final_image, self._before = jacobian, final_image, before
        self._noisy_copies, self._noise_std, self._max_norm = noisy_copies, noise_std, max_norm
        self._micro_batch = micro_batch

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the gradients of transitions of any batch shape."""
        step, prompt_id = tensordict["step"], tensordict["prompt_id"]
        final = self._at_final_image(tensordict) if self._final_image else None
        after = self.gradient(tensordict["action"], step + 1, prompt_id) if final is None else final
        tensordict.set(("next", "reward_grad"), after)
        if self._before:
            before = self.gradient(tensordict["latents"], step, prompt_id) if final is None else final
            tensordict.set("reward_grad", before)
        return tensordict

    def gradient(self, latents: Tensor, step: Tensor, prompt_id: Tensor) -> Tensor:
        """The raw gradient [*batch, *latent] at `latents`; `step` and `prompt_id` [*batch, 1], step T is clean."""
        x = latents.reshape(-1, *latents.shape[step.ndim - 1 :])
        chunks = (tensor.split(self._micro_batch) for tensor in (x, step.reshape(-1), prompt_id.reshape(-1)))
        return torch.cat([self._chunk(*chunk) for chunk in zip(*chunks, strict=True)]).view_as(latents)

    @torch.enable_grad()
    def _chunk(self, x: Tensor, i: Tensor, prompt_id: Tensor) -> Tensor:
        denoiser, _ = self._tools
        x = x.detach().requires_grad_()
        images = denoiser.backbone.decode(self._clean(x, i, prompt_id))
        prompts = [denoiser.conditioning.prompts[k] for k in prompt_id.tolist()]
        copies = max(1, self._noisy_copies)
        if self._noisy_copies:
            images = images.repeat_interleave(copies, 0)
            images = images + self._noise_std * torch.randn_like(images)
            prompts = [prompt for prompt in prompts for _ in range(copies)]
        (gradient,) = torch.autograd.grad(score_images(self._tools[1], images, prompts).sum() / copies, x)
        if self._max_norm is None:
            return gradient
        norm = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
        return gradient * (self._max_norm / norm).clamp(max=1)

    def _clean(self, x: Tensor, i: Tensor, prompt_id: Tensor) -> Tensor:
        """One-step prediction of the clean latents; latents after the last step are clean already."""
        denoiser, _ = self._tools
        noisy = (i < denoiser.sampler.num_steps).nonzero().squeeze(1)
        if not len(noisy):
            return x
        x_t, i, prompt_id = x[noisy], i[noisy], prompt_id[noisy]
        with torch.set_grad_enabled(self._jacobian):
            out = denoiser.output(x_t, denoiser.sampler.timesteps[i], prompt_id)
        return x.index_copy(0, noisy, denoiser.sampler.to_x0(x_t, out, i))

    def _at_final_image(self, tensordict: TensorDictBase) -> Tensor:
        last = self._tools[0].sampler.num_steps - 1
        if tensordict.ndim != 2 or (tensordict["step"][:, -1] != last).any():
            raise ValueError(
                f"final_image needs whole trajectories [B, T] that end with step {last}, got a batch of shape "
                f"{tuple(tensordict.shape)}; call RewardGradient on the collector's batch, before transitions are drawn"
            )
        end = tensordict[:, -1]
        gradient = self.gradient(end["action"], end["step"] + 1, end["prompt_id"])
        return gradient.unsqueeze(1).expand_as(tensordict["latents"])

    # On an environment. The gradient is no observation: a collector would drop it from "next" to save memory.

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        if not self._before:
            return tensordict_reset
        return tensordict_reset.set("reward_grad", self._at_state(tensordict_reset))

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict.set("reward_grad", self._at_state(next_tensordict))

    def _at_state(self, state: TensorDictBase) -> Tensor:
        if self._final_image:
            raise ValueError(
                "final_image cannot be known while an environment steps; call RewardGradient on the collector's batch"
            )
        return self.gradient(state["latents"], state["step"], state["prompt_id"])

    def _post_step_mdp_hooks(
        self, tensordict: TensorDictBase, tensordict_: TensorDictBase
    ) -> tuple[TensorDictBase, TensorDictBase]:
        if self._before:
            tensordict_.set("reward_grad", tensordict["next", "reward_grad"])
        return tensordict, tensordict_

    def transform_output_spec(self, output_spec: Composite) -> Composite:
        """The specs as they are: what is written is no observation, see above."""
        return output_spec

    def transform_fake_tensordict(self, fake_tensordict: TensorDictBase) -> TensorDictBase:
        """Announce the keys to collectors, which reserve memory by it."""
        zeros = torch.zeros_like(fake_tensordict["latents"])
        fake_tensordict.set(("next", "reward_grad"), zeros)
        return fake_tensordict.set("reward_grad", zeros.clone()) if self._before else fake_tensordict
