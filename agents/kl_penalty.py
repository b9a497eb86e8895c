"""KL divergence to the pretrained model, exact at every step, as a term beside any policy-gradient loss.

Fan et al. 2023, "DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models", arXiv:2305.16381,
section 4.2: the sum over steps of E KL(p_theta(x_prev | x_t) || p_pretrained(x_prev | x_t)) bounds the divergence of
the images' distributions from above. Two steps differ in their means alone, and a divergence is
|mu - mu_pre|^2 / (2 sigma^2).
Details: the mean over transitions, as the losses take it; the states are those of the data. TorchRL's own
    `KLRewardTransform` is the sampled estimate for language models and knows no other policy.
Metric: `kl_reference`, the divergence before it is multiplied by the coefficient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import LossModule

from .policy import DenoisingMean, DenoisingNormal, denoising_mean

Triple = tuple[Tensor, Tensor, Tensor]


class Evaluated(NamedTuple):
    """One call of the policy's network: its inputs (latents, step, prompt_id), mean and standard deviation."""

    inputs: Triple
    mean: Tensor
    std: Tensor


class KLPenalty(LossModule):
    """What `loss` writes, and `loss_kl` = coefficient * mean KL(policy || pretrained model) at the same transitions.

    It costs one network call without gradient: the policy's own mean is the one that `loss` has computed.
    """

    def __init__(self, loss: LossModule, policy: ProbabilisticActor, *, coefficient: float) -> None:
        """Add the penalty to `loss`, which trains `policy`.

        Args:
            loss: any that evaluates the policy's distribution at its transitions, such as TorchRL's `ClipPPOLoss`.
            policy: made by `make_policy`; the pretrained model is its backbone within `reference()`, the adapter off
                or, in full fine-tuning, the frozen copy.
            coefficient: weight of the divergence, which is reduced over the latent's elements as the policy's
                log-probability is ("mean" or "sum"). Both parts of the loss then shrink alike, and a coefficient means
                the same for either reduction: what an advantage of 1 is worth in nats of one step.

        Raises:
            ValueError: the coefficient is not above 0, or no step has a density.
        """
        super().__init__()
        if not coefficient > 0:
            raise ValueError(f"coefficient is {coefficient}; it must be above 0. Without a penalty use the loss itself")
        self._tools = (policy, denoising_mean(policy))  # in a tuple: their parameters are listed as the loss's
        if not self._tools[1].sampler.has_density.any():
            raise ValueError("every step of this sampler is deterministic and has no KL divergence; raise eta")
        self.loss = loss
        self._coefficient = coefficient
        self.out_keys = [*loss.out_keys, "loss_kl", "kl_reference"]

    @property
    def in_keys(self) -> list[NestedKey]:
        """What `forward` reads."""
        return self.loss.in_keys

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The losses of transitions [N].

        Raises:
            TypeError: the loss never evaluates the policy's distribution at them.
            ValueError: a deterministic step is among them.
        """
        calls: list[Evaluated] = []

        def remember(_: nn.Module, inputs: Triple, outputs: Triple) -> None:
            mean, std, _out = outputs
            calls.append(Evaluated(inputs, mean, std))

        _, denoiser = self._tools
        hook = denoiser.register_forward_hook(remember)
        try:
            losses = self.loss(tensordict)
        finally:
            hook.remove()
        kl = self._kl(self._at_transitions(calls, tensordict.numel()), denoiser).mean()
        return losses.set("loss_kl", self._coefficient * kl).set("kl_reference", kl.detach())

    def _at_transitions(self, calls: list[Evaluated], count: int) -> Evaluated:
        for call in calls:
            if call.mean.requires_grad == torch.is_grad_enabled() and call.inputs[1].numel() == count:
                return call
        raise TypeError(
            f"{type(self.loss).__name__} does not evaluate the policy's distribution at its {count} transitions, where "
            "the KL divergence is measured; use the penalty with a policy-gradient loss"
        )

    def _kl(self, policy: Evaluated, denoiser: DenoisingMean) -> Tensor:
        """KL(policy || pretrained model) [N]."""
        with torch.no_grad(), denoiser.backbone.reference():
            mean, std, _ = denoiser(*policy.inputs)
        return kl_divergence(self._distribution(policy.mean, policy.std), self._distribution(mean, std))

    def _distribution(self, mean: Tensor, std: Tensor) -> DenoisingNormal:
        return self._tools[0].build_dist_from_params(TensorDict({"loc": mean, "scale": std}))
