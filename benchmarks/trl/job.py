"""One DDPO iteration after another, on request: what both sides of the comparison share.

This runs in this project's environment and in TRL's, so it needs no more than torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

COUNTS = ("sampling", "training", "updates")
"""Latents that went through the network without gradient and with it; optimiser steps."""


@dataclass(frozen=True)
class Options:
    """How this project's side computes."""

    dtype: str = "float32"
    """Of the frozen weights."""
    channels_last: bool = True
    """Memory format of UNet and VAE."""
    fold_lora: bool = True
    """Adapters are added to the weights rather than to the layers' output."""
    compile: bool = False
    """`torch.compile` of the network."""
    micro_batch: int = 16
    """Transitions that go through the network at a time."""
    processes: int = 1
    """Processes (`torchrun`), each with its share of the images and of the threads."""


@dataclass(frozen=True)
class Job:
    """The job that both do; LoRA is TRL's own, rank and alpha 4 on the attention projections, all steps train."""

    pipeline: str
    prompts: list[str]
    images: int
    num_steps: int
    guidance_scale: float
    minibatch: int
    their_sample_batch: int
    threads: int
    ours: Options
    seed: int = 0
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    clip_range: float = 1e-4
    max_grad_norm: float = 1.0


def measured(network: nn.Module, iterate: Callable[[], object]) -> Callable[[], dict[str, float]]:
    """`iterate`, returning its wall-clock and processor seconds and the `COUNTS`.

    Args:
        network: called with the latents first; its calls are counted from now on.
        iterate: does one iteration.
    """
    counts: Counter[str] = Counter()
    plain: Any = type(network)

    class Counted(plain):
        """Counts outside of the call: a forward hook would be compiled with a compiled network."""

        def __call__(self, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            counts["training" if torch.is_grad_enabled() else "sampling"] += len(latents)
            return super().__call__(latents, *args, **kwargs)

    def count_updates(*_: object) -> None:
        counts["updates"] += 1

    network.__class__ = Counted

    def run() -> dict[str, float]:
        counts.clear()
        hook = register_optimizer_step_post_hook(count_updates)
        start, processor = time.perf_counter(), time.process_time()
        iterate()
        spent = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - processor}
        hook.remove()
        return spent | {key: counts[key] for key in COUNTS}

    return run


def is_first() -> bool:
    """Whether this is the process that reads requests and answers them."""
    return not dist.is_initialized() or dist.get_rank() == 0


def requests() -> Iterator[None]:
    """One for each line that the first process reads from standard input, in all processes."""
    while True:
        line = [sys.stdin.readline() if is_first() else ""]
        if dist.is_initialized():
            dist.broadcast_object_list(line)
        if not line[0]:
            return
        yield


def together(answer: dict[str, float]) -> dict[str, float]:
    """What all processes did: seconds until the last one was done, updates that all made, sums of the others."""
    if not dist.is_initialized():
        return answer
    answers = [answer] * dist.get_world_size()
    dist.all_gather_object(answers, answer)
    one = {"seconds": max, "updates": max}
    return {key: one.get(key, sum)(each[key] for each in answers) for key in answer}


def serve(make: Callable[[Job], tuple[nn.Module, Callable[[], object]]]) -> None:
    """Answer each line of standard input by one iteration, and a line of JSON about it (see `measured`).

    Args:
        make: from the job, the first argument of the program as JSON, to the network and what does one iteration.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever the libraries print is no answer
    content = json.loads(sys.argv[1])
    job = Job(**content | {"ours": Options(**content["ours"])})
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    run = measured(*make(job))
    for _ in requests():
        answer = together(run())
        if is_first():
            print(json.dumps(answer), file=answers, flush=True)
