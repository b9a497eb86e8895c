"""What does each method reach? Every example with the same budget, three seeds, judged independently.

    python -m benchmarks.methods                                    # goes on where it was stopped
    python -m benchmarks.methods --methods draft_aesthetic --seeds 0

Each run appends a row to `benchmarks/results/methods.csv`: those of `benchmarks.main_job`, with the method and the
standard error of the mean reward after training. A method and a seed that have a row are not run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from pathlib import Path
from types import ModuleType

import tyro

from benchmarks.main_job import append, measure, read_rows
from configs import PRESETS, RunSettings

RESULTS = Path(__file__).parent / "results" / "methods.csv"
METHODS = (
    "ppo_aesthetic",
    "a2c_aesthetic",
    "draft_aesthetic",
    "refl_aesthetic",
    "nabla_db_aesthetic",
    "reinforce_compressibility",
    "rwr_compressibility",
)


@dataclass(frozen=True)
class Settings:
    """Which runs."""

    methods: tuple[str, ...] = METHODS
    """Examples by name."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run each."""
    iterations: int = 48
    """Rounds of sampling and updating, the same for every method."""
    images_per_iteration: int = 64
    """Images sampled before each round of updates."""
    results: Path = RESULTS
    """Where rows go; another budget needs another file."""


def pending(path: Path, methods: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """The runs that have no row in `path` yet, all methods of one seed before the next seed."""
    rows = [(row["method"], int(row["seed"])) for row in read_rows(path)]
    for seed, method in product(seeds, methods):
        if (method, seed) not in rows:
            yield method, seed


def run_settings(example: ModuleType, seed: int, settings: Settings) -> RunSettings:
    """The example's own settings on the pipeline that ships, with this budget."""
    own = example.adapt(PRESETS["embedded"]())
    return replace(
        own,
        seed=seed,
        output=Path("runs/methods") / own.output.name,
        watch=replace(own.watch, stop=False),
        sampling=replace(own.sampling, images_per_iteration=settings.images_per_iteration),
        training=replace(own.training, iterations=settings.iterations),
    )


def main(settings: Settings) -> None:
    """Run what is missing."""
    for method, seed in pending(settings.results, settings.methods, settings.seeds):
        example = import_module(f"examples.{method}")
        row = measure(run_settings(example, seed, settings), example.main)
        error = round(float(row["after_std"]) / float(row["images"]) ** 0.5, 4)
        row = {"method": method, **row, "after_standard_error": error}
        append(row, settings.results)
        print(row)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
