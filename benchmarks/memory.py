"""Memory: what a trajectory takes in the buffer beside T + 1 latents, and the peaks of a process on the CPU.

    python -m benchmarks.memory

A trajectory's floor is its T + 1 latents in float32; `bytes_per_trajectory` counts every byte that the rollout keeps
alive, a shared tensor once; `bytes_at_handover` what the collector's rollout and the stored one do together. The
peaks are resident memory above what the process held before that part, the networks' activations included, and in
`peak_resident_mib` the whole of it. Linux only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tensordict import TensorDictBase

from agents import PromptAdvantage, TransitionSampler, ddpo_is_loss, make_collector, make_policy
from agents.training import train
from benchmarks.collector_overhead import brightness
from benchmarks.main_job import append, markdown, provenance
from configs import ModelSettings, SamplingSettings, TrainingSettings, build_backbone
from diffusion_env import DenoisingEnv, prompt_set

RESULTS = Path(__file__).parent / "results" / "memory.csv"


@dataclass(frozen=True)
class Settings:
    """Size of the job."""

    images: int = SamplingSettings.images_per_iteration
    """Images a batch."""
    num_steps: int = SamplingSettings.num_steps
    """Denoising steps T, all of which train."""
    micro_batch: int = TrainingSettings.micro_batch
    """Transitions that go through the network at a time."""
    model: str = "embedded"
    """'embedded', or a diffusers folder."""
    results: Path = RESULTS
    """Where the row goes."""


def kept_bytes(*data: TensorDictBase) -> int:
    """Bytes that the tensors of `data` keep alive together: whole storages, each once."""
    storages = (value.untyped_storage() for each in data for value in each.values(True, True))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


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
    commit = provenance()
    backbone = build_backbone(ModelSettings(name=settings.model, device="cpu"))
    sampler, conditioning = backbone.sampler(settings.num_steps), backbone.conditioning(prompt_set("animals"))
    policy = make_policy(backbone, sampler, conditioning)
    env = DenoisingEnv(backbone, settings.num_steps, brightness, conditioning.prompts, batch_size=settings.images)
    collector = make_collector(env, policy, iterations=2)
    store, held = collector.postproc, []

    def storing(rollout: TensorDictBase) -> TensorDictBase:
        stored = store(rollout)
        held.append((kept_bytes(stored), kept_bytes(rollout, stored)))
        return stored

    collector.postproc = storing
    batches = iter(collector)
    sampling = peak(lambda: next(batches))
    loss = ddpo_is_loss(policy, clip_range=1e-3)
    optimizer = torch.optim.AdamW([parameter for parameter in loss.parameters() if parameter.requires_grad])
    loop = train(
        batches,
        loss,
        optimizer,
        advantage=PromptAdvantage(),
        sampler=TransitionSampler(range(settings.num_steps)),
        micro_batch=settings.micro_batch,
    )
    iteration = peak(lambda: next(loop))
    kept, handover = (size / settings.images for size in held[0])
    floor = (settings.num_steps + 1) * env.observation_spec["latents"].zero()[0].nbytes
    row = {
        "bytes_per_trajectory": round(kept),
        "floor": floor,
        "ratio": round(kept / floor, 4),
        "bytes_at_handover": round(handover),
        "peak_sampling_mib": round(sampling / 2**20, 1),
        "peak_iteration_mib": round(iteration / 2**20, 1),
        "peak_resident_mib": round(_status("VmHWM") / 2**20, 1),
        "images": settings.images,
        "num_steps": settings.num_steps,
        "micro_batch": settings.micro_batch,
        **commit,
    }
    append(row, settings.results)
    print(markdown([row]))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
