"""Rollouts in other processes, on this machine or on others: TorchRL's multi-process and Ray collectors.

Each worker has a network, an environment and random numbers of its own; rewards are computed where the images are
made. Before each batch the weights that train, and no others, are sent to all workers by TorchRL's weight
synchronisation, so that a batch is always the current policy's. A batch is what single-process collectors with the
workers' seeds would give, one after the other.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.modules import ProbabilisticActor

from diffusion_env import DenoisingEnv

from .distributed import numbered_seed, seed_generators, size
from .rollout import share_latents

if TYPE_CHECKING:
    from torchrl.collectors.distributed import RayCollector  # imports Ray where that is installed

WorkerKind = Literal["process", "ray"]
Rollouts = tuple[DenoisingEnv, ProbabilisticActor]


class TrainedWeights(nn.Module):
    """A policy with no parameters but those that train: what is sent to the workers, and what receives it there.

    Pickled it is the weights alone, without the policy.
    """

    def __init__(self, policy: ProbabilisticActor) -> None:
        """Refer to the parameters of `policy`."""
        super().__init__()
        self.weights = nn.ParameterList(each for each in policy.parameters() if each.requires_grad)
        self._policy: tuple[ProbabilisticActor, ...] = (policy,)  # in a tuple: its other parameters are not this one's

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the policy does."""
        return self._policy[0](tensordict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_policy": ()}


class RolloutWorker(Collector):
    """TorchRL's collector in a worker, over the environment and the policy that are made there."""

    def __init__(
        self,
        create_env_fn: Callable[[], Rollouts],
        policy: TrainedWeights | None = None,
        *,
        policy_factory: Callable[[], TrainedWeights] | None = None,
        worker_idx: int,
        **options: Any,
    ) -> None:
        """Be called by TorchRL, which gives the weights to begin with in one of two ways, and `options` of its own."""
        if torch.cuda.is_available():  # Ray shows a worker its own GPU alone
            torch.cuda.set_device(worker_idx % torch.cuda.device_count())
        env, actor = create_env_fn()
        received = policy_factory() if policy is None and policy_factory is not None else policy
        assert received is not None
        weights = TrainedWeights(actor)
        weights.load_state_dict(received.state_dict())
        super().__init__(env, weights, worker_idx=worker_idx, **options)

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


class WorkerEnvironments:
    """What a run asks of its environment, asked of those of all workers."""

    def __init__(self, collector: MultiSyncCollector | RayCollector, *, prompts: Sequence[str], num_steps: int) -> None:
        """Ask the workers of `collector`."""
        self._collector, self.prompts, self.num_steps = collector, tuple(prompts), num_steps

    @property
    def reward_parts(self) -> dict[str, Tensor]:
        """By name, the rewards of the images scored last, where the reward has parts."""
        parts = self._collector.get_distant_attr("env.reward_parts")
        return {name: torch.cat([each[name].cpu() for each in parts]) for name in parts[0]}

    def state_dict(self) -> dict[str, Any]:
        """Environment and random states of each worker."""
        return {"by_worker": self._collector.map_fn("sampling_state")}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them; the collector is to be reset after it."""
        self._collector.map_fn("load_sampling_state", [(state,) for state in state_dict["by_worker"]])


class WorkerCollector:
    """TorchRL's collector over the workers, as `Experiment` uses a collector of its own process."""

    def __init__(self, collector: MultiSyncCollector | RayCollector, env: WorkerEnvironments, frames: int) -> None:
        """Have `collector` give batches of `frames` transitions."""
        self._collector, self.env, self.requested_frames_per_batch = collector, env, frames

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Batches [B, T]; whatever a worker raised has been printed by it, or is in the error itself with Ray."""
        try:
            yield from self._collector
        except Exception as error:
            error.add_note("A worker that makes rollouts has ended; what it raised is printed above")
            raise

    def reset(self) -> None:
        """Begin new episodes on all workers."""
        self._collector.map_fn("reset")

    def shutdown(self) -> None:
        """End the workers."""
        self._collector.shutdown()


def make_worker_collector(
    make: Callable[[int], Rollouts],
    policy: ProbabilisticActor,
    *,
    workers: int,
    kind: WorkerKind = "process",
    seed: int,
    images: int,
    num_steps: int,
    prompts: Sequence[str],
    iterations: int,
) -> WorkerCollector:
    """A collector like that of `make_collector`, whose images are made by other processes.

    Worker n draws with the seed `numbered_seed(seed, n)`, which for the first one is `seed` itself: its part of a batch
    is bit for bit what `make_collector(*make(s), ...)` gives after `seed_generators(s)`, but for the numbers of groups,
    which are made different from other workers'.

    Args:
        make: called in each worker with its seed; makes the environment, of images / workers images, and a policy of
            the same network as `policy`, whose weights it is given. Pickled by cloudpickle.
        policy: what is trained.
        workers: how many there are.
        kind: "process", on this machine, by TorchRL's `MultiSyncCollector`, which starts a fresh interpreter for each:
            a program must have its `if __name__ == "__main__":`. "ray", by its `RayCollector`, on the Ray cluster that
            is connected or found, or else on one that it starts here; each worker takes a CPU, and a GPU where the
            policy is on one.
        seed: of all that is drawn.
        images: images a batch, those of all workers together.
        num_steps: T, the environments'.
        prompts: the environments'.
        iterations: how many batches.

    Raises:
        ValueError: the images cannot be shared out evenly, or this process is one of several under `torchrun`.
    """
    if workers < 1 or images % workers:
        raise ValueError(f"images={images} cannot be shared out evenly among workers={workers}")
    if size() > 1:
        raise ValueError(
            f"workers={workers} under torchrun, which started {size()} processes: each of those samples its own images "
            "already. Use either one"
        )
    seeds = [numbered_seed(seed, worker) for worker in range(workers)]
    makers = [partial(make, each) for each in seeds]
    weights = TrainedWeights(policy)
    frames = images * num_steps
    gather = partial(_gather, workers=workers, device=weights.weights[0].device)
    collector = (_ray if kind == "ray" else _processes)(makers, weights, frames, frames * iterations, gather)
    collector.map_fn("seed_generators", [(each,) for each in seeds])
    env = WorkerEnvironments(collector, prompts=prompts, num_steps=num_steps)
    return WorkerCollector(collector, env, frames)


def _processes(
    makers: list[Callable[[], Rollouts]],
    weights: TrainedWeights,
    frames: int,
    total_frames: int,
    gather: Callable[[TensorDictBase], TensorDictBase],
) -> MultiSyncCollector:
    threads = torch.get_num_threads()
    return MultiSyncCollector(
        makers,
        weights,
        collector_class=RolloutWorker,
        frames_per_batch=frames,
        total_frames=total_frames,
        postproc=gather,
        cat_results=0,
        use_buffers=True,
        compact_obs=True,
        update_at_each_batch=True,
        trust_policy=True,
        auto_register_policy_transforms=False,
        # Workers and this process never compute at the same time.
        num_threads=threads,
        num_sub_threads=max(1, threads // len(makers)),
        init_fn=_ignore_interrupts,
    )


def _ray(
    makers: list[Callable[[], Rollouts]],
    weights: TrainedWeights,
    frames: int,
    total_frames: int,
    gather: Callable[[TensorDictBase], TensorDictBase],
) -> RayCollector:
    from torchrl.collectors.distributed import RayCollector

    collector = RayCollector(
        makers,
        weights,
        collector_class=RolloutWorker,
        collector_kwargs={
            "compact_obs": True,
            "auto_register_policy_transforms": False,
            "return_same_td": True,
            "postproc": _to_send,
        },
        frames_per_batch=frames,
        total_frames=total_frames,
        postproc=gather,
        sync=True,
        update_after_each_batch=True,
        trust_policy=True,
        ray_init_config={"include_dashboard": False},
        remote_configs={"num_cpus": 1, "num_gpus": int(weights.weights[0].is_cuda)},
    )
    collector.update_policy_weights_()  # connects; TorchRL warns when the first batch does
    return collector


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; the one that trains decides when the others end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _to_send(rollout: TensorDictBase) -> TensorDictBase:
    """A worker's rollout [B, T], on the CPU, in which `latents` are the first ones, stored once, seen T times."""
    first = rollout["latents"][:, :1].clone()
    return rollout.copy().set("latents", first.expand_as(rollout["latents"])).cpu()


def _gather(rollouts: TensorDictBase, *, workers: int, device: torch.device) -> TensorDictBase:
    """The batch [B, T] of all workers' rollouts [workers, B / workers, T] or [B, T], on `device`."""
    batch = share_latents(rollouts.reshape(-1, rollouts.shape[-1]).to(device))
    worker = torch.arange(workers, device=device).repeat_interleave(len(batch) // workers)
    return batch.set("group_id", batch["group_id"] * workers + worker[:, None, None])
