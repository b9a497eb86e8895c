"""What does each method reach? Every example with the same budget, three seeds, judged independently.

    python -m benchmarks.methods                                    # goes on where it was stopped
    python -m benchmarks.methods --methods draft_aesthetic --seeds 0

Each run appends a row to `benchmarks/results/methods.csv`: those of `benchmarks.main_job`, with the method and the
processor time that the run took. A method and a seed that have a row are not run again. The first seed's run also
leaves `benchmarks/results/methods/NAME.png`: images of the pretrained model, below them the same prompts and noise
after training. At the end it prints the table of `examples/README.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from time import process_time
from types import ModuleType

import torch
import tyro
from PIL import Image

from agents import Evaluation
from benchmarks.main_job import Row, append, measure, read_rows
from configs import PRESETS, RunSettings

RESULTS = Path(__file__).parent / "results" / "methods.csv"
PICTURES = "../benchmarks/results/methods"  # as seen from examples/README.md
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
    iterations: int = 16
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
        evaluate_every=settings.iterations,
        watch=replace(own.watch, stop=False),
        sampling=replace(own.sampling, images_per_iteration=settings.images_per_iteration),
        training=replace(own.training, iterations=settings.iterations),
    )


def strip(before: Evaluation, after: Evaluation, columns: int = 8) -> Image.Image:
    """Images of `columns` prompts side by side, those of `before` above those of `after`."""
    chosen = torch.linspace(0, len(before.images) - 1, columns).long()
    lines = [torch.cat(list(each.images[chosen]), dim=2) for each in (before, after)]
    return Image.fromarray((torch.cat(lines, dim=1) * 255).round().byte().permute(1, 2, 0).numpy())


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown, one for each method: means over its seeds, `±` the standard error of the mean over seeds."""
    lines = ["| program | before | after | gain in std | processor | images |", "| --- | --- | --- | --- | --- | --- |"]
    for method in dict.fromkeys(row["method"] for row in rows):
        of = [row for row in rows if row["method"] == method]

        def over_seeds(key: str, of: Sequence[Row] = of) -> tuple[float, float]:
            values = [float(row[key]) for row in of]
            return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0

        (before, _), (after, error) = over_seeds("before"), over_seeds("after")
        (gain, gain_error), (seconds, _) = over_seeds("gain_in_std"), over_seeds("processor_seconds")
        lines.append(
            f"| `{method}.py` | {before:.2f} | {after:.2f} ± {error:.2f} | {gain:+.2f} ± {gain_error:.2f} | "
            f"{seconds / 60:.0f} min | ![]({PICTURES}/{method}.png) |"
        )
    return lines


def main(settings: Settings) -> None:
    """Run what is missing."""
    for method, seed in pending(settings.results, settings.methods, settings.seeds):
        example, start = import_module(f"examples.{method}"), process_time()

        def run(own: RunSettings, example: ModuleType = example, name: str = method) -> tuple[Evaluation, Evaluation]:
            before, after = example.main(own)
            if own.seed == settings.seeds[0]:
                pictures = settings.results.with_suffix("")
                pictures.mkdir(parents=True, exist_ok=True)
                strip(before, after).save(pictures / f"{name}.png")
            return before, after

        row = {"method": method, **measure(run_settings(example, seed, settings), run)}
        del row["seconds"]  # the machine may have done other work, too
        append({**row, "processor_seconds": round(process_time() - start)}, settings.results)
    print("\n".join(table(read_rows(settings.results))))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
