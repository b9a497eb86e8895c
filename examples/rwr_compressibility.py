"""Reward-weighted regression (RWR) on JPEG compressibility: no log-probability, no gradient of the reward.

    python examples/rwr_compressibility.py

What differs from `reinforce_compressibility.py` is the loss, what weighs its images, and that it needs only the last
transition of a trajectory. Several passes go over each batch.
Black et al. 2023, arXiv:2305.13301, section 4.2 and appendix D.
"""

from dataclasses import replace
from pathlib import Path

from agents import Evaluation, ExponentialWeights, RWRLoss, summary
from agents.distributed import say
from configs import RunSettings, build_experiment, build_folder, parse_settings, with_experiment

INVERSE_TEMPERATURE = {"embedded": 5.0, "sd15": 0.2}  # rewards in kB vary less on small images


def main(settings: RunSettings) -> tuple[Evaluation, Evaluation]:
    """Train and save; the evaluations before and after."""
    say(f"{settings.reward} on {settings.model.name}, {settings.sampling.prompts} prompts, seed {settings.seed}")
    experiment = build_experiment(settings)
    loss = RWRLoss(experiment.policy)
    weights = ExponentialWeights(inverse_temperature=INVERSE_TEMPERATURE[settings.preset])
    experiment = replace(experiment, sampler=loss.transition_sampler(), advantage=weights)
    folder = build_folder(settings)
    before, after = experiment.run(loss, folder)
    say(summary(before, after, folder))
    return before, after


def adapt(preset: RunSettings) -> RunSettings:
    """Five passes over each batch as in DDPO's code; `sd15` trains the whole UNet as the paper does.

    Its appendix D.5 samples 10,240 images ten times. A batch is on one device here, so that the same number of images
    and of updates, 128 images each, comes in the smallest batches of the paper's figure 11.
    """
    preset = with_experiment(preset, "compressibility")
    training = replace(preset.training, updates_per_epoch=1, epochs=5, recompute_log_prob=False)
    preset = replace(preset, output=Path(f"runs/rwr_{preset.experiment}"))
    if preset.preset == "sd15":
        return replace(
            preset,
            model=replace(preset.model, dtype="float32", lora_rank=0),
            training=replace(training, iterations=400, updates_per_epoch=2, learning_rate=1e-5),
        )
    # At twice this learning rate images are blank after sixteen iterations, at twenty times within ten.
    return replace(preset, training=replace(training, learning_rate=8e-5))


if __name__ == "__main__":
    main(parse_settings(__doc__, adapt=adapt, unused=("clip_range", "kl_penalty")))
