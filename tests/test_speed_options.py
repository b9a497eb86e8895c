"""What makes the network faster changes nothing but rounding: each option and their combinations."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Conv2d
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from agents import OnPolicyRatioCheck, PromptAdvantage, ddpo_is_loss, make_collector, make_policy
from agents.training import update
from diffusion_env import DenoisingEnv, LoRA, StableDiffusionBackbone
from diffusion_env.folded_lora import FoldedConv2d, FoldedLinear, _Linear

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut")
OPTIONS = ("fold_lora", "channels_last", "gradient_checkpointing")
CLIP = 1e-4  # DDPO's; a tenth of it is what the ratio may be off


def trained(folder, **options: bool) -> StableDiffusionBackbone:
    """The tiny pipeline with adapters everywhere, all of them far from 0."""
    lora = LoRA(rank=3, alpha=5.0, targets=TARGETS)
    backbone = StableDiffusionBackbone.from_pretrained(folder, lora=lora, guidance_scale=2.0, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return backbone


def one_update(backbone: StableDiffusionBackbone) -> tuple[float, dict[str, torch.Tensor]]:
    """The ratio's error on data of the current policy, and how far a gradient step on them moves each parameter."""
    torch.manual_seed(0)
    conditioning = backbone.conditioning(["a", "b"])
    policy = make_policy(backbone, backbone.sampler(2), conditioning)
    env = DenoisingEnv(backbone, 2, lambda images, _: images[:, 0].mean((1, 2)), ["a", "b"], batch_size=3, seed=0)
    data = PromptAdvantage(min_count=32)(next(iter(make_collector(env, policy, iterations=1)))).reshape(-1)
    error = OnPolicyRatioCheck(policy, clip_range=CLIP)(data[:4])["ratio_error"]
    loss = ddpo_is_loss(policy, clip_range=CLIP)
    parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    before = {name: p.detach().clone() for name, p in backbone.named_parameters() if p.requires_grad}
    update(loss, torch.optim.SGD(parameters, lr=1.0), parameters, data, 4, 1.0)
    return error, {name: p.detach() - before[name] for name, p in backbone.named_parameters() if name in before}


@pytest.fixture(scope="module")
def plain_update(tiny_folder) -> dict[str, torch.Tensor]:
    """The update with PEFT's own layers, nothing else switched on."""
    return one_update(trained(tiny_folder, **dict.fromkeys(OPTIONS, False)))[1]


def assert_same_update(backbone: StableDiffusionBackbone, plain: dict[str, torch.Tensor]) -> None:
    error, moved = one_update(backbone)
    assert error < CLIP / 10
    assert moved.keys() == plain.keys()
    largest = max(change.abs().max().item() for change in plain.values())
    for name, change in moved.items():
        assert change.abs().max() > 0, name
        torch.testing.assert_close(
            change, plain[name], rtol=1e-3, atol=1e-4 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("chosen", list(product((False, True), repeat=len(OPTIONS)))[1:])
def test_exact_options_leave_ratio_and_update(tiny_folder, plain_update, chosen):
    backbone = trained(tiny_folder, **dict(zip(OPTIONS, chosen, strict=True)))
    folded = [module for module in backbone.modules() if isinstance(module, FoldedLinear | FoldedConv2d)]
    assert bool(folded) == chosen[0]
    assert_same_update(backbone, plain_update)


@pytest.mark.long  # minutes of compilation
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("fold_lora", [False, True])
def test_compiling_leaves_ratio_and_update(tiny_folder, plain_update, fold_lora):
    assert_same_update(trained(tiny_folder, fold_lora=fold_lora, compile=True), plain_update)


def test_half_precision_is_not_folded(tiny_folder):
    backbone = StableDiffusionBackbone.from_pretrained(tiny_folder, dtype="bfloat16", lora=LoRA())
    assert not [module for module in backbone.modules() if isinstance(module, FoldedLinear | FoldedConv2d)]


@pytest.mark.parametrize("x_shape", [(3, 4), (2, 3, 4)])
def test_the_folded_linear_layers_derivatives_are_finite_differences(x_shape):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (x_shape, (5, 4), (5,), (2, 4), (5, 2))
    )
    for each in (x, a, b):
        each.requires_grad_()

    def layer(x, a, b):
        return _Linear.apply(x, weight, bias, a, b, 1.7)

    torch.testing.assert_close(layer(x, a, b), x @ weight.T + bias + 1.7 * (x @ a.T) @ b.T)
    assert gradcheck(layer, (x, a, b)) and gradgradcheck(layer, (x, a, b))


@pytest.mark.parametrize("stride, kernel", [(1, 3), (2, 3), (1, 1)])
def test_a_folded_convolution_is_pefts_layer_to_the_bit_with_gradients_and_but_for_rounding_without(stride, kernel):
    torch.manual_seed(0)
    base = nn.Conv2d(3, 4, kernel, stride, kernel // 2)
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=False)
    layers = [kind(base, "policy", config, r=2, lora_alpha=3) for kind in (FoldedConv2d, Conv2d)]
    layers[0].load_state_dict(layers[1].state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(*(layer(x) for layer in layers))
    with torch.no_grad():
        torch.testing.assert_close(*(layer(x) for layer in layers))
        plain = layers[1](x)
        layers[0].lora_B["policy"].weight.zero_()
        assert not torch.allclose(layers[0](x), plain)
