"""The study's figures, of its CSV files and saved samples alone.

- `reward.png`: reward over reward calls, network evaluations, seconds of training.
- `reward_diversity.png`, `reward_fid.png`, `reward_fidelity.png`: each against the reward, along the runs. The square
  is the pretrained model, the dotted line its value for images from other noise, where it was measured.
- `equal_reward.png`: samples from the same noise, of each method's evaluation whose reward is nearest to a common one,
  the median of the methods' best.
- `generalisation.png`: reward before and after on training and unseen prompts.
- `table.md`: the last evaluations, and what is left of diversity and prompt fidelity at a reward of 1.5, on a straight
  line between the evaluations before and after.

Lines are means over seeds; bands and error bars are standard errors over seeds, of a single seed over its images.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from PIL import Image

from agents.run_folder import pyplot
from benchmarks.main_job import Row, markdown, read_rows
from benchmarks.study_methods import METHODS

AXES = {"reward_calls": "reward calls", "network_evaluations": "network evaluations", "seconds": "seconds of training"}
AGAINST = {
    "diversity": ("reward_diversity.png", "diversity within prompts"),
    "fid": ("reward_fid.png", "FID within prompts to the pretrained model, same noise"),
    "held_out_prompt_fidelity": ("reward_fidelity.png", "prompt fidelity (held out)"),
}
OTHER_NOISE = "pretrained, other noise"
DPI = 130
SHOWN = 8  # prompts side by side
LEVEL = 1.5  # reward at which methods are compared in `table.md`


class Point(NamedTuple):
    """Mean of a quantity over seeds and its standard error."""

    mean: float
    error: float


class Curve:
    """A method's evaluations over seeds, those iterations that all its seeds have reached."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Take the rows of one method."""
        of_seed: dict[str, dict[int, Row]] = defaultdict(dict)
        for row in rows:
            of_seed[row["seed"]][int(row["iteration"])] = row
        self._seeds = list(of_seed.values())
        self.iterations = sorted(set.intersection(*(set(rows) for rows in self._seeds)))

    def __call__(self, key: str) -> list[Point]:
        """A quantity at each of `iterations`."""
        return [self._point(key, iteration) for iteration in self.iterations]

    def _point(self, key: str, iteration: int) -> Point:
        rows = [rows[iteration] for rows in self._seeds]
        values = [float(row[key]) for row in rows]
        if len(values) > 1:
            return Point(fmean(values), stdev(values) / len(values) ** 0.5)
        return Point(values[0], float(rows[0].get(f"{key}_error") or 0))


def draw(results: Path) -> list[Path]:
    """Draw whatever the files in `results` allow; the figures made."""
    rows = read_rows(results / "evaluations.csv")
    curves = {name: Curve(of) for name in METHODS if (of := [row for row in rows if row["method"] == name])}
    unseen = read_rows(results / "generalisation.csv")
    if not curves:
        return []
    made = [_rewards(curves, results / "reward.png")]
    if all(row.get("held_out_prompt_fidelity") for row in rows):
        (results / "table.md").write_text(table(curves))
    for key, (name, title) in AGAINST.items():
        if all(row.get(key) for row in rows):
            made.append(_trade_off(curves, key, title, _other_noise(unseen, results, key), results / name))
    if pictures := equal_reward(rows, results / "samples"):
        made.append(_side_by_side(pictures, results / "equal_reward.png"))
    if unseen:
        made.append(_generalisation(unseen, results / "generalisation.png"))
    return made


def table(curves: dict[str, Curve]) -> str:
    """A Markdown table, a line a method; means over seeds and their standard errors."""
    columns = {"reward": ".2f", "diversity": ".0f", "held_out_prompt_fidelity": ".1f", "fid": ".0f"}
    level = f"at reward {LEVEL:g}"
    heads = ["method", "reward", "diversity", "prompt fidelity", "FID", "reward calls", "network evaluations"]
    heads += [f"diversity {level}", f"fidelity {level}"]
    start = next(iter(curves.values()))
    before = [f"{start(key)[0].mean:{form}}" for key, form in columns.items()]
    lines = [["pretrained", *before, "0", "0", "", ""]]
    for name, curve in curves.items():
        last = {key: curve(key)[-1] for key in columns}
        cells = [f"{point.mean:{columns[key]}} ± {point.error:{columns[key]}}" for key, point in last.items()]
        costs = [f"{curve(key)[-1].mean:,.0f}" for key in ("reward_calls", "network_evaluations")]
        there = [
            "" if (value := _at_level(curve, key)) is None else f"{value:{columns[key]}}"
            for key in ("diversity", "held_out_prompt_fidelity")
        ]
        lines.append([METHODS[name].label, *cells, *costs, *there])
    return markdown([dict(zip(heads, cells, strict=True)) for cells in lines])


def _at_level(curve: Curve, key: str) -> float | None:
    """A quantity where the mean reward first comes to `LEVEL`; None where it does not."""
    points = list(zip([point.mean for point in curve("reward")], [point.mean for point in curve(key)], strict=True))
    for (low, before), (high, after) in pairwise(points):
        if low < LEVEL <= high:
            return before + (LEVEL - low) / (high - low) * (after - before)
    return None


def _rewards(curves: dict[str, Curve], path: Path) -> Path:
    figure, panels = pyplot().subplots(1, 3, figsize=(13, 4.6), layout="constrained", sharey=True)
    for axes, (key, title) in zip(panels, AXES.items(), strict=True):
        for name, curve in curves.items():
            x, y = [point.mean for point in curve(key)], curve("reward")
            low, high = ([point.mean + sign * point.error for point in y] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=_colour(name), alpha=0.15, linewidth=0)
            axes.plot(x, [point.mean for point in y], ".-", color=_colour(name), label=METHODS[name].label)
        axes.set_xlabel(title)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
    panels[0].set_ylabel("reward")
    return _save(figure, panels, path)


def _trade_off(curves: dict[str, Curve], key: str, title: str, other: float | None, path: Path) -> Path:
    figure, axes = pyplot().subplots(figsize=(7.5, 5), layout="constrained")
    for name, curve in curves.items():
        x, y, colour = curve("reward"), curve(key), _colour(name)
        bars = {"xerr": [point.error for point in x], "yerr": [point.error for point in y]}
        means = [[point.mean for point in points] for points in (x, y)]
        axes.errorbar(*means, **bars, fmt=".-", color=colour, elinewidth=0.6, label=METHODS[name].label)
        axes.plot(means[0][:1], means[1][:1], "s", color="black", zorder=3)
    if other is not None:
        axes.axhline(other, color="grey", linestyle=":", label=OTHER_NOISE)
    axes.set(xlabel="reward", ylabel=title)
    return _save(figure, [axes], path)


def _other_noise(rows: Sequence[Row], results: Path, key: str) -> float | None:
    """The pretrained model's value for the training prompts, from noise that is not the evaluations'."""
    trained_on = json.loads((results / "protocol.json").read_text())["prompts"]
    found = [row[key] for row in rows if (row["method"], row["prompts"]) == (OTHER_NOISE, trained_on) and row.get(key)]
    return float(found[0]) if found else None


class Pictures(NamedTuple):
    """One line of `equal_reward.png`."""

    caption: str
    strip: Path
    prompts: list[str]


def equal_reward(rows: Sequence[Row], samples: Path) -> list[Pictures]:
    """The pretrained model's samples, then each method's at the common reward; empty where no samples were kept."""
    runs: dict[str, list[Row]] = {}
    for name in METHODS:
        folders = sorted(samples.glob(f"{name}-[0-9]*"))
        seed = folders[0].name.removeprefix(f"{name}-") if folders else None
        if own := [row for row in rows if (row["method"], row["seed"]) == (name, seed)]:
            runs[name] = sorted(own, key=lambda row: int(row["iteration"]))
    if not runs:
        return []
    level = median(max(float(row["reward"]) for row in own) for own in runs.values())
    chosen = {"pretrained": next(iter(runs.values()))[0]}
    for name, own in runs.items():
        chosen[name] = min(own, key=lambda row: abs(float(row["reward"]) - level))
    lines = []
    for name, row in chosen.items():
        folder = samples / f"{row['method']}-{row['seed']}"
        label = METHODS[name].label if name in METHODS else name
        caption = f"{label}\niteration {row['iteration']}\nreward {float(row['reward']):.2f}"
        prompts = json.loads((folder / "prompts.json").read_text())
        lines.append(Pictures(caption, folder / f"{int(row['iteration']):06d}.jpg", prompts))
    return lines


def _side_by_side(lines: Sequence[Pictures], path: Path) -> Path:
    columns = min(SHOWN, len(lines[0].prompts))
    size = (1.15 * columns + 1.6, 1.15 * len(lines) + 0.3)
    figure, grid = pyplot().subplots(len(lines), columns, figsize=size, layout="constrained", squeeze=False)
    for panels, line in zip(grid, lines, strict=True):
        with Image.open(line.strip) as strip:
            width = strip.width // len(line.prompts)
            for n, axes in enumerate(panels):
                axes.imshow(strip.crop((n * width, 0, (n + 1) * width, strip.height)))
                axes.set(xticks=[], yticks=[])
                if line is lines[0]:
                    axes.set_title(line.prompts[n], fontsize=8)
        panels[0].set_ylabel(line.caption, fontsize=7, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=95)
    pyplot().close(figure)
    return path


def _generalisation(rows: Sequence[Row], path: Path) -> Path:
    sets = list(dict.fromkeys(row["prompts"] for row in rows))
    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    figure, axes = pyplot().subplots(figsize=(8, 4.6), layout="constrained")
    for k, prompts in enumerate(sets):
        here = [row for row in rows if row["prompts"] == prompts]
        before = next(row for row in here if row["method"] == "pretrained")
        axes.axhline(float(before["reward"]), color=f"C{k}", linestyle=":", label=f"pretrained, {Path(prompts).stem}")
        after = {name: [row for row in here if row["method"] == name] for name in names}
        points = {
            name: Curve([row | {"iteration": "0"} for row in own])("reward")[0] for name, own in after.items() if own
        }
        x = [names.index(name) + 0.18 * (k - (len(sets) - 1) / 2) for name in points]
        means, errors = ([point[n] for point in points.values()] for n in (0, 1))
        axes.errorbar(x, means, errors, fmt="o", color=f"C{k}", capsize=3, label=f"fine-tuned, {Path(prompts).stem}")
    axes.set_xticks(range(len(names)), [METHODS[name].label for name in names], rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("reward")
    return _save(figure, [axes], path)


def _colour(name: str) -> str:
    return f"C{list(METHODS).index(name)}"


def _save(figure: Any, panels: Sequence[Any], path: Path) -> Path:
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)
    return path
