"""The aesthetic reward by backpropagating it through the last denoising steps (DRaFT-K).

    python examples/draft_aesthetic.py

What differs from `ppo_aesthetic.py` is the loss, and that it starts from one state a trajectory.
Clark et al. 2023, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv:2309.17400.
"""

from dataclasses import replace
from pathlib import Path

from agents import DRaFTLoss, summary
from configs import RunSettings, build_experiment, build_folder, parse_settings

BACKPROP_STEPS = 2


def main(settings: RunSettings) -> None:
    """Train and save."""
    print(f"{settings.reward} on {settings.model.name}, {settings.sampling.prompts} prompts, seed {settings.seed}")
    experiment = build_experiment(settings)
    loss = DRaFTLoss(experiment.policy, experiment.reward, backprop_steps=BACKPROP_STEPS)
    experiment = replace(experiment, sampler=loss.transition_sampler())
    folder = build_folder(settings)
    before, after = experiment.run(loss, folder)
    print(summary(before, after, folder))


def on_policy(preset: RunSettings) -> RunSettings:
    """The preset with a single update an iteration, and few states at a time: images are decoded with gradients."""
    training = replace(
        preset.training,
        learning_rate=preset.training.learning_rate / 2,  # at PPO's, images break within ten iterations
        updates_per_epoch=1,
        epochs=1,
        micro_batch=min(16, preset.training.micro_batch),
        recompute_log_prob=False,
    )
    return replace(preset, output=Path("runs/draft_aesthetic"), training=training)


if __name__ == "__main__":
    main(parse_settings(__doc__, adapt=on_policy))
