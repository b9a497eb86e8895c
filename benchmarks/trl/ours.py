"""This project's side of the comparison: the same job through the loop that every example runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from agents import PromptAdvantage, TransitionSampler, ddpo_is_loss, make_collector, make_policy, trainable_steps
from agents.distributed import draw_apart, join, size
from agents.training import train
from benchmarks.trl.job import Job, serve
from diffusion_env import DenoisingEnv, LoRA, StableDiffusionBackbone
from rewards import JPEGCompressibility

ITERATIONS = 1000


def make(job: Job) -> tuple[nn.Module, Callable[[], object]]:
    """The network and one iteration of the loop, of this process's share of the images."""
    join("cpu")
    images = job.images // size()
    backbone = StableDiffusionBackbone.from_pretrained(
        job.pipeline,
        dtype=job.ours.dtype,
        guidance_scale=job.guidance_scale,
        lora=LoRA(rank=4, alpha=4.0),
        fold_lora=job.ours.fold_lora,
        compile=job.ours.compile,
        channels_last=job.ours.channels_last,
    )
    sampler, conditioning = backbone.sampler(job.num_steps), backbone.conditioning(job.prompts)
    policy = make_policy(backbone, sampler, conditioning)
    env = DenoisingEnv(backbone, job.num_steps, JPEGCompressibility(), job.prompts, batch_size=images)
    loss = ddpo_is_loss(policy, clip_range=job.clip_range)
    draw_apart()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in loss.parameters() if parameter.requires_grad],
        lr=job.learning_rate,
        weight_decay=job.weight_decay,
        fused=True,
    )
    loop = train(
        make_collector(env, policy, iterations=ITERATIONS),
        loss,
        optimizer,
        advantage=PromptAdvantage(),
        sampler=TransitionSampler(trainable_steps(sampler)),
        updates_per_epoch=job.images // job.minibatch,
        micro_batch=job.ours.micro_batch,
        max_grad_norm=job.max_grad_norm,
    )
    return backbone.unet, lambda: next(loop)


if __name__ == "__main__":
    serve(make)
