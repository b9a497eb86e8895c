"""The denoiser: latents of captioned drawings, precomputed once, then v-prediction with min-SNR weights."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor
from transformers import AutoTokenizer, BertModel

from diffusion_env.embedded import write_text_encoder

from .augment import compose, step_generator
from .emoji import Drawings
from .trainer import fit

DROPPED_CAPTIONS = 0.1
SNR_GAMMA = 5.0


@dataclass(frozen=True)
class Phase:
    """A part of training: how many steps, how freely drawings are placed, how often animals are drawn."""

    steps: int
    scale: tuple[float, float]
    animal_share: float
    animal_copies: int
    other_copies: int


# First everything, placed freely; then mostly animals, nearly filling the picture, which settles their shapes.
PHASES = (Phase(1300, (0.75, 1.0), 0.45, 40, 6), Phase(2200, (0.94, 1.0), 0.75, 16, 3))


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, v-prediction, timesteps counted from the noisy end ("trailing")."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # StableDiffusionPipeline insists; "trailing" timesteps do not use it
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def build_unet() -> UNet2DConditionModel:
    """Two levels with cross-attention, 8 x 8 and 4 x 4: wide rather than deep, which two cores like best."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(80, 160),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=384,
        attention_head_dim=5,  # diffusers' name for the number of heads
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class LatentDataset:
    """Scaled latents [N, 16, 8, 8] (half precision) with their captions; the last state row is the empty caption."""

    latents: Tensor
    caption_index: Tensor
    states: Tensor
    is_animal: Tensor

    def draw(self, count: int, animal_share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents and caption states, `animal_share` of them animals, `DROPPED_CAPTIONS` of them without caption."""
        animals, others = self.is_animal.nonzero()[:, 0], (~self.is_animal).nonzero()[:, 0]
        of_animals = animals[torch.randint(len(animals), (count,), generator=generator)]
        of_others = others[torch.randint(len(others), (count,), generator=generator)]
        chosen = torch.where(torch.rand(count, generator=generator) < animal_share, of_animals, of_others)
        dropped = torch.rand(count, generator=generator) < DROPPED_CAPTIONS
        caption = self.caption_index[chosen].masked_fill(dropped, len(self.states) - 1)
        return self.latents[chosen].float(), self.states[caption]


@torch.no_grad()
def encode_captions(captions: list[str]) -> Tensor:
    """Token states [N, 16, 384] exactly as `StableDiffusionPipeline.encode_prompt` computes them."""
    with tempfile.TemporaryDirectory() as folder:
        write_text_encoder(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
        encoder = BertModel.from_pretrained(f"{folder}/text_encoder").eval()
    states = []
    for start in range(0, len(captions), 64):
        tokens = tokenizer(
            captions[start : start + 64],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        states.append(encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0])
    return torch.cat(states)


@torch.no_grad()
def load_latents(drawings: Drawings, vae: AutoencoderKL, phase: Phase, path: Path, *, seed: int = 0) -> LatentDataset:
    """Latents of several augmented copies of every drawing that is not held out, computed into `path` once."""
    if not path.exists():
        train = drawings.select(~drawings.held_out)
        rgba, is_animal = torch.from_numpy(train.rgba), torch.from_numpy(train.animal >= 0)
        copies = torch.where(is_animal, phase.animal_copies, phase.other_copies)
        index = torch.arange(len(rgba)).repeat_interleave(copies)
        captions = sorted(set(train.caption.tolist()))
        row = {caption: i for i, caption in enumerate(captions)}
        caption_of = torch.tensor([row[caption] for caption in train.caption.tolist()])
        latents = []
        for step, chosen in enumerate(index.split(256)):
            generator = step_generator(seed, step)
            images = compose(rgba[chosen], generator, scale=phase.scale) * 2 - 1
            posterior = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
            latents.append((posterior.sample(generator) * vae.config.scaling_factor).half())
        states = encode_captions([*captions, ""])
        torch.save(vars(LatentDataset(torch.cat(latents), caption_of[index], states, is_animal[index])), path)
    return LatentDataset(**torch.load(path, weights_only=True))


def train_unet(
    drawings: Drawings,
    vae: AutoencoderKL,
    folder: Path,
    *,
    phases: Sequence[Phase] = PHASES,
    batch: int = 64,
    seed: int = 0,
) -> UNet2DConditionModel:
    """Minimise the min-SNR weighted v-prediction error (Hang et al. 2023, arXiv:2303.09556), phase after phase."""
    torch.manual_seed(seed)
    unet, scheduler = build_unet(), build_scheduler()
    for number, phase in enumerate(phases, 1):
        data = load_latents(drawings, vae, phase, folder / f"latents-{number}.pt", seed=seed)
        loss_at = partial(_min_snr_loss, unet, scheduler, data, phase.animal_share, batch, seed)
        fit(unet, loss_at, folder / f"unet-{number}.pt", steps=phase.steps, learning_rate=1e-3)
    return unet


def _min_snr_loss(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    data: LatentDataset,
    animal_share: float,
    batch: int,
    seed: int,
    step: int,
) -> Tensor:
    generator = step_generator(seed, step)
    x0, states = data.draw(batch, animal_share, generator)
    noise = torch.randn(x0.shape, generator=generator)
    # One timestep from each of `batch` equal strata: the same expectation as uniform draws, less variance.
    horizon = scheduler.config.num_train_timesteps
    t = ((torch.arange(batch) + torch.rand(batch, generator=generator)) * (horizon / batch)).long()
    x_t = scheduler.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
    error = unet(x_t, t, states).sample - scheduler.get_velocity(x0, noise, t)
    snr = compute_snr(scheduler, t)
    return (snr.clamp(max=SNR_GAMMA) / (snr + 1) * error.square().mean((1, 2, 3))).mean()
