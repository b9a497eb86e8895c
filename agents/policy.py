"""Denoiser + sampler as a TorchRL probabilistic actor."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule
from torch import Size, Tensor, nn
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint
from torch.distributions.kl import register_kl
from torchrl.modules import ProbabilisticActor

from diffusion_env import ConditioningCache, DDIMSampler, Reduction, normal_kl, normal_log_prob
from diffusion_env.env import Decoder

NO_SAMPLES = Size()


class Backbone(Decoder, Protocol):
    """A network that denoises, (x_t, timestep, conditioning) -> guided output, and decodes what it has denoised."""

    def __call__(self, x_t: Tensor, timestep: Tensor, conditioning: TensorDict) -> Tensor:
        """Guided output [B, *latent]."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """A context in which the network is the pretrained one."""
        ...


class DenoisingNormal(Distribution):
    """N(loc, scale^2 I) over one latent, the action distribution of a denoising step.

    Its log-probability is averaged or summed over the latent's elements, see `diffusion_env.normal_log_prob`. Where
    `scale` is 0 a step is deterministic: it is sampled as its mean and has no density.
    """

    arg_constraints: dict[str, Constraint] = {}
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale: Tensor, *, latent_ndim: int, reduction: Reduction, all_have_density: bool
    ) -> None:
        """Take `loc` [*batch, *latent] and `scale` [*batch, 1, ...], both with `latent_ndim` dimensions a latent."""
        self.loc, self.scale = loc, scale
        self.reduction: Reduction = reduction
        self.all_have_density = all_have_density
        super().__init__(loc.shape[:-latent_ndim], loc.shape[-latent_ndim:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The mean [*batch, *latent]."""
        return self.loc

    @property
    def deterministic_sample(self) -> Tensor:
        """What TorchRL takes where exploration is off."""
        return self.loc

    @property
    def stddev(self) -> Tensor:
        """The standard deviation, broadcasting over the latent."""
        return self.scale

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = NO_SAMPLES) -> Tensor:
        """Mean + scale * noise, the noise drawn as diffusers' schedulers draw it, so that one seed serves both."""
        shape = (*sample_shape, *self.loc.shape)
        return self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability [*batch] of `value`; 0 stands in for a deterministic step while sampling.

        Raises:
            ValueError: a gradient is asked for at a deterministic step, where there is no density.
        """
        mean, x = (tensor.reshape(-1, *self.event_shape) for tensor in (self.loc, value))
        std = self.scale.reshape(-1, *self.scale.shape[-len(self.event_shape) :])
        if self.all_have_density:
            return normal_log_prob(x, mean, std, self.reduction).reshape(self.batch_shape)
        deterministic = std == 0
        if self.loc.requires_grad and deterministic.any():
            raise ValueError(
                f"{int(deterministic.sum())} of {len(std)} transitions are deterministic (standard deviation 0) and "
                "have no log-probability; train the others only (`sampler.has_density`)"
            )
        log_prob = normal_log_prob(x, mean, std.masked_fill(deterministic, 1.0), self.reduction)
        return log_prob.masked_fill(deterministic.flatten(), 0.0).reshape(self.batch_shape)


@register_kl(DenoisingNormal, DenoisingNormal)
def _kl(p: DenoisingNormal, q: DenoisingNormal) -> Tensor:
    """KL(p || q) [*batch] in closed form, for `torch.distributions.kl_divergence`; reduced as p's log-probability.

    Raises:
        ValueError: a step is deterministic, so that there are no densities to compare.
    """
    if not p.all_have_density and ((p.scale == 0).any() or (q.scale == 0).any()):
        raise ValueError(
            "some transitions are deterministic (standard deviation 0) and have no KL divergence; compare the others "
            "only (`sampler.has_density`)"
        )
    event = p.event_shape
    mean_p, mean_q = (each.loc.reshape(-1, *event) for each in (p, q))
    std_p, std_q = (each.scale.reshape(-1, *each.scale.shape[-len(event) :]) for each in (p, q))
    return normal_kl(mean_p, std_p, mean_q, std_q, p.reduction).reshape(p.batch_shape)


class DenoisingMean(nn.Module):
    """(latents, step, prompt_id) -> mean and standard deviation of the next latents, and the network's guided output.

    For any batch shape.
    """

    backbone: Backbone

    def __init__(self, backbone: Backbone, sampler: DDIMSampler, conditioning: ConditioningCache) -> None:
        """Keep the three; only `backbone` has parameters."""
        super().__init__()
        self.backbone = backbone
        self._tools = (sampler, conditioning)  # in a tuple: tables and prompt embeddings are no policy parameters

    def forward(self, latents: Tensor, step: Tensor, prompt_id: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`latents` [*batch, *latent], `step` and `prompt_id` [*batch, 1]."""
        batch = step.shape[:-1]
        x_t = latents.reshape(-1, *latents.shape[len(batch) :])
        i = step.reshape(-1)
        out = self.output(x_t, self.sampler.timesteps[i], prompt_id.reshape(-1))
        mean, std = self.sampler.step(x_t, out, i)
        return mean.reshape(latents.shape), std.reshape(*batch, *std.shape[1:]), out.reshape(latents.shape)

    @property
    def sampler(self) -> DDIMSampler:
        """What turns the network's output into mean and standard deviation."""
        return self._tools[0]

    @property
    def conditioning(self) -> ConditioningCache:
        """Encoded prompts by id."""
        return self._tools[1]

    def output(self, x_t: Tensor, timestep: Tensor, prompt_id: Tensor) -> Tensor:
        """The network's guided output [N, *latent] at any training timestep [N] for prompts [N]."""
        return self.backbone(x_t, timestep, self.conditioning(prompt_id))


def make_policy(
    backbone: Backbone,
    sampler: DDIMSampler,
    conditioning: ConditioningCache,
    *,
    log_prob_reduction: Reduction = "mean",
    keep_distribution: bool = False,
    keep_model_output: bool = False,
) -> ProbabilisticActor:
    """The denoising policy N(mu_theta(x_t, i, prompt), sigma_i^2 I).

    It samples unless told otherwise: TorchRL's probabilistic modules act deterministically by default outside a
    collector, and a policy gradient is then exactly zero.

    Args:
        backbone: the denoiser, its parameters are the policy's.
        sampler: turns the network's output into mean and standard deviation.
        conditioning: encoded prompts by id.
        log_prob_reduction: "mean" over latent elements as DDPO's published code, to which its clip range of 1e-4
            belongs, or "sum", the true log-probability, whose ratio leaves any clip range D times as fast.
        keep_distribution: write `loc` and `scale` too, as much again as the latents, for losses that ask
            (`KLPENPPOLoss`).
        keep_model_output: also write the network's guided output, which the trust region of `NablaDBLoss` reads and
            which is as large as the latents again.

    Returns:
        An actor that reads `latents`, `step`, `prompt_id` and writes `action`, `action_log_prob` and, if asked for,
        `model_output`.
    """
    if log_prob_reduction not in ("mean", "sum"):
        raise ValueError(f"log_prob_reduction is {log_prob_reduction!r}; choose 'mean' or 'sum'")
    mean = TensorDictModule(
        DenoisingMean(backbone, sampler, conditioning),
        in_keys=["latents", "step", "prompt_id"],
        out_keys=["loc", "scale", "model_output"],
    )
    policy = ProbabilisticActor(
        mean,
        in_keys=["loc", "scale"],
        distribution_class=DenoisingNormal,
        distribution_kwargs={
            "latent_ndim": len(backbone.latent_shape),
            "reduction": log_prob_reduction,
            "all_have_density": sampler.all_have_density,
        },
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )
    # A collector would store mean and scale of every step, as much as the latents again.
    kept = ["action", "action_log_prob"]
    kept += ["loc", "scale"] * keep_distribution + ["model_output"] * keep_model_output
    policy.select_out_keys(*kept)
    return policy


def denoising_mean(policy: ProbabilisticActor) -> DenoisingMean:
    """The network part of a policy made by `make_policy`.

    Raises:
        TypeError: `policy` was made otherwise.
    """
    found = [module for module in policy.modules() if isinstance(module, DenoisingMean)]
    if len(found) != 1:
        raise TypeError(
            f"the policy ({type(policy).__name__}) holds {len(found)} denoising networks, expected 1; make it with "
            "`make_policy`"
        )
    return found[0]
