"""Implicit Q-learning: off-policy, from transitions however old, with TorchRL's own `IQLLoss`.

Kostrikov et al. 2021, "Offline Reinforcement Learning with Implicit Q-Learning", arXiv:2110.06169, equations 5 to 7.
Minimised are a regression of Q(x_t, x_prev) on r + V(x_prev), an expectile regression of V on Q, and
-E[exp(tau (Q - V)) log p_theta(x_prev | x_t)], so that the policy is never asked for an action of its own: steps that
turned out well become likelier, whoever took them.

    loss = iql_loss(policy)
    buffer = ReplayBuffer(storage=LazyTensorStorage(50_000), batch_size=256, transform=RestoreNext())
    train(..., loss, ..., advantage=lambda rollout: rollout, buffer=buffer, target_update=SoftUpdate(loss, tau=0.005))

Details: undiscounted, where TorchRL's losses discount by 0.99; only the last step is terminal and has a reward, so that
    all steps have to train: a step left out cuts Q off from the reward.
Metrics: TorchRL's `entropy`, minus the mean log-probability of the data's steps.
"""

from __future__ import annotations

from torchrl.modules import ProbabilisticActor
from torchrl.objectives import IQLLoss, ValueEstimators

from .critic import make_critic, make_q_critic


def iql_loss(
    policy: ProbabilisticActor, *, inverse_temperature: float = 3.0, expectile: float = 0.7, width: int = 128
) -> IQLLoss:
    """`IQLLoss` with two Q critics and a V critic, all of which it trains.

    Args:
        policy: the denoising policy.
        inverse_temperature: tau; it belongs to the reward's scale. 0 imitates the data; weights end at 100.
        expectile: which expectile of Q over the data's steps V is, 0.5 their mean, towards 1 their best.
        width: hidden units of the critics.

    Raises:
        ValueError: a number is out of range.
    """
    if inverse_temperature < 0:
        raise ValueError(f"inverse_temperature is {inverse_temperature}; it must be at least 0 (0 imitates the data)")
    if not 0 < expectile < 1:
        raise ValueError(f"expectile is {expectile}; it must lie between 0 and 1 (0.5 is the mean)")
    q_critic, critic = make_q_critic(policy, width=width), make_critic(policy, width=width)
    loss = IQLLoss(policy, q_critic, critic, temperature=inverse_temperature, expectile=expectile)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=1.0)
    return loss
