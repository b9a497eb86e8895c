"""The critic, advantages from it, and TorchRL's actor-critic losses on the true policy."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import A2CLoss, ClipPPOLoss, KLPENPPOLoss, ReinforceLoss, ValueEstimators

from agents import (
    CriticAdvantage,
    RestoreNext,
    ScoreFunctionLoss,
    TransitionSampler,
    make_collector,
    make_critic,
    make_policy,
    make_q_critic,
    train,
)
from diffusion_env import DenoisingEnv

STEPS = 3
PROMPTS = ("a cat", "a dog")
LOSSES = {
    "Reinforce": lambda policy, critic: ReinforceLoss(policy, critic),
    "A2C": lambda policy, critic: A2CLoss(policy, critic, entropy_bonus=False),
    "ClipPPO": lambda policy, critic: ClipPPOLoss(policy, critic, clip_epsilon=0.1, entropy_bonus=False),
    "KLPENPPO": lambda policy, critic: KLPENPPOLoss(policy, critic, entropy_bonus=False),
}


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def build_policy(backbone):
    conditioning = backbone.conditioning(PROMPTS)
    return make_policy(backbone, backbone.sampler(STEPS), conditioning, keep_distribution=True)


def build_env(backbone, batch_size):
    return DenoisingEnv(backbone, STEPS, brightness, PROMPTS, batch_size=batch_size, seed=0)


def collect(backbone, policy, batch_size=6):
    torch.manual_seed(1)
    collector = make_collector(build_env(backbone, batch_size), policy, iterations=1)
    (data,) = collector
    collector.shutdown()
    return data


def random_critic(policy):
    return randomised(make_critic(policy, width=16), lambda module: module.head[-1])


def randomised(critic, last_layer):
    """A critic that says something: its last layer is zero at first."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in last_layer(critic.module).parameters():
            parameter.normal_()
    return critic


def trainable(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def total(losses):
    return sum(value for key, value in losses.items() if key.startswith("loss_"))


def gradient(value, module):
    value.backward()
    found = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trainable(module)]
    )
    for parameter in trainable(module):
        parameter.grad = None
    return found


def test_values_of_any_batch_shape_depend_on_all_of_the_state(backbone):
    policy = build_policy(backbone)
    data = collect(backbone, policy)
    assert (make_critic(policy)(data.clone())["state_value"] == 0).all()
    critic = random_critic(policy)
    values = critic(data.clone())["state_value"]
    assert values.shape == (6, STEPS, 1)
    flat = critic(data.reshape(-1))["state_value"]
    torch.testing.assert_close(flat, values.reshape(-1, 1))
    for key, other in (
        ("latents", 1.5 * data["latents"]),
        ("step", data["step"] + 1),
        ("prompt_id", 1 - data["prompt_id"]),
    ):
        assert ((critic(data.clone().set(key, other))["state_value"] - values).abs() > 1e-4).all(), key


def test_values_of_actions_depend_on_state_and_action(backbone):
    policy = build_policy(backbone)
    data = collect(backbone, policy)
    assert (make_q_critic(policy)(data.clone())["state_action_value"] == 0).all()
    critic = randomised(make_q_critic(policy, width=16), lambda module: module.value.head[-1])
    values = critic(data.clone())["state_action_value"]
    assert values.shape == (6, STEPS, 1)
    torch.testing.assert_close(critic(data.reshape(-1))["state_action_value"], values.reshape(-1, 1))
    for key, other in (
        ("latents", 1.5 * data["latents"]),
        ("action", 1.5 * data["action"]),
        ("step", data["step"] + 1),
        ("prompt_id", 1 - data["prompt_id"]),
    ):
        changed = critic(data.clone().set(key, other))["state_action_value"]
        assert ((changed - values).abs() > 1e-4).all(), key


def test_the_next_state_is_restored_exactly(backbone):
    """As a rollout that never dropped it has it."""
    policy, env = build_policy(backbone), build_env(backbone, 4)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        rollout = env.rollout(STEPS, policy)
    compact = rollout.exclude(*[("next", key) for key in ("latents", "step", "prompt_id")])
    restored = RestoreNext()(compact)
    for key in ("latents", "step", "prompt_id"):
        assert torch.equal(restored["next", key], rollout["next", key]), key
    assert restored["next", "latents"].data_ptr() == compact["action"].data_ptr()  # no copy


@pytest.mark.parametrize("lmbda", [0.0, 0.7, 1.0])
def test_advantages_are_undiscounted(backbone, lmbda):
    policy = build_policy(backbone)
    data = collect(backbone, policy)
    critic = random_critic(policy)
    value = critic(data.clone())["state_value"].detach()[..., 0]
    reward = data["next", "reward"][:, -1, 0]
    # Worked backwards: the last step's next value is the reward itself, since nothing follows.
    following, expected = torch.zeros(6), torch.zeros(6, STEPS)
    for i in reversed(range(STEPS)):
        delta = (reward if i == STEPS - 1 else value[:, i + 1]) - value[:, i]
        following = delta + lmbda * following
        expected[:, i] = following
    found = CriticAdvantage(critic, lmbda=lmbda, standardize=False)(data.clone())
    torch.testing.assert_close(found["advantage"][..., 0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["value_target"][..., 0], expected + value, rtol=1e-4, atol=1e-5)
    assert ("next", "latents") not in found.keys(True)
    standard = CriticAdvantage(critic, lmbda=lmbda)(data.clone())["advantage"]
    assert standard.mean().item() == pytest.approx(0, abs=1e-4)
    assert standard.std().item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("name", LOSSES)
def test_the_policys_gradient_is_the_score_function(trained_backbone, name):
    """On-policy all four agree with DDPO-SF on the same advantages, and the critic trains beside it."""
    policy = build_policy(trained_backbone)
    critic = random_critic(policy)
    data = CriticAdvantage(critic)(collect(trained_backbone, policy)).reshape(-1)
    expected = gradient(ScoreFunctionLoss(policy)(data.clone())["loss_objective"], trained_backbone)
    assert expected.norm() > 1e-4
    loss = LOSSES[name](policy, critic)
    assert {id(p) for p in loss.parameters() if p.requires_grad} == {
        id(p) for module in (policy, critic) for p in trainable(module)
    }
    losses = loss(data.clone())
    found = gradient(total(losses), trained_backbone)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert gradient(total(loss(data.clone())), critic).norm() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_a_losss_own_estimator_gives_the_same(trained_backbone, name):
    """Told gamma = 1 and given whole trajectories with the next state."""
    policy = build_policy(trained_backbone)
    critic = random_critic(policy)
    data = collect(trained_backbone, policy)
    loss = LOSSES[name](policy, critic)
    expected = loss(CriticAdvantage(critic, lmbda=0.7, standardize=False)(data.clone()))
    loss.make_value_estimator(ValueEstimators.GAE, gamma=1.0, lmbda=0.7)
    losses = loss(RestoreNext()(data.clone()))
    for key in (key for key in expected.keys() if key.startswith("loss_")):
        torch.testing.assert_close(losses[key], expected[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loop_trains_policy_and_critic(backbone, name):
    policy = build_policy(backbone)
    critic = make_critic(policy, width=16)
    loss = LOSSES[name](policy, critic)
    before = [[parameter.detach().clone() for parameter in trainable(module)] for module in (policy, critic)]
    torch.manual_seed(0)
    collector = make_collector(build_env(backbone, 6), policy, iterations=2)
    rows = list(
        train(
            collector,
            loss,
            torch.optim.AdamW(trainable(loss), lr=1e-3),
            advantage=CriticAdvantage(critic),
            sampler=TransitionSampler(range(STEPS)),
            micro_batch=8,
        )
    )
    collector.shutdown()
    assert len(rows) == 2
    assert all(row["grad_norm"] > 0 for row in rows)
    for module, old in zip((policy, critic), before, strict=True):
        assert any(not torch.equal(new, was) for new, was in zip(trainable(module), old, strict=True))


def test_a_critic_learns_the_reward(backbone):
    """On one batch, whose rewards differ."""
    policy = build_policy(backbone)
    critic = make_critic(policy, width=32)
    data = collect(backbone, policy)
    reward = data["next", "reward"][:, -1:] * 20
    data["next", "reward"] = data["next", "reward"] * 20
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    loss = A2CLoss(policy, critic, entropy_bonus=False)
    with torch.no_grad():
        start = (critic(data.clone())["state_value"] - reward).square().mean()
    for _ in range(60):
        target = CriticAdvantage(critic, lmbda=1.0)(data.clone())
        loss.loss_critic(target)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (critic(data.clone())["state_value"] - reward).square().mean() < 0.05 * start


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_between_policies_is_exact(trained_backbone, reduction):
    policy = make_policy(
        trained_backbone,
        trained_backbone.sampler(STEPS),
        trained_backbone.conditioning(PROMPTS),
        log_prob_reduction=reduction,
    )
    data = collect(trained_backbone, policy, batch_size=2)
    p = policy.get_dist(data.clone())
    with trained_backbone.reference():
        q = policy.get_dist(data.clone())
    expected = kl_divergence(Normal(p.loc, p.scale.expand_as(p.loc)), Normal(q.loc, q.scale.expand_as(q.loc)))
    expected = getattr(expected.flatten(2), reduction)(2)
    assert (expected > 0).all()
    torch.testing.assert_close(kl_divergence(p, q), expected)


def test_kl_between_deterministic_steps_is_refused(backbone):
    """Not a silent NaN."""
    policy = make_policy(backbone, backbone.sampler(STEPS, eta=0.0), backbone.conditioning(PROMPTS))
    distribution = policy.get_dist(collect(backbone, policy, batch_size=2))
    with pytest.raises(ValueError, match="have no KL divergence"):
        kl_divergence(distribution, distribution)


def test_the_distribution_is_kept_only_on_request(backbone):
    data = collect(backbone, build_policy(backbone))
    assert data["loc"].shape == data["latents"].shape
    assert data["scale"].shape == (6, STEPS, 1, 1, 1)
    lean = make_policy(backbone, backbone.sampler(STEPS), backbone.conditioning(PROMPTS))
    assert not {"loc", "scale"} & set(collect(backbone, lean).keys())


def test_an_impossible_lambda_is_refused(backbone):
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match="lmbda is"):
            CriticAdvantage(make_critic(build_policy(backbone)), lmbda=wrong)
