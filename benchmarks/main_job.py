"""Does the main job learn? Three seeds of `examples/ppo_aesthetic.py`, its defaults unchanged, judged independently.

    python -m benchmarks.main_job                                   # the aesthetic reward, seeds 0 1 2
    python -m benchmarks.main_job --reward jpeg-compressibility --seeds 0

Each run appends a row to `benchmarks/results/main_job.csv`: reward on fixed prompts and noise before and after, the
gain in standard deviations of the pretrained model's images, the share of images that the Lite2 probe gives their own
animal.
"""

from __future__ import annotations

import csv
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
import tyro

from agents import Evaluation
from configs import PRESETS, RunSettings
from configs.schema import RewardName
from examples import ppo_aesthetic
from examples.pretraining.judge import judged_accuracy

RESULTS = Path(__file__).parent / "results" / "main_job.csv"

Row = dict[str, str]


@dataclass(frozen=True)
class Settings:
    """Which runs."""

    reward: RewardName = "style-preference"
    """The reward to maximise."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run each."""


def run_settings(reward: RewardName, seed: int, output: Path) -> RunSettings:
    """The main job's defaults with this reward and seed."""
    return replace(ppo_aesthetic.adapt(PRESETS["embedded"]()), reward=reward, seed=seed, output=output)


def measure(
    settings: RunSettings, run: Callable[[RunSettings], tuple[Evaluation, Evaluation]] = ppo_aesthetic.main
) -> dict[str, object]:
    """Run an example once and return its row."""
    commit = provenance()  # as it is when the run begins
    start = time.perf_counter()
    before, after = run(settings)
    seconds = time.perf_counter() - start
    return {
        "reward": settings.reward,
        "seed": settings.seed,
        "before": round(before.mean, 4),
        "before_std": round(before.std, 4),
        "after": round(after.mean, 4),
        "after_std": round(after.std, 4),
        "gain_in_std": round((after.mean - before.mean) / before.std, 3),
        "judge_before": round(judged_accuracy(before.images, before.prompts), 3),
        "judge_after": round(judged_accuracy(after.images, after.prompts), 3),
        "images": len(after.rewards),
        "seconds": round(seconds),
        **commit,
    }


def provenance() -> dict[str, str]:
    """Commit, machine and date of a measurement."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    machine = f"{torch.get_num_threads()} cores {platform.machine()}"
    return {"commit": commit.stdout.strip(), "machine": machine, "date": date.today().isoformat()}


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(row: dict[str, object], path: Path) -> None:
    """Add a row to a CSV file, with a header where it is new; beside it the whole as a Markdown table."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    path.with_suffix(".md").write_text(markdown(read_rows(path)))


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows that have the same columns as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def main(settings: Settings) -> None:
    """Run every seed and report."""
    for seed in settings.seeds:
        row = measure(run_settings(settings.reward, seed, Path("runs/main_job")))
        append(row, RESULTS)
        print(row)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
