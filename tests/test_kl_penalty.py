"""The KL penalty against the closed form of a linear-Gaussian chain, and beside every loss it is meant for."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import A2CLoss, ClipPPOLoss, KLPENPPOLoss, ReinforceLoss, SoftUpdate

from agents import KLPenalty, RWRLoss, ScoreFunctionLoss, ddpo_is_loss, make_critic, make_policy
from diffusion_env import ConditioningCache, StableDiffusionBackbone
from tests.chain import PROMPTS, chain, encode, transitions
from tests.tiny import tiny_pipeline

STEPS = 3
ANIMALS = ("a cat", "a dog")


def delayed(loss):
    """Its first call of the policy's network is the older policy's, and has no gradient."""
    SoftUpdate(loss, tau=0.1)
    return loss


WITH_CRITIC = {
    "Reinforce": lambda policy, critic: ReinforceLoss(policy, critic),
    "A2C": lambda policy, critic: A2CLoss(policy, critic, entropy_bonus=False),
    "ClipPPO": lambda policy, critic: ClipPPOLoss(policy, critic, clip_epsilon=0.1, entropy_bonus=False),
    "KLPENPPO, delayed": lambda policy, critic: delayed(
        KLPENPPOLoss(policy, critic, entropy_bonus=False, delay_actor=True)
    ),
    "KLPENPPO": lambda policy, critic: KLPENPPOLoss(policy, critic, entropy_bonus=False),
}


def with_advantage(data):
    generator = torch.Generator().manual_seed(2)
    return data.clone().set("advantage", torch.randn(*data.shape, 1, generator=generator))


def moved_chain(reduction):
    """A chain away from the pretrained one, its transitions, and each one's KL divergence worked out by hand.

    The means differ by sigma^2 (slope x + offset), so that KL = sigma^2 |slope x + offset|^2 / 2.
    """
    backbone, sampler, _ = chain()
    policy = make_policy(backbone, sampler, ConditioningCache(encode, PROMPTS), log_prob_reduction=reduction)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        backbone.slope.normal_(generator=generator)
        backbone.offset.normal_(generator=generator)
    data = with_advantage(transitions(policy, sampler).reshape(-1))
    i = data["step"][:, 0]
    change = backbone.slope[i] * data["latents"] + backbone.offset[i, data["prompt_id"][:, 0]]
    squared = change.square().flatten(1)
    squared = squared.mean(1) if reduction == "mean" else squared.sum(1)
    return backbone, policy, data, sampler.std[i] ** 2 * squared / 2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_the_divergence_of_two_normals_of_one_variance(reduction):
    backbone, policy, data, expected = moved_chain(reduction)
    losses = KLPenalty(ScoreFunctionLoss(policy), policy, coefficient=0.3)(data)
    torch.testing.assert_close(losses["kl_reference"], expected.mean().detach())
    torch.testing.assert_close(losses["loss_kl"], 0.3 * expected.mean())
    found = torch.autograd.grad(losses["loss_kl"], [backbone.slope, backbone.offset])
    by_hand = torch.autograd.grad(0.3 * expected.mean(), [backbone.slope, backbone.offset])
    for left, right in zip(found, by_hand, strict=True):
        assert right.abs().max() > 1e-3
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_the_loss_beside_it_is_what_it_was():
    _, policy, data, _ = moved_chain("mean")
    for loss in (ScoreFunctionLoss(policy), ddpo_is_loss(policy)):
        expected = loss(data.clone())
        found = KLPenalty(loss, policy, coefficient=1.0)(data.clone())
        assert set(found.keys()) == {*expected.keys(), "loss_kl", "kl_reference"}
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)


def test_at_the_pretrained_model_it_is_zero_and_so_is_its_gradient():
    backbone, sampler, policy = chain()
    data = with_advantage(transitions(policy, sampler).reshape(-1))
    losses = KLPenalty(ScoreFunctionLoss(policy), policy, coefficient=10.0)(data)
    assert losses["loss_kl"] == 0
    for gradient in torch.autograd.grad(losses["loss_kl"], [backbone.slope, backbone.offset]):
        assert (gradient == 0).all()


def real_data(policy, count=4):
    torch.manual_seed(0)
    state = {
        "latents": torch.randn(count, 4, 8, 8),
        "step": torch.arange(count)[:, None] % STEPS,
        "prompt_id": torch.arange(count)[:, None] % 2,
    }
    with torch.no_grad():
        data = policy(TensorDict(state, [count]))
    data["value_target"], data["state_value"] = torch.zeros(count, 1), torch.zeros(count, 1)
    return with_advantage(data)


@pytest.mark.parametrize("name", WITH_CRITIC)
def test_it_costs_one_call_without_gradient_whatever_the_loss(trained_backbone, name):
    conditioning = trained_backbone.conditioning(ANIMALS)
    policy = make_policy(trained_backbone, trained_backbone.sampler(STEPS), conditioning, keep_distribution=True)
    data = real_data(policy)
    loss = WITH_CRITIC[name](policy, make_critic(policy, width=8))
    calls = []
    trained_backbone.register_forward_hook(lambda module, inputs, out: calls.append(out.requires_grad))
    loss(data.clone())
    alone, calls[:] = list(calls), []
    penalised = KLPenalty(loss, policy, coefficient=0.1)
    losses = penalised(data.clone())
    assert calls == [*alone, False]
    assert losses["kl_reference"] > 0
    assert losses["loss_kl"].requires_grad
    assert [id(p) for p in penalised.parameters()] == [id(p) for p in loss.parameters()]
    with trained_backbone.reference():
        pretrained = policy.get_dist(data.clone()).loc
    std = trained_backbone.sampler(STEPS).std[data["step"][:, 0]].view(-1, 1, 1, 1)
    expected = ((policy.get_dist(data.clone()).loc - pretrained) / std).square().mean() / 2
    torch.testing.assert_close(losses["kl_reference"], expected.detach(), rtol=1e-4, atol=1e-6)


def test_full_fine_tuning_is_compared_with_the_frozen_copy():
    full = StableDiffusionBackbone(tiny_pipeline(), guidance_scale=2.0)
    sampler = full.sampler(STEPS)
    policy = make_policy(full, sampler, full.conditioning(ANIMALS))
    data = real_data(policy)
    penalised = KLPenalty(ScoreFunctionLoss(policy), policy, coefficient=1.0)
    assert penalised(data)["loss_kl"] == 0
    with torch.no_grad():
        full.unet.conv_out.bias += 0.5  # guidance keeps what both branches share
    i = data["step"][:, 0]
    expected = (0.5 * sampler.mean_out[i] / sampler.std[i]).square().mean() / 2
    losses = penalised(data)
    torch.testing.assert_close(losses["kl_reference"], expected, rtol=1e-4, atol=0)
    losses["loss_kl"].backward()
    assert full.unet.conv_out.bias.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in full._reference[0].parameters())


def test_what_cannot_work_is_refused():
    _, sampler, policy = chain()
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="coefficient is"):
            KLPenalty(ScoreFunctionLoss(policy), policy, coefficient=wrong)
    data = transitions(policy, sampler)[:, -1].set("weight", torch.ones(16, 1))
    with pytest.raises(TypeError, match="RWRLoss does not evaluate"):
        KLPenalty(RWRLoss(policy), policy, coefficient=1.0)(data)
    _, _, deterministic = chain(eta=0.0)
    with pytest.raises(ValueError, match="raise eta"):
        KLPenalty(RWRLoss(deterministic), deterministic, coefficient=1.0)
