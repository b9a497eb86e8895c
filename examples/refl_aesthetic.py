"""The aesthetic reward of the one-step prediction at a random late step, clipped from above (ReFL).

    python examples/refl_aesthetic.py

What differs from `draft_aesthetic.py` is the loss.
Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", arXiv:2304.05977.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from agents import ReFLLoss, summary
from configs import RunSettings, backpropagating, build_experiment, build_folder, parse_settings

LATE = 4  # the last quarter of the steps, as in the authors' code
CEILINGS = {"style-preference": 5.0, "laion-aesthetic": 10.0}  # beyond what training should reach


def main(settings: RunSettings) -> None:
    """Train and save."""
    print(f"{settings.reward} on {settings.model.name}, {settings.sampling.prompts} prompts, seed {settings.seed}")
    experiment = build_experiment(settings)
    last_steps = max(1, settings.sampling.num_steps // LATE)
    loss = ReFLLoss(
        experiment.policy, experiment.reward, last_steps=last_steps, ceiling=CEILINGS.get(settings.reward, 0.0)
    )
    experiment = replace(experiment, sampler=loss.transition_sampler())
    folder = build_folder(settings)
    before, after = experiment.run(loss, folder)
    print(summary(before, after, folder))


if __name__ == "__main__":
    main(parse_settings(__doc__, adapt=partial(backpropagating, output=Path("runs/refl_aesthetic"))))
