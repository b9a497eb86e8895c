"""The page about where the time went, against a clock."""

import gzip
import json
import time
from collections import defaultdict
from itertools import pairwise

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from agents.profiling import SECTIONS, Profile, section_seconds


def innermost(events):
    """Seconds by the section that was entered last, by going through the events' beginnings and ends in time."""
    spans = [event for event in events if event.name in SECTIONS or event.name.startswith("ProfilerStep")]
    moments = sorted({moment for span in spans for moment in (span.time_range.start, span.time_range.end)})
    seconds = defaultdict(float)
    for start, end in pairwise(moments):
        inside = [span for span in spans if span.time_range.start <= start and end <= span.time_range.end]
        if inside:
            name = max(inside, key=lambda span: span.time_range.start).name
            seconds[SECTIONS.get(name, "everything else")] += (end - start) / 1e6
    return seconds


def test_a_section_has_its_seconds_without_those_nested_in_it():
    def work(milliseconds):
        end = time.perf_counter() + milliseconds / 1e3
        while time.perf_counter() < end:
            torch.ones(10).sum()

    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("ProfilerStep#1"):
        for _ in range(2):
            with record_function("sampling"), record_function("something between"):
                work(20)
                with record_function("reward"):
                    work(10)
        with record_function("evaluation"), record_function("reward"):
            work(15)
        with record_function("training"):
            work(30)
        work(25)
    found = section_seconds(profiler.events())
    assert found == pytest.approx({"evaluation": 0.0} | innermost(profiler.events()), abs=1e-4)
    least = {"sampling": 0.04, "decoding and reward": 0.035, "training": 0.03, "everything else": 0.025}
    assert all(found[name] >= seconds for name, seconds in least.items())


def test_the_second_iteration_leaves_a_trace_and_a_page(tmp_path):
    with Profile(tmp_path) as profiling:
        for iteration in range(4):
            assert (tmp_path / "profile.md").exists() == (iteration >= 2)
            with record_function("training"), record_function(f"iteration {iteration}"):
                torch.ones(100, 100) @ torch.ones(100, 100)
            profiling.step()
    page = (tmp_path / "profile.md").read_text()
    assert all(f"| {section} | " in page for section in SECTIONS.values())
    assert "aten::mm" in page
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {name for name in names if name and name.startswith("iteration")} == {"iteration 1"}


def test_without_a_folder_nothing_is_profiled():
    with Profile(None) as profiling:
        assert not torch.autograd._profiler_enabled()
        profiling.step()
