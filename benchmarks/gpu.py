"""Stable Diffusion 1.5 on a GPU: images a second and the share of the chip's peak, in sampling and in training.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --peak-tflops 181   # a chip that PEAK_TFLOPS lacks

The architecture with random weights, LoRA and guidance as in the preset sd15, DDPO-IS over all denoising steps; eager
and compiled. An image is sampled when it has its reward (a mean of pixels) and trained on when all its steps are.
Floating-point operations are counted on one image by torch.utils.flop_counter, the attention as the matrix products of
its definition: what a kernel computes twice to save memory is no work done. The share is theirs, for the images of a
second, in the chip's peak without sparsity. Medians of iterations after one that warms up and compiles.

A row a mode in `benchmarks/results/gpu.csv`, and a Markdown table.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from tensordict import TensorDict, TensorDictBase
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from agents import PromptAdvantage, TransitionSampler, ddpo_is_loss, make_collector, make_policy, train, trainable_steps
from benchmarks.collector_overhead import brightness, timed
from benchmarks.main_job import append, markdown, provenance
from benchmarks.stable_diffusion import stable_diffusion_15
from configs import PRESETS, build_backbone
from diffusion_env import DenoisingEnv, LoRA, StableDiffusionBackbone
from diffusion_env.backbones import DTYPES

RESULTS = Path(__file__).parent / "results" / "gpu.csv"
PROMPT = "a cat"  # encoded before anything is counted or timed
# 10^12 operations a second in bfloat16 or float16, dense, of the maker's data sheets; SXM where nothing else is named.
PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "L40S": 362.0,
    "L4": 121.0,
}


@dataclass(frozen=True)
class Settings:
    """Size of the job."""

    model: str = "sd15"
    """'sd15' is Stable Diffusion 1.5 with random weights; else a diffusers folder."""
    device: str = "cuda"
    """Where it runs."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the frozen weights."""
    compiled: bool = True
    """After eager also with torch.compile of the network."""
    backend: str = "inductor"
    """Of torch.compile."""
    peak_tflops: float | None = None
    """The chip's peak in that dtype, 10^12 operations a second; None looks it up."""
    images: int = 32
    """Images an iteration."""
    num_steps: int = 10
    """Denoising steps T; rates are for T steps."""
    micro_batch: int = 8
    """Transitions that go through the network at a time in training."""
    rounds: int = 3
    """Iterations that are timed."""
    results: Path = RESULTS
    """Where rows go."""

    def __post_init__(self) -> None:
        """Refuse what would be measured wrongly."""
        if self.images % self.micro_batch:
            raise ValueError(
                f"images={self.images} is no multiple of micro_batch={self.micro_batch}: the rest would be a batch of "
                "another shape, compiled by itself"
            )
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1")
        if self.dtype == "float32" and self.peak_tflops is None:
            raise ValueError("the table of peaks is for half precision; give --peak-tflops for float32")


def device_name(device: str) -> str:
    """What the chip calls itself.

    Raises:
        ValueError: there is no such GPU.
    """
    if torch.device(device).type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device={device}: no GPU was found; --device cpu with --model FOLDER tries the program out")
    return torch.cuda.get_device_name(device)


def peak_of(chip: str) -> float:
    """The chip's peak in half precision, 10^12 operations a second.

    Raises:
        ValueError: the table lacks it, or it is a part of a chip.
    """
    for name, peak in PEAK_TFLOPS.items():  # H100 after its variants
        if re.search(rf"\b{name}\b", chip) and "MIG" not in chip:
            return peak
    raise ValueError(f"the peak of {chip!r} is not in the table; give --peak-tflops from its data sheet")


def load(settings: Settings) -> StableDiffusionBackbone:
    """What is measured, with guidance and adapters of the preset sd15."""
    # The layers' own operations are counted; in bfloat16, which is measured, nothing would be folded anyway.
    model = replace(PRESETS["sd15"]().model, fold_lora=False)
    model = replace(model, name=settings.model, device=settings.device, dtype=settings.dtype)
    if settings.model != "sd15":
        return build_backbone(model)
    pipeline = stable_diffusion_15(settings.device).to(DTYPES[settings.dtype])
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    lora = LoRA(model.lora_rank, model.lora_alpha, model.lora_targets)
    return StableDiffusionBackbone(pipeline, guidance_scale=model.guidance_scale, lora=lora, fold_lora=model.fold_lora)


class Job:
    """DDPO-IS over all steps; its two halves by themselves. Each ends when the device has done its work."""

    def __init__(self, backbone: StableDiffusionBackbone, settings: Settings, *, images: int) -> None:
        """Prepare iterations of so many images."""
        self.images = images
        sampler = backbone.sampler(settings.num_steps)
        policy = self._policy = make_policy(backbone, sampler, backbone.conditioning([PROMPT]))
        env = DenoisingEnv(backbone, settings.num_steps, brightness, [PROMPT], batch_size=images, seed=0)
        self._batches = iter(make_collector(env, policy, iterations=settings.rounds + 1))
        self._loss, self._micro_batch = ddpo_is_loss(policy), settings.micro_batch
        self._optimizer = torch.optim.AdamW([each for each in policy.parameters() if each.requires_grad], fused=True)
        self._steps, self._device = trainable_steps(sampler), backbone.device
        self._batch: TensorDictBase = TensorDict()

    def sample(self) -> None:
        """Images and their rewards."""
        self._batch = next(self._batches)
        self._finish()

    def train(self) -> None:
        """An update from the images sampled last."""
        loop = train(
            [self._batch],
            self._loss,
            self._optimizer,
            advantage=PromptAdvantage(),
            sampler=TransitionSampler(self._steps),
            micro_batch=self._micro_batch,
        )
        next(loop)
        self._finish()

    def backpropagate(self) -> None:
        """What `train` has the network do, for counting: TorchRL's functional losses break FlopCounterMode."""
        for transition in self._batch[:, self._steps].reshape(-1).split(1):  # attention as defined takes much memory
            self._policy.get_dist(transition).log_prob(transition["action"]).sum().backward()
        self._optimizer.zero_grad()

    def _finish(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()


def operations(work: Callable[[], None]) -> int:
    """Floating-point operations of `work`, a product and a sum being two."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def measure(job: Job, work: dict[str, int], peak_tflops: float, rounds: int) -> dict[str, object]:
    """Rates, and shares of the peak, of both halves of an iteration.

    Args:
        job: what is timed.
        work: floating-point operations an image of "sampling" and "training".
        peak_tflops: of the chip, 10^12 a second.
        rounds: iterations after the first.
    """
    seconds = [(timed(job.sample), timed(job.train)) for _ in range(rounds + 1)][1:]
    row: dict[str, object] = {}
    for half, times in zip(("sampling", "training"), zip(*seconds, strict=True), strict=True):
        rate = job.images / statistics.median(times)
        row[f"{half}_images_per_second"] = float(f"{rate:.4g}")
        row[f"{half}_share_of_peak"] = float(f"{rate * work[half] / (peak_tflops * 1e12):.3g}")
        row[f"{half}_tflop_per_image"] = float(f"{work[half] / 1e12:.4g}")
    return row


def main(settings: Settings) -> None:
    """Measure eager, then compiled."""
    chip = device_name(settings.device)
    peak = settings.peak_tflops or peak_of(chip)  # an unknown chip shows before anything is built
    commit, backbone, rows = provenance(), load(settings), []
    one = Job(backbone, settings, images=1)
    work = {"sampling": operations(one.sample), "training": operations(one.backpropagate)}
    for mode in ("eager", "compiled") if settings.compiled else ("eager",):
        if mode == "compiled":  # in place; each of the two batch shapes by itself
            backbone.unet.compile(dynamic=False, backend=settings.backend)
        row = {
            "device": chip,
            "model": settings.model,
            "dtype": settings.dtype,
            "mode": mode,
            **measure(Job(backbone, settings, images=settings.images), work, peak, settings.rounds),
            "peak_tflops": peak,
            "images": settings.images,
            "num_steps": settings.num_steps,
            "micro_batch": settings.micro_batch,
            "rounds": settings.rounds,
            **commit,
        }
        append(row, settings.results)
        rows.append(row)
    print(markdown(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
