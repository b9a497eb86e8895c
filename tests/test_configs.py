"""Settings: typed, complete, refused where impossible, before anything is loaded."""

from dataclasses import asdict, fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch

from agents import TransitionSampler, WatchRule
from benchmarks.methods import METHODS
from configs import (
    PRESETS,
    ModelSettings,
    RunSettings,
    SamplingSettings,
    TrainingSettings,
    build_reward,
    parse_settings,
)
from examples import draft_aesthetic
from rewards import REWARDS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_reached_by_its_name(name):
    assert parse_settings("", ["--preset", name]) == PRESETS[name]()
    assert PRESETS[name]().preset == name


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_of_the_registry_is_a_setting(name):
    assert parse_settings("", ["--reward", name]).reward == name


def test_rewards_are_built_by_name():
    device = torch.device("cpu")
    for name in ("jpeg-compressibility", "jpeg-incompressibility", "style-preference"):
        assert type(build_reward(name, head=None, device=device)) is REWARDS[name]
    with pytest.raises(FileNotFoundError, match="aesthetic head was looked for at 'nowhere.pth'"):
        build_reward("laion-aesthetic", head="nowhere.pth", device=device)
    with pytest.raises(ValueError, match="reward_head=head.pth is for laion-aesthetic, and the reward is pick-score"):
        build_reward("pick-score", head="head.pth", device=device)


def test_command_line_wins_over_the_preset():
    settings = parse_settings("", ["--preset", "sd15", "--training.learning-rate", "1e-5", "--model.lora-rank", "8"])
    assert settings.training.learning_rate == 1e-5
    assert settings.model.lora_rank == 8
    assert settings.sampling.num_steps == 50


def test_what_is_held_out_can_be_chosen():
    assert parse_settings("", []).held_out == ("prompt-fidelity",)
    assert parse_settings("", ["--held-out"]).held_out == ()
    chosen = parse_settings("", ["--held-out", "prompt-fidelity", "jpeg-compressibility", "--watch.stop"])
    assert chosen.held_out == ("prompt-fidelity", "jpeg-compressibility")
    assert chosen.watch.stop


def test_ddpo_preset_holds_the_published_numbers():
    settings = PRESETS["sd15"]()
    assert (settings.model.guidance_scale, settings.sampling.num_steps, settings.sampling.eta) == (5.0, 50, 1.0)
    assert (settings.training.learning_rate, settings.training.clip_range) == (3e-4, 1e-4)
    assert (settings.sampling.images_per_iteration, settings.training.updates_per_epoch) == (256, 2)
    assert (settings.training.advantage_buffer, settings.training.advantage_min_count) == (32, 16)


# What each method's publication or its authors' code says.
PUBLISHED = {
    "a2c_aesthetic": {"training": {"updates_per_epoch": 1}},
    # Black et al. 2023: `compressibility` in the code, one update an iteration in appendix D.5
    "reinforce_compressibility": {
        "training": {"iterations": 100, "updates_per_epoch": 1, "learning_rate": 3e-4, "advantage_buffer": 16},
        "sampling": {"images_per_iteration": 256, "num_steps": 50},
        "model": {"guidance_scale": 5.0, "lora_rank": 4},
    },
    # Black et al. 2023, appendix D.5
    "rwr_compressibility": {
        "training": {"learning_rate": 1e-5, "weight_decay": 1e-4, "epochs": 5},
        "sampling": {"num_steps": 50, "eta": 1.0},
        "model": {"guidance_scale": 5.0, "lora_rank": 0},
    },
    # Clark et al. 2023
    "draft_aesthetic": {
        "training": {"iterations": 2000, "learning_rate": 4e-4, "weight_decay": 0.1, "updates_per_epoch": 1},
        "sampling": {"images_per_iteration": 4, "num_steps": 50},
        "model": {"guidance_scale": 7.5, "lora_rank": 8},
    },
    # Xu et al. 2023, the authors' script
    "refl_aesthetic": {
        "training": {"iterations": 100, "learning_rate": 1e-5, "weight_decay": 1e-2, "updates_per_epoch": 1},
        "sampling": {"images_per_iteration": 64, "num_steps": 40},
        "model": {"guidance_scale": 1.0, "lora_rank": 0},
    },
    # Liu et al. 2025, the authors' default configuration
    "nabla_db_aesthetic": {
        "training": {"iterations": 100, "learning_rate": 1e-3, "weight_decay": 1e-4, "updates_per_epoch": 2},
        "sampling": {"images_per_iteration": 64, "num_steps": 50, "eta": 1.0, "prompts": "animals-bare"},
        "model": {"guidance_scale": 5.0, "lora_rank": 8, "lora_alpha": 8.0, "dtype": "bfloat16"},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sd15_holds_each_methods_published_numbers(name):
    example = import_module(f"examples.{name}")
    settings = asdict(parse_settings("", ["--preset", "sd15"], adapt=example.adapt))
    assert settings["model"]["name"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    for group, numbers in PUBLISHED[name].items():
        assert {key: settings[group][key] for key in numbers} == numbers
    # The embedded pipeline's own run has the main job's budget.
    embedded, main_job = example.adapt(PRESETS["embedded"]()), RunSettings()
    assert embedded.sampling == main_job.sampling
    assert embedded.training.iterations == main_job.training.iterations
    assert embedded.model == main_job.model


def test_numbers_that_are_no_settings_are_the_published_ones():
    nabla_db = import_module("examples.nabla_db_aesthetic").METHODS["sd15"]
    assert (nabla_db.beta, nabla_db.trust_region, nabla_db.weighting) == (1e4, 2e3, "none")
    settings = import_module("examples.nabla_db_aesthetic").adapt(PRESETS["sd15"]())
    sampler = TransitionSampler(range(settings.sampling.num_steps), settings.training.timestep_fraction)
    assert sampler.steps_per_trajectory == 6
    assert import_module("examples.rwr_compressibility").INVERSE_TEMPERATURE["sd15"] == 0.2
    refl = import_module("examples.refl_aesthetic")
    assert refl.adapt(PRESETS["sd15"]()).sampling.num_steps // refl.LATE["sd15"] == 10
    assert import_module("examples.draft_aesthetic").BACKPROP_STEPS["sd15"] == 1
    # Weighted regression makes ten rounds of 10,240 images and 400 updates in the paper.
    rwr = import_module("examples.rwr_compressibility").adapt(PRESETS["sd15"]())
    assert rwr.training.iterations * rwr.sampling.images_per_iteration == 10 * 10_240
    assert rwr.training.iterations * rwr.training.updates_per_epoch * rwr.training.epochs == 10 * 400


@pytest.mark.parametrize(
    "arguments",
    [
        ["--training.learning-rat", "1"],
        ["--training.iterations", "many"],
        ["--reward", "beauty"],
        ["--preset", "sd16"],
        ["--sampling.eta", "0"],
        ["--sampling.images-per-iteration", "10", "--sampling.samples-per-prompt", "4"],
    ],
)
def test_misspelt_or_impossible_settings_leave_with_a_message(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_settings("", arguments)
    assert stopped.value.code != 0
    assert len(capsys.readouterr().err) > 50


@pytest.mark.parametrize("name", METHODS)
def test_a_setting_is_used_by_the_method_or_refused(name):
    program = (ROOT / "examples" / f"{name}.py").read_text()
    for setting in ("clip_range", "kl_penalty"):
        assert (f"training.{setting}" in program) != (f'"{setting}"' in program), setting


@pytest.mark.parametrize("source", ["option", "file"])
def test_a_setting_that_the_method_has_not_is_refused(source, tmp_path, capsys):
    arguments = ["--training.kl-penalty", "0.3"]
    if source == "file":
        (tmp_path / "config.json").write_text('{"training": {"kl_penalty": 0.3}}')
        arguments = ["--config", str(tmp_path / "config.json")]
    with pytest.raises(SystemExit):
        parse_settings("", arguments, adapt=draft_aesthetic.adapt, unused=("kl_penalty",))
    assert "training.kl_penalty=0.3 does not go with this program's method, only 0.0 does" in capsys.readouterr().err
    assert parse_settings("", [], adapt=draft_aesthetic.adapt, unused=("kl_penalty",)).training.kl_penalty == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelSettings(guidance_scale=0.5), "guidance_scale=0.5"),
        (lambda: ModelSettings(lora_rank=0, dtype="bfloat16"), "loses small updates"),
        (lambda: SamplingSettings(num_steps=0), "num_steps=0"),
        (lambda: SamplingSettings(images_per_iteration=10, batch_size=4), "batch_size=4 must divide images_per_iterat"),
        (lambda: SamplingSettings(workers=-1), "workers=-1 must be at least 0"),
        (lambda: SamplingSettings(worker_kind="ray"), "worker_kind=ray says where workers run, and there are none"),
        (
            lambda: SamplingSettings(images_per_iteration=12, samples_per_prompt=4, workers=2),
            "images_per_iteration=12 cannot be shared out among workers=2 in whole groups of samples_per_prompt=4",
        ),
        (lambda: SamplingSettings(images_per_iteration=8, batch_size=4, workers=2), "batch_size=4 is for images made"),
        (
            lambda: SamplingSettings(images_per_iteration=8, samples_per_prompt=4, batch_size=2),
            "batch_size=2 .* multiple of samples_per_prompt=4",
        ),
        (lambda: TrainingSettings(timestep_fraction=1.1), "timestep_fraction=1.1"),
        (lambda: TrainingSettings(kl_penalty=-0.1), "kl_penalty=-0.1"),
        (lambda: TrainingSettings(compare_processes_every=0), "compare_processes_every=0"),
        (
            lambda: RunSettings(profile=True, training=TrainingSettings(iterations=1)),
            "profile needs at least 2 iterations.*iterations=1",
        ),
        (lambda: TrainingSettings(advantage_min_count=64), "advantage_min_count=64"),
        (lambda: RunSettings(reward="beauty"), "'beauty' must be one of style-preference, prompt-alignment, "),
        (lambda: RunSettings(reward_head="head.pth"), "laion-aesthetic alone, not by style-preference"),
        (lambda: RunSettings(held_out=("style-preference",)), "nothing would be held out"),
        (
            lambda: RunSettings(
                sampling=SamplingSettings(images_per_iteration=1), training=TrainingSettings(updates_per_epoch=9)
            ),
            "1 images x 4 trained steps are 4 transitions",
        ),
    ],
)
def test_impossible_numbers_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_setting_is_documented():
    import inspect

    def check(settings):
        source = "".join(inspect.getsource(part) for part in settings.__mro__ if is_dataclass(part))
        for field in fields(settings):
            after = source.split(f"    {field.name}:", 1)[1].split("\n", 1)[1]
            if not is_dataclass(getattr(settings(), field.name)):
                assert after.lstrip().startswith('"""'), f"{settings.__name__}.{field.name} has no description"

    for settings in (RunSettings, ModelSettings, SamplingSettings, TrainingSettings, WatchRule):
        check(settings)
