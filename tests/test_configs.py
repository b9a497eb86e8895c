"""Settings: typed, complete, refused where impossible, before anything is loaded."""

from dataclasses import fields, is_dataclass

import pytest

from agents import WatchRule
from configs import PRESETS, ModelSettings, RunSettings, SamplingSettings, TrainingSettings, parse_settings


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_reached_by_its_name(name):
    assert parse_settings("", ["--preset", name]) == PRESETS[name]()
    assert PRESETS[name]().preset == name


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelSettings(guidance_scale=0.5), "guidance_scale=0.5"),
        (lambda: ModelSettings(lora_rank=0, dtype="bfloat16"), "loses small updates"),
        (lambda: SamplingSettings(num_steps=0), "num_steps=0"),
        (lambda: TrainingSettings(timestep_fraction=1.1), "timestep_fraction=1.1"),
        (lambda: TrainingSettings(advantage_min_count=64), "advantage_min_count=64"),
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
