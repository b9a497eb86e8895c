"""The aesthetic reward with residual Nabla-DB, a GFlowNet that matches the reward's gradient and keeps the prior.

    python examples/nabla_db_aesthetic.py

What differs from `draft_aesthetic.py` is the loss, and the transform that writes the reward's gradient.
Liu et al. 2025, "Efficient Diversity-Preserving Diffusion Alignment via Gradient-Informed GFlowNets", arXiv:2412.07775.
"""

from dataclasses import replace
from pathlib import Path

from agents import NablaDBLoss, RewardGradient, summary
from configs import RunSettings, build_experiment, build_folder, parse_settings

# How far the reward may pull images from the pretrained model's: it belongs to the reward's scale.
BETA = {"embedded": 100.0, "sd15": 1e4}


def main(settings: RunSettings) -> None:
    """Train and save."""
    print(f"{settings.reward} on {settings.model.name}, {settings.sampling.prompts} prompts, seed {settings.seed}")
    experiment = build_experiment(settings)
    # In units of the network's output: in the paper's units the last steps are nearly all of the loss.
    loss = NablaDBLoss(experiment.policy, beta=BETA[settings.preset], weighting="output")
    gradient = RewardGradient(experiment.policy, experiment.reward, jacobian=False, before=False)
    experiment = replace(experiment, transform=gradient)
    folder = build_folder(settings)
    before, after = experiment.run(loss, folder)
    print(summary(before, after, folder))


def on_policy(preset: RunSettings) -> RunSettings:
    """The preset with a single update an iteration: the reward's gradient is that of the current policy."""
    training = replace(preset.training, updates_per_epoch=1, epochs=1, recompute_log_prob=False)
    return replace(preset, output=Path("runs/nabla_db_aesthetic"), training=training)


if __name__ == "__main__":
    main(parse_settings(__doc__, adapt=on_policy))
