"""What the losses of a denoising policy share that need no critic."""

from __future__ import annotations

from tensordict import TensorDictParams
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import LossModule


class PolicyLoss(LossModule):
    """A `LossModule` over one functional network, `actor_network`, and without a value estimator."""

    actor_network: ProbabilisticActor
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams

    def _forward_value_estimator_keys(self, **_: object) -> None:
        """There is no value estimator."""
