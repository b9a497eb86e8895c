"""The experiments of DDPO and Nabla-DB by name: prompts, reward, and the numbers published for them.

Each is put onto a model's preset: on `embedded` with the reward that this pipeline has of its own, on Stable Diffusion
with the published one. DDPO is Black et al. 2023, arXiv:2305.13301, its numbers those of `config/dgx.py` of
kvablack/ddpo-pytorch; Nabla-DB is Liu et al. 2025, arXiv:2412.07775.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .schema import ExperimentName, RunSettings


def with_experiment(preset: RunSettings, name: ExperimentName) -> RunSettings:
    """`preset` with the experiment `name`, unless it has one already."""
    return preset if preset.experiment else replace(EXPERIMENTS[name](preset), experiment=name)


def aesthetic(preset: RunSettings) -> RunSettings:
    """The presets' own: 45 animals; LAION's predictor, or the embedded pipeline's taste in backgrounds and styles."""
    return preset


def alignment(preset: RunSettings) -> RunSettings:
    """DDPO's animals at activities: does LLaVA see what the prompt says; on `embedded`, does its own small CLIP."""
    if preset.preset == "embedded":
        return _about(preset, "prompt-alignment", "animal-activities")
    return _asking_llava(_about(preset, "llava-bertscore", "animal-activities"))


def counting(preset: RunSettings) -> RunSettings:
    """DDPO's "six turtles", where LLaVA is fooled in the end; LLaVA is asked about `embedded`'s drawings too."""
    return _asking_llava(_about(preset, "llava-counting", "counting"))


def compressibility(preset: RunSettings) -> RunSettings:
    """JPEG size of the preset's 45 animals; DDPO drew its prompts from the names of ImageNet's 398 animals."""
    preset = replace(preset, reward="jpeg-compressibility")
    if preset.preset == "embedded":
        return preset
    return replace(preset, training=replace(preset.training, iterations=100, updates_per_epoch=4, advantage_buffer=16))


def hpsv2(preset: RunSettings) -> RunSettings:
    """HPS v2.1, as in Nabla-DB's code; the prompts of HPDv2, which that uses, do not come with the package."""
    return _about(preset, "hpsv2.1", "animal-activities")


def image_reward(preset: RunSettings) -> RunSettings:
    """ImageReward; the prompts of DrawBench, which Nabla-DB's code uses, do not come with the package."""
    return _about(preset, "image-reward", "animal-activities")


EXPERIMENTS: dict[ExperimentName, Callable[[RunSettings], RunSettings]] = {
    "aesthetic": aesthetic,
    "alignment": alignment,
    "compressibility": compressibility,
    "counting": counting,
    "hpsv2": hpsv2,
    "image_reward": image_reward,
}


def _about(preset: RunSettings, reward: str, prompts: str) -> RunSettings:
    return replace(preset, reward=reward, sampling=replace(preset.sampling, prompts=prompts))


def _asking_llava(preset: RunSettings) -> RunSettings:
    """LLaVA looks at some images while others are denoised; on Stable Diffusion as many images as DDPO's six GPUs."""
    images = preset.sampling.images_per_iteration if preset.preset == "embedded" else 288
    return replace(preset, sampling=replace(preset.sampling, images_per_iteration=images, batch_size=32))
