"""Rollouts in other processes, on this machine or on others: TorchRL's multi-process and Ray collectors.

Each worker has a network, an environment and random numbers of its own; rewards are computed where the images are
made. Before each batch the weights that train, and no others, are sent to the collector of every worker
(`update_policy_weights_`), so that a batch is always the current policy's. A batch is what single-process collectors
with the workers' seeds would give, one after the other.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.collectors import MultiSyncCollector
from torchrl.modules import ProbabilisticActor
from torchrl.weight_update import NoWeightSyncScheme

from .distributed import numbered_seed, size
from .workers import Rollouts, RolloutWorker, TrainedWeights, gather, ignore_interrupts, to_send

if TYPE_CHECKING:
    from torchrl.collectors.distributed import RayCollector  # imports Ray where that is installed

WorkerKind = Literal["process", "ray"]


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

    def __init__(
        self,
        collector: MultiSyncCollector | RayCollector,
        env: WorkerEnvironments,
        weights: TrainedWeights,
        frames: int,
    ) -> None:
        """Have `collector` give batches of `frames` transitions; the workers end with this process at the latest."""
        self._collector, self.env, self._weights, self.requested_frames_per_batch = collector, env, weights, frames
        atexit.register(self.shutdown)  # before `multiprocessing` would wait for them

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Batches [B, T] of the policy as it is when each is asked for."""
        batches = iter(self._collector)
        try:
            while True:
                # Not by one of TorchRL's schemes: where a worker has ended, that for processes would wait for ever.
                self._collector.map_fn(
                    "update_policy_weights_", [(self._weights.copied(),)] * self._collector.num_workers
                )
                if (batch := next(batches, None)) is None:
                    return
                yield batch
        except Exception as error:
            error.add_note("A worker that makes rollouts failed; what it raised stands above")
            raise

    def reset(self) -> None:
        """Begin new episodes on all workers."""
        self._collector.map_fn("reset")

    def shutdown(self) -> None:
        """End the workers."""
        atexit.unregister(self.shutdown)
        self._collector.shutdown()


def check_workers(workers: int, kind: WorkerKind) -> None:
    """Refuse what cannot work, before anything is loaded.

    Raises:
        ValueError: Ray is missing, or this process is one of several under `torchrun`.
    """
    if workers and size() > 1:
        raise ValueError(
            f"workers={workers} under torchrun, which started {size()} processes: each of those makes images of its "
            "own already. Use either one"
        )
    if kind == "ray" and find_spec("ray") is None:
        raise ValueError("workers of the kind 'ray' need Ray, which is not installed: pip install 'diffusion-env[ray]'")


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
        ValueError: the images cannot be shared out evenly, Ray is missing, or this is one of several processes under
            `torchrun`.
    """
    if workers < 1 or images % workers:
        raise ValueError(f"images={images} cannot be shared out evenly among workers={workers}")
    check_workers(workers, kind)
    seeds = [numbered_seed(seed, worker) for worker in range(workers)]
    makers: list[Callable[[], Rollouts]] = [partial(make, each) for each in seeds]
    weights = TrainedWeights(policy)
    frames = images * num_steps
    start = _start_on_ray if kind == "ray" else _start_processes
    device = weights.weights[0].device
    collector = start(makers, device, frames, frames * iterations, partial(gather, workers=workers, device=device))
    collector.map_fn("seed_generators", [(each,) for each in seeds])
    env = WorkerEnvironments(collector, prompts=prompts, num_steps=num_steps)
    return WorkerCollector(collector, env, weights, frames)


def _start_processes(
    makers: list[Callable[[], Rollouts]],
    device: torch.device,
    frames: int,
    total_frames: int,
    postproc: Callable[[TensorDictBase], TensorDictBase],
) -> MultiSyncCollector:
    threads = torch.get_num_threads()
    return MultiSyncCollector(
        makers,
        collector_class=RolloutWorker,
        frames_per_batch=frames,
        total_frames=total_frames,
        postproc=postproc,
        cat_results=0,
        use_buffers=True,
        compact_obs=True,
        trust_policy=True,
        auto_register_policy_transforms=False,
        # Workers and this process never compute at the same time.
        num_threads=threads,
        num_sub_threads=max(1, threads // len(makers)),
        init_fn=ignore_interrupts,
    )


def _start_on_ray(
    makers: list[Callable[[], Rollouts]],
    device: torch.device,
    frames: int,
    total_frames: int,
    postproc: Callable[[TensorDictBase], TensorDictBase],
) -> RayCollector:
    from torchrl.collectors.distributed import RayCollector

    nothing = nn.Module()  # TorchRL warns of a policy that is none
    collector = RayCollector(
        makers,
        nothing,
        collector_class=RolloutWorker,
        collector_kwargs={
            "compact_obs": True,
            "auto_register_policy_transforms": False,
            "return_same_td": True,
            "postproc": to_send,
        },
        frames_per_batch=frames,
        total_frames=total_frames,
        postproc=postproc,
        sync=True,
        trust_policy=True,
        weight_sync_schemes={"policy": NoWeightSyncScheme()},
        ray_init_config={"include_dashboard": False},
        remote_configs={"num_cpus": 1, "num_gpus": int(device.type == "cuda")},
    )
    collector.update_policy_weights_(nothing)  # TorchRL warns where its scheme has never been used
    return collector
