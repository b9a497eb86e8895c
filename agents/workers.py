"""What runs in a worker, a process that makes rollouts, and what goes between it and the process that trains."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import Collector
from torchrl.modules import ProbabilisticActor

from diffusion_env import DenoisingEnv

from .distributed import seed_generators
from .rollout import share_latents

Rollouts = tuple[DenoisingEnv, ProbabilisticActor]


class TrainedWeights(nn.Module):
    """A policy with no parameters but those that train."""

    def __init__(self, policy: ProbabilisticActor) -> None:
        """Refer to the parameters of `policy`."""
        super().__init__()
        self.weights = nn.ParameterList(each for each in policy.parameters() if each.requires_grad)
        self._policy = (policy,)  # in a tuple: its other parameters are not this one's

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the policy does."""
        return self._policy[0](tensordict)

    def copied(self) -> TensorDictBase:
        """The weights as they are now, on the CPU, in one piece of memory: what a worker is sent."""
        return TensorDict.from_module(self).data.cpu().consolidate()


class RolloutWorker(Collector):
    """TorchRL's collector in a worker, over the environment and the policy that are made there.

    `update_policy_weights_` takes what `TrainedWeights.copied` gives.
    """

    def __init__(
        self,
        create_env_fn: Callable[[], Rollouts],
        policy: object = None,
        *,
        policy_factory: object = None,
        worker_idx: int,
        **options: Any,
    ) -> None:
        """Be called by TorchRL, with `options` of its own; the policy is what `create_env_fn` makes."""
        if torch.cuda.is_available():  # Ray shows a worker its own GPU alone
            torch.cuda.set_device(worker_idx % torch.cuda.device_count())
        env, actor = create_env_fn()
        super().__init__(env, TrainedWeights(actor), worker_idx=worker_idx, **options)

    def __repr__(self) -> str:
        return f"worker {self.worker_idx}"  # Ray writes it before every line that a worker prints

    def seed_generators(self, seed: int) -> None:
        """Seed this worker's generators."""
        seed_generators(seed)

    def sampling_state(self) -> dict[str, Any]:
        """What prompts and first noise, and what the policy's noise is drawn from."""
        return {"environment": self.env.state_dict(), "random": GlobalRNGState().state_dict()}

    def load_sampling_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `sampling_state` gave; the environment is to be reset after it."""
        self.env.load_state_dict(state["environment"])
        GlobalRNGState().load_state_dict(state["random"])


def ignore_interrupts() -> None:
    """Ctrl-C and some SIGTERMs reach a whole group of processes; the one that trains decides when the others end."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


def to_send(rollout: TensorDictBase) -> TensorDictBase:
    """A worker's rollout [B, T] on the CPU, in which `latents` are the first ones, stored once and seen T times."""
    sent = rollout.cpu().copy()
    first = sent["latents"][:, :1].clone()
    return sent.set("latents", first.expand_as(sent["latents"]))


def gather(rollouts: TensorDictBase, *, workers: int, device: torch.device) -> TensorDictBase:
    """The batch [B, T] of all workers' rollouts [workers, B / workers, T] or [B, T], on `device`."""
    batch = share_latents(rollouts.reshape(-1, rollouts.shape[-1]).to(device))
    worker = torch.arange(workers, device=device).repeat_interleave(len(batch) // workers)
    return batch.set("group_id", batch["group_id"] * workers + worker[:, None, None])
