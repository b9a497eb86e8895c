"""Named, complete settings, and the command line over them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from pydantic import TypeAdapter

from rewards import REWARDS

from .experiments import EXPERIMENTS, with_experiment
from .schema import ModelSettings, RunSettings, SamplingSettings, TrainingSettings


def embedded() -> RunSettings:
    """The pipeline that ships with the package: ten minutes on two CPU cores."""
    return RunSettings()


def sd15() -> RunSettings:
    """Stable Diffusion 1.5 with LoRA as `config/dgx.py:aesthetic` of kvablack/ddpo-pytorch, one device.

    Black et al. 2023, arXiv:2305.13301: 256 images an iteration from 45 animals, 50 steps, two updates, LoRA rank 4.
    """
    return RunSettings(
        preset="sd15",
        reward="laion-aesthetic",
        output=Path("runs/ppo_sd15"),
        model=ModelSettings(
            name="stable-diffusion-v1-5/stable-diffusion-v1-5",
            dtype="bfloat16",  # DDPO: float16, and a scaled loss, as its gradients would underflow
            guidance_scale=5.0,
            lora_rank=4,
            lora_alpha=4.0,
            lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
        ),
        sampling=SamplingSettings(prompts="animals-bare", num_steps=50, images_per_iteration=256),
        training=TrainingSettings(
            iterations=200,
            learning_rate=3e-4,
            clip_range=1e-4,
            timestep_fraction=1.0,
            min_noise=0.0,
            updates_per_epoch=2,
            micro_batch=4,
            advantage_min_count=16,
            recompute_log_prob=True,
        ),
    )


def backpropagating(preset: RunSettings, output: Path) -> RunSettings:
    """`preset` for losses that backpropagate the reward: one update an iteration, on data of the current policy.

    Few states at a time: images are decoded with gradients.
    """
    training = replace(
        preset.training,
        updates_per_epoch=1,
        epochs=1,
        micro_batch=min(16, preset.training.micro_batch),
        recompute_log_prob=False,
    )
    return replace(preset, output=output, training=training)


PRESETS = {"embedded": embedded, "sd15": sd15}


def parse_settings(
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    adapt: Callable[[RunSettings], RunSettings] = lambda preset: preset,
    needs_gradient: bool = False,
    shardable: bool = True,
    unused: Sequence[str] = (),
) -> RunSettings:
    """Settings from the command line over those of `--preset` and `--experiment`; leaves with a message if impossible.

    Args:
        description: shown by `--help`.
        arguments: instead of `sys.argv[1:]`.
        adapt: changes preset and experiment to what this program needs.
        needs_gradient: the program differentiates the reward; one without a gradient is refused.
        shardable: the program's loss trains a network that is sharded over processes; if not, that is refused.
        unused: training settings that mean nothing to the program's method; other values of them are refused.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--preset", "--experiment", "--config", "--resume"):
        chooser.add_argument(option)
    chosen, others = chooser.parse_known_args(arguments)
    try:
        if chosen.resume is not None:
            named = filter(None, (chosen.preset, chosen.experiment, chosen.config))
            settings = _resumed(Path(chosen.resume), [*others, *named])
        else:
            default = _default(chosen.preset, chosen.experiment, chosen.config, adapt)
            settings = tyro.cli(RunSettings, default=default, args=arguments, description=description)
        if needs_gradient:
            _require_gradient(settings)
        if settings.model.shard and not shardable:
            raise ValueError(
                "model.shard: how often this program's method calls the network depends on what a process has drawn, "
                "and those of a sharded network call it together; leave it out, with LoRA if memory is short"
            )
        _refuse_unused(settings.training, adapt(PRESETS[settings.preset]()).training, unused)
    except (OSError, ValueError) as error:
        chooser.error(str(error))
    return settings


def _default(
    preset: str | None, experiment: str | None, config: str | None, adapt: Callable[[RunSettings], RunSettings]
) -> RunSettings:
    """What other options win over. An unknown preset or experiment passes; the command line refuses it."""
    if config is None:
        settings = PRESETS.get(preset or "embedded", embedded)()
        return adapt(with_experiment(settings, experiment) if experiment in EXPERIMENTS else settings)
    for option, value in (("--preset", preset), ("--experiment", experiment)):
        if value is not None:
            raise ValueError(f"{option} and --config both say where the other settings come from; give one of them")
    return replace(read_settings(Path(config)), resume=None)


def _require_gradient(settings: RunSettings) -> None:
    if not REWARDS[settings.reward].differentiable:
        able = ", ".join(name for name, reward in REWARDS.items() if reward.differentiable)
        raise ValueError(
            f"reward={settings.reward} has no gradient, and this method learns from nothing else; take one of {able}, "
            "or a method that needs none, such as examples/ppo_aesthetic.py"
        )


def _refuse_unused(training: TrainingSettings, own: TrainingSettings, names: Sequence[str]) -> None:
    for name in names:
        value, expected = getattr(training, name), getattr(own, name)
        if value != expected:
            raise ValueError(
                f"training.{name}={value} does not go with this program's method, only {expected} does; take another, "
                "such as examples/ppo_aesthetic.py"
            )


def _resumed(run: Path, others: Sequence[str]) -> RunSettings:
    if others:
        raise ValueError(f"--resume keeps the settings of {run / 'config.json'} and takes no others; got {others}")
    return replace(read_settings(run / "config.json"), resume=run)


def read_settings(file: Path) -> RunSettings:
    """The settings that a run wrote to its `config.json`; those that the file does not name have their defaults.

    Raises:
        OSError: there is no such file.
        ValueError: it is no JSON, names an unknown setting, or holds an impossible one; the message says which.
    """
    try:
        content = json.loads(file.read_text())
        if unknown := _unknown(content, RunSettings()):
            raise ValueError(f"unknown settings: {', '.join(unknown)}")
        return TypeAdapter(RunSettings).validate_json(file.read_text(), strict=True)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _unknown(content: Any, default: Any, name: str = "") -> list[str]:
    if not (isinstance(content, dict) and is_dataclass(default)):
        return []
    known = {field.name: getattr(default, field.name) for field in fields(default)}
    here = [f"{name}{key}" for key in content.keys() - known.keys()]
    return sorted(here) + [
        line for key in content.keys() & known.keys() for line in _unknown(content[key], known[key], f"{name}{key}.")
    ]
