"""Where a run's time goes: `torch.profiler`'s trace of one iteration, and a page about it.

The sections are `record_function` ranges in the loop, the evaluator and the environment; each ends with a number that
the host reads, so that on a GPU, too, its time is that of its work. What is nested counts for the inner section.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import TracebackType

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile, schedule

from .files import write_whole

SECTIONS = {
    "sampling": "sampling",
    "reward": "decoding and reward",
    "training": "training",
    "evaluation": "evaluation",
}
ITERATION = "ProfilerStep"
OPERATORS = 15


class Profile:
    """A context around the loop: with a folder, its second iteration leaves `trace.json.gz` and `profile.md` there.

    The first one warms up. The trace opens in Perfetto or chrome://tracing.
    """

    def __init__(self, folder: Path | None) -> None:
        """Write to `folder`; None profiles nothing."""
        self._profiler = None
        if folder is not None:
            plan = schedule(wait=0, warmup=1, active=1, repeat=1)
            self._profiler = profile(schedule=plan, on_trace_ready=partial(_write, folder), acc_events=True)

    def __enter__(self) -> Profile:
        """Begin the first iteration."""
        if self._profiler is not None:
            self._profiler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        """End; what was not finished is not written."""
        if self._profiler is not None and kind is None:
            self._profiler.stop()

    def step(self) -> None:
        """An iteration has ended."""
        if self._profiler is not None:
            self._profiler.step()


def _write(folder: Path, profiler: profile) -> None:
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    averages = profiler.key_averages()
    gpu = any(event.self_device_time_total for event in averages)
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    table = averages.table(sort_by=order, row_limit=OPERATORS, max_name_column_width=40)
    write_whole(folder / "profile.md", f"{section_table(profiler.events())}\n```\n{table}\n```\n")


def section_table(events: Iterable[FunctionEvent]) -> str:
    """Seconds and shares of an iteration by section, as Markdown."""
    seconds = section_seconds(events)
    total = sum(seconds.values())
    lines = ["| section | seconds | share |", "| --- | --- | --- |"]
    lines += [f"| {name} | {value:.3f} | {value / total:.1%} |" for name, value in seconds.items()]
    return "\n".join([*lines, f"| the iteration | {total:.3f} | 100.0% |", ""])


def section_seconds(events: Iterable[FunctionEvent]) -> dict[str, float]:
    """Seconds of the iteration by section, each without what is nested in it, and of everything else."""
    seconds = dict.fromkeys([*SECTIONS.values(), "everything else"], 0.0)
    for event in events:
        name = _section(event)
        if name is None:
            continue
        seconds[name] += event.cpu_time_total / 1e6
        outer = event.cpu_parent
        while outer is not None and _section(outer) is None:
            outer = outer.cpu_parent
        if outer is not None:
            seconds[_section(outer) or ""] -= event.cpu_time_total / 1e6
    return seconds


def _section(event: FunctionEvent) -> str | None:
    return "everything else" if event.name.startswith(ITERATION) else SECTIONS.get(event.name)
