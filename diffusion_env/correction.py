"""A small network beside the denoiser: latents, timestep and prompt to a field over the latents, zero at first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffusers import UNet2DConditionModel
from tensordict import TensorDict
from torch import Tensor, nn

from .backbones import StableDiffusionBackbone


class CorrectionUNet(nn.Module):
    """The correction network g_phi of Nabla-DB (Liu et al. 2025, arXiv:2412.07775) for a Stable Diffusion pipeline.

    A `UNet2DConditionModel` with the authors' sizes. Unlike theirs, whose last layer starts with a zero bias and random
    weights, it is exactly zero before training. Float32, without guidance.
    """

    def __init__(
        self,
        backbone: StableDiffusionBackbone,
        *,
        block_out_channels: Sequence[int] = (64, 128, 256, 256),
        layers_per_block: int = 1,
    ) -> None:
        """Build it on the backbone's device, for its latents and encoded prompts.

        Args:
            backbone: gives the latents' shape and the width of the encoded prompts.
            block_out_channels: channels of each resolution, the finest first; each halves height and width.
            layers_per_block: residual blocks a resolution.

        Raises:
            ValueError: the latents cannot be halved that often.
        """
        super().__init__()
        channels, height, width = backbone.latent_shape
        levels = len(block_out_channels)
        if math.gcd(height, width) % 2 ** (levels - 1):
            raise ValueError(
                f"latents of {height} x {width} cannot be halved {levels - 1} times; give fewer block_out_channels "
                f"than {levels}"
            )
        self.unet = UNet2DConditionModel(
            sample_size=(height, width),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(block_out_channels),
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            layers_per_block=layers_per_block,
            norm_num_groups=math.gcd(32, *block_out_channels),
            cross_attention_dim=backbone.unet.config.cross_attention_dim,
        ).to(backbone.device)
        for parameter in self.unet.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_t: Tensor, timestep: Tensor, conditioning: TensorDict) -> Tensor:
        """Float32 [B, *latent].

        Args:
            x_t: latents [B, *latent].
            timestep: int64 [B].
            conditioning: what the backbone's `conditioning(...)` returns for the batch's prompt ids.
        """
        states = conditioning["encoder_hidden_states"].float()
        return self.unet(x_t.float(), timestep, encoder_hidden_states=states).sample
