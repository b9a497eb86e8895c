"""DDPO's two losses against the formulas of the paper, written by hand on the same data."""

import pytest
import torch
from tensordict import TensorDict
from torch.distributions import Normal

from agents import OnPolicyRatioCheck, RecomputeLogProb, ScoreFunctionLoss, ddpo_is_loss, make_policy
from diffusion_env import StableDiffusionBackbone

STEPS = 5
PROMPTS = ("a cat", "a dog")
CLIP = 0.02


@pytest.fixture
def policy(trained_backbone):
    backbone = trained_backbone
    return make_policy(backbone, backbone.sampler(STEPS), backbone.conditioning(PROMPTS))


@pytest.fixture
def transitions(policy):
    """On-policy transitions with random advantages, at random latents."""
    generator = torch.Generator().manual_seed(4)
    count = 8
    data = TensorDict(
        {
            "latents": torch.randn(count, 4, 8, 8, generator=generator),
            "step": torch.randint(STEPS, (count, 1), generator=generator),
            "prompt_id": torch.randint(2, (count, 1), generator=generator),
            "advantage": torch.randn(count, 1, generator=generator),
        },
        [count],
    )
    torch.manual_seed(0)
    with torch.no_grad():
        return policy(data)


@torch.no_grad()
def move_off_policy(transitions, seed=6):
    """Old log-probabilities as if an earlier policy had sampled: ratios on both sides of the clip range."""
    noise = torch.randn(transitions.shape, generator=torch.Generator().manual_seed(seed))
    return transitions.clone().set("action_log_prob", transitions["action_log_prob"] + 2 * CLIP * noise)


def log_prob_by_hand(policy, transitions):
    """Through backbone and sampler, not through the policy's distribution."""
    mean = policy.module[0].module
    sampler, conditioning = mean._tools
    i = transitions["step"][:, 0]
    out = mean.backbone(transitions["latents"], sampler.timesteps[i], conditioning(transitions["prompt_id"][:, 0]))
    step = sampler.step(transitions["latents"], out, i)
    return Normal(step.mean, step.std.expand_as(step.mean)).log_prob(transitions["action"]).mean((1, 2, 3))


def gradients(loss, policy):
    policy.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    assert max(gradient.abs().max() for gradient in found.values()) > 1e-4
    return found


def assert_same_gradients(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-5)


def total(losses):
    return sum(value for key, value in losses.items() if key.startswith("loss_"))


def test_ddpo_is_equals_the_clipped_surrogate(policy, transitions):
    data = move_off_policy(transitions)
    losses = ddpo_is_loss(policy, clip_range=CLIP)(data.clone())
    log_prob = log_prob_by_hand(policy, data)
    ratio = (log_prob - data["action_log_prob"]).exp()
    advantage = data["advantage"][:, 0]
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    expected = torch.maximum(-advantage * ratio, -advantage * clipped).mean()
    # The data try all cases: cut above, cut below, outside but not cut.
    cut = (-advantage * clipped) > (-advantage * ratio)
    assert 0 < cut.sum() < len(data)
    assert ((ratio - 1).abs() > CLIP).sum() > cut.sum()
    torch.testing.assert_close(total(losses), expected, rtol=1e-4, atol=1e-6)
    assert_same_gradients(gradients(total(losses), policy), gradients(expected, policy))


def test_ddpo_is_is_the_surrogate_alone(policy, transitions):
    """No entropy bonus, no value loss: nothing else moves the policy."""
    losses = ddpo_is_loss(policy, clip_range=CLIP)(transitions.clone())
    assert [key for key in losses.keys() if key.startswith("loss_")] == ["loss_objective"]
    torch.testing.assert_close(losses["loss_objective"], -transitions["advantage"].mean(), rtol=1e-4, atol=1e-5)


def test_score_function_equals_the_formula(policy, transitions):
    losses = ScoreFunctionLoss(policy)(transitions.clone())
    expected = -(log_prob_by_hand(policy, transitions) * transitions["advantage"][:, 0]).mean()
    torch.testing.assert_close(losses["loss_objective"], expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(total(losses), policy), gradients(expected, policy))


def test_both_have_the_same_gradient_on_policy(policy, transitions):
    """Black et al. 2023, section 4.3: the ratio is 1 and neither side of it is cut."""
    first = gradients(total(ddpo_is_loss(policy, clip_range=CLIP)(transitions.clone())), policy)
    second = gradients(total(ScoreFunctionLoss(policy)(transitions.clone())), policy)
    assert_same_gradients(first, second)


def test_losses_train_exactly_the_policys_adapters(policy, trained_backbone):
    trainable = {id(p) for p in trained_backbone.parameters() if p.requires_grad}
    for loss in (ddpo_is_loss(policy), ScoreFunctionLoss(policy)):
        assert {id(p) for p in loss.parameters() if p.requires_grad} == trainable


def test_renamed_keys(policy, transitions):
    loss = ScoreFunctionLoss(policy)
    expected = loss(transitions.clone())["loss_objective"]
    loss.set_keys(advantage="worth", action="taken")
    renamed = transitions.clone().rename_key_("advantage", "worth").rename_key_("action", "taken")
    torch.testing.assert_close(loss(renamed)["loss_objective"], expected)


def test_advantages_of_another_shape_are_refused(policy, transitions):
    """[N] against [N, N] would broadcast silently."""
    loss = ScoreFunctionLoss(policy)
    for wrong in (torch.randn(8, 8), torch.randn(8, 8, 1)):
        with pytest.raises(ValueError, match="Give one advantage a transition"):
            loss(transitions.clone().set("advantage", wrong))


def test_the_ratio_check_measures_and_refuses(policy, transitions):
    check = OnPolicyRatioCheck(policy, clip_range=1e-3)
    assert check(transitions)["ratio_error"] < 1e-5
    shifted = transitions.clone()
    shifted["action_log_prob"][3] -= 5e-5  # within a tenth of the clip range
    assert check(shifted)["ratio_error"] == pytest.approx(5e-5, rel=0.2)
    shifted["action_log_prob"][3] -= 1e-4
    with pytest.raises(RuntimeError, match="ratio is off by 0.00015"):
        check(shifted)
    shifted["action_log_prob"][3] = torch.nan
    with pytest.raises(RuntimeError, match="off by nan"):
        check(shifted)


@pytest.mark.parametrize("measure", [OnPolicyRatioCheck, RecomputeLogProb])
def test_what_is_compared_with_training_is_computed_as_in_training(policy, transitions, measure):
    """Without gradients a folded or compiled network takes another way, whose rounding differs."""
    modes = []
    network = next(module for module in policy.modules() if isinstance(module, StableDiffusionBackbone))
    network.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    call = measure(policy, clip_range=1e-3) if measure is OnPolicyRatioCheck else measure(policy, micro_batch=8)
    with torch.no_grad():
        call(transitions)
    assert modes
    assert all(modes)


def test_an_impossible_clip_range_is_refused(policy):
    for wrong in (0.0, -1e-4):
        with pytest.raises(ValueError, match="clip_range is"):
            ddpo_is_loss(policy, clip_range=wrong)
