"""The main job with another method: the score-function gradient (DDPO-SF) on JPEG compressibility.

    python examples/reinforce_compressibility.py

What differs from `ppo_aesthetic.py` is the constructor of the loss; being on-policy, it makes one update an iteration.
"""

from dataclasses import replace
from pathlib import Path

from agents import ScoreFunctionLoss, summary
from configs import RunSettings, build_experiment, build_folder, parse_settings


def main(settings: RunSettings) -> None:
    """Train and save."""
    print(f"{settings.reward} on {settings.model.name}, {settings.sampling.prompts} prompts, seed {settings.seed}")
    experiment = build_experiment(settings)
    loss = ScoreFunctionLoss(experiment.policy)
    folder = build_folder(settings)
    before, after = experiment.run(loss, folder)
    print(summary(before, after, folder))


def on_policy_compressibility(preset: RunSettings) -> RunSettings:
    """The preset with this reward and a single update an iteration."""
    return replace(
        preset,
        reward="jpeg-compressibility",
        output=Path("runs/reinforce_compressibility"),
        training=replace(preset.training, updates_per_epoch=1, epochs=1),
    )


if __name__ == "__main__":
    main(parse_settings(__doc__, adapt=on_policy_compressibility))
