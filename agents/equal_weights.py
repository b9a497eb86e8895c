"""Several processes must train one model: their weights are compared as the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b

import torch
from torch import Tensor
from torchrl.objectives import KLPENPPOLoss, LossModule

from diffusion_env.scoring import Reward

from .distributed import gathered, size


class UnequalWeightsError(RuntimeError):
    """The processes train different models."""


class EqualWeights:
    """For `optimizer.register_step_post_hook`: `check_equal` after every `every`-th update."""

    def __init__(self, weights: Callable[[], Mapping[str, Tensor]], every: int) -> None:
        """Compare what `weights` gives, tensors by name."""
        self._weights, self._every, self._updates = weights, every, 0

    def __call__(self, *_: object) -> None:
        """Count an update."""
        self._updates += 1
        if self._updates % self._every == 0:
            check_equal(self._weights())


def check_equal(weights: Mapping[str, Tensor]) -> None:
    """Compare hashes of `weights` over all processes; a single one has nothing to compare.

    Raises:
        UnequalWeightsError: they differ.
    """
    if size() == 1:
        return
    hashes = gathered({name: _hash(weight) for name, weight in weights.items()})
    for other, theirs in enumerate(hashes):
        if different := [name for name, value in hashes[0].items() if theirs.get(name) != value]:
            raise UnequalWeightsError(
                f"{len(different)} of {len(hashes[0])} tensors differ between processes 0 and {other}, {different[0]} "
                "for one: they no longer train the same model. Something changes it outside the optimiser, or by the "
                "data of one process alone (as KLPENPPOLoss adapts its beta): that needs a single process"
            )


def refuse_unshared(loss: LossModule, reward: Reward) -> None:
    """Refuse, where there are several processes, what each would have of its own.

    Raises:
        ValueError: the loss adapts to, or the reward normalises by, one process's data.
    """
    if size() == 1:
        return
    if isinstance(loss, KLPENPPOLoss):
        raise ValueError(
            "KLPENPPOLoss adapts its beta to one process's data: several would train different models; use one, or a "
            "fixed penalty (--training.kl-penalty)"
        )
    if getattr(reward, "statistics", None) is not None:
        raise ValueError(
            "the reward normalises by running statistics, and each process would have its own: their rewards could not "
            "be compared. Leave out normalise, scale its parts yourself, or use a single process"
        )


def _hash(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return blake2b(content.numpy().data, digest_size=16).digest()
