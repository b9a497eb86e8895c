"""Does the main job's memory stay flat? It runs for an hour without an end, its resident memory is read on the way.

    python -m benchmarks.soak

Writes `benchmarks/results/soak.csv`, a row every half minute: minutes since the start, iterations done, resident memory
in MiB of the process and its children. The growth that is printed is the slope of a straight line through the second
half, by when every kind of work (evaluation, checkpoint, picture) has been done many times. Linux only.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression

import psutil
import tyro

from agents.files import write_rows
from benchmarks.main_job import provenance, read_rows

RESULTS = Path(__file__).parent / "results" / "soak.csv"
MEBI = 2**20


@dataclass(frozen=True)
class Settings:
    """How long, and of what."""

    minutes: float = 60.0
    """How long the job runs, at least one iteration."""
    interval: float = 30.0
    """Seconds between readings."""
    options: tuple[str, ...] = ()
    """Given to the job, for one that is smaller."""
    output: Path = Path("runs/soak")
    """The run folder; it must not exist."""
    results: Path = RESULTS
    """Where rows go; what is there is replaced."""


def resident(process: psutil.Process) -> float:
    """MiB that a process and its children hold."""
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) / MEBI


def growth(minutes: Sequence[float], mebibytes: Sequence[float]) -> float:
    """MiB an hour: the least-squares slope through the second half of the readings."""
    half = len(minutes) // 2
    return 60 * linear_regression(minutes[half:], mebibytes[half:]).slope


def soak(settings: Settings) -> list[dict[str, object]]:
    """Run the job and stop it with SIGTERM when the time is over; the readings.

    Raises:
        RuntimeError: it ended by itself, or SIGTERM did not end it as it should.
    """
    command = [sys.executable, "examples/ppo_aesthetic.py", "--watch.no-stop", "--training.iterations", "1000000"]
    measured_by, rows, start = provenance(), [], time.monotonic()
    job = subprocess.Popen([*command, "--output", str(settings.output), *settings.options])
    process = psutil.Process(job.pid)
    minutes, done = 0.0, 0
    while minutes < settings.minutes or not done:
        minutes = (time.monotonic() - start) / 60
        done = len(read_rows(settings.output / "metrics.csv"))
        reading = {"minutes": round(minutes, 2), "iterations": done, "mebibytes": round(resident(process), 1)}
        rows.append({**reading, **measured_by})
        write_rows(settings.results, rows)
        time.sleep(settings.interval)
        if job.poll() is not None:
            raise RuntimeError(f"the job ended after {minutes:.1f} minutes with status {job.returncode}")
    job.send_signal(signal.SIGTERM)
    if job.wait() != 128 + signal.SIGTERM:
        raise RuntimeError(f"SIGTERM ended the job with status {job.returncode}, not {128 + signal.SIGTERM}")
    return rows


def main(settings: Settings) -> None:
    """Run, and say how much memory grew."""
    rows = soak(settings)
    slope = growth([float(row["minutes"]) for row in rows], [float(row["mebibytes"]) for row in rows])
    peak = max(float(row["mebibytes"]) for row in rows)
    print(f"{rows[-1]['iterations']} iterations, at most {peak:.0f} MiB, growth {slope:+.1f} MiB an hour")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
