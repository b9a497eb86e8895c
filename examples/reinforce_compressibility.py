"""The main job with another method: the score-function gradient (DDPO-SF) on JPEG compressibility.

    python examples/reinforce_compressibility.py

What differs from `ppo_aesthetic.py` is the constructor of the loss; being on-policy, it makes one update an iteration.
"""

from dataclasses import replace
from pathlib import Path

from agents import Evaluation, KLPenalty, ScoreFunctionLoss, summary
from agents.distributed import say
from configs import RunSettings, build_experiment, build_folder, parse_settings, with_experiment


def main(settings: RunSettings) -> tuple[Evaluation, Evaluation]:
    """Train and save; the evaluations before and after."""
    say(f"{settings.reward} on {settings.model.name}, {settings.sampling.prompts} prompts, seed {settings.seed}")
    experiment = build_experiment(settings)
    loss = ScoreFunctionLoss(experiment.policy)
    if settings.training.kl_penalty:
        loss = KLPenalty(loss, experiment.policy, coefficient=settings.training.kl_penalty)
    folder = build_folder(settings)
    before, after = experiment.run(loss, folder)
    say(summary(before, after, folder))
    return before, after


def adapt(preset: RunSettings) -> RunSettings:
    """A single update an iteration, on the pipeline that ships a larger one."""
    preset = with_experiment(preset, "compressibility")
    training = replace(preset.training, updates_per_epoch=1, epochs=1, recompute_log_prob=False)
    if preset.preset == "embedded":
        training = replace(training, learning_rate=1.5e-3)
    return replace(preset, output=Path(f"runs/reinforce_{preset.experiment}"), training=training)


if __name__ == "__main__":
    main(parse_settings(__doc__, adapt=adapt, unused=("clip_range", "epochs", "updates_per_epoch")))
