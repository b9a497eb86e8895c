"""The soak run: what it reads of a process, and what it makes of the readings."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest

from benchmarks.main_job import read_rows
from benchmarks.soak import Settings, growth, resident, soak


def test_growth_is_the_slope_of_the_second_half():
    minutes = [0.5 * n for n in range(21)]
    values = [1000.0 - 50 * n for n in range(10)] + [300 + 0.3 * n + (-1) ** n for n in range(11)]
    expected = np.polyfit(minutes[10:], values[10:], 1)[0]
    assert growth(minutes, values) == pytest.approx(60 * expected)


def test_the_memory_of_children_counts():
    child = "x = bytearray(100 * 2**20); print('ready', flush=True); input()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        assert resident(psutil.Process(process.pid)) > 100
        process.communicate("\n")


def test_a_job_is_watched_and_ended(tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    options = {
        "model.name": tiny_folder, "model.lora-rank": 3, "sampling.prompts": prompts, "sampling.num-steps": 2,
        "sampling.images-per-iteration": 4, "reward": "jpeg-compressibility", "evaluation-samples": 1,
    }  # fmt: skip
    settings = Settings(
        minutes=0.1,
        interval=0.5,
        options=tuple(str(part) for key, value in options.items() for part in (f"--{key}", value)),
        output=tmp_path / "run",
        results=tmp_path / "soak.csv",
    )
    rows = soak(settings)
    assert rows[-1]["iterations"] > 0
    assert [row["minutes"] for row in read_rows(settings.results)] == [str(row["minutes"]) for row in rows]
    assert rows[-1]["mebibytes"] > 100
    with pytest.raises(RuntimeError, match="the job ended after"):
        soak(replace(settings, options=("--sampling.prompts", "missing.txt"), output=tmp_path / "other"))
