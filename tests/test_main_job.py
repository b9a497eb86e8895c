"""The main job learns, for three seeds and a second reward; about forty minutes on two cores (`make test-long`)."""

from dataclasses import replace

import pytest

from benchmarks.main_job import RESULTS, append, measure
from configs import RunSettings

RUNS = [("style-preference", 0), ("style-preference", 1), ("style-preference", 2), ("jpeg-compressibility", 0)]


@pytest.mark.long
@pytest.mark.filterwarnings("always::agents.OverOptimisationWarning")  # the row says what became of the animals
@pytest.mark.parametrize(("reward", "seed"), RUNS)
def test_reward_rises_by_two_standard_deviations_and_animals_stay(reward, seed, tmp_path):
    row = measure(replace(RunSettings(), reward=reward, seed=seed, output=tmp_path / "run"))
    append(row, RESULTS)
    assert row["seconds"] <= 600
    if reward == "style-preference":
        assert row["gain_in_std"] >= 2
        assert row["judge_after"] >= row["judge_before"] * 2 / 3
    else:
        assert row["gain_in_std"] > 0.3
