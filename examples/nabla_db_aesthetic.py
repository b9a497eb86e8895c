"""The aesthetic reward with residual Nabla-DB, a GFlowNet that matches the reward's gradient and keeps the prior.

    python examples/nabla_db_aesthetic.py
    python examples/nabla_db_aesthetic.py --experiment alignment          # or another whose reward has a gradient
    python examples/nabla_db_aesthetic.py --experiment hpsv2 --preset sd15

What differs from `draft_aesthetic.py` is the loss, the transform that writes the reward's gradient, and which
transitions train.
Liu et al. 2025, "Efficient Diversity-Preserving Diffusion Alignment via Gradient-Informed GFlowNets", arXiv:2412.07775.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from agents import Evaluation, NablaDBLoss, RewardGradient, TransitionSampler, summary, trainable_steps
from agents.distributed import say
from agents.scores import Weighting
from configs import RunSettings, build_experiment, build_folder, parse_settings, with_experiment
from diffusion_env import CorrectionUNet


@dataclass(frozen=True)
class Method:
    """What of Nabla-DB is used."""

    beta: float
    """How far the reward may pull images from the pretrained model's: it belongs to the reward's scale."""
    weighting: Weighting = "none"
    trust_region: float = 0.0
    correction: bool = False
    """Learn the correction network, with backward matching."""
    jacobian: bool = False
    """Differentiate the reward through the network too."""
    last_step_always: bool = False
    """The last transition is always among those that train, the others come one from each of as many equal bins."""


METHODS = {
    # In units of the network's output: in the paper's units the last steps are nearly all of the loss.
    "embedded": Method(beta=500.0, weighting="output"),
    "sd15": Method(beta=1e4, trust_region=2e3, correction=True, jacobian=True, last_step_always=True),
}

# Beta and the trust region belong to the reward's scale; a reward that is not listed has those above.
SCALES = {
    ("embedded", "prompt-alignment"): {"beta": 2500.0},  # its gradient is a fifth of style-preference's
    ("sd15", "hpsv2"): {"trust_region": 5e3},
    ("sd15", "hpsv2.1"): {"trust_region": 5e3},
    ("sd15", "image-reward"): {"beta": 1e3, "trust_region": 5e3},
}


def method_of(settings: RunSettings) -> Method:
    """What the preset and its reward use."""
    return replace(METHODS[settings.preset], **SCALES.get((settings.preset, settings.reward), {}))


def main(settings: RunSettings) -> tuple[Evaluation, Evaluation]:
    """Train and save; the evaluations before and after."""
    say(f"{settings.reward} on {settings.model.name}, {settings.sampling.prompts} prompts, seed {settings.seed}")
    method, training = method_of(settings), settings.training
    experiment = build_experiment(settings, keep_model_output=method.trust_region > 0)
    backbone, policy, last = experiment.backbone, experiment.policy, method.last_step_always
    steps = trainable_steps(backbone.sampler(settings.sampling.num_steps, settings.sampling.eta), training.min_noise)
    sampler = TransitionSampler(steps, training.timestep_fraction, stratified=last, always_last=last)
    loss = NablaDBLoss(
        policy,
        beta=method.beta,
        correction=CorrectionUNet(backbone) if method.correction else None,
        terminal_weight=sampler.steps_per_trajectory,  # the authors average it over last transitions alone
        trust_region=method.trust_region,
        weighting=method.weighting,
    )
    gradient = RewardGradient(policy, experiment.reward, jacobian=method.jacobian, before=method.correction)
    experiment = replace(experiment, transform=gradient, sampler=sampler)
    folder = build_folder(settings)
    before, after = experiment.run(loss, folder)
    say(summary(before, after, folder))
    return before, after


def adapt(preset: RunSettings) -> RunSettings:
    """The reward's gradient is that of the policy at each update; `sd15` holds the settings of the authors' code."""
    preset = with_experiment(preset, "aesthetic")
    preset = replace(preset, output=Path(f"runs/nabla_db_{preset.experiment}"))
    training = replace(preset.training, epochs=1, recompute_log_prob=False)
    if preset.preset == "sd15":
        return replace(
            preset,
            model=replace(preset.model, dtype="bfloat16", lora_rank=8, lora_alpha=8.0),
            sampling=replace(preset.sampling, images_per_iteration=64),
            # Six of fifty steps.
            training=replace(training, iterations=100, learning_rate=1e-3, timestep_fraction=0.12),
        )
    # Its residuals do not change with the sampling noise: later steps tell as much, few transitions make an update. The
    # last step hardly has a density; of the three others one trains of each trajectory.
    return replace(preset, training=replace(training, updates_per_epoch=4, timestep_fraction=0.34, min_noise=0.05))


if __name__ == "__main__":
    main(
        parse_settings(__doc__, adapt=adapt, needs_gradient=True, shardable=False, unused=("clip_range", "kl_penalty"))
    )
