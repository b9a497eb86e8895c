"""The aesthetic reward by backpropagating it through the last denoising steps (DRaFT-K).

    python examples/draft_aesthetic.py

What differs from `ppo_aesthetic.py` is the loss, and that it starts from one state a trajectory.
Clark et al. 2023, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv:2309.17400.
"""

from dataclasses import replace
from pathlib import Path

from agents import DRaFTLoss, Evaluation, summary
from agents.distributed import say
from configs import RunSettings, backpropagating, build_experiment, build_folder, parse_settings, with_experiment

BACKPROP_STEPS = {"embedded": 2, "sd15": 1}  # K; 1 is DRaFT-1


def main(settings: RunSettings) -> tuple[Evaluation, Evaluation]:
    """Train and save; the evaluations before and after."""
    say(f"{settings.reward} on {settings.model.name}, {settings.sampling.prompts} prompts, seed {settings.seed}")
    experiment = build_experiment(settings)
    loss = DRaFTLoss(experiment.policy, experiment.reward, backprop_steps=BACKPROP_STEPS[settings.preset])
    experiment = replace(experiment, sampler=loss.transition_sampler())
    folder = build_folder(settings)
    before, after = experiment.run(loss, folder)
    say(summary(before, after, folder))
    return before, after


def adapt(preset: RunSettings) -> RunSettings:
    """`sd15` holds the paper's smaller setting as others quote it, with noise in DDIM's steps where it has none."""
    preset = with_experiment(preset, "aesthetic")
    adapted = backpropagating(preset, output=Path(f"runs/draft_{preset.experiment}"))
    if preset.preset != "sd15":
        return adapted
    return replace(
        adapted,
        evaluate_every=200,
        model=replace(adapted.model, guidance_scale=7.5, lora_rank=8, lora_alpha=8.0),
        sampling=replace(adapted.sampling, images_per_iteration=4, batch_size=None),
        training=replace(adapted.training, iterations=2000, learning_rate=4e-4, weight_decay=0.1),
    )


if __name__ == "__main__":
    main(parse_settings(__doc__, adapt=adapt, needs_gradient=True, unused=("clip_range", "kl_penalty")))
