"""What a report reads from run folders: settings, evaluations, sample images; which runs differ by seed alone."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

Row = dict[str, float]


@dataclass(frozen=True)
class Run:
    """One run folder, read."""

    path: Path
    config: dict[str, Any]
    """Settings by dotted name."""
    evaluations: list[Row]
    prompts: list[str]
    """Of the sample images."""

    @property
    def name(self) -> str:
        """The folder's."""
        return self.path.name

    def images(self, row: Row) -> float:
        """How many images had been sampled for training at a row of the evaluations."""
        return row["iteration"] * float(self.config.get("sampling.images_per_iteration", 1))

    def samples(self, row: Row) -> list[Image.Image]:
        """The images of `prompts` at a row of the evaluations."""
        with Image.open(self.path / "samples" / f"{int(row['iteration']):06d}.png") as strip:
            width = strip.width // len(self.prompts)
            return [strip.crop((n * width, 0, (n + 1) * width, strip.height)) for n in range(len(self.prompts))]


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but for the seed, under one label."""

    label: str
    runs: list[Run]


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: it is none, or of a run that was stopped before its first evaluation.
    """
    for name in ("config.json", "evaluations.csv"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no {name}; give the folder of a run that has been evaluated")
    config = flat(json.loads((path / "config.json").read_text()))
    prompts = json.loads((path / "samples" / "prompts.json").read_text())
    return Run(path, config, _rows(path / "evaluations.csv"), prompts)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def differing(runs: list[Run]) -> dict[str, list[Any]]:
    """Settings, in their order, that are not the same in all runs: a value for each run, None where it has none."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    values = {name: [run.config.get(name) for run in runs] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def grouped(runs: list[Run]) -> list[Group]:
    """Runs that differ by the seed alone together, labelled by the other settings that differ."""
    by_settings: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_settings[json.dumps(_without_seed(run))].append(run)
    differences = differing([replace(group[0], config=_without_seed(group[0])) for group in by_settings.values()])
    groups = enumerate(by_settings.values())
    return [Group(_label(differences, n) or group[0].name, group) for n, group in groups]


def _without_seed(run: Run) -> dict[str, Any]:
    """The settings; of an output folder whose name ends in the seed, such as `ppo-0` or `ppo_seed0`, the rest."""
    config = {name: value for name, value in run.config.items() if name != "seed"}
    if "output" in config:
        config["output"] = re.sub(rf"[-_](seed[-_]?)?{run.config.get('seed')}$", "", config["output"])
    return config


def _label(differences: dict[str, list[Any]], n: int) -> str:
    # The output folder says which program ran; its name alone is enough.
    parts = [
        Path(values[n]).name if name == "output" else f"{name.split('.')[-1]}={values[n]}"
        for name, values in differences.items()
    ]
    return ", ".join(parts[:3])


def _rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
