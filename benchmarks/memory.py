"""Memory: what a trajectory takes in the buffer beside T + 1 latents, and the peaks of a process on the CPU.

    python -m benchmarks.memory

A trajectory's floor is its T + 1 latents in float32; `bytes_per_trajectory` counts every byte that the rollout keeps
alive, a shared tensor once. The peaks are resident memory above what the process held before that part, which includes
the networks' activations; `handover` is the copy from the collector's rollout to the stored one. Linux only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tensordict import TensorDictBase

from agents import PromptAdvantage, TransitionSampler, ddpo_is_loss, make_collector, make_policy, share_latents
from agents.training import train
from benchmarks.collector_overhead import brightness
from benchmarks.main_job import append, provenance
from diffusion_env import DenoisingEnv, LoRA, StableDiffusionBackbone, embedded_folder, prompt_set

RESULTS = Path(__file__).parent / "results" / "memory.csv"


@dataclass(frozen=True)
class Settings:
    """Size of the job."""

    images: int = 64
    """Images a batch."""
    num_steps: int = 8
    """Denoising steps T."""
    micro_batch: int = 128
    """Transitions that go through the network at a time."""
    model: str = "embedded"
    """'embedded', or a diffusers folder."""


def kept_bytes(rollout: TensorDictBase) -> int:
    """Bytes that the tensors of `rollout` keep alive: whole storages, each once."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in rollout.values(True, True)
    }
    return sum(storages.values())


def peak(work: Callable[[], object]) -> int:
    """Bytes of resident memory that `work` takes at its peak beyond what the process has."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main(settings: Settings) -> None:
    """Measure and write."""
    folder = embedded_folder() if settings.model == "embedded" else settings.model
    backbone = StableDiffusionBackbone.from_pretrained(folder, guidance_scale=3.0, lora=LoRA())
    sampler, conditioning = backbone.sampler(settings.num_steps), backbone.conditioning(prompt_set("animals"))
    policy = make_policy(backbone, sampler, conditioning)
    env = DenoisingEnv(backbone, settings.num_steps, brightness, conditioning.prompts, batch_size=settings.images)
    rollouts: list[TensorDictBase] = []

    def sample() -> None:
        with torch.no_grad():
            rollouts.append(env.rollout(settings.num_steps, policy))

    sampling = peak(sample)
    handover = peak(lambda: rollouts.append(share_latents(rollouts[0])))
    loss = ddpo_is_loss(policy, clip_range=1e-3)
    optimizer = torch.optim.AdamW([parameter for parameter in loss.parameters() if parameter.requires_grad])
    loop = train(
        make_collector(env, policy, iterations=1),
        loss,
        optimizer,
        advantage=PromptAdvantage(),
        sampler=TransitionSampler(range(settings.num_steps)),
        micro_batch=settings.micro_batch,
    )
    iteration = peak(lambda: next(loop))
    kept = kept_bytes(rollouts[1]) / settings.images
    floor = (settings.num_steps + 1) * rollouts[1]["latents"][0, 0].nbytes
    row = {
        "bytes_per_trajectory": round(kept),
        "floor": floor,
        "ratio": round(kept / floor, 4),
        "peak_sampling_mib": round(sampling / 2**20, 1),
        "peak_handover_mib": round(handover / 2**20, 1),
        "peak_iteration_mib": round(iteration / 2**20, 1),
        "resident_mib": round(_status("VmRSS") / 2**20, 1),
        "images": settings.images,
        "num_steps": settings.num_steps,
        "micro_batch": settings.micro_batch,
        **provenance(),
    }
    append(row, RESULTS)
    print(row)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
