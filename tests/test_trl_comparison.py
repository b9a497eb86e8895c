"""The comparison with TRL as far as it runs without TRL: its counters, its refusals, its pinned versions."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks.trl import ours
from benchmarks.trl.job import COUNTS, Job, Options, measured
from benchmarks.trl_comparison import PINS, ROOT, Settings, Side, compare


def job_of(folder: Path, processes: int) -> Job:
    """Four images of three steps, two updates."""
    return Job(
        pipeline=str(folder),
        prompts=["a", "b"],
        images=4,
        num_steps=3,
        guidance_scale=5.0,
        minibatch=2,
        their_sample_batch=4,
        threads=processes,
        ours=Options(micro_batch=4 // processes, processes=processes),
    )


def test_the_counters_see_the_whole_iteration(tiny_folder):
    """Guidance makes two latents of each; a pass over all steps of 4 images makes 4 / 2 updates."""
    run = measured(*ours.make(job_of(tiny_folder, 1)))
    for _ in range(2):
        answer = run()
        assert {key: answer[key] for key in COUNTS} == {
            "sampling": 4 * 3 * 2,
            "training": 4 * 3 * 2,
            "updates": 2,
        }
        assert 0 < answer["processor_seconds"] and 0 < answer["seconds"]


def answer(seconds: float, training: int = 8) -> dict[str, float]:
    return {"seconds": seconds, "processor_seconds": 2 * seconds, "sampling": 8, "training": training, "updates": 1}


def test_a_row_is_the_median_of_the_pairs_ratios():
    row = compare([answer(1), answer(2), answer(4)], [answer(2), answer(3), answer(12)])
    assert row["ratio_of_seconds"] == row["ratio_of_processor_seconds"] == 2.0
    assert (row["lowest_of_seconds"], row["highest_of_seconds"]) == (1.5, 3.0)
    assert (row["our_seconds"], row["their_seconds"]) == (2, 3)
    assert row["training_each"] == 8


def test_unequal_work_is_no_comparison():
    with pytest.raises(RuntimeError, match="unequal work"):
        compare([answer(1, training=6)], [answer(2)])


def test_what_trl_would_refuse_is_refused_first():
    with pytest.raises(ValueError, match="minibatch=16 must divide"):
        Settings(images=32)
    with pytest.raises(ValueError, match="5 processes cannot share minibatch=16"):
        Settings(ours=Options(processes=5))


def test_two_processes_do_the_work_of_one(tiny_folder):
    """The side as it runs beside TRL: counts are over both, each of which makes every update."""
    with Side(sys.executable, "benchmarks.trl.ours", job_of(tiny_folder, 2), 2) as side:
        answers = [side.iteration() for _ in range(2)]
    for answer in answers:
        assert {key: answer[key] for key in COUNTS} == {"sampling": 24, "training": 24, "updates": 2}


def test_both_sides_have_the_same_network_code():
    pinned = [
        dict(re.findall(r"^([\w-]+)==(\S+)", path.read_text(), re.M)) for path in (PINS, ROOT / "constraints.txt")
    ]
    assert pinned[0]["trl"] == "0.23.1"
    for package in ("torch", "diffusers", "transformers", "peft", "accelerate"):
        assert pinned[0][package] == pinned[1][package]
