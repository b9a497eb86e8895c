"""From settings to objects: the only place that knows the packages and the settings alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torchrl.modules import ProbabilisticActor

import rewards
from agents import (
    Evaluator,
    Experiment,
    PromptAdvantage,
    RecomputeLogProb,
    RunFolder,
    TransitionSampler,
    make_collector,
    make_policy,
    trainable_steps,
)
from agents.distributed import join, rank_seed, seed_generators, size
from agents.metrics import FeatureExtractor
from agents.policy import denoising_mean
from diffusion_env import DenoisingEnv, LoRA, StableDiffusionBackbone, embedded_folder, prompt_set

from .schema import HeldOutName, ModelSettings, RewardName, RunSettings

FEATURES = "lite2"  # a network that no reward looks through
FIDELITY_SAMPLES = 4
FIDELITY_SEED = 1  # not that of the evaluations
KL_TRAJECTORIES = 16  # enough for a tenth of the mean, cheap beside the evaluation's own sampling


def build_backbone(settings: ModelSettings) -> StableDiffusionBackbone:
    """Load the pipeline.

    Raises:
        ValueError: it is to be sharded over processes and there is only this one.
    """
    if settings.shard and size() == 1:
        raise ValueError(
            "model.shard divides the UNet over processes, and there is only one: start several with torchrun "
            "--nproc-per-node, or leave it out"
        )
    lora = LoRA(settings.lora_rank, settings.lora_alpha, settings.lora_targets) if settings.lora_rank else None
    return StableDiffusionBackbone.from_pretrained(
        embedded_folder() if settings.name == "embedded" else settings.name,
        dtype=settings.dtype,
        device=_device(settings),
        guidance_scale=settings.guidance_scale,
        lora=lora,
        gradient_checkpointing=settings.gradient_checkpointing,
        mesh=init_device_mesh(torch.device(_device(settings)).type, (size(),)) if settings.shard else None,
    )


def _device(settings: ModelSettings) -> str:
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def build_reward(name: RewardName, *, head: str | None, device: torch.device) -> rewards.Reward:
    """Make the reward called `name` on `device`; `head` is the file of laion-aesthetic's."""
    reward = rewards.make_reward(name) if head is None else rewards.LAIONAesthetic(head=head)
    return reward.to(device) if isinstance(reward, torch.nn.Module) else reward


def build_held_out(
    names: Sequence[HeldOutName], env: DenoisingEnv, policy: ProbabilisticActor, features: FeatureExtractor
) -> dict[str, rewards.Reward]:
    """The rewards called `names`, in keys with underscores.

    For the prompts' fidelity the pretrained model draws `FIDELITY_SAMPLES` images of each prompt of `env`, from noise
    of its own.
    """
    held_out: dict[str, rewards.Reward] = {}
    for name in names:
        if name == "prompt-fidelity":
            with denoising_mean(policy).backbone.reference():
                drawn = Evaluator(env, samples_per_prompt=FIDELITY_SAMPLES, seed=FIDELITY_SEED)(policy)
            reward: rewards.Reward = rewards.PromptFidelity(features, drawn.images.to(env.device), drawn.prompts)
        else:
            reward = build_reward(name, head=None, device=env.device)
        held_out[name.replace("-", "_")] = reward
    return held_out


def build_experiment(settings: RunSettings, *, keep_model_output: bool = False) -> Experiment:
    """Everything of a policy-gradient run but the loss; `keep_model_output` is that of `make_policy`.

    Under `torchrun` the processes join here; each draws prompts and noise of its own.
    """
    join(_device(settings.model))
    seed_generators(settings.seed)
    prompts: Sequence[str] = prompt_set(settings.sampling.prompts)  # a missing file shows before a model loads
    sampling, training = settings.sampling, settings.training
    backbone = build_backbone(settings.model)
    reward = build_reward(settings.reward, head=settings.reward_head, device=backbone.device)
    batch_size = sampling.batch_size or sampling.images_per_iteration
    sampler = backbone.sampler(sampling.num_steps, sampling.eta)
    policy = make_policy(
        backbone,
        sampler,
        backbone.conditioning(prompts),
        log_prob_reduction=training.log_prob_reduction,
        keep_model_output=keep_model_output,
    )
    steps = trainable_steps(sampler, training.min_noise)
    env = DenoisingEnv(
        backbone,
        sampling.num_steps,
        reward,
        prompts,
        batch_size=batch_size,
        samples_per_prompt=sampling.samples_per_prompt,
        seed=rank_seed(settings.seed),
    )
    evaluation_env = DenoisingEnv(backbone, sampling.num_steps, reward, prompts, batch_size=min(45, batch_size), seed=0)
    features = rewards.LiteFeatures(FEATURES).to(backbone.device)
    evaluator = Evaluator(
        evaluation_env,
        samples_per_prompt=settings.evaluation_samples,
        held_out=build_held_out(settings.held_out, evaluation_env, policy, features),
        features=features,
        kl_trajectories=KL_TRAJECTORIES,
    )
    return Experiment(
        backbone=backbone,
        policy=policy,
        reward=reward,
        collector=make_collector(env, policy, iterations=training.iterations, episodes=sampling.episodes),
        evaluator=evaluator,
        advantage=PromptAdvantage(buffer_size=training.advantage_buffer, min_count=training.advantage_min_count),
        prepare=[RecomputeLogProb(policy, training.micro_batch)] if training.recompute_log_prob else [],
        sampler=TransitionSampler(steps, training.timestep_fraction),
        optimisation=training,
        evaluate_every=settings.evaluate_every,
        checkpoint_every=settings.checkpoint_every,
        watch=settings.watch,
        profile=settings.profile,
    )


def build_folder(settings: RunSettings) -> RunFolder:
    """The run's folder: `settings.resume`, else `settings.output` or the first of `output-2`, ... that is free."""
    if settings.resume is not None:
        config = asdict(replace(settings, resume=None))
        return RunFolder(settings.resume, config, logger=settings.logger, resume=True)
    path, number = settings.output, 1
    while True:
        try:
            return RunFolder(path, asdict(settings), logger=settings.logger)
        except FileExistsError:
            if not path.is_dir():
                raise
        number += 1
        path = Path(f"{settings.output}-{number}")
