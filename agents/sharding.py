"""What training minds where the network is sharded (`diffusion_env/sharding.py`): its parameters are `DTensor`s.

FSDP itself sums their gradients over processes, so `sum_gradients` is for the other parameters alone, a critic's for
one. Processes call the network together: one that has fewer transitions borrows some, which count for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.distributed import DistError
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from .distributed import LostProcessError, gathered


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of `tensors` is divided over processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def by_sharding(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """`parameters` in groups of the same kind, whole and sharded, for what takes no mixture: optimisers and norms."""
    parameters = list(parameters)
    groups = [[each for each in parameters if isinstance(each, DTensor) == sharded] for sharded in (False, True)]
    return [group for group in groups if group]


def whole(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those of `parameters` that each process has the whole of."""
    return [parameter for parameter in parameters if not isinstance(parameter, DTensor)]


def local(state: Any) -> Any:
    """A nested `state` with this process's shares, as plain tensors on the same memory, in the place of `DTensor`s."""
    return tree_map_only(DTensor, DTensor.to_local, state)


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """`nn.utils.clip_grad_norm_` over whole and sharded parameters together; the norm, the same on all processes."""
    groups = by_sharding(parameters)
    norms = [nn.utils.get_total_norm([each.grad for each in group if each.grad is not None]) for group in groups]
    found = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = found[0] if len(found) == 1 else nn.utils.get_total_norm(found)
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


def borrowed(transitions: TensorDictBase) -> TensorDictBase:
    """`transitions` [N], or where there are none one of another process, [1]."""
    offered = gathered(transitions[:1].clone().cpu())
    return transitions if len(transitions) else next(each for each in offered if len(each)).to(transitions.device)


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Make of what FSDP's own exchanges raise the `LostProcessError` of all others; also a decorator."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, DistError) or "gloo" in str(error)  # which raises a plain RuntimeError
        if lost and not isinstance(error, LostProcessError):
            raise LostProcessError(error) from error
        raise


class OwnShares:
    """An optimiser's state as a part of a checkpoint: what this process remembers of its shares."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Of `optimizer`."""
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain tensors."""
        return local(self._optimizer.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore it, where the parameters are divided as they were."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        remembered = {
            number: {name: _shared_like(parameters[number], value) for name, value in values.items()}
            for number, values in state_dict["state"].items()
        }
        self._optimizer.load_state_dict({**state_dict, "state": remembered})


def _shared_like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` as a share like `parameter`'s, but for a number, such as the count of steps."""
    if not isinstance(parameter, DTensor) or not value.ndim:
        return value
    return DTensor.from_local(
        value.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def refuse_sharded(policy: nn.Module, method: str) -> None:
    """For a `method` that calls the network more or less often by the steps that were drawn.

    Raises:
        ValueError: the network of `policy` is sharded.
    """
    if is_sharded(policy.parameters()):
        raise ValueError(
            f"{method} calls the network more or less often by the steps that a process has drawn, and those of a "
            "sharded network would wait for each other for ever. Leave out --model.shard, with LoRA if memory is short"
        )
