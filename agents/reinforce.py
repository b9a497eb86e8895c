"""DDPO-SF: the score-function (REINFORCE) gradient over denoising steps, without a critic.

Black et al. 2023, arXiv:2305.13301, section 4.3: minimise -E[log p_theta(x_prev | x_t) A]. On-policy: one optimiser
step for each batch of trajectories. TorchRL's `ReinforceLoss` is the same gradient but insists on a critic.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.modules import ProbabilisticActor

from .policy_loss import PolicyLoss


def score_function(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """REINFORCE as a loss (Williams 1992): mean of -log_prob * advantage, both [N]; a scalar."""
    return -(log_prob * advantage).mean()


class ScoreFunctionLoss(PolicyLoss):
    """`score_function` over transitions; reads what the policy reads, `action` and `advantage`.

    Writes `loss_objective`.
    """

    @dataclass
    class _AcceptedKeys:
        action: NestedKey = "action"
        advantage: NestedKey = "advantage"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    out_keys = ["loss_objective"]

    def __init__(self, policy: ProbabilisticActor) -> None:
        """Train `policy`."""
        super().__init__()
        self.convert_to_functional(policy, "actor_network")

    @property
    def in_keys(self) -> list[NestedKey]:
        """What `forward` reads."""
        return [*self.actor_network.in_keys, self.tensor_keys.action, self.tensor_keys.advantage]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The loss of transitions [N]."""
        with self.actor_network_params.to_module(self.actor_network):
            distribution = self.actor_network.get_dist(tensordict.clone(False))
        log_prob = distribution.log_prob(tensordict[self.tensor_keys.action])
        advantage = tensordict[self.tensor_keys.advantage].squeeze(-1)
        if advantage.shape != log_prob.shape:
            raise ValueError(
                f"advantage has shape {tuple(advantage.shape)} after its last dimension is dropped, log-probabilities "
                f"have {tuple(log_prob.shape)}; every pair would be multiplied. Give one advantage a transition, [N, 1]"
            )
        return TensorDict({"loss_objective": score_function(log_prob, advantage)})
