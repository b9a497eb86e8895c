"""Nabla-DB and residual Nabla-DB: gradient-informed detailed balance, matching scores instead of densities.

Liu et al. 2025, "Efficient Diversity-Preserving Diffusion Alignment via Gradient-Informed GFlowNets", arXiv:2412.07775.
The target is p(x_0 | prompt) proportional to p_ref(x_0 | prompt) exp(beta r(x_0, prompt)); without the pretrained model
p_ref where not residual. Detailed balance between x_t and x_prev, differentiated by each of them, asks for

    forward   grad_{x_prev} S =  f(x_prev)        S = log p(x_prev | x_t) - log b(x_prev, x_t)
    backward  grad_{x_t}    S = -f(x_t)           f(x) = beta gamma grad r(x0(x)) + g(x), the score of the flow
    terminal  g(clean) = 0

with b the pretrained model's p_ref(x_prev | x_t) (residual) or the noising kernel q(x_t | x_prev). The loss is the mean
square, over transitions and latent elements, of what is left of each equation.

Details: the residual forward score is (b_i / sigma_i^2)(out - out_ref), from which the sampling noise has cancelled;
    backward matching is a vector-Jacobian product at x_t and by default trains the correction g alone, as in the
    authors' code; it is kept at the last step, where their code compares with 0; terminal matching is averaged over all
    transitions, the last ones having a share of it, so that a micro-batch changes nothing.
Metrics: `score_rms`, `reward_flow_rms`, `correction_rms`, root mean squares at x_prev of the left side of forward
    matching, of beta gamma grad r and of g. A correction as large as the reward's part explains the reward away.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchrl.modules import ProbabilisticActor

from diffusion_env import StepCoefficients

from .policy import denoising_mean
from .policy_loss import PolicyLoss
from .scores import Evaluated, StepScores, Weighting, balance_scores, pull_back, residual_scores, step_weight
from .sharding import refuse_sharded


def matching(score: Tensor, target: Tensor | float, weight: Tensor | float) -> Tensor:
    """Mean of (weight (score - target))^2 over transitions and latent elements, a scalar."""
    return (weight * (score - target)).square().mean()


class NablaDBLoss(PolicyLoss):
    """Nabla-DB over transitions [*batch]; reads what the policy reads, `action` and what `RewardGradient` writes.

    Writes `loss_forward` and, where they are on, `loss_backward`, `loss_terminal`, `loss_trust_region`, each with its
    weight; and the metrics of this module's docstring.
    """

    @dataclass
    class _AcceptedKeys:
        action: NestedKey = "action"
        reward_grad: NestedKey = "reward_grad"
        model_output: NestedKey = "model_output"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    _gamma: Tensor

    def __init__(
        self,
        policy: ProbabilisticActor,
        *,
        beta: float,
        correction: nn.Module | None = None,
        residual: bool = True,
        backward_weight: float | None = None,
        backward_trains_policy: bool = False,
        terminal_weight: float = 1.0,
        trust_region: float = 0.0,
        gamma_power: float = 1.0,
        weighting: Weighting = "none",
        last_step: int | None = None,
    ) -> None:
        """Train `policy`, and `correction` if there is one.

        Args:
            policy: made by `make_policy`.
            beta: strength of the reward, one over a temperature; 1e4 in the paper's code for the aesthetic score.
            correction: g, a network (x, timestep, conditioning) -> [N, *latent] that is zero at first, such as
                `CorrectionUNet`; the clean latents have the timestep below the last one. None is forward matching
                alone (Nabla-R2D3; Reward Score Matching, arXiv:2604.17415, finds that g hardly matters).
            residual: compare with the pretrained model; False samples from exp(beta r) without it.
            backward_weight: weight of backward matching. None is 1 where it trains something, otherwise 0. With a
                correction and 0 forward matching may explain the reward away instead of following it.
            backward_trains_policy: differentiate backward matching by the policy's parameters too, a second-order
                graph for which attention takes PyTorch's slower math kernel.
            terminal_weight: weight of terminal matching. The authors average over the last transitions alone: that is
                the number of transitions that train per trajectory.
            trust_region: weight lambda of the squared change of the network's output since the data were sampled, an
                additional term of the paper (2e3 there); needs `make_policy(..., keep_model_output=True)`.
            gamma_power: gamma is alpha_bar to this power, 1 at the clean latents: 1 in the authors' code, 0.5 their
                other choice, 0 no attenuation.
            weighting: what the residuals of forward matching are multiplied by. "none" is the paper, where the last two
                of fifty steps have 97 % of the weight; "sigma" (Reward Score Matching) the step's standard deviation;
                "output" sigma^2 / |b|, which compares network outputs (noise, for a network that predicts it). The
                other terms are not weighted: a backward term smaller than the forward one of the step before would
                leave the correction to follow the policy.
            last_step: the decision after which latents count as finished, where g is 0; None is the last one with a
                density. An earlier one leaves out decisions with next to no noise, whose scores, over sigma^2, drown
                all others.

        Raises:
            ValueError: a term would train nothing, no step has a density, the network is sharded, or a number is out
                of range.
        """
        super().__init__()
        refuse_sharded(policy, "Nabla-DB")
        if backward_weight is None:
            backward_weight = float(correction is not None or backward_trains_policy)
        if backward_weight > 0 and correction is None and not backward_trains_policy:
            raise ValueError(
                f"backward matching (backward_weight={backward_weight}) would be a constant: it trains the correction "
                "network and there is none. Give a correction, set backward_trains_policy=True, or backward_weight=0"
            )
        if min(beta, backward_weight, terminal_weight, trust_region, gamma_power) < 0:
            raise ValueError(
                f"{beta=}, {backward_weight=}, {terminal_weight=}, {trust_region=} and {gamma_power=} must be at least "
                "0; for less of what a reward measures, negate the reward"
            )
        if weighting not in ("none", "sigma", "output"):
            raise ValueError(f"weighting is {weighting!r}; choose 'none', 'sigma' or 'output'")
        self._denoiser = (denoising_mean(policy),)  # in a tuple: its parameters are listed as the policy's
        sampler = self._denoiser[0].sampler
        if not sampler.has_density.any():
            raise ValueError("every step of this sampler is deterministic, so Nabla-DB has nothing to match; raise eta")
        self.convert_to_functional(policy, "actor_network")
        self.correction = correction
        self._beta, self._residual, self._weighting = beta, residual, weighting
        self._backward_weight, self._backward_trains_policy = backward_weight, backward_trains_policy
        self._terminal_weight, self._trust_region = terminal_weight, trust_region
        on = {
            "loss_forward": True,
            "loss_backward": backward_weight > 0,
            "loss_terminal": correction is not None,
            "loss_trust_region": trust_region > 0,
        }
        self.out_keys = [*(key for key, value in on.items() if value), "score_rms", "reward_flow_rms", "correction_rms"]
        # After the last step with a density nothing random happens: that state is the terminal one.
        random = sampler.has_density.nonzero().flatten().tolist()
        self._last = random[-1] if last_step is None else last_step
        if self._last not in random:
            raise ValueError(f"last_step={last_step} is no decision with a density; those are {random}")
        gamma = sampler.signal_power**gamma_power
        gamma[self._last + 1 :] = 1
        self.register_buffer("_gamma", gamma, persistent=False)

    @property
    def in_keys(self) -> list[NestedKey]:
        """What `forward` reads."""
        keys = self.tensor_keys
        optional = [keys.reward_grad] * (self._backward_weight > 0) + [keys.model_output] * (self._trust_region > 0)
        return [*self.actor_network.in_keys, keys.action, self._next_reward_grad, *optional]

    @property
    def _next_reward_grad(self) -> NestedKey:
        return ("next", self.tensor_keys.reward_grad)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The losses of transitions.

        Raises:
            KeyError: an entry is missing; the message says what writes it.
            ValueError: a deterministic step is among them.
        """
        data = self._checked(tensordict)
        x_t, step, prompt_id = (data[key] for key in self.actor_network.in_keys)
        x_prev, i, prompt_id = data[self.tensor_keys.action], step[:, 0], prompt_id[:, 0]
        coefficients = self._denoiser[0].sampler.coefficients(i, x_t)
        weight = step_weight(coefficients, self._weighting)
        out, score = self._scores(x_t, x_prev, i, prompt_id, coefficients)
        terminal = (i == self._last).view_as(weight)

        reward_flow = self._reward_flow(data[self._next_reward_grad], i + 1)
        correction = self._correction(x_prev, i + 1, prompt_id)
        target = reward_flow + correction.masked_fill(terminal, 0)
        losses = {"loss_forward": matching(score.by_x_prev, target, weight)}
        if score.by_x_t is not None:
            flow = self._reward_flow(data[self.tensor_keys.reward_grad], i) + self._correction(x_t, i, prompt_id)
            losses["loss_backward"] = self._backward_weight * matching(score.by_x_t, -flow, 1)
        if self.correction is not None:
            losses["loss_terminal"] = self._terminal_weight * matching(correction, 0, terminal.float())
        if self._trust_region:
            losses["loss_trust_region"] = self._trust_region * matching(out, data[self.tensor_keys.model_output], 1)
        parts = {"score_rms": score.by_x_prev, "reward_flow_rms": reward_flow, "correction_rms": correction}
        return TensorDict(losses | {key: part.detach().square().mean().sqrt() for key, part in parts.items()})

    def _scores(
        self, x_t: Tensor, x_prev: Tensor, i: Tensor, prompt_id: Tensor, step: StepCoefficients
    ) -> tuple[Tensor, StepScores]:
        """The policy's network output, and the left sides of forward and backward matching."""
        arguments = (x_t, x_prev, i, prompt_id)
        denoiser = self._denoiser[0]
        # The fused attention kernels have no second derivative.
        kernel = sdpa_kernel(SDPBackend.MATH) if self._backward_trains_policy else nullcontext()
        with self.actor_network_params.to_module(self.actor_network), kernel:
            policy = self._evaluate(*arguments, create_graph=self._backward_trains_policy)
            if self._residual:
                with torch.no_grad(), denoiser.backbone.reference():
                    ref = self._evaluate(*arguments)
                score = residual_scores(policy, ref._replace(out=ref.out.detach()), step)
            else:
                score = balance_scores(policy, x_t, x_prev, step, denoiser.sampler.noising(i, x_t))
        if score.by_x_t is not None and not self._backward_trains_policy:
            score = score._replace(by_x_t=score.by_x_t.detach())
        return policy.out, score

    def _evaluate(
        self, x_t: Tensor, x_prev: Tensor, i: Tensor, prompt_id: Tensor, *, create_graph: bool = False
    ) -> Evaluated:
        backward = self._backward_weight > 0
        denoiser = self._denoiser[0]
        with torch.set_grad_enabled(backward or torch.is_grad_enabled()):
            x_t = x_t.detach().requires_grad_(backward)
            out = denoiser.output(x_t, denoiser.sampler.timesteps[i], prompt_id)
            error = x_prev - denoiser.sampler.step(x_t, out, i).mean
            pulled_back = pull_back(out, x_t, error, create_graph=create_graph) if backward else None
        return Evaluated(out, error, pulled_back)

    def _reward_flow(self, reward_grad: Tensor, i: Tensor) -> Tensor:
        """The parametrised part of the flow's score, beta gamma grad r, before decision `i` (T: clean)."""
        return self._beta * self._gamma[i].view(-1, *[1] * (reward_grad.ndim - 1)) * reward_grad.detach()

    def _correction(self, x: Tensor, i: Tensor, prompt_id: Tensor) -> Tensor:
        if self.correction is None:
            return torch.zeros_like(x)
        denoiser = self._denoiser[0]
        timesteps = denoiser.sampler.timesteps
        # Clean latents come after the last decision and have no timestep of their own.
        return self.correction(x, torch.cat([timesteps, timesteps[-1:] - 1])[i], denoiser.conditioning(prompt_id))

    def _checked(self, tensordict: TensorDictBase) -> TensorDictBase:
        present = set(tensordict.keys(True, True))
        missing = [key for key in self.in_keys if key not in present]
        if missing:
            raise KeyError(
                f"the transitions have no {missing}; reward_grad comes from RewardGradient, model_output from "
                "make_policy(..., keep_model_output=True), the rest from the collector"
            )
        data = tensordict.select(*self.in_keys).reshape(-1)
        sampler, i = self._denoiser[0].sampler, data[self.actor_network.in_keys[1]]
        if not sampler.all_have_density and (sampler.std[i] == 0).any():
            raise ValueError(
                "some transitions are deterministic (standard deviation 0), where nothing can be matched; train the "
                "steps with a density only, see `trainable_steps`"
            )
        return data
