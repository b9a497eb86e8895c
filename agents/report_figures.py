"""The report's figures as SVG: a quantity over training with its band, reward against diversity."""

from __future__ import annotations

import io
from typing import Any

from .report_data import Group, Run
from .run_folder import pyplot

SIZE = (4.6, 3.1)  # inches; small, so that the letters are still large on a phone


def curve(groups: list[Group], key: str, title: str) -> str:
    """`key` of the evaluations over images sampled.

    The band of a single run is the standard error over its images, that of several seeds reaches from the lowest to the
    highest. Crosses mark alarms of the watch, rings the checkpoint that a run kept.
    """
    figure, axes = _figure(title)
    for number, group in enumerate(groups):
        colour = f"C{number}"
        runs = [[(run.images(row), row) for row in run.evaluations if key in row] for run in group.runs]
        steps = sorted(set.intersection(*({x for x, _ in run} for run in runs)))
        values = [[row[key] for x, row in run if x in steps] for run in runs]
        means = [sum(column) / len(column) for column in zip(*values, strict=True)]
        if len(runs) > 1:
            low, high = ([pick(column) for column in zip(*values, strict=True)] for pick in (min, max))
        else:
            errors = [row.get(f"{key}_error", 0.0) for _, row in runs[0]]
            low = [mean - error for mean, error in zip(means, errors, strict=True)]
            high = [mean + error for mean, error in zip(means, errors, strict=True)]
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, means, ".-", color=colour, label=group.label)
        for run in group.runs:
            _mark(axes, run, key, colour)
    axes.set_xlabel("images sampled for training")
    return _svg(figure, axes, legend=len(groups) > 1)


def trade_off(groups: list[Group], key: str, title: str) -> str:
    """`key` against the reward, one line a run from the pretrained model (square) on."""
    figure, axes = _figure(title)
    for number, group in enumerate(groups):
        for n, run in enumerate(group.runs):
            rows = [row for row in run.evaluations if key in row]
            x, y = [row["reward"] for row in rows], [row[key] for row in rows]
            axes.plot(x, y, ".-", color=f"C{number}", label=group.label if n == 0 else None)
            axes.plot(x[:1], y[:1], "s", color=f"C{number}")
    axes.set_xlabel("reward")
    return _svg(figure, axes, legend=len(groups) > 1)


def _mark(axes: Any, run: Run, key: str, colour: str) -> None:
    rows = [row for row in run.evaluations if key in row]
    alarmed = [row for row in rows if row["alarms"]]
    axes.plot([run.images(row) for row in alarmed], [row[key] for row in alarmed], "x", color="black", zorder=3)
    kept = [row for row in rows if row["kept"]][-1:]
    style = {"markersize": 11, "markerfacecolor": "none", "color": colour}
    axes.plot([run.images(row) for row in kept], [row[key] for row in kept], "o", **style)


def _figure(title: str) -> tuple[Any, Any]:
    figure, axes = pyplot().subplots(figsize=SIZE, layout="constrained")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any, axes: Any, *, legend: bool) -> str:
    if legend:
        axes.legend(fontsize=8)
    file = io.StringIO()
    with pyplot().rc_context({"svg.hashsalt": "report"}):  # the same run gives the same page
        figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot().close(figure)
    return file.getvalue()
