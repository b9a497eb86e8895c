"""The comparison study on a tiny pipeline: costs against counters, stopping and going on, figures from files alone."""

import csv
import gc
import json
import signal
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from agents import Experiment, PromptAdvantage, TransitionSampler, make_collector, make_policy, train, trainable_steps
from agents.stopping import StopRequest
from benchmarks import exploits, study, study_runs
from benchmarks.main_job import read_rows
from benchmarks.study import RESULTS
from benchmarks.study_figures import Curve, draw, equal_reward, table
from benchmarks.study_methods import METHODS
from benchmarks.study_runs import TimeLimit, add_rows, method_settings
from diffusion_env import DenoisingEnv, StableDiffusionBackbone
from rewards import StylePreference
from tests.runs import ROOT

PROMPTS = ("a cat", "a dog", "an ant")
ITERATIONS = 3
pytestmark = pytest.mark.filterwarnings("always::agents.OverOptimisationWarning")  # such a model does anything


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "mine.txt"
    file.write_text("\n".join(PROMPTS))
    return file


@pytest.fixture
def small(tiny_folder, prompts, tmp_path):
    """A study of seconds."""
    return study.Settings(
        model=str(tiny_folder),
        prompts=str(prompts),
        num_steps=3,
        iterations=ITERATIONS,
        images_per_iteration=6,
        evaluate_every=2,
        evaluation_samples=2,
        methods=("draft-1", "ddpo-sf"),
        seeds=(0, 1),
        learning_rates=(1e-3, 1e-2),
        unseen=(),
        results=tmp_path / "results",
        runs=tmp_path / "runs",
    )


class Counted(nn.Module):
    """Brightness, and how many images were scored."""

    name, differentiable = "brightness", True

    def __init__(self):
        super().__init__()
        self.images = 0

    def forward(self, images, prompts):
        self.images += len(images)
        return images.mean((1, 2, 3)) + 1e-3 * images[:, 0, 0, 0]


@pytest.mark.parametrize(("name", "minimum"), [*((name, 0.1) for name in METHODS), ("nabla-db-backward", 0.0)])
def test_costs_are_what_counters_see(name, minimum, backbone, small):
    """`minimum` is of the noisiest step's standard deviation; at 0 the last step trains too."""
    own = method_settings(METHODS[name], small.base(0), learning_rate=1e-4, output=small.runs)
    fraction = 0.5 if minimum else 1.0
    own = replace(own, training=replace(own.training, timestep_fraction=fraction, min_noise=minimum))
    sampler, reward = backbone.sampler(small.num_steps), Counted()
    policy = make_policy(backbone, sampler, backbone.conditioning(PROMPTS))
    env = DenoisingEnv(backbone, small.num_steps, reward, PROMPTS, batch_size=6, seed=0)
    steps = trainable_steps(sampler, minimum)
    assert (small.num_steps - 1 in steps) == (minimum == 0)
    experiment, loss = METHODS[name].job(
        Experiment(
            backbone=backbone,
            policy=policy,
            reward=reward,
            collector=make_collector(env, policy, iterations=ITERATIONS),
            evaluator=None,
            advantage=PromptAdvantage(min_count=2),
            prepare=[],
            sampler=TransitionSampler(steps, fraction),
            optimisation=own.training,
            evaluate_every=1,
        ),
        own,
    )
    rows = []
    backbone.unet.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    reward.images = 0  # losses try the reward when they are built
    metrics = list(
        train(
            experiment.collector,
            loss,
            torch.optim.AdamW([each for each in loss.parameters() if each.requires_grad], lr=1e-4),
            advantage=experiment.advantage,
            sampler=experiment.sampler,
            updates_per_epoch=own.training.updates_per_epoch,
            epochs=own.training.epochs,
            transform=experiment.transform,
        )
    )
    if name == "nabla-db-backward":
        assert any(each["loss_terminal"] > 0 for each in metrics)
    cost = METHODS[name].cost(own, sampler)
    assert reward.images == ITERATIONS * cost.reward_calls
    if name != "alignprop":
        assert sum(rows) == ITERATIONS * cost.network_evaluations
    else:  # K is drawn for each image from 1, 2, 3, of standard deviation (2/3)^1/2; a guided output is two latents
        drawn = sum(rows) - ITERATIONS * 6 * 2 * small.num_steps
        assert drawn == pytest.approx(ITERATIONS * 6 * 2 * 2, abs=3 * 2 * (ITERATIONS * 6 * 2 / 3) ** 0.5)
        assert cost.network_evaluations == 6 * 2 * (small.num_steps + 2)


def stop_after(file, monkeypatch):
    """SIGTERM arrives when the reward is asked after `file` has appeared."""
    score = StylePreference.forward

    def stopping(self, images, prompts):
        if file.exists():
            signal.raise_signal(signal.SIGTERM)
        return score(self, images, prompts)

    monkeypatch.setattr(StylePreference, "forward", stopping)


def test_a_study_that_is_stopped_goes_on_to_the_same_rows_and_figures(small, tmp_path, monkeypatch, capsys):
    small = replace(small, methods=("draft-1",), seeds=(0,), learning_rates=(1e-3,))
    with monkeypatch.context() as patch:
        stop_after(small.runs / "draft-1-0" / "metrics.csv", patch)
        with pytest.raises(SystemExit) as left:
            study.main(small)
    assert left.value.code == 128 + signal.SIGTERM
    del left
    gc.collect()  # the end of a process would close the run's folder too
    assert "python -m benchmarks.study" in capsys.readouterr().err
    assert not (small.results / "evaluations.csv").exists()
    assert 0 < len(read_rows(small.runs / "draft-1-0" / "metrics.csv")) < ITERATIONS

    study.main(small)
    made = [Path(line) for line in capsys.readouterr().out.splitlines() if line.endswith(".png")][-6:]
    assert [path.name for path in made] == [
        "reward.png", "reward_diversity.png", "reward_fid.png", "reward_fidelity.png", "equal_reward.png",
        "generalisation.png",
    ]  # fmt: skip
    rows, tuning = (read_rows(small.results / name) for name in ("evaluations.csv", "tuning.csv"))
    assert [(row["method"], row["seed"], row["iteration"]) for row in rows] == [("draft-1", "0", n) for n in "023"]
    assert [(row["method"], row["seed"], row["iteration"]) for row in tuning] == [("draft-1", "100", n) for n in "01"]
    assert {row["learning_rate"] for row in (*rows, *tuning)} == {"0.001"}
    assert [row["reward_calls"] for row in rows] == ["0", "24", "36"]
    assert float(rows[0]["seconds"]) == 0 < float(rows[1]["seconds"]) <= float(rows[2]["seconds"])
    assert {row["method"] for row in read_rows(small.results / "generalisation.csv")} == {
        "pretrained", "pretrained, other noise", "draft-1"
    }  # fmt: skip

    own = method_settings(METHODS["draft-1"], small.base(0), learning_rate=1e-3, output=tmp_path / "whole")
    whole = study_runs.rows_of(own.output, study_runs.run(METHODS["draft-1"], own, ""), {})
    for row, expected in zip(rows, whole, strict=True):
        assert {key: row[key] for key in expected if key != "seconds"} | {"seconds": expected["seconds"]} == expected

    # The figures follow from the committed files alone; and nothing is left to run.
    pixels = [Image.open(path).tobytes() for path in made]
    small.runs.rename(tmp_path / "away")
    monkeypatch.setattr(study_runs, "build_experiment", None)
    study.main(small)
    assert [Image.open(path).tobytes() for path in made] == pixels


def test_time_that_is_over_stops_a_run():
    with TimeLimit(0.1 / 60) as limit:
        assert not limit.over
        time.sleep(0.2)
        assert limit.over  # and no run is there to be told
        with StopRequest() as stop:
            time.sleep(1.1)
        assert stop.received() == signal.SIGTERM
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    with TimeLimit(None) as limit:
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert not limit.over


def test_a_study_whose_time_is_over_says_how_to_go_on(small, monkeypatch, capsys):
    def leave(settings, limit):
        limit.over = True
        raise SystemExit(143)

    monkeypatch.setattr(study, "PARTS", (leave,))
    study.main(replace(small, minutes=5))
    assert "5 minutes are over; go on with: python -m benchmarks.study" in capsys.readouterr().out


def test_the_rate_of_the_highest_last_reward_without_an_alarm_is_taken(small):
    keys = ("method", "learning_rate", "iteration", "reward", "alarms")
    rows = [
        ("rwr", "0.001", "0", "9", "0"),
        ("rwr", "0.001", "3", "-1", "0"),
        ("rwr", "0.002", "3", "-0.5", "0"),
        ("rwr", "0.003", "3", "6", "1"),  # the watch objects
        ("rwr", "0.004", "2", "7", "0"),  # broke down
        ("refl", "0.001", "3", "1", "1"),  # it objects to both
        ("refl", "0.002", "3", "2", "2"),
    ]
    small = replace(small, iterations=12)
    add_rows(small.results / "tuning.csv", [dict(zip(keys, row, strict=True)) for row in rows])
    assert study.tuned(small, "rwr") == 0.002
    assert study.tuned(small, "refl") == 0.002
    with pytest.raises(ValueError, match="lets draft-1 end"):
        study.tuned(small, "draft-1")


def test_results_of_another_protocol_are_refused(small):
    study.claim(small)
    study.claim(replace(small, seeds=(7,), minutes=3))
    with pytest.raises(ValueError, match=r"iterations=3 \(here 5\)"):
        study.claim(replace(small, iterations=5))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="jpeg-compressibility has none"):
        study.Settings(reward="jpeg-compressibility")
    assert study.Settings(reward="jpeg-compressibility", methods=("rwr", "ddpo-is")).reward == "jpeg-compressibility"
    with pytest.raises(ValueError, match="need the gradient"):
        exploits.Settings(reward="jpeg-compressibility", method="nabla-db")
    with pytest.raises(ValueError, match="one of the study's seeds"):
        study.Settings(tuning_seed=1)
    with pytest.raises(ValueError, match="within prompts"):
        study.Settings(evaluation_samples=1)
    with pytest.raises(ValueError, match="at least one"):
        study.Settings(seeds=())


def made_up(method, seed, rewards):
    return [
        {"method": method, "seed": str(seed), "iteration": str(8 * n), "reward": str(reward), "reward_error": "0.3"}
        for n, reward in enumerate(rewards)
    ]


def test_curves_are_means_over_seeds_with_standard_errors():
    curve = Curve([*made_up("rwr", 0, [1, 2, 5]), *made_up("rwr", 1, [1, 4]), *made_up("rwr", 2, [1, 9])])
    assert curve.iterations == [0, 8]
    mean, error = curve("reward")[1]
    assert mean == pytest.approx(5)
    assert error == pytest.approx(statistics.stdev([2, 4, 9]) / 3**0.5)
    assert Curve(made_up("rwr", 0, [1, 2]))("reward")[1] == (2, 0.3)


def test_the_table_has_last_values_and_those_at_a_common_reward():
    constant = {"held_out_prompt_fidelity": "-2", "fid": "7", "reward_calls": "640", "network_evaluations": "6400"}
    rows = [row | constant for row in made_up("rwr", 0, [0, 1.4, 1.6, 1.5])]
    for row, diversity in zip(rows, (700, 600, 400, 300), strict=True):
        row["diversity"] = str(diversity)
    header, _, before, line = table({"rwr": Curve(rows)}).splitlines()
    assert before.split(" | ")[:3] == ["| pretrained", "0.00", "700"]
    cells = line.split(" | ")
    assert cells[:3] == ["| RWR", "1.50 ± 0.30", "300 ± 0"]
    assert cells[-2:] == ["500", "-2.0 |"]  # half-way between 1.4 and 1.6
    low = [row | {"reward": "0.5"} for row in rows]
    assert table({"rwr": Curve(low)}).splitlines()[-1].endswith("|  |  |")


def test_the_readme_has_the_studys_table():
    rows = read_rows(RESULTS / "evaluations.csv")
    made = table({name: Curve([row for row in rows if row["method"] == name]) for name in METHODS})
    assert made == (RESULTS / "table.md").read_text()
    assert made in (ROOT / "README.md").read_text()


def test_samples_are_compared_nearest_to_the_median_of_the_best_rewards(tmp_path):
    rows = [*made_up("rwr", 0, [1, 2, 1.5]), *made_up("refl", 0, [1, 2.9, 3, 2.5]), *made_up("draft-1", 0, [1, 2.8, 5])]
    rows += made_up("refl", 1, [100])
    assert equal_reward(rows, tmp_path) == []
    for name in ("rwr-0", "refl-0", "draft-1-0", "rwr-sparse-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompts.json").write_text(json.dumps(PROMPTS))
    lines = {line.caption.split("\n")[0]: line for line in equal_reward(rows, tmp_path)}
    # The best are 2, 3 and 5.
    assert {label: int(line.strip.stem) for label, line in lines.items()} == {
        "pretrained": 0, "RWR": 8, "ReFL": 16, "DRaFT-1": 8
    }  # fmt: skip
    assert lines["RWR"].caption == "RWR\niteration 8\nreward 2.00"


def test_without_rows_nothing_is_drawn(tmp_path):
    assert draw(tmp_path) == []


def test_an_exploit_leaves_rows_and_pictures(small, tmp_path, capsys):
    settings = exploits.Settings(
        **{name: getattr(small, name) for name in ("model", "prompts", "num_steps", "images_per_iteration")},
        iterations=2,
        evaluate_every=1,
        method="ddpo-is",
        random_weights=True,
        results=tmp_path / "exploits",
        runs=tmp_path / "runs",
    )
    exploits.main(settings)
    name = "style-preference-ddpo-is-mine-random-weights-0"
    assert {path.name for path in settings.results.iterdir()} == {
        f"{name}.csv", f"{name}.jpg", f"{name}-before-after.jpg"
    }  # fmt: skip
    with (settings.results / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == ["0", "1", "2"]
    assert float(rows[2]["kl"]) > 0
    capsys.readouterr()
    exploits.main(settings)
    assert "there already" in capsys.readouterr().out


def test_random_weights_are_the_seeds_and_nothing_else_changes(tiny_folder, tmp_path):
    folders = [exploits.random_pipeline(str(tiny_folder), tmp_path / str(n), seed) for n, seed in enumerate((1, 1, 2))]
    first, same, other, pretrained = (
        StableDiffusionBackbone.from_pretrained(folder).pipeline for folder in (*folders, tiny_folder)
    )

    def weights(part):
        return torch.cat([parameter.flatten() for parameter in part.parameters()])

    assert torch.equal(weights(first.unet), weights(same.unet))
    assert not torch.equal(weights(first.unet), weights(other.unet))
    assert not torch.equal(weights(first.unet), weights(pretrained.unet))
    assert torch.equal(weights(first.vae), weights(pretrained.vae))
