"""DDPO-IS: PPO's clipped surrogate over denoising steps, which is TorchRL's own `ClipPPOLoss` without a critic.

Black et al. 2023, "Training Diffusion Models with Reinforcement Learning", arXiv:2305.13301, section 4.3.
Minimise -E[min(r A, clip(r, 1 - c, 1 + c) A)], r = p_theta(x_prev | x_t) / p_old(x_prev | x_t).
Metrics: `clip_fraction`, share of transitions cut; `kl_approx`, mean of log p_old - log p; `ESS`, effective sample size
of the ratios.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss


def ddpo_is_loss(policy: ProbabilisticActor, *, clip_range: float = 1e-4) -> ClipPPOLoss:
    """`ClipPPOLoss` as DDPO uses it: no critic, and no entropy bonus since the steps' variance is fixed.

    Args:
        policy: the denoising policy.
        clip_range: c; 1e-4 in DDPO belongs to a log-probability averaged over 16,384 latent elements.
    """
    if clip_range <= 0:
        raise ValueError(f"clip_range is {clip_range}; it must be above 0")
    return ClipPPOLoss(
        policy,
        None,
        clip_epsilon=clip_range,
        entropy_bonus=False,
        critic_coeff=None,
        normalize_advantage=False,
        functional=False,  # there is no second set of weights to put in the network's place
    )


class OnPolicyRatioCheck:
    """Measures |ratio - 1| on data of the current policy, where it should be 0; refuses a run that would train noise.

    A ratio that is off before the first update comes from a network that computes differently in sampling and in
    training (half precision, other batch shapes); beyond a tenth of the clip range it decides what is clipped.
    """

    def __init__(self, policy: ProbabilisticActor, *, clip_range: float) -> None:
        """Check `policy` against a tenth of `clip_range`."""
        self._policy, self._limit = policy, clip_range / 10

    @torch.enable_grad()  # as in training: without, a compiled or folded network computes in another way
    def __call__(self, transitions: TensorDictBase) -> dict[str, float]:
        """Return {"ratio_error": max |ratio - 1|} over `transitions` [N].

        Raises:
            RuntimeError: it exceeds the limit.
        """
        log_prob = self._policy.get_dist(transitions.clone(False)).log_prob(transitions["action"]).detach()
        error = ((log_prob - transitions["action_log_prob"]).exp() - 1).abs().max().item()
        if not error <= self._limit:
            raise RuntimeError(
                f"before the first update the importance ratio is off by {error:.2g}, more than a tenth of the clip "
                f"range ({self._limit:.2g}): the network computes differently in sampling and in training. Use "
                "float32, recompute_log_prob, the same batch shape in both, or a wider clip range"
            )
        return {"ratio_error": error}
