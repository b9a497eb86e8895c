"""The denoiser: latents of captioned pictures, computed once, then v-prediction."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, BertModel

from diffusion_env.embedded import write_text_encoder

from .augment import step_generator
from .captioned import Mixture, training_pictures
from .emoji import Drawings
from .trainer import fit
from .vae import LATENT_CHANNELS

DROPPED_CAPTIONS = 0.1


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
    """Three levels, 16 x 16, 8 x 8 and 4 x 4 positions, cross-attention on the lower two: about equal cost on each."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=384,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class LatentDataset:
    """Scaled latents [N, 8, 16, 16] and caption states [M, 16, 384], both in half precision.

    Latent n has caption `caption_index[n]` and is drawn with probability `weight[n]`; the last state is the empty
    caption's.
    """

    latents: Tensor
    caption_index: Tensor
    states: Tensor
    weight: Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents and caption states, `DROPPED_CAPTIONS` of them without caption."""
        chosen = torch.multinomial(self.weight, count, replacement=True, generator=generator)
        dropped = torch.rand(count, generator=generator) < DROPPED_CAPTIONS
        caption = self.caption_index[chosen].masked_fill(dropped, len(self.states) - 1)
        return self.latents[chosen].float(), self.states[caption].float()


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
def load_latents(
    drawings: Drawings, vae: AutoencoderKL, path: Path, mixture: Mixture, *, seed: int = 0
) -> LatentDataset:
    """Latents of the training pictures, computed into `path` once."""
    if not path.exists():
        latents, captions, weights = [], [], []
        for step, part in enumerate(tqdm(training_pictures(drawings, mixture, seed=seed), desc="latents")):
            images = (part.images * 2 - 1).to(vae.device).contiguous(memory_format=torch.channels_last)
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=step_generator(seed + 2, step))
            sample = posterior.mean.cpu() + posterior.std.cpu() * noise
            latents.append((sample * vae.config.scaling_factor).half().contiguous())
            captions += part.captions
            weights.append(part.weight)
        distinct = sorted(set(captions))
        row = {caption: i for i, caption in enumerate(distinct)}
        caption_index = torch.tensor([row[caption] for caption in captions])
        states = encode_captions([*distinct, ""]).half()
        dataset = LatentDataset(torch.cat(latents), caption_index, states, torch.cat(weights))
        torch.save(vars(dataset), path)
    return LatentDataset(**torch.load(path, weights_only=True))


def train_unet(
    drawings: Drawings,
    vae: AutoencoderKL,
    folder: Path,
    *,
    steps: int,
    mixture: Mixture,
    device: str = "cpu",
    batch: int = 64,
    seed: int = 0,
) -> UNet2DConditionModel:
    """Minimise the v-prediction error with timesteps drawn uniformly."""
    data = load_latents(drawings, vae, folder / "latents.pt", mixture, seed=seed)
    torch.manual_seed(seed)
    unet, scheduler = build_unet().to(device), build_scheduler()
    loss_at = partial(_v_prediction_loss, unet, scheduler, data, batch, seed)
    fit(unet, loss_at, folder / "unet.pt", steps=steps, learning_rate=1e-3)
    return unet


def _v_prediction_loss(
    unet: UNet2DConditionModel, scheduler: DDIMScheduler, data: LatentDataset, batch: int, seed: int, step: int
) -> Tensor:
    """Mean squared error of v, which weights the error of x0 by SNR + 1 (Salimans and Ho 2022, arXiv:2202.00512).

    Min-SNR weights (arXiv:2303.09556) would multiply it by min(SNR, 5) / (SNR + 1). With latents of equal variance in
    2,048 dimensions a picture's layout is decided at SNR 0.02 to 0.2, where they leave 2 to 17 %.
    """
    generator = step_generator(seed, step)
    x0, states = data.draw(batch, generator)
    noise = torch.randn(x0.shape, generator=generator)
    # One timestep from each of `batch` equal strata: the same expectation as uniform draws, less variance.
    horizon = scheduler.config.num_train_timesteps
    t = ((torch.arange(batch) + torch.rand(batch, generator=generator)) * (horizon / batch)).long()
    x_t = scheduler.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
    target = scheduler.get_velocity(x0, noise, t)
    device = unet.device
    return F.mse_loss(unet(x_t.to(device), t.to(device), states.to(device)).sample, target.to(device))
