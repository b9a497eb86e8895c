"""From settings to objects: the only place that knows the packages and the settings alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

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
from diffusion_env import DenoisingEnv, LoRA, StableDiffusionBackbone, embedded_folder, prompt_set

from .schema import ModelSettings, RewardName, RunSettings


def build_backbone(settings: ModelSettings) -> StableDiffusionBackbone:
    """Load the pipeline."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    lora = LoRA(settings.lora_rank, settings.lora_alpha, settings.lora_targets) if settings.lora_rank else None
    return StableDiffusionBackbone.from_pretrained(
        embedded_folder() if settings.name == "embedded" else settings.name,
        dtype=settings.dtype,
        device=device,
        guidance_scale=settings.guidance_scale,
        lora=lora,
        gradient_checkpointing=settings.gradient_checkpointing,
    )


def build_reward(name: RewardName, *, head: str | None, device: torch.device) -> rewards.Reward:
    """Make the reward called `name` on `device`."""
    if name == "style-preference":
        return rewards.StylePreference().to(device)
    if name == "laion-aesthetic":
        return (rewards.LAIONAesthetic(head=head) if head else rewards.LAIONAesthetic()).to(device)
    return rewards.JPEGCompressibility() if name == "jpeg-compressibility" else rewards.JPEGIncompressibility()


def build_experiment(settings: RunSettings, *, keep_model_output: bool = False) -> Experiment:
    """Everything of a policy-gradient run but the loss; `keep_model_output` is that of `make_policy`."""
    torch.manual_seed(settings.seed)
    prompts: Sequence[str] = prompt_set(settings.sampling.prompts)  # a missing file shows before a model loads
    sampling, training = settings.sampling, settings.training
    backbone = build_backbone(settings.model)
    reward = build_reward(settings.reward, head=settings.reward_head, device=backbone.device)
    sampler = backbone.sampler(sampling.num_steps, sampling.eta)
    policy = make_policy(
        backbone,
        sampler,
        backbone.conditioning(prompts),
        log_prob_reduction=training.log_prob_reduction,
        keep_model_output=keep_model_output,
    )
    steps = trainable_steps(sampler, training.min_step_std)
    env = DenoisingEnv(
        backbone,
        sampling.num_steps,
        reward,
        prompts,
        batch_size=sampling.images_per_iteration,
        samples_per_prompt=sampling.samples_per_prompt,
        seed=settings.seed,
    )
    evaluation_env = DenoisingEnv(
        backbone, sampling.num_steps, reward, prompts, batch_size=min(45, sampling.images_per_iteration), seed=0
    )
    return Experiment(
        backbone=backbone,
        policy=policy,
        reward=reward,
        collector=make_collector(env, policy, iterations=training.iterations),
        evaluator=Evaluator(evaluation_env, samples_per_prompt=settings.evaluation_samples),
        advantage=PromptAdvantage(buffer_size=training.advantage_buffer, min_count=training.advantage_min_count),
        prepare=[RecomputeLogProb(policy, training.micro_batch)] if training.recompute_log_prob else [],
        sampler=TransitionSampler(steps, training.timestep_fraction),
        optimisation=training,
        evaluate_every=settings.evaluate_every,
        checkpoint_every=settings.checkpoint_every,
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
