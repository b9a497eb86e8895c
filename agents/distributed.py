"""Several processes of one run, as `torchrun` starts them: the only file that knows of ranks.

Every process has the whole model (or a share of it, see `sharding.py`) and samples images of its own; gradients are
summed after the backward pass, with no wrapper around losses, and statistics are taken over the images of all
processes. On a single process each function here is an identity. All processes must come to each exchange, in the same
order.
"""

from __future__ import annotations

import atexit
import functools
import io
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
P = ParamSpec("P")
BUCKET = 2**24  # elements that are exchanged at a time


class LostProcessError(RuntimeError):
    """An exchange failed, most likely because another process has ended."""

    def __init__(self, error: Exception) -> None:
        """The exchange raised `error`."""
        super().__init__(
            f"process {rank()} of {size()} can no longer reach the others ({error}). Another process has ended: its "
            "message stands above, or there is none because it was killed (the system may do so when memory runs "
            "out). This one ends, too; --resume continues after the newest checkpoint"
        )


def join(device: str) -> None:
    """Join the other processes if `torchrun` started this one; nothing when that has been done.

    Args:
        device: what this process computes on, "cpu" or "cuda": then each process takes a GPU of its own.

    Raises:
        ValueError: processes would share a GPU.
    """
    if dist.is_initialized() or not dist.is_torchelastic_launched():
        return
    local, there = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    gpu = torch.device(device).type == "cuda"
    if gpu and there > 1 and torch.device(device).index is not None:
        raise ValueError(f"model.device={device} names one GPU for all {there} processes; use cuda, or auto")
    if gpu and there > torch.cuda.device_count():
        raise ValueError(
            f"{there} processes were started and there are {torch.cuda.device_count()} GPUs; each process needs one. "
            "Lower --nproc-per-node, or use --model.device cpu"
        )
    if gpu and there > 1:
        torch.cuda.set_device(local)
    # Small statistics go by the CPU also where gradients are on a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    atexit.register(dist.destroy_process_group)


def rank() -> int:
    """This process's number, 0 for the first one; known before `join`."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def size() -> int:
    """How many processes there are.

    Raises:
        RuntimeError: `torchrun` started several and they have not joined; each would train a model of its own.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    if dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        raise RuntimeError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, which have not joined: call "
            "agents.distributed.join(device) first, as build_experiment does"
        )
    return 1


def launcher() -> list[str]:
    """The words before a program's name that start as many processes again."""
    if size() == 1:
        return ["python"]
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    return ["torchrun", *(["--nnodes", str(size() // here)] if size() > here else []), "--nproc-per-node", str(here)]


def on_first(function: Callable[P, object]) -> Callable[P, None]:
    """`function` on the first process and nothing on the others: whatever writes."""

    @functools.wraps(function)
    def write(*args: P.args, **kwargs: P.kwargs) -> None:
        if rank() == 0:
            function(*args, **kwargs)

    return write


say = on_first(print)


def numbered_seed(seed: int, number: int) -> int:
    """The seed of one of several that draw apart: `seed` for number 0, then made of both; no neighbouring seed's."""
    if not number:
        return seed
    return int(np.random.SeedSequence([seed % 2**64, number]).generate_state(1, np.uint64)[0] >> 1)


def rank_seed(seed: int) -> int:
    """The first process's seed is `seed`; the others' are made of it and their rank."""
    return numbered_seed(seed, rank())


def seed_generators(seed: int) -> None:
    """Seed the process's generators: PyTorch's, and NumPy's and Python's for rewards that draw numbers."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def draw_apart() -> None:
    """From here on each process draws numbers of its own; before, what is drawn is the same everywhere."""
    if rank():
        seed_generators(rank_seed(torch.initial_seed()))


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostProcessError(error) from error


def gathered(value: T) -> list[T]:
    """The `value` of each process, by rank; for what is small."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    with _exchange():
        dist.all_gather_object(values, value)
    return values


def from_first(function: Callable[[], T]) -> T:
    """What `function` gives on the first process, which alone calls it."""
    if size() == 1:
        return function()
    values: list[Any] = [function() if rank() == 0 else None]
    with _exchange():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def collected(state: T) -> list[T]:
    """On the first process the `state` of each, tensors on the CPU; nothing on the others."""
    if size() == 1:
        return [state]
    file = io.BytesIO()
    torch.save(state, file)
    files: list[Any] | None = [None] * size() if rank() == 0 else None
    with _exchange():
        dist.gather_object(file.getvalue(), files, dst=0)
    return [torch.load(io.BytesIO(each), map_location="cpu", weights_only=True) for each in files or ()]


class Joined(NamedTuple):
    """The rows of all processes, by rank, and which of them are this one's."""

    values: Tensor
    own: slice


def joined(values: Tensor) -> Joined:
    """Rows [N, ...] of every process, N being each one's own."""
    parts = gathered(values.cpu()) if size() > 1 else [values]
    start = sum(len(part) for part in parts[: rank()])
    return Joined(torch.cat(parts).to(values.device), slice(start, start + len(values)))


def shared_out(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """The results of all `jobs` in their order, each done by one process and sent to all."""
    parts = gathered([job() for job in jobs[rank() :: size()]])
    return [parts[number % size()][number // size()] for number in range(len(jobs))]


def in_step(items: Iterable[T], otherwise: T) -> Iterator[T]:
    """`items`, then `otherwise` for as long as another process still has some."""
    left = iter(items)
    while True:
        item = next(left, None)
        if not any(gathered(item is not None)):
            return
        yield otherwise if item is None else item


@torch.no_grad()
def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Give every process the sum of the processes' gradients; a parameter without any keeps None.

    For the mean, weigh each process's loss by its share of the data: shares may differ, and may be 0.
    """
    if size() == 1:
        return
    used = [any(each) for each in zip(*gathered([p.grad is not None for p in parameters]), strict=True)]
    trained = [parameter for parameter, anywhere in zip(parameters, used, strict=True) if anywhere]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in trained if parameter.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        with _exchange():
            dist.all_reduce(flat)
        for gradient, summed in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of at most `BUCKET` elements, or of a single larger one."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(each.numel() for each in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@torch.no_grad()
def share_weights(weights: Mapping[str, Tensor]) -> None:
    """Overwrite `weights` with the first process's, so that all start from the same."""
    for weight in weights.values() if size() > 1 else ():
        value = weight.contiguous()
        with _exchange():
            dist.broadcast(value, src=0)
        weight.copy_(value)
