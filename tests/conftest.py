"""What many tests share: a Stable Diffusion pipeline of the true classes with a few thousand random weights."""

import os
from pathlib import Path

# Before torch is loaded, and inherited by the programs that tests start: tests run beside one another, and sums that
# threads divide round differently from machine to machine.
os.environ["OMP_NUM_THREADS"] = "1"

import diffusers.utils.logging
import pytest
import torch
import transformers.utils.logging

from diffusion_env import LoRA, StableDiffusionBackbone
from tests.tiny import tiny_pipeline

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny pipeline in diffusers' folder format; only ever read."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline().save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture
def backbone() -> StableDiffusionBackbone:
    """The pipeline of `tiny_folder` with LoRA on attention and a convolution, rank not alpha; it adds nothing yet."""
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    lora = LoRA(rank=3, alpha=5.0, targets=("to_q", "to_k", "to_v", "to_out.0", "conv1"))
    return StableDiffusionBackbone(pipeline, lora=lora, guidance_scale=2.0)


@pytest.fixture
def trained_backbone(backbone) -> StableDiffusionBackbone:
    """`backbone` as if it had been trained: every LoRA weight is random, so that adapter on and off differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return backbone
