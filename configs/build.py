"""From settings to objects: the only place that knows the packages and the settings alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import diffusers.utils.logging
import torch
import transformers.utils.logging
from torch.distributed.device_mesh import init_device_mesh
from torchrl.collectors import Collector
from torchrl.modules import ProbabilisticActor

import rewards
from agents import (
    Evaluator,
    Experiment,
    PromptAdvantage,
    RecomputeLogProb,
    RunFolder,
    TransitionSampler,
    WorkerCollector,
    make_collector,
    make_policy,
    make_worker_collector,
    trainable_steps,
)
from agents.distributed import join, rank_seed, seed_generators, size
from agents.metrics import FeatureExtractor
from agents.policy import denoising_mean
from agents.worker_collector import check_workers
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
        channels_last=settings.channels_last,
        fold_lora=settings.fold_lora,
        compile=settings.compile,
        mesh=init_device_mesh(torch.device(_device(settings)).type, (size(),)) if settings.shard else None,
    )


def _device(settings: ModelSettings) -> str:
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def build_reward(name: RewardName, *, head: str | None, device: torch.device) -> rewards.Reward:
    """Make the reward called `name` on `device`; `head` is the file of laion-aesthetic's.

    Raises:
        ValueError: another reward would leave the head out.
    """
    if head is not None and name != "laion-aesthetic":
        raise ValueError(f"reward_head={head} is for laion-aesthetic, and the reward is {name}; leave one of them out")
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

    Under `torchrun` the processes join here; each draws prompts and noise of its own. Workers, if the settings have
    any, start here.
    """
    join(_device(settings.model))
    check_workers(settings.sampling.workers, settings.sampling.worker_kind)
    seed_generators(settings.seed)
    prompts: Sequence[str] = prompt_set(settings.sampling.prompts)  # a missing file shows before a model loads
    sampling, training = settings.sampling, settings.training
    backbone = build_backbone(settings.model)
    reward = build_reward(settings.reward, head=settings.reward_head, device=backbone.device)
    batch_size = sampling.batch_size or sampling.images_per_iteration
    policy = _build_policy(settings, backbone, prompts, keep_model_output)
    sampler = denoising_mean(policy).sampler
    steps = trainable_steps(sampler, training.min_noise)
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
        collector=_build_collector(settings, backbone, reward, prompts, policy, keep_model_output),
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


def _build_policy(
    settings: RunSettings, backbone: StableDiffusionBackbone, prompts: Sequence[str], keep_model_output: bool
) -> ProbabilisticActor:
    return make_policy(
        backbone,
        backbone.sampler(settings.sampling.num_steps, settings.sampling.eta),
        backbone.conditioning(prompts),
        log_prob_reduction=settings.training.log_prob_reduction,
        keep_model_output=keep_model_output,
    )


def _build_env(
    settings: RunSettings,
    backbone: StableDiffusionBackbone,
    reward: rewards.Reward,
    prompts: Sequence[str],
    batch_size: int,
    seed: int,
) -> DenoisingEnv:
    return DenoisingEnv(
        backbone,
        settings.sampling.num_steps,
        reward,
        prompts,
        batch_size=batch_size,
        samples_per_prompt=settings.sampling.samples_per_prompt,
        seed=seed,
    )


def _build_collector(
    settings: RunSettings,
    backbone: StableDiffusionBackbone,
    reward: rewards.Reward,
    prompts: Sequence[str],
    policy: ProbabilisticActor,
    keep_model_output: bool,
) -> Collector | WorkerCollector:
    sampling, iterations = settings.sampling, settings.training.iterations
    if not sampling.workers:
        batch_size = sampling.images_per_iteration // sampling.episodes
        env = _build_env(settings, backbone, reward, prompts, batch_size, rank_seed(settings.seed))
        return make_collector(env, policy, iterations=iterations, episodes=sampling.episodes)
    return make_worker_collector(
        partial(_build_rollouts, settings, tuple(prompts), keep_model_output),
        policy,
        workers=sampling.workers,
        kind=sampling.worker_kind,
        seed=settings.seed,
        images=sampling.images_per_iteration,
        num_steps=sampling.num_steps,
        prompts=prompts,
        iterations=iterations,
    )


def _build_rollouts(
    settings: RunSettings, prompts: Sequence[str], keep_model_output: bool, seed: int
) -> tuple[DenoisingEnv, ProbabilisticActor]:
    """A worker's environment and policy; it has loaded the model as quietly as it can."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    backbone = build_backbone(settings.model)
    reward = build_reward(settings.reward, head=settings.reward_head, device=backbone.device)
    batch_size = settings.sampling.images_per_iteration // settings.sampling.workers
    env = _build_env(settings, backbone, reward, prompts, batch_size, seed)
    return env, _build_policy(settings, backbone, prompts, keep_model_output)


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
