"""Fine-tune a text-to-image diffusion model with PPO (DDPO-IS) on an aesthetic reward.

    python examples/ppo_aesthetic.py                        # the pipeline that ships, ten minutes on two CPU cores
    python examples/ppo_aesthetic.py --preset sd15          # Stable Diffusion 1.5 with DDPO's settings, a GPU
    python examples/ppo_aesthetic.py --experiment alignment # or another of DDPO's and Nabla-DB's, on either model
    python examples/ppo_aesthetic.py --reward jpeg-compressibility
    python examples/ppo_aesthetic.py --help                 # every setting

Black et al. 2023, "Training Diffusion Models with Reinforcement Learning", arXiv:2305.13301.
"""

from dataclasses import replace
from pathlib import Path

from agents import Evaluation, KLPenalty, OnPolicyRatioCheck, ddpo_is_loss, summary
from agents.distributed import say
from configs import RunSettings, build_experiment, build_folder, parse_settings, with_experiment


def main(settings: RunSettings) -> tuple[Evaluation, Evaluation]:
    """Train and save; the evaluations before and after."""
    say(f"{settings.reward} on {settings.model.name}, {settings.sampling.prompts} prompts, seed {settings.seed}")
    experiment = build_experiment(settings)
    loss = ddpo_is_loss(experiment.policy, clip_range=settings.training.clip_range)
    if settings.training.kl_penalty:
        loss = KLPenalty(loss, experiment.policy, coefficient=settings.training.kl_penalty)
    check = OnPolicyRatioCheck(experiment.policy, clip_range=settings.training.clip_range)
    folder = build_folder(settings)
    before, after = experiment.run(loss, folder, checks=[check])
    say(summary(before, after, folder))
    return before, after


def adapt(preset: RunSettings) -> RunSettings:
    """The presets are this program's; on the pipeline that ships the run ends where it over-optimises."""
    preset = with_experiment(preset, "aesthetic")
    watch = replace(preset.watch, stop=preset.preset == "embedded")
    return replace(preset, output=Path(f"runs/ppo_{preset.experiment}"), watch=watch)


if __name__ == "__main__":
    main(parse_settings(__doc__, adapt=adapt))
