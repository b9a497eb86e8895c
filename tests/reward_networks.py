"""OpenCLIP's and ImageReward's architectures under their published names, small, with random weights."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rewards.laion import AestheticHead


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that every part of the network shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim:
                centre = 1.0 if re.search(r"(norm|ln_)\w*\.weight$", name.lower()) else 0.0
                parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


class OpenCLIPBlock(nn.Module):
    """A residual block as in OpenCLIP's source, with torch's own attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp.c_proj(nn.functional.gelu(self.mlp.c_fc(self.ln_2(x))))


def open_clip_blocks(width: int) -> nn.Module:
    transformer = nn.Module()
    transformer.resblocks = nn.ModuleList([OpenCLIPBlock(width), OpenCLIPBlock(width)])
    return transformer


class OpenCLIP(nn.Module):
    """OpenCLIP's `CLIP` with a vision transformer, written from its published checkpoints' names."""

    def __init__(self, width: int = 32, projection: int = 24) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, width, 16, stride=16, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.zeros(width))
        self.visual.positional_embedding = nn.Parameter(torch.zeros(10, width))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.visual.transformer = open_clip_blocks(width)
        self.visual.proj = nn.Parameter(torch.zeros(width, projection))
        self.token_embedding = nn.Embedding(64, width)
        self.positional_embedding = nn.Parameter(torch.zeros(77, width))
        self.transformer = open_clip_blocks(width)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, projection))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def image(self, pixels: Tensor) -> Tensor:
        x = self.visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], 1) + self.visual.positional_embedding
        x = self.visual.ln_pre(x)
        for block in self.visual.transformer.resblocks:
            x = block(x, None)
        return self.visual.ln_post(x[:, 0]) @ self.visual.proj

    def text(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        mask = torch.full((length, length), -torch.inf).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        end = (tokens == 1).int().argmax(1)
        return self.ln_final(x)[torch.arange(len(x)), end] @ self.text_projection


class BLIPReward(nn.Module):
    """ImageReward's modules under the names of its published checkpoint, filled from transformers' small BLIP."""

    def __init__(self) -> None:
        super().__init__()
        vision = BlipVisionConfig(
            hidden_size=128,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=48,
            patch_size=16,
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=40,
            hidden_size=64,
            encoder_hidden_size=128,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=36,
        )
        self.vision = (
            randomise(BlipVisionModel(vision), seed=4).half().float()
        )  # what a checkpoint in half precision holds
        self.text = randomise(BlipTextModel(text, add_pooling_layer=False), seed=5)
        self.head = randomise(AestheticHead(64), seed=6)
        self.head.layers[7].weight.data /= 10  # scores of the published order of size

    def published(self) -> dict[str, Tensor]:
        names = {
            "embeddings.class_embedding": "cls_token",
            "embeddings.position_embedding": "pos_embed",
            "embeddings.patch_embedding": "patch_embed.proj",
            "encoder.layers": "blocks",
            "self_attn.projection": "attn.proj",
            "self_attn.qkv": "attn.qkv",
            "layer_norm": "norm",
            "post_layernorm": "norm",
        }
        result = {}
        for key, value in self.vision.state_dict().items():
            for ours, theirs in names.items():
                key = key.replace(ours, theirs)
            result[f"blip.visual_encoder.{key}"] = value.half()
        result |= {f"blip.text_encoder.{key}": value for key, value in self.text.state_dict().items()}
        result["blip.text_encoder.embeddings.position_ids"] = torch.arange(36)[None]
        result |= {"blip.vision_proj.weight": torch.zeros(8, 128), "blip.text_proj.bias": torch.zeros(8)}
        return result | {f"mlp.{key}": value for key, value in self.head.state_dict().items()}
