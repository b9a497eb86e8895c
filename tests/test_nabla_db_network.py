"""Nabla-DB on a small true pipeline: residuals against autograd, what trains, the correction network."""

import pytest
import torch
from tensordict import TensorDict
from torch.distributions import Independent, Normal
from torch.nn.attention import SDPBackend, sdpa_kernel

from agents import NablaDBLoss, RewardGradient, TransitionSampler, make_collector, make_policy, train
from diffusion_env import CorrectionUNet, DenoisingEnv, LoRA, StableDiffusionBackbone
from tests.chain import PROMPTS, STEPS, gradients, total
from tests.tiny import tiny_pipeline


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.fixture
def real(trained_backbone):
    """Policy with the true log-density, sampler, and transitions at random latents."""
    sampler = trained_backbone.sampler(STEPS)
    cache = trained_backbone.conditioning(PROMPTS)
    policy = make_policy(trained_backbone, sampler, cache, log_prob_reduction="sum", keep_model_output=True)
    generator = torch.Generator().manual_seed(4)
    state = TensorDict(
        {
            "latents": torch.randn(4, 4, 8, 8, generator=generator),
            "step": torch.arange(4)[:, None],
            "prompt_id": torch.tensor([[0], [1], [0], [1]]),
        },
        [4],
    )
    torch.manual_seed(0)
    with torch.no_grad():
        data = policy(state)
    for key in ("reward_grad", ("next", "reward_grad")):
        data[key] = torch.randn(4, 4, 8, 8, generator=generator)
    return trained_backbone, sampler, policy, data


def log_prob(policy, data, x_t, x_prev):
    return policy.get_dist(data.clone().set("latents", x_t)).log_prob(x_prev)


def ratio_gradients(real, *, residual):
    """Autograd of the log-density ratio by x_prev and x_t, with the graph of the parameters."""
    backbone, sampler, policy, data = real
    x_t, x_prev = (data[key].clone().requires_grad_() for key in ("latents", "action"))
    ratio = log_prob(policy, data, x_t, x_prev)
    if residual:
        with backbone.reference():
            ratio = ratio - log_prob(policy, data, x_t, x_prev)
    else:
        noising = sampler.noising(data["step"][:, 0], x_t)
        ratio = ratio - Independent(Normal(noising.scale * x_prev, noising.std.expand_as(x_t)), 3).log_prob(x_t)
    return torch.autograd.grad(ratio.sum(), (x_prev, x_t), create_graph=True)


@pytest.mark.parametrize("residual", [True, False])
def test_both_residuals_are_autograds_of_the_log_density_ratio(real, residual):
    """And so are the gradients of their losses by the parameters: those of the backward one are of second order."""
    _, _, policy, data = real
    loss = NablaDBLoss(policy, beta=0.5, residual=residual, backward_trains_policy=True, weighting="sigma")
    losses = loss(data)
    with sdpa_kernel(SDPBackend.MATH):
        by_x_prev, by_x_t = ratio_gradients(real, residual=residual)
    sampler, i = real[1], data["step"][:, 0]
    gamma = torch.cat([sampler.signal_power[1:-1], torch.ones(1)])[i].view(-1, 1, 1, 1)
    target_after = 0.5 * gamma * data["next", "reward_grad"]
    target_before = -0.5 * sampler.signal_power[i].view(-1, 1, 1, 1) * data["reward_grad"]
    std = sampler.std[i].view(-1, 1, 1, 1)
    for key, score, target in (
        ("loss_forward", by_x_prev, target_after),
        ("loss_backward", by_x_t, target_before),
    ):
        weight = std if key == "loss_forward" else 1  # backward matching is not weighted
        expected = (weight * (score - target)).square().mean()
        torch.testing.assert_close(losses[key], expected, rtol=1e-3, atol=1e-6)
        losses[key].backward(retain_graph=True)
        found = gradients(policy)
        expected.backward(retain_graph=True)
        by_hand = gradients(policy)
        assert found.keys() == by_hand.keys() and found
        scale = max(gradient.abs().max() for gradient in by_hand.values())
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, by_hand[name], rtol=1e-2, atol=2e-3 * float(scale))


def test_the_forward_residual_is_free_of_the_sampling_noise(real):
    _, _, policy, data = real
    loss = NablaDBLoss(policy, beta=0)
    other = data.clone().set("action", data["action"] + torch.randn(4, 4, 8, 8))
    assert torch.equal(loss(data)["loss_forward"], loss(other)["loss_forward"])
    assert loss(data)["loss_forward"] > 0


def test_without_reward_the_pretrained_model_stays(backbone):
    """Beta = 0: no gradient at all, for the adapters and for the correction."""
    sampler = backbone.sampler(STEPS)
    policy = make_policy(backbone, sampler, backbone.conditioning(PROMPTS), keep_model_output=True)
    correction = CorrectionUNet(backbone, block_out_channels=(32, 32))
    loss = NablaDBLoss(policy, beta=0, correction=correction, backward_trains_policy=True, trust_region=3.0)
    torch.manual_seed(0)
    data = TensorDict(
        {
            "latents": torch.randn(4, 4, 8, 8),
            "step": torch.arange(4)[:, None],
            "prompt_id": torch.zeros(4, 1, dtype=torch.int64),
        },
        [4],
    )
    with torch.no_grad():
        data = policy(data)
    data["reward_grad"] = data["next", "reward_grad"] = torch.randn(4, 4, 8, 8)
    losses = loss(data)
    losses["loss_forward"].backward(retain_graph=True)
    assert not any(gradient.any() for gradient in gradients(loss).values())
    total(losses).backward()  # its second-order part adds up in another order with the adapters in place
    at_zero = max(gradient.abs().max() for gradient in gradients(loss).values())
    # With a reward it moves, and moves the correction's last layer first.
    loss = NablaDBLoss(policy, beta=1, correction=correction, backward_trains_policy=True)
    total(loss(data)).backward()
    found = gradients(loss)
    assert max(gradient.abs().max() for name, gradient in found.items() if "lora" in name) > 1e4 * at_zero
    assert {name for name, gradient in found.items() if name.startswith("correction") and gradient.any()} == {
        "correction.unet.conv_out.weight",
        "correction.unet.conv_out.bias",
    }


def test_backward_matching_trains_the_correction_alone_unless_told(real):
    backbone, _, policy, data = real
    correction = CorrectionUNet(backbone, block_out_channels=(32, 32))
    for trains_policy in (False, True):
        loss = NablaDBLoss(policy, beta=1, correction=correction, backward_trains_policy=trains_policy)
        loss(data)["loss_backward"].backward()
        found = gradients(loss)
        assert found["correction.unet.conv_out.bias"].abs().max() > 0
        assert any("lora" in name for name in found) == trains_policy
    # The value is the same; only what is differentiated changes.
    first = NablaDBLoss(policy, beta=1, correction=correction)(data)["loss_backward"]
    torch.testing.assert_close(first, loss(data)["loss_backward"], rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_nothing_of_the_second_order_graph():
    """Activations are recomputed outside the loss, where another attention kernel would be chosen."""
    found = []
    for checkpointing in (False, True):
        lora = LoRA(rank=3, alpha=5.0, targets=("to_q", "to_k", "to_v", "to_out.0"))
        pipeline = tiny_pipeline()
        backbone = StableDiffusionBackbone(
            pipeline, lora=lora, guidance_scale=2.0, gradient_checkpointing=checkpointing
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in backbone.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        policy = make_policy(backbone, backbone.sampler(STEPS), backbone.conditioning(PROMPTS))
        state = {
            "latents": torch.randn(2, 4, 8, 8, generator=generator),
            "action": torch.randn(2, 4, 8, 8, generator=generator),
            "step": torch.tensor([[0], [1]]),
            "prompt_id": torch.tensor([[0], [1]]),
            "reward_grad": torch.randn(2, 4, 8, 8, generator=generator),
        }
        data = TensorDict(state, [2])
        data["next", "reward_grad"] = data["reward_grad"]
        loss = NablaDBLoss(policy, beta=1, backward_trains_policy=True)
        losses = loss(data)
        total(losses).backward()
        found.append(gradients(loss))
    assert found[0].keys() == found[1].keys()
    assert max(gradient.abs().max() for gradient in found[0].values()) > 0
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


def test_full_fine_tuning_is_compared_with_the_frozen_copy():
    pipeline = tiny_pipeline()
    full = StableDiffusionBackbone(pipeline, guidance_scale=2.0)
    sampler = full.sampler(STEPS)
    policy = make_policy(full, sampler, full.conditioning(PROMPTS))
    loss = NablaDBLoss(policy, beta=0)
    data = TensorDict(
        {
            "latents": torch.randn(2, 4, 8, 8),
            "step": torch.zeros(2, 1, dtype=torch.int64),
            "prompt_id": torch.zeros(2, 1, dtype=torch.int64),
            "action": torch.randn(2, 4, 8, 8),
            ("next", "reward_grad"): torch.randn(2, 4, 8, 8),
        },
        [2],
    )
    assert loss(data)["loss_forward"] < 1e-10
    with torch.no_grad():
        full.unet.conv_out.bias += 0.5
    before = full.unet
    expected = (sampler.mean_out[0] / sampler.std[0] ** 2 * 0.5).square()  # guidance keeps what both branches share
    torch.testing.assert_close(loss(data)["loss_forward"], expected, rtol=1e-3, atol=0)
    assert full.unet is before


def test_the_loop_trains_policy_and_correction(backbone):
    """Through `agents.train`, the gradients computed for the drawn transitions by the buffer."""
    sampler = backbone.sampler(STEPS)
    policy = make_policy(backbone, sampler, backbone.conditioning(PROMPTS), keep_model_output=True)
    env = DenoisingEnv(backbone, STEPS, brightness, PROMPTS, batch_size=4, seed=0)
    correction = CorrectionUNet(backbone, block_out_channels=(32, 32))
    loss = NablaDBLoss(policy, beta=100, correction=correction, trust_region=1.0, weighting="output")
    trainable = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    collector = make_collector(env, policy, iterations=2)
    loop = train(
        collector,
        loss,
        torch.optim.AdamW(trainable, lr=1e-3),
        advantage=lambda data: data,
        sampler=TransitionSampler(range(STEPS), 0.5, stratified=True, always_last=True),
        updates_per_epoch=2,
        micro_batch=3,
        transform=RewardGradient(policy, brightness),
    )
    torch.manual_seed(0)
    rows = list(loop)
    collector.shutdown()
    assert len(rows) == 2
    for row in rows:
        assert set(loss.out_keys) <= set(row)
        assert row["reward_flow_rms"] > 0
    assert rows[0]["loss_trust_region"] > 0, "the second update of an iteration is off the sampling policy"
    started_at_zero = [
        parameter
        for name, parameter in loss.named_parameters()
        if "lora_B" in name or name.startswith("correction.unet.conv_out")
    ]
    assert len(started_at_zero) > 2
    assert all(parameter.any() for parameter in started_at_zero)


def test_the_correction_network_is_zero_at_first_and_fits_the_latents(backbone):
    correction = CorrectionUNet(backbone, block_out_channels=(32, 64))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([981, 0])
    conditioning = backbone.conditioning(PROMPTS)(torch.tensor([0, 1]))
    assert not correction(x, t, conditioning).any()
    torch.nn.init.ones_(correction.unet.conv_out.weight)
    out = correction(x, t, conditioning)
    assert out.shape == x.shape
    swapped = backbone.conditioning(PROMPTS)(torch.tensor([1, 0]))
    assert not torch.allclose(out, correction(x, t, swapped)), "it must read the prompt"
    with pytest.raises(ValueError, match="cannot be halved 4 times"):
        CorrectionUNet(backbone, block_out_channels=(32,) * 5)
