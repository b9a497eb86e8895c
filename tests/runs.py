"""Small real runs of the examples as processes of their own: started, killed, resumed, compared."""

import csv
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TIMES = {"seconds_sampling", "seconds_training", "images_per_second"}


@dataclass(frozen=True)
class Program:
    """An example with settings so small that an iteration takes a tenth of a second."""

    name: str
    model: Path
    prompts: Path
    options: tuple[str, ...] = ()
    iterations: int = 4
    images: int = 6

    def command(self, output: Path) -> list[str]:
        """Start a new run in `output`."""
        settings = {
            "model.name": self.model,
            "model.lora-rank": 3,
            "model.guidance-scale": 2,
            "sampling.prompts": self.prompts,
            "sampling.num-steps": 3,
            "sampling.images-per-iteration": self.images,
            "training.iterations": self.iterations,
            "training.advantage-min-count": 2,
            "evaluation-samples": 1,
            "evaluate-every": 4,
            "watch.held-out-drop": 1000,  # no warnings about what such a model does
            "watch.diversity-share": 0,
            "output": output,
        }
        arguments = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
        return [*self._python(), *arguments, *self.options]

    def resume(self, run: Path, *others: str) -> list[str]:
        """Continue the run in `run`."""
        return [*self._python(), "--resume", str(run), *others]

    def _python(self) -> list[str]:
        return [sys.executable, str(ROOT / "examples" / self.name)]


def finish(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, which must be a good one."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def torchrun(command: list[str]) -> list[str]:
    """The command on two processes."""
    return [*TORCHRUN, *command[1:]]


def worker(launcher: subprocess.Popen[str], rank: int) -> int:
    """The id of the process with this rank that `launcher` started."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def lose_process(launcher: subprocess.Popen[str]) -> None:
    """Kill the second of two processes; the first one must end soon, with a message."""
    os.kill(worker(launcher, 1), signal.SIGKILL)
    killed = time.monotonic()
    _, errors = launcher.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert launcher.returncode == 1
    assert "LostProcessError: process 0 of 2 can no longer reach the others" in errors
    assert "Signal 9 (SIGKILL)" in errors


def on_two_processes(script: str, *arguments: object, timeout: float = 200) -> None:
    """Run a script of this folder under `torchrun` to its end, which must be a good one."""
    command = [*TORCHRUN, str(ROOT / "tests" / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def start(command: list[str], *, own_group: bool = False) -> subprocess.Popen[str]:
    """Run a command in the background, on request as the first of a process group."""
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=own_group
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until `condition` holds, while `process` runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def checkpoint(run: Path, iteration: int) -> Path:
    """The file of the checkpoint after `iteration` iterations."""
    return run / "checkpoints" / f"checkpoint-{iteration:012d}.torchrl"


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of `metrics.csv` as text, without what depends on the clock."""
    with (run / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def tensors(run: Path, iteration: int) -> dict[str, object]:
    """Every part of a checkpoint but the metrics, as plain values."""
    parts = {}
    with zipfile.ZipFile(checkpoint(run, iteration)) as archive:
        for name in archive.namelist():
            if name.endswith(".pt") and "metrics" not in name:
                with archive.open(name) as file:
                    parts[name] = torch.load(file, weights_only=True)
    return parts


def equal(a: object, b: object) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_run(run: Path, reference: Path, iterations: int) -> None:
    """Metrics, exported weights and whole final states are equal, and TorchRL's logger has each number once."""
    assert metrics(run) == metrics(reference)
    weights = [each / "lora" / "pytorch_lora_weights.safetensors" for each in (run, reference)]
    assert equal(*(load_file(file) for file in weights))  # the file itself also holds a set in any order
    assert equal(tensors(run, iterations), tensors(reference, iterations))
    logged = sorted((run / "logs").rglob("reward.csv"))
    assert [line.split(",")[0] for line in logged[0].read_text().split()] == [str(i) for i in range(iterations)]
