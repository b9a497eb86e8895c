"""One self-contained HTML page of a run, or of several runs side by side.

    python -m agents.report runs/ppo_aesthetic                      # writes runs/ppo_aesthetic/report.html
    python -m agents.report runs/ppo_aesthetic runs/main_job --output comparison.html

It reads what a run leaves (`RunFolder`), opens from disk, holds no script and fetches nothing. Runs that differ by
their seed alone are drawn as one line with a band.
"""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from .report_data import Group, Row, Run, differing, grouped, read_run
from .report_figures import curve, trade_off

TITLES = {
    "reward": "reward, trained on",
    "diversity": "diversity within prompts",
    "moved": "squared feature distance from pretrained",
    "fid": "FID within prompts to pretrained",
    "kl": "KL divergence from pretrained, nats",
}
COLUMNS = 5  # images of a prompt over time
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1240px; margin: 0 auto; padding: 0 14px 40px; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 1.8rem 0 .5rem; border-bottom: 1px solid #ddd; }
p.note { color: #555; font-size: .9rem; margin: .3rem 0; }
.alarm { color: #a11; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; }
th, td { text-align: left; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #eee; vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; }
.outcome table { width: 100%; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 10px; }
.curves img { width: 100%; height: auto; }
.prompts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 14px; }
.prompt { margin: 0; }
.prompt figcaption { font-weight: 600; font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(5, 1fr); gap: 4px; }
.tiles div { font-size: .68rem; color: #555; line-height: 1.2; overflow-wrap: anywhere; }
.tiles img { width: 100%; height: auto; display: block; border-radius: 3px; }
"""


@dataclass(frozen=True)
class Settings:
    """What to report."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    output: Path | None = None
    """The page; by default `report.html` in the run's folder, or `comparison.html` here."""


def page(paths: list[Path]) -> str:
    """The HTML page of the runs in these folders.

    Raises:
        ValueError: no folder was given.
        FileNotFoundError: a folder holds no evaluated run.
    """
    if not paths:
        raise ValueError("no run was given; name at least one run folder")
    runs = [read_run(path) for path in paths]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    groups = grouped(runs)
    body = [
        f"<h1>{escape(title)}</h1>",
        *(_alarms(run) for run in runs),
        "<h2>Outcome</h2>",
        _outcome(runs),
        "<h2>Over training</h2>",
        f'<p class="note">{_band(groups)} x marks an alarm of the over-optimisation watch, a ring the checkpoint kept '
        "as lora_best. All on fixed prompts and noise.</p>",
        _curves(groups),
        "<h2>Same prompts, same noise</h2>",
        _pictures(runs),
        f"<h2>{'Settings' if len(runs) == 1 else 'Settings that differ'}</h2>",
        _settings(runs),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n"
        "</html>\n"
    )


def _alarms(run: Run) -> str:
    alarmed = [f"{row['iteration']:.0f}" for row in run.evaluations if row["alarms"]]
    if not alarmed:
        return f'<p class="note">{escape(run.name)}: the over-optimisation watch raised no alarm.</p>'
    word = "iteration" if len(alarmed) == 1 else "iterations"
    return f'<p class="alarm">{escape(run.name)}: over-optimisation alarm at {word} {", ".join(alarmed)}.</p>'


def _outcome(runs: list[Run]) -> str:
    """A table a run: each quantity for the pretrained model, the checkpoint kept and the end."""
    tables = []
    for run in runs:
        kept = [row for row in run.evaluations if row["kept"]][-1:]
        rows = [("pretrained", run.evaluations[0]), *(("kept", row) for row in kept), ("end", run.evaluations[-1])]
        header = [
            run.name,
            *(f"{state} ({row['iteration']:.0f})" if row["iteration"] else state for state, row in rows),
        ]
        lines = [[_title(key), *(_number(row, key) for _, row in rows)] for key in _measured(runs)]
        tables.append(_table(header, lines))
    return f'<div class="curves outcome">{"".join(tables)}</div>'


def _measured(runs: list[Run]) -> list[str]:
    """Quantities that every run has, the reward first."""
    keys = [key for key in runs[0].evaluations[-1] if all(key in run.evaluations[-1] for run in runs)]
    return [key for key in keys if key in TITLES or key.startswith("held_out_") and not key.endswith("_error")]


def _title(key: str) -> str:
    return TITLES.get(key) or f"held out: {key.removeprefix('held_out_').replace('_', ' ')}"


def _number(row: Row, key: str) -> str:
    error = row.get(f"{key}_error")
    return _short(row[key], 4) + ("" if error is None else f" ±\u00a0{_short(error, 2)}") if key in row else ""


def _short(value: float, digits: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _band(groups: list[Group]) -> str:
    if any(len(group.runs) > 1 for group in groups):
        return "Bands reach from the lowest to the highest seed, or over one standard error where there is one run."
    return "Bands are one standard error over images."


def _curves(groups: list[Group]) -> str:
    keys = _measured([run for group in groups for run in group.runs])
    figures = [(_title(key), curve(groups, key, _title(key))) for key in keys]
    for key in keys:
        if key == "diversity" or key.startswith("held_out_"):
            title = f"{_title(key)}, against the reward"
            figures.append((title, trade_off(groups, key, title)))
    return f'<div class="curves">{"".join(_image(svg.encode(), "svg+xml", title) for title, svg in figures)}</div>'


def _pictures(runs: list[Run]) -> str:
    """Of one run the images over time, of several the pretrained model's and each run's last ones."""
    if any(run.prompts != runs[0].prompts for run in runs):
        return '<p class="note">The runs were evaluated on different prompts.</p>'
    shown = [("pretrained", runs[0], runs[0].evaluations[0])]
    if len(runs) == 1:
        rows = runs[0].evaluations[1:]
        spread = sorted({round(n * (len(rows) - 1) / max(1, COLUMNS - 2)) for n in range(COLUMNS - 1)}) if rows else []
        shown += [(f"{rows[n]['iteration']:.0f}", runs[0], rows[n]) for n in spread]
    else:
        shown += [(run.name, run, run.evaluations[-1]) for run in runs]
    columns = [(caption, run.samples(row)) for caption, run, row in shown]
    figures = []
    for n, prompt in enumerate(runs[0].prompts):
        tiles = (
            f"<div>{_image(_png(images[n]), 'png', f'{prompt}, {caption}')}{escape(caption)}</div>"
            for caption, images in columns
        )
        figures.append(
            f'<figure class="prompt"><figcaption>{escape(prompt)}</figcaption>'
            f'<div class="tiles">{"".join(tiles)}</div></figure>'
        )
    return f'<div class="prompts">{"".join(figures)}</div>'


def _settings(runs: list[Run]) -> str:
    if len(runs) == 1:
        return _table(["setting", "value"], [[name, _value(value)] for name, value in runs[0].config.items()])
    rows = [[name, *map(_value, values)] for name, values in differing(runs).items()]
    if not rows:
        return '<p class="note">None.</p>'
    return _table(["setting", *(run.name for run in runs)], rows)


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td{_kind(cell)}>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _kind(cell: str) -> str:
    return ' class="number"' if cell[:1].isdigit() or cell[:1] == "-" else ""


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _image(content: bytes, kind: str, description: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(description)}" src="data:image/{kind};base64,{data}">'


def main(settings: Settings) -> None:
    """Write the page, whole or not at all."""
    content = page(list(settings.runs))
    single = len(settings.runs) == 1
    output = settings.output or (settings.runs[0] / "report.html" if single else Path("comparison.html"))
    partial = output.with_suffix(".partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, output)
    print(output)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
