"""LoRA layers that fold the adapter into the weight in the forward pass and stay low-rank in the backward pass.

PEFT's layers compute W x + s B (A x): two thin products, a scaling and a sum beside every product, each of which reads
or writes whole activations. Here y = (W + s B A) x, and with g = dL/dy the gradients are those of the same function,

    dL/dx = (W + s B A)^T g,    dL/dB = s g (A x)^T,    dL/dA = s (B^T g) x^T,

so nothing of the size of W's own gradient is ever computed. Convolutions are folded only where no gradient is recorded,
as in a rollout: their backward pass is faster as PEFT has it. Exact but for rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F


class FoldedLinear(lora.Linear):
    """PEFT's LoRA around `nn.Linear`, folded where there is one adapter and it is on."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output."""
        if not _folds(self):
            return super().forward(x, *args, **kwargs)
        base, (name,) = self.base_layer, self.active_adapters
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _Linear.apply(x, base.weight, base.bias, a, b, self.scaling[name])


class FoldedConv2d(lora.Conv2d):
    """PEFT's LoRA around `nn.Conv2d`, folded where there is one adapter, it is on, and no gradient is recorded."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output."""
        if torch.is_grad_enabled() or not _folds(self):
            return super().forward(x, *args, **kwargs)
        base, (name,) = self.base_layer, self.active_adapters
        weight = _folded(base.weight, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
        return F.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation)


FOLDED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FoldedLinear, nn.Conv2d: FoldedConv2d}


def _folds(layer: lora.LoraLayer) -> bool:
    return not layer.disable_adapters and not layer.merged and len(layer.active_adapters) == 1


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Of differentiable operations on what was saved, so that a second derivative exists.
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad @ torch.addmm(weight, b, a, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
        grad_a = (grad @ b).T @ x * ctx.scale
        grad_b = grad.T @ (x @ a.T) * ctx.scale
        return grad_x, None, None, grad_a, grad_b, None


def _folded(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + s B A of a convolution; the product is laid out as channels-last, the format that the weights have."""
    rank, channels, height, width = a.shape
    product = b.flatten(1) @ a.permute(0, 2, 3, 1).reshape(rank, -1)
    return weight + scale * product.view(-1, height, width, channels).permute(0, 3, 1, 2)
