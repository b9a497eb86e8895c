"""The methods of the comparison study: settings, loss, and what an iteration of each costs.

Costs are counted in training alone; evaluations are the same for all methods and left out.

- Reward calls: images that the reward scores, with or without a gradient. Each of the B sampled images is scored once,
  whether or not the method reads that number.
- Network evaluations: latents that go forward through the denoising network; a guided output is two (g = 2). A backward
  pass costs about two more and is not counted, nor is Nabla-DB's small correction network: the wall time has both.

With T denoising steps, S of which train (drawn from `trained`), E passes over a batch, an iteration costs

    reward calls          B (1 + E a)
    network evaluations   g B (T + R + E b)

| method | a | b |
| --- | --- | --- |
| DDPO | 0 | S |
| RWR | 0 | 1 |
| RWR-sparse | 0 | the share of images at or above the 90th percentile |
| ReFL, DRaFT-1 | 1 | 1 |
| DRaFT-LV with n fresh noises | 1 + n | 1 + n |
| AlignProp | 1 | (T + 1) / 2, the mean of K |
| Nabla-DB | S | 2 S + S c: policy, pretrained model, one-step prediction after the step |
| with backward matching | 2 S | the same and S for the prediction before the step |

R = T where old log-probabilities are computed again (`recompute_log_prob`), else 0. c = 1, less the share of `trained`
that is the last step, after which latents are clean. Where steps are drawn, this is the mean over draws; without a last
step in `trained` only AlignProp's cost varies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from torchrl.objectives import LossModule

from agents import (
    AlignPropLoss,
    BestTrajectories,
    DRaFTLoss,
    DRaFTLVLoss,
    Experiment,
    ExponentialWeights,
    NablaDBLoss,
    ReFLLoss,
    RewardGradient,
    RWRLoss,
    ScoreFunctionLoss,
    TransitionSampler,
    ddpo_is_loss,
    trainable_steps,
)
from agents.policy import denoising_mean
from agents.reward_backprop import RewardBackpropLoss
from configs import RunSettings
from diffusion_env import CorrectionUNet, DDIMSampler
from examples import (
    draft_aesthetic,
    nabla_db_aesthetic,
    ppo_aesthetic,
    refl_aesthetic,
    reinforce_compressibility,
    rwr_compressibility,
)
from rewards import REWARDS

INVERSE_TEMPERATURE = 1.0  # of RWR; style-preference has a standard deviation of about 1
BEST = 0.9  # RWR-sparse keeps images from this percentile on
UPDATES = 4  # of DDPO-IS, on one batch
FRESH_NOISES = 2  # of DRaFT-LV, as in the paper
CORRECTION = (32, 64, 128)  # channels of Nabla-DB's correction network, 3.4 M parameters beside the denoiser's 7.6 M
CONSTANTS = {
    "inverse_temperature": INVERSE_TEMPERATURE,
    "best": BEST,
    "updates": UPDATES,
    "fresh_noises": FRESH_NOISES,
    "correction": CORRECTION,
}


class Job(NamedTuple):
    """A run that lacks nothing."""

    experiment: Experiment
    loss: LossModule


class Size(NamedTuple):
    """What costs depend on: images B, steps T, how many of them train, and which may."""

    images: int
    num_steps: int
    drawn: int
    trained: Sequence[int]


class Work(NamedTuple):
    """Of one pass over a batch, for each sampled image: images scored (a) and guided outputs (b)."""

    scored: float
    outputs: float


class Cost(NamedTuple):
    """Of one iteration."""

    reward_calls: float
    network_evaluations: float


@dataclass(frozen=True)
class Method:
    """One line of the study."""

    label: str
    adapt: Callable[[RunSettings], RunSettings]
    """Its own settings over those of the preset: those of its example."""
    job: Callable[[Experiment, RunSettings], Job]
    work: Callable[[Size], Work]

    def cost(self, settings: RunSettings, sampler: DDIMSampler) -> Cost:
        """Of one iteration with these settings; the sampler's schedule says which steps train."""
        training, images, steps = settings.training, settings.sampling.images_per_iteration, sampler.num_steps
        trained = trainable_steps(sampler, training.min_noise)
        drawn = TransitionSampler(trained, training.timestep_fraction).steps_per_trajectory
        branches, epochs = 2 if settings.model.guidance_scale > 1 else 1, training.epochs
        work = self.work(Size(images, steps, drawn, trained))
        outputs = steps * (1 + training.recompute_log_prob) + epochs * work.outputs
        return Cost(images * (1 + epochs * work.scored), branches * images * outputs)


def _several_updates(preset: RunSettings) -> RunSettings:
    """DDPO-IS's example makes a single update of a batch, the ratio is 1 then and DDPO-IS is DDPO-SF."""
    preset = ppo_aesthetic.adapt(preset)
    return replace(preset, training=replace(preset.training, updates_per_epoch=UPDATES))


def _ddpo_is(experiment: Experiment, settings: RunSettings) -> Job:
    return Job(experiment, ddpo_is_loss(experiment.policy, clip_range=settings.training.clip_range))


def _ddpo_sf(experiment: Experiment, settings: RunSettings) -> Job:
    return Job(experiment, ScoreFunctionLoss(experiment.policy))


def _from_one_state(experiment: Experiment, loss: RewardBackpropLoss | RWRLoss) -> Job:
    return Job(replace(experiment, sampler=loss.transition_sampler()), loss)


def _rwr(experiment: Experiment, settings: RunSettings) -> Job:
    weights = ExponentialWeights(inverse_temperature=INVERSE_TEMPERATURE)
    return _from_one_state(replace(experiment, advantage=weights), RWRLoss(experiment.policy))


def _rwr_sparse(experiment: Experiment, settings: RunSettings) -> Job:
    return _from_one_state(replace(experiment, advantage=BestTrajectories(percentile=BEST)), RWRLoss(experiment.policy))


def _refl(experiment: Experiment, settings: RunSettings) -> Job:
    last_steps = max(1, settings.sampling.num_steps // refl_aesthetic.LATE[settings.preset])
    ceiling = refl_aesthetic.CEILINGS.get(settings.reward, 0.0)
    loss = ReFLLoss(experiment.policy, experiment.reward, last_steps=last_steps, ceiling=ceiling)
    return _from_one_state(experiment, loss)


def _draft_1(experiment: Experiment, settings: RunSettings) -> Job:
    # Nothing is recomputed, here and in AlignProp: the activations of this pipeline fit into memory.
    loss = DRaFTLoss(experiment.policy, experiment.reward, backprop_steps=1, gradient_checkpointing=False)
    return _from_one_state(experiment, loss)


def _draft_lv(experiment: Experiment, settings: RunSettings) -> Job:
    return _from_one_state(experiment, DRaFTLVLoss(experiment.policy, experiment.reward, noises=FRESH_NOISES))


def _alignprop(experiment: Experiment, settings: RunSettings) -> Job:
    return _from_one_state(
        experiment, AlignPropLoss(experiment.policy, experiment.reward, gradient_checkpointing=False)
    )


def _nabla_db(experiment: Experiment, settings: RunSettings, *, backward: bool) -> Job:
    own = nabla_db_aesthetic.method_of(settings)
    trained = trainable_steps(denoising_mean(experiment.policy).sampler, settings.training.min_noise)
    loss = NablaDBLoss(
        experiment.policy,
        beta=own.beta,
        correction=CorrectionUNet(experiment.backbone, block_out_channels=CORRECTION) if backward else None,
        # The authors average terminal matching over last transitions alone; here these are one of as many as may train.
        terminal_weight=len(trained),
        weighting=own.weighting,
        last_step=trained[-1],  # the correction's only boundary condition, which has to be among those that train
    )
    gradient = RewardGradient(experiment.policy, experiment.reward, jacobian=own.jacobian, before=backward)
    return Job(replace(experiment, transform=gradient), loss)


def _nabla_work(size: Size, *, backward: bool) -> Work:
    noisy = 1 - (size.num_steps - 1 in size.trained) / len(size.trained)
    return Work(size.drawn * (1 + backward), size.drawn * (2 + noisy + backward))


METHODS = {
    "ddpo-sf": Method("DDPO-SF", reinforce_compressibility.adapt, _ddpo_sf, lambda size: Work(0, size.drawn)),
    "ddpo-is": Method("DDPO-IS", _several_updates, _ddpo_is, lambda size: Work(0, size.drawn)),
    "rwr": Method("RWR", rwr_compressibility.adapt, _rwr, lambda size: Work(0, 1)),
    # Exact where no two rewards are equal: those from the percentile's (interpolated) place in the order on.
    "rwr-sparse": Method(
        "RWR-sparse",
        rwr_compressibility.adapt,
        _rwr_sparse,
        lambda size: Work(0, (size.images - math.ceil(BEST * (size.images - 1))) / size.images),
    ),
    "refl": Method("ReFL", refl_aesthetic.adapt, _refl, lambda size: Work(1, 1)),
    "draft-1": Method("DRaFT-1", draft_aesthetic.adapt, _draft_1, lambda size: Work(1, 1)),
    "draft-lv": Method(
        "DRaFT-LV", draft_aesthetic.adapt, _draft_lv, lambda size: Work(1 + FRESH_NOISES, 1 + FRESH_NOISES)
    ),
    "alignprop": Method("AlignProp", draft_aesthetic.adapt, _alignprop, lambda size: Work(1, (size.num_steps + 1) / 2)),
    "nabla-db": Method(
        "res. Nabla-DB",
        nabla_db_aesthetic.adapt,
        partial(_nabla_db, backward=False),
        partial(_nabla_work, backward=False),
    ),
    "nabla-db-backward": Method(
        "res. Nabla-DB + backward",
        nabla_db_aesthetic.adapt,
        partial(_nabla_db, backward=True),
        partial(_nabla_work, backward=True),
    ),
}

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]


def check_gradient(methods: Sequence[str], reward: str) -> None:
    """Refuse, before anything is loaded, methods that differentiate a reward that gives no gradient."""
    differentiating = [name for name in methods if not name.startswith(("ddpo", "rwr"))]
    if differentiating and not REWARDS[reward].differentiable:
        raise ValueError(
            f"{', '.join(differentiating)} need the gradient of the reward, and {reward} has none; take ddpo-sf, "
            "ddpo-is, rwr, rwr-sparse, or a differentiable reward (`python -m rewards` lists them)"
        )
