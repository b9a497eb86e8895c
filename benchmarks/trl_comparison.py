"""A whole DDPO iteration, sampling and training, against TRL 0.23.1's `DDPOTrainer`, the last release that has it.

    python -m benchmarks.trl_comparison                        # TRL's environment is made in .cache/trl first, 1 GB
    python -m benchmarks.trl_comparison --ours.processes 2 --ours.compile  # this project's side as it is fastest
    python -m benchmarks.trl_comparison --ours.dtype bfloat16  # this project's network in bfloat16, TRL's in float32

Both do the same job on the same pipeline folder: prompts, JPEG reward, LoRA of rank 4 on the attention projections,
guidance in sampling and training, all steps trained, one optimiser step for each minibatch of images. Each side is a
process of its own that does one iteration at a time on request, so that pairs are interleaved; the first is not
counted. The latents that go through the network are counted, and the optimiser steps; unequal counts are an error.
TRL's side is one process in any case: with several, 0.23.1 does not average their gradients (the network that it calls
is not the one it wraps), so that it would not do the same job.
`benchmarks/results/trl_comparison.csv` has the median over pairs of the ratio of wall-clock times, theirs to ours, and
that of processor times, which is the better one where a machine has other work.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.main_job import append, provenance
from benchmarks.trl.job import COUNTS, Job, Options
from diffusion_env import embedded_folder, prompt_set

ROOT = Path(__file__).parents[1]
PINS = Path(__file__).parent / "trl" / "requirements.txt"
PLACE = ROOT / ".cache" / "trl"
RESULTS = Path(__file__).parent / "results" / "trl_comparison.csv"

Answer = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Size of the comparison, and how this project's side computes."""

    images: int = 64
    """Images an iteration."""
    num_steps: int = 12
    """Denoising steps, all of which train."""
    minibatch: int = 16
    """Images of each optimiser step, and TRL's batch at each of their timesteps."""
    their_sample_batch: int = 64
    """Images that TRL samples at a time; ours are sampled all at once."""
    guidance_scale: float = 5.0
    """TRL's default."""
    rounds: int = 3
    """Interleaved pairs."""
    ours: Options = field(default_factory=Options)
    """How this project's side computes; TRL's does as it ships, in float32."""

    def __post_init__(self) -> None:
        """Refuse what TRL refuses, before its environment is made."""
        if self.images % self.their_sample_batch or self.their_sample_batch % self.minibatch:
            raise ValueError(
                f"minibatch={self.minibatch} must divide their_sample_batch={self.their_sample_batch}, and that "
                f"images={self.images}: DDPOTrainer deals whole batches out"
            )
        processes, threads = self.ours.processes, torch.get_num_threads()
        if self.minibatch % processes or threads % processes:
            raise ValueError(
                f"{processes} processes cannot share minibatch={self.minibatch} and {threads} threads out evenly"
            )


class Side:
    """One side's process; a context that ends it."""

    def __init__(self, python: str | Path, module: str, job: Job, processes: int = 1) -> None:
        """Start `module` with this interpreter, in processes that share the job's threads out among them."""
        self._name = module
        job = replace(job, threads=job.threads // processes)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        self._process = subprocess.Popen(
            [python, *(launcher if processes > 1 else []), "-m", module, json.dumps(asdict(job))],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(job.threads), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def iteration(self) -> Answer:
        """Do one and return what the process says of it.

        Raises:
            RuntimeError: it has ended; its own message is on standard error.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self._name} ended with status {self._process.wait()}; its error is above")
        return json.loads(line)

    def __enter__(self) -> Side:
        """The side itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, and those that it started, by the end of its input."""
        self._process.communicate()


def their_python() -> Path:
    """The interpreter of TRL's environment, which is made where it is missing or of other versions."""
    made, python = PLACE / "requirements.txt", PLACE / "venv" / "bin" / "python"
    if not made.exists() or made.read_text() != PINS.read_text():
        print(f"making TRL's environment in {PLACE}")
        venv.create(PLACE / "venv", clear=True, with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # First and alone: pip then takes the CPU build of PyTorch where one is on offer, see the Makefile.
        subprocess.run([*pip, "--constraint", PINS, "torch"], check=True)
        subprocess.run([*pip, "--requirement", PINS], check=True)
        shutil.copy(PINS, made)
    return python


def compare(ours: Sequence[Answer], theirs: Sequence[Answer]) -> dict[str, object]:
    """The row's measured part, of pairs of iterations.

    Raises:
        RuntimeError: the two did not do the same amount of work.
    """
    first = {key: theirs[0][key] for key in COUNTS}
    for answer in (*ours, *theirs):
        counted = {key: answer[key] for key in COUNTS}
        if counted != first:
            raise RuntimeError(f"the two did unequal work, {counted} and {first}: their times cannot be compared")
    row: dict[str, object] = {}
    for unit in ("seconds", "processor_seconds"):
        ratios = [b[unit] / a[unit] for a, b in zip(ours, theirs, strict=True)]
        row[f"ratio_of_{unit}"] = round(statistics.median(ratios), 3)
        row[f"lowest_of_{unit}"], row[f"highest_of_{unit}"] = round(min(ratios), 3), round(max(ratios), 3)
        row[f"our_{unit}"] = round(statistics.median(answer[unit] for answer in ours), 2)
        row[f"their_{unit}"] = round(statistics.median(answer[unit] for answer in theirs), 2)
    return row | {f"{key}_each": value for key, value in first.items()}


def main(settings: Settings) -> None:
    """Measure and write."""
    commit = provenance()
    python = their_python()
    job = Job(
        pipeline=str(embedded_folder()),
        prompts=list(prompt_set("animals")),
        images=settings.images,
        num_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        minibatch=settings.minibatch,
        their_sample_batch=settings.their_sample_batch,
        threads=torch.get_num_threads(),
        ours=settings.ours,
    )
    with (
        Side(sys.executable, "benchmarks.trl.ours", job, settings.ours.processes) as us,
        Side(python, "benchmarks.trl.theirs", job) as them,
    ):
        us.iteration(), them.iteration()  # warm up
        pairs = [(us.iteration(), them.iteration()) for _ in range(settings.rounds)]
    size = asdict(settings)
    row = {**compare(*zip(*pairs, strict=True)), **size.pop("ours"), **size, **commit}
    append(row, RESULTS)
    print(row)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
