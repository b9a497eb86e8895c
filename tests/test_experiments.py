"""The published experiments by name: what each consists of, and that PPO and Nabla-DB run them with tiny models."""

import csv
import json
from importlib import import_module

import pytest
import torch

from agents import RunFolder
from configs import EXPERIMENTS, PRESETS, parse_settings, with_experiment
from diffusion_env import prompt_set
from rewards import REWARDS
from tests.test_reward_language import deberta_folder, llava_folder  # noqa: F401
from tests.test_reward_models import blip, blip_folder, clip_folder, head_file, hps_folder, open_clip  # noqa: F401

# Reward and prompts on the embedded pipeline, the same on Stable Diffusion.
CONTENTS = {
    "aesthetic": (("style-preference", "animals"), ("laion-aesthetic", "animals-bare")),
    "alignment": (("prompt-alignment", "animal-activities"), ("llava-bertscore", "animal-activities")),
    "compressibility": (("jpeg-compressibility", "animals"), ("jpeg-compressibility", "animals-bare")),
    "counting": (("llava-counting", "counting"), ("llava-counting", "counting")),
    "hpsv2": (("hpsv2.1", "animal-activities"), ("hpsv2.1", "animal-activities")),
    "image_reward": (("image-reward", "animal-activities"), ("image-reward", "animal-activities")),
}
WITH_GRADIENT = {
    "embedded": ("aesthetic", "alignment", "hpsv2", "image_reward"),
    "sd15": ("aesthetic", "hpsv2", "image_reward"),
}
METHODS = ("ppo_aesthetic", "nabla_db_aesthetic")


def parsed(method, *arguments):
    return parse_settings(
        "", arguments, adapt=import_module(f"examples.{method}").adapt, needs_gradient=method == "nabla_db_aesthetic"
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_a_reward_and_prompts(name, preset):
    settings = parsed("ppo_aesthetic", "--preset", preset, "--experiment", name)
    assert (settings.reward, settings.sampling.prompts) == CONTENTS[name][list(PRESETS).index(preset)]
    assert (settings.preset, settings.experiment, settings.output.name) == (preset, name, f"ppo_{name}")
    assert settings.model == PRESETS[preset]().model
    if preset == "embedded":  # the main job's budget
        assert settings.training == PRESETS[preset]().training
        assert settings.sampling.images_per_iteration == PRESETS[preset]().sampling.images_per_iteration
    assert with_experiment(settings, "aesthetic") == settings, "the first one stays"


def test_without_a_name_each_program_has_its_own_experiment():
    for method, name in {"ppo_aesthetic": "aesthetic", "rwr_compressibility": "compressibility"}.items():
        own, named = parsed(method), parsed(method, "--experiment", name)
        assert own == named and own.experiment == name
    assert parsed("rwr_compressibility", "--experiment", "alignment").reward == "prompt-alignment"
    assert parsed("ppo_aesthetic", "--experiment", "alignment", "--reward", "hpsv2").reward == "hpsv2"


def test_ddpos_published_numbers():
    """`config/dgx.py` of kvablack/ddpo-pytorch: images an iteration, updates, iterations, rewards remembered."""
    numbers = {"aesthetic": (256, 2, 200, 32), "compressibility": (256, 4, 100, 16), "alignment": (288, 2, 200, 32)}
    for name, expected in numbers.items():
        settings = parsed("ppo_aesthetic", "--preset", "sd15", "--experiment", name)
        training = settings.training
        found = (training.updates_per_epoch, training.iterations, training.advantage_buffer)
        assert (settings.sampling.images_per_iteration, *found) == expected
        assert training.advantage_min_count == 16


def test_nabla_dbs_published_beta_and_trust_region():
    method_of = import_module("examples.nabla_db_aesthetic").method_of
    numbers = {"aesthetic": (1e4, 2e3), "hpsv2": (1e4, 5e3), "image_reward": (1e3, 5e3)}
    for name, expected in numbers.items():
        method = method_of(parsed("nabla_db_aesthetic", "--preset", "sd15", "--experiment", name))
        assert (method.beta, method.trust_region) == expected


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_nabla_db_refuses_what_has_no_gradient_before_anything_is_loaded(name, preset, capsys, monkeypatch):
    monkeypatch.setattr("configs.build.build_backbone", None)
    arguments = ("--preset", preset, "--experiment", name)
    if name in WITH_GRADIENT[preset]:
        assert REWARDS[parsed("nabla_db_aesthetic", *arguments).reward].differentiable
        return
    with pytest.raises(SystemExit) as stopped:
        parsed("nabla_db_aesthetic", *arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    reward = CONTENTS[name][list(PRESETS).index(preset)][0]
    assert f"reward={reward} has no gradient" in message and "take one of style-preference, prompt-alig" in message


def test_an_experiment_and_a_file_of_settings_do_not_go_together(tmp_path, capsys):
    for arguments in (["--experiment", "alignment", "--config", "x"], ["--experiment", "alignment", "--resume", "x"]):
        with pytest.raises(SystemExit):
            parsed("ppo_aesthetic", *arguments)
    message = capsys.readouterr().err
    assert "--experiment and --config both say" in message and "takes no others; got ['alignment']" in message
    with pytest.raises(SystemExit):
        parsed("ppo_aesthetic", "--experiment", "beauty")
    assert "image_reward" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Half the time of so short a run; `test_examples.py` looks at them."""
    for name in ("save_curve", "save_before_after"):
        monkeypatch.setattr(RunFolder, name, lambda *_: None)


@pytest.fixture
def tiny_rewards(monkeypatch, clip_folder, head_file, hps_folder, blip_folder, llava_folder, deberta_folder):  # noqa: F811
    """The registry's classes, by default with small random weights of the true architectures."""
    llava = {"llava": llava_folder, "dtype": torch.float32}
    sources = {
        "laion-aesthetic": {"clip": clip_folder, "head": head_file},
        "hpsv2.1": {"weights": hps_folder, "base": hps_folder},
        "image-reward": {"weights": blip_folder, "tokenizer": blip_folder},
        "llava-bertscore": llava | {"deberta": deberta_folder, "layers": 3},
        "llava-counting": llava,
    }
    for name, arguments in sources.items():
        published = REWARDS[name]

        def make(self, published=published, arguments=arguments):
            published.__init__(self, **arguments)

        monkeypatch.setitem(REWARDS, name, type(published.__name__, (published,), {"__init__": make}))


SMALL = {
    "model.dtype": "float32",
    "model.device": "cpu",
    "model.lora-rank": 3,
    "sampling.num-steps": 2,
    "sampling.images-per-iteration": 4,
    "sampling.batch-size": 2,
    "training.iterations": 1,
    "training.updates-per-epoch": 1,
    "training.advantage-min-count": 2,
    "training.clip-range": 0.1,
    "evaluation-samples": 1,
    "watch.held-out-drop": 1000,
    "watch.diversity-share": 0,
}


def run(method, preset, experiment, tmp_path, options):
    """One iteration; the row of its metrics and the settings in its folder."""
    prompts = tmp_path / "prompts.txt"
    named = parsed(method, "--preset", preset, "--experiment", experiment).sampling.prompts
    prompts.write_text("\n".join(prompt_set(named)[:2]))
    values = SMALL | {"sampling.prompts": prompts, "output": tmp_path / "run"} | options
    arguments = [str(part) for key, value in values.items() for part in (f"--{key}", value)]
    settings = parsed(method, "--preset", preset, "--experiment", experiment, *arguments, "--held-out")
    import_module(f"examples.{method}").main(settings)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["reward"] == CONTENTS[experiment][list(PRESETS).index(preset)][0]
    return {key: float(value) for key, value in row.items()}


@pytest.mark.parametrize(
    ("method", "experiment"),
    [("ppo_aesthetic", name) for name in EXPERIMENTS]
    + [("nabla_db_aesthetic", name) for name in WITH_GRADIENT["sd15"]],
)
def test_stable_diffusions_experiments_run(method, experiment, tiny_folder, tiny_rewards, tmp_path):
    row = run(method, "sd15", experiment, tmp_path, {"model.name": tiny_folder})
    assert row["skipped_updates"] == 0
    # Tiny LLaVA counts nothing: all its rewards are 0, and so are the advantages.
    assert (row["grad_norm"] > 0) == (experiment != "counting")


@pytest.mark.parametrize("method", METHODS)
def test_alignment_runs_on_the_embedded_pipeline_with_its_own_reward(method, tmp_path):
    row = run(method, "embedded", "alignment", tmp_path, {})
    assert row["grad_norm"] > 0 and -1 <= row["reward"] <= 1
