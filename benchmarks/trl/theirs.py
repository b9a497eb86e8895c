"""TRL's side of the comparison: `DDPOTrainer` as it ships, driven by its own `step`. Runs in TRL's environment."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from itertools import count

from accelerate import PartialState
from torch import nn
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

from benchmarks.trl.job import Job, serve
from rewards import JPEGCompressibility


def make(job: Job) -> tuple[nn.Module, Callable[[], object]]:
    """The network and one iteration of `DDPOTrainer`."""
    PartialState()  # the pipeline logs through accelerate, which refuses to before this exists
    pipeline = DefaultDDPOStableDiffusionPipeline(job.pipeline, use_lora=True)
    reward = JPEGCompressibility()
    draws = random.Random(job.seed)
    config = DDPOConfig(
        seed=job.seed,
        mixed_precision="no",
        allow_tf32=False,
        project_kwargs={"project_dir": tempfile.gettempdir()},
        save_freq=1_000_000,
        sample_num_steps=job.num_steps,
        sample_eta=1.0,
        sample_guidance_scale=job.guidance_scale,
        sample_batch_size=job.their_sample_batch,
        sample_num_batches_per_epoch=job.images // job.their_sample_batch,
        train_batch_size=job.minibatch,
        train_gradient_accumulation_steps=1,
        train_learning_rate=job.learning_rate,
        train_adam_weight_decay=job.weight_decay,
        train_clip_range=job.clip_range,
        train_max_grad_norm=job.max_grad_norm,
        train_cfg=True,
        per_prompt_stat_tracking=True,
    )
    trainer = DDPOTrainer(
        config,
        lambda images, prompts, _: (reward(images, list(prompts)), {}),
        lambda: (draws.choice(job.prompts), {}),
        pipeline,
    )
    pipeline.set_progress_bar_config(disable=True)
    epochs = count()
    return pipeline.unet, lambda: trainer.step(next(epochs), 0)


if __name__ == "__main__":
    serve(make)
