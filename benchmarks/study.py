"""The comparison study: every method on the same task with the same budget, over seeds.

    python -m benchmarks.study                                  # goes on where it was stopped; takes hours
    python -m benchmarks.study --minutes 60                     # leaves after an hour, the same command goes on
    python -m benchmarks.study --methods draft-1 nabla-db --seeds 0 --iterations 16 --results /tmp/small
    python -m benchmarks.study --figures                        # draws again, from the files in --results alone

Protocol. Task: the embedded pipeline, its 45 animals, `style-preference`, which is differentiable, so that all methods
can maximise the same reward. What a method does beyond the learning rate is what its example does on this pipeline, or
what `benchmarks/study_methods.py` says instead; Nabla-DB's beta and RWR's temperature are not tuned.

1. Tuning: the same declared learning rates for every method, `--tuning-seed` (none of the study's), a quarter of the
   iterations; optimiser steps an iteration are each method's own: 4 for DDPO-IS and Nabla-DB, 5 for RWR, else 1. The
   highest mean reward of the last evaluation wins, of those to which the over-optimisation watch does
   not object, which here means that half of the diversity is left; nothing else counts. `tuning.csv`
2. Runs: for each seed and method the same number of iterations, each sampling the same number of images. Evaluations on
   fixed prompts and noise, the same for all runs, count on no axis. `evaluations.csv`, a row for each method, seed and
   evaluation; three axes: reward calls, network evaluations (both counted as `study_methods` says), seconds of training
3. Generalisation: each run's last adapter on the training prompts and on unseen ones, by `examples/evaluate.py`, beside
   the pretrained model and the pretrained model from other noise. `generalisation.csv`
4. Figures: of these files and the pictures in `samples`, see `benchmarks/study_figures.py`.

Diversity, FID and `moved` (how far an image is from the pretrained model's of the same noise, in the place of LPIPS,
whose networks would have to be downloaded) are squared distances of EfficientNet-Lite2 features, which no reward
uses. FID is within prompts and between images from the same noise, so that it starts at 0; from other noise the
pretrained model itself is as far as `pretrained, other noise` says, for few images far.

What has rows is not run again; a run that was stopped continues after its newest checkpoint in `--runs`. Results of
another protocol need another `--results`, which says so.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from agents.files import write_whole
from benchmarks.main_job import provenance, read_rows
from benchmarks.methods import pending
from benchmarks.study_figures import draw
from benchmarks.study_methods import CONSTANTS, METHODS, MethodName, check_gradient
from benchmarks.study_runs import Task, TimeLimit, add_rows, method_settings, rows_of, run
from examples import evaluate

RESULTS = Path(__file__).parent / "results" / "study"
BATCH = 45  # of evaluations


@dataclass(frozen=True)
class Settings(Task):
    """The study's size."""

    methods: tuple[MethodName, ...] = tuple(METHODS)
    """Which methods."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of each method each."""
    learning_rates: tuple[float, ...] = (1.5e-4, 5e-4, 1.5e-3)
    """Tried for every method, in a quarter of the iterations."""
    tuning_seed: int = 100
    """Of the runs that tune."""
    unseen: tuple[str, ...] = ("unseen-animals", "everyday-objects")
    """Prompt sets that are only evaluated on."""
    minutes: float | None = None
    """Leave after this time; the same command goes on."""
    figures: bool = False
    """Draw the figures again, run nothing."""
    results: Path = RESULTS
    """Where CSV files, samples and figures go."""
    runs: Path = Path("runs/study")
    """Where run folders go."""

    def __post_init__(self) -> None:
        """Refuse what the protocol cannot do."""
        check_gradient(self.methods, self.reward)
        if not (self.methods and self.seeds and self.learning_rates):
            raise ValueError("give at least one method, one seed and one learning rate")
        if self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed={self.tuning_seed} is one of the study's seeds; tune with another")
        if self.evaluation_samples < 2:
            raise ValueError(
                f"evaluation_samples={self.evaluation_samples} must be at least 2: diversity and FID are within prompts"
            )

    @property
    def protocol(self) -> dict[str, Any]:
        """What all rows of the results have in common."""
        free = ("methods", "seeds", "minutes", "figures", "results", "runs")
        kept = {key: value for key, value in asdict(self).items() if key not in free}
        return json.loads(json.dumps(kept | CONSTANTS))


def again() -> str:
    """The command that goes on."""
    return shlex.join(["python", "-m", "benchmarks.study", *sys.argv[1:]])


def claim(settings: Settings) -> None:
    """Write the protocol beside the results, or refuse those of another one."""
    file = settings.results / "protocol.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(settings.protocol, indent=2) + "\n")
    written = json.loads(file.read_text())
    differing = [key for key in settings.protocol if written.get(key) != settings.protocol[key]]
    if differing:
        there = ", ".join(f"{key}={written.get(key)!r} (here {settings.protocol[key]!r})" for key in differing)
        raise ValueError(f"{file} belongs to a study with {there}; give this one its own --results and --runs")


def tune(settings: Settings, limit: TimeLimit) -> None:
    """Try each learning rate with each method."""
    budget = tuning_iterations(settings)
    base = replace(settings.base(settings.tuning_seed), evaluate_every=budget, held_out=())
    base = replace(base, training=replace(base.training, iterations=budget))
    file = settings.results / "tuning.csv"
    done = {(row["method"], row["learning_rate"]) for row in read_rows(file)}
    for name, rate in product(settings.methods, settings.learning_rates):
        if limit.over:
            return
        if (name, f"{rate:g}") not in done:
            output = settings.runs / "tuning" / f"{name}-{rate:g}"
            own, commit = method_settings(METHODS[name], base, learning_rate=rate, output=output), provenance()
            cost = run(METHODS[name], own, again())
            key = {"method": name, "learning_rate": f"{rate:g}", "seed": settings.tuning_seed}
            add_rows(file, [key | row for row in rows_of(output, cost, commit)])


def tuning_iterations(settings: Settings) -> int:
    """A quarter of the budget."""
    return max(1, settings.iterations // 4)


def tuned(settings: Settings, method: str) -> float:
    """The learning rate whose last evaluation has the highest reward, without an alarm if there is one.

    Raises:
        ValueError: every run broke down before its end.
    """
    last = str(tuning_iterations(settings))
    rows = read_rows(settings.results / "tuning.csv")
    ended = [row for row in rows if row["method"] == method and row["iteration"] == last]
    if not ended:
        raise ValueError(f"no learning rate of {settings.learning_rates} lets {method} end; give lower ones")
    return float(max(ended, key=lambda row: (row["alarms"] == "0", float(row["reward"])))["learning_rate"])


def train(settings: Settings, limit: TimeLimit) -> None:
    """The runs that have no rows yet, all methods of one seed before the next seed."""
    file = settings.results / "evaluations.csv"
    for name, seed in pending(file, settings.methods, settings.seeds):
        if limit.over:
            return
        rate, output, commit = tuned(settings, name), settings.runs / f"{name}-{seed}", provenance()
        own = method_settings(METHODS[name], settings.base(seed), learning_rate=rate, output=output)
        cost = run(METHODS[name], own, again())
        if seed == settings.seeds[0]:
            keep_samples(output / "samples", settings.results / "samples" / output.name)
        key = {"method": name, "seed": seed, "learning_rate": f"{rate:g}"}
        add_rows(file, [key | row for row in rows_of(output, cost, commit)])


def keep_samples(source: Path, target: Path) -> None:
    """Copy the strips of sample images, as JPEG files that are small enough to be committed."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "prompts.json").write_text((source / "prompts.json").read_text())
    for strip in sorted(source.glob("*.png")):
        with Image.open(strip) as image:
            image.save(target / f"{strip.stem}.jpg", quality=90)


def generalise(settings: Settings, limit: TimeLimit) -> None:
    """Evaluate the last adapters of the runs in `--runs` on all prompt sets."""
    file = settings.results / "generalisation.csv"
    for prompts, seed in product((settings.prompts, *settings.unseen), settings.seeds):
        done = {(row["prompts"], row["method"], row["seed"]) for row in read_rows(file)}
        left = [name for name in settings.methods if (prompts, name, str(seed)) not in done]
        adapters = {f"{name}-{seed}": name for name in left if (settings.runs / f"{name}-{seed}" / "lora").is_dir()}
        if limit.over or not adapters:
            continue
        output = settings.runs / "generalisation" / f"{Path(prompts).stem}-{seed}"
        evaluate.main(
            evaluate.Settings(
                tuple(settings.runs / adapter for adapter in adapters),
                prompts=prompts,
                samples=settings.evaluation_samples,
                reward=settings.reward,
                batch=min(BATCH, settings.images_per_iteration),
                output=output,
            )
        )
        table = {row.pop("model"): row for row in read_rows(output / "table.csv")}
        named = [("" if name not in adapters else str(seed), adapters.get(name, name), table[name]) for name in table]
        rows = [{"prompts": prompts, "method": name, "seed": seed} | row for seed, name, row in named]
        add_rows(file, [row for row in rows if (prompts, row["method"], row["seed"]) not in done])


PARTS: tuple[Callable[[Settings, TimeLimit], None], ...] = (tune, train, generalise)


def main(settings: Settings) -> None:
    """Do what is missing, then draw."""
    if not settings.figures:
        claim(settings)
        with TimeLimit(settings.minutes) as limit:
            try:
                for part in PARTS:
                    part(settings, limit)
            except SystemExit:
                if not limit.over:
                    raise
        if limit.over:
            print(f"{settings.minutes:g} minutes are over; go on with: {again()}")
    for file in draw(settings.results):
        print(file)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
