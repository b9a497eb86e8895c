"""What to do when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ADVICE = (
    "Out of memory. In training, lower --training.micro-batch (it changes nothing else) or set "
    "--model.gradient-checkpointing; in sampling, lower --sampling.batch-size; in both, --model.lora-rank "
    "instead of the whole UNet (0) and --model.dtype bfloat16 need less; under torchrun --model.shard "
    "divides the whole one"
)


@contextmanager
def memory_advice() -> Iterator[None]:
    """Add `ADVICE` to an error that says that memory ran out, on the GPU or the CPU; also a decorator."""
    try:
        yield
    except RuntimeError as error:
        # On the CPU it is a plain RuntimeError.
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            error.add_note(ADVICE)
        raise
