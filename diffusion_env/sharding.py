"""A UNet whose weights are divided over processes: FSDP2, which is PyTorch's `fully_shard`.

Each process keeps a share of every weight, of its gradient and of what an optimiser remembers of it; a block's whole
weights are brought together for as long as the block computes. All processes must therefore call the network, and go
back through it, equally often.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def shard(unet: UNet2DConditionModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Divide `unet`, in place, over the processes of `mesh`, on whose device it then is.

    Args:
        unet: float32 and contiguous; equal on all processes. On the CPU, so that no GPU ever holds the whole of it.
        mesh: of one dimension.
        dtype: what it computes in; weights, gradients and their sums over processes stay float32.
    """
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
        # Also the outermost is divided again after the forward pass: outside of one, every parameter is a share.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
        # Summed rather than averaged: losses are weighed by a process's share of the transitions.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction with a factor


def save_whole(unet: UNet2DConditionModel, folder: str | Path) -> None:
    """Write `unet` in diffusers' format; if it is divided all processes must call this, and the first one writes."""
    weights = get_model_state_dict(unet, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not weights:  # the first process has them
        return
    with torch.device("meta"):
        whole = UNet2DConditionModel.from_config(unet.config)
    whole.load_state_dict(weights, assign=True)
    whole.save_pretrained(folder)


def load_whole(unet: UNet2DConditionModel, folder: str | Path) -> None:
    """Take over the weights that `save_whole` wrote; each process reads them and keeps its share."""
    weights = UNet2DConditionModel.from_pretrained(folder).state_dict()
    set_model_state_dict(unet, weights, options=StateDictOptions(full_state_dict=True))
