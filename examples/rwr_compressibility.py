"""Reward-weighted regression (RWR) on JPEG compressibility: no log-probability, no gradient of the reward.

    python examples/rwr_compressibility.py

What differs from `reinforce_compressibility.py` is the loss, what weighs its images, and that it needs only the last
transition of a trajectory. Several passes go over each batch.
Black et al. 2023, arXiv:2305.13301, section 4.2 and appendix D.
"""

from dataclasses import replace
from pathlib import Path

from agents import ExponentialWeights, RWRLoss, summary
from configs import RunSettings, build_experiment, build_folder, parse_settings

INVERSE_TEMPERATURE = {"embedded": 5.0, "sd15": 0.2}  # rewards in kB vary less on small images


def main(settings: RunSettings) -> None:
    """Train and save."""
    print(f"{settings.reward} on {settings.model.name}, {settings.sampling.prompts} prompts, seed {settings.seed}")
    experiment = build_experiment(settings)
    loss = RWRLoss(experiment.policy)
    weights = ExponentialWeights(inverse_temperature=INVERSE_TEMPERATURE[settings.preset])
    experiment = replace(experiment, sampler=loss.transition_sampler(), advantage=weights)
    folder = build_folder(settings)
    before, after = experiment.run(loss, folder)
    print(summary(before, after, folder))


def five_passes(preset: RunSettings) -> RunSettings:
    """The preset with this reward and five passes over each batch, as in DDPO's code."""
    training = replace(
        preset.training,
        learning_rate=preset.training.learning_rate / 10,  # at PPO's, all images turn blank within ten iterations
        updates_per_epoch=1,
        epochs=5,
        recompute_log_prob=False,
    )
    return replace(preset, reward="jpeg-compressibility", output=Path("runs/rwr_compressibility"), training=training)


if __name__ == "__main__":
    main(parse_settings(__doc__, adapt=five_passes))
