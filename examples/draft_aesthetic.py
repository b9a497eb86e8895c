"""The aesthetic reward by backpropagating it through the last denoising steps (DRaFT-K).

    python examples/draft_aesthetic.py

What differs from `ppo_aesthetic.py` is the loss, and that it starts from one state a trajectory.
Clark et al. 2023, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv:2309.17400.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from agents import DRaFTLoss, summary
from configs import RunSettings, backpropagating, build_experiment, build_folder, parse_settings

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


if __name__ == "__main__":
    main(parse_settings(__doc__, adapt=partial(backpropagating, output=Path("runs/draft_aesthetic"))))
