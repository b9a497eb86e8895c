"""The aesthetic reward with an actor-critic: TorchRL's `A2CLoss`, whose critic learns beside the policy.

    python examples/a2c_aesthetic.py

What differs from `reinforce_compressibility.py` is the loss, the critic it trains, and the advantage taken from that.
Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning", arXiv:1602.01783.
"""

from dataclasses import replace
from pathlib import Path

from torchrl.objectives import A2CLoss

from agents import CriticAdvantage, Evaluation, KLPenalty, make_critic, summary
from agents.distributed import say
from configs import RunSettings, build_experiment, build_folder, parse_settings, with_experiment


def main(settings: RunSettings) -> tuple[Evaluation, Evaluation]:
    """Train and save; the evaluations before and after."""
    say(f"{settings.reward} on {settings.model.name}, {settings.sampling.prompts} prompts, seed {settings.seed}")
    experiment = build_experiment(settings)
    critic = make_critic(experiment.policy)
    loss = A2CLoss(experiment.policy, critic, entropy_bonus=False, functional=False)
    if settings.training.kl_penalty:
        loss = KLPenalty(loss, experiment.policy, coefficient=settings.training.kl_penalty)
    # The reward at the end rather than the next value: the critic starts at 0, far from any reward.
    experiment = replace(experiment, advantage=CriticAdvantage(critic, lmbda=1.0))
    folder = build_folder(settings)
    before, after = experiment.run(loss, folder)
    say(summary(before, after, folder))
    return before, after


def adapt(preset: RunSettings) -> RunSettings:
    """The preset with a single update an iteration; `sd15` is otherwise PPO's, nobody having published this one."""
    preset = with_experiment(preset, "aesthetic")
    training = replace(preset.training, updates_per_epoch=1, epochs=1, recompute_log_prob=False)
    if preset.preset == "embedded":
        training = replace(training, learning_rate=1.5e-3)
    return replace(preset, output=Path(f"runs/a2c_{preset.experiment}"), training=training)


if __name__ == "__main__":
    main(parse_settings(__doc__, adapt=adapt, unused=("clip_range", "epochs", "updates_per_epoch")))
