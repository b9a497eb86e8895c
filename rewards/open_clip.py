"""Checkpoints in OpenCLIP's format, renamed for transformers' `CLIPModel`."""

from __future__ import annotations

import re

from torch import Tensor

# From OpenCLIP to transformers; what follows `resblocks.N.` is translated by `BLOCK`.
NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
IN_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under transformers' names: projections transposed, the joint input projection cut into three.

    Raises:
        ValueError: a name is not one of OpenCLIP's vision transformers.
    """
    result: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key in NAMES:
            result[NAMES[key]] = value
        elif key in TRANSPOSED:
            result[TRANSPOSED[key]] = value.T.contiguous()
        elif block := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", key):
            visual, number, part, kind = block.groups()
            prefix = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}."
            result |= _block_part(key, prefix, part, kind, value)
        else:
            raise _unknown(key)
    return result


def _block_part(key: str, prefix: str, part: str, kind: str, value: Tensor) -> dict[str, Tensor]:
    if part == "attn.in_proj":
        thirds = zip(IN_PROJECTIONS, value.chunk(3), strict=True)
        return {f"{prefix}self_attn.{name}.{kind}": third.contiguous() for name, third in thirds}
    if part not in BLOCK:
        raise _unknown(key)
    return {f"{prefix}{BLOCK[part]}.{kind}": value}


def _unknown(key: str) -> ValueError:
    return ValueError(
        f"the checkpoint has a weight {key!r}, which is none of OpenCLIP's: this is another kind of model."
    )
