"""The aesthetic reward of the one-step prediction at a random late step, clipped from above (ReFL).

    python examples/refl_aesthetic.py

What differs from `draft_aesthetic.py` is the loss.
Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", arXiv:2304.05977.
"""

from dataclasses import replace
from pathlib import Path

from agents import Evaluation, ReFLLoss, summary
from agents.distributed import say
from configs import RunSettings, backpropagating, build_experiment, build_folder, parse_settings, with_experiment

# The last quarter of the steps, as in the authors' code; of four steps that would be one, and ReFL would be DRaFT-1.
LATE = {"embedded": 2, "sd15": 4}
CEILINGS = {"style-preference": 5.0, "laion-aesthetic": 10.0}  # beyond what training should reach


def main(settings: RunSettings) -> tuple[Evaluation, Evaluation]:
    """Train and save; the evaluations before and after."""
    say(f"{settings.reward} on {settings.model.name}, {settings.sampling.prompts} prompts, seed {settings.seed}")
    experiment = build_experiment(settings)
    last_steps = max(1, settings.sampling.num_steps // LATE[settings.preset])
    loss = ReFLLoss(
        experiment.policy, experiment.reward, last_steps=last_steps, ceiling=CEILINGS.get(settings.reward, 0.0)
    )
    experiment = replace(experiment, sampler=loss.transition_sampler())
    folder = build_folder(settings)
    before, after = experiment.run(loss, folder)
    say(summary(before, after, folder))
    return before, after


def adapt(preset: RunSettings) -> RunSettings:
    """`sd15` holds the settings of the authors' code: 40 DDPM steps without guidance, the whole UNet trained."""
    preset = with_experiment(preset, "aesthetic")
    adapted = backpropagating(preset, output=Path(f"runs/refl_{preset.experiment}"))
    if preset.preset != "sd15":
        return adapted
    return replace(
        adapted,
        model=replace(adapted.model, dtype="float32", guidance_scale=1.0, lora_rank=0),
        sampling=replace(adapted.sampling, num_steps=40, images_per_iteration=64),
        training=replace(adapted.training, iterations=100, learning_rate=1e-5, weight_decay=1e-2, micro_batch=2),
    )


if __name__ == "__main__":
    main(parse_settings(__doc__, adapt=adapt, needs_gradient=True, unused=("clip_range", "kl_penalty")))
