"""The policy against torch.distributions, and its importance ratio between rollout and training."""

import pytest
import torch
from tensordict import TensorDict
from torch.distributions import Independent, Normal
from torchrl.envs.utils import ExplorationType, set_exploration_type

from agents import DenoisingNormal, make_collector, make_policy
from diffusion_env import DDIMSampler, DenoisingEnv
from tests.tiny import SCHEDULE

STEPS = 4
PROMPTS = ("a cat", "a dog", "an ant")


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def build(backbone, *, sampler=None, batch_size=6, **arguments):
    """Policy and environment over one backbone."""
    sampler = sampler or backbone.sampler(STEPS)
    policy = make_policy(backbone, sampler, backbone.conditioning(PROMPTS), **arguments)
    env = DenoisingEnv(backbone, sampler.num_steps, brightness, PROMPTS, batch_size=batch_size, seed=0)
    return policy, env


def collect(policy, env, seed=0):
    """One batch of trajectories as training sees it: through the collector and `share_latents`."""
    torch.manual_seed(seed)
    collector = make_collector(env, policy, iterations=1)
    (data,) = collector
    collector.shutdown()
    return data


def states(backbone, *batch):
    generator = torch.Generator().manual_seed(3)
    return TensorDict(
        {
            "latents": torch.randn((*batch, *backbone.latent_shape), generator=generator),
            "step": torch.randint(STEPS, (*batch, 1), generator=generator),
            "prompt_id": torch.randint(len(PROMPTS), (*batch, 1), generator=generator),
        },
        batch,
    )


def gradient(policy):
    total = sum(p.grad.abs().sum() for p in policy.parameters() if p.grad is not None)
    policy.zero_grad()
    return float(total)


@pytest.mark.parametrize("batch", [(5,), (2, 3), ()])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob_equals_torch(batch, reduction):
    loc, noise = torch.randn(2, *batch, 4, 3, 3)
    scale = torch.rand(*batch, 1, 1, 1) + 0.05
    x = loc + scale * noise
    ours = DenoisingNormal(loc, scale, latent_ndim=3, reduction=reduction, all_have_density=True)
    expected = Independent(Normal(loc.double(), scale.double().expand_as(loc)), 3).log_prob(x.double())
    if reduction == "mean":
        expected = expected / 36
    assert ours.log_prob(x).shape == batch
    torch.testing.assert_close(ours.log_prob(x), expected.float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(ours.mean, loc)
    assert torch.equal(ours.deterministic_sample, loc)


def test_log_prob_of_latents_of_another_rank():
    loc, x = torch.randn(2, 5, 7)
    scale = torch.rand(5, 1) + 0.1
    ours = DenoisingNormal(loc, scale, latent_ndim=1, reduction="sum", all_have_density=True)
    torch.testing.assert_close(ours.log_prob(x), Independent(Normal(loc, scale.expand_as(loc)), 1).log_prob(x))


def test_samples_have_the_moments_and_pass_gradients():
    loc = torch.tensor([[[[1.0]]], [[[-2.0]]]]).requires_grad_()
    scale = torch.tensor([[[[0.5]]], [[[3.0]]]])
    torch.manual_seed(0)
    samples = DenoisingNormal(loc, scale, latent_ndim=3, reduction="sum", all_have_density=True).rsample((40_000,))
    assert samples.shape == (40_000, 2, 1, 1, 1)
    error = 5 / 40_000**0.5  # five standard errors, in units of the standard deviation
    standardised = ((samples - loc) / scale).detach()
    assert standardised.mean(0).abs().max() < error
    assert (standardised.var(0) - 1).abs().max() < error * 2**0.5
    samples.mean(0).sum().backward()
    torch.testing.assert_close(loc.grad, torch.ones_like(loc), rtol=1e-4, atol=1e-4)


def test_sampling_uses_the_noise_of_diffusers_schedulers():
    loc, scale = torch.zeros(2, 4, 8, 8), torch.ones(2, 1, 1, 1)
    torch.manual_seed(9)
    drawn = DenoisingNormal(loc, scale, latent_ndim=3, reduction="sum", all_have_density=True).sample()
    assert torch.equal(drawn, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9)))


@torch.no_grad()
def test_mean_and_std_are_the_samplers(trained_backbone):
    policy, _ = build(trained_backbone)
    state = states(trained_backbone, 5)
    distribution = policy.get_dist(state.clone())
    sampler, cache = trained_backbone.sampler(STEPS), trained_backbone.conditioning(PROMPTS)
    for row in range(5):
        x, i = state["latents"][row : row + 1], state["step"][row]
        out = trained_backbone(x, sampler.timesteps[i], cache(state["prompt_id"][row]))
        mean, std = sampler.step(x, out, i)
        torch.testing.assert_close(distribution.mean[row : row + 1], mean, rtol=1e-4, atol=1e-5)
        assert torch.equal(distribution.stddev[row : row + 1], std)


@torch.no_grad()
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_any_batch_shape_gives_the_same(trained_backbone, reduction):
    policy, _ = build(trained_backbone, log_prob_reduction=reduction)
    state = states(trained_backbone, 2, 3)
    deep, flat = policy.get_dist(state.clone()), policy.get_dist(state.reshape(6))
    assert deep.batch_shape == (2, 3)
    assert deep.event_shape == (4, 8, 8)
    x = torch.randn(2, 3, 4, 8, 8)
    torch.testing.assert_close(deep.mean.flatten(0, 1), flat.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(deep.log_prob(x).flatten(), flat.log_prob(x.flatten(0, 1)), rtol=1e-5, atol=1e-5)


def test_on_policy_the_ratio_is_1_at_any_batch_shape(trained_backbone):
    """Guidance, adapters that do something, the collector's storage: DESIGN.md section 6."""
    policy, env = build(trained_backbone)
    data = collect(policy, env)
    assert data.batch_size == (6, STEPS)
    flat = data.reshape(-1)
    for micro_batch in (1, 5, 24):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                parts = flat.split(micro_batch)[:5]
                now = torch.cat([policy.get_dist(part.clone()).log_prob(part["action"]) for part in parts])
            ratio = (now.detach() - flat["action_log_prob"][: len(now)]).exp()
            assert (ratio - 1).abs().max() < 1e-5
    with torch.no_grad():
        deep = policy.get_dist(data.clone()).log_prob(data["action"])
    assert ((deep - data["action_log_prob"]).exp() - 1).abs().max() < 1e-5
    # Where the adapter counts: without it the ratio is another one.
    with torch.no_grad(), trained_backbone.reference():
        other = policy.get_dist(flat.clone()).log_prob(flat["action"])
    assert ((other - flat["action_log_prob"]).exp() - 1).abs().max() > 1e-2


def test_it_samples_outside_a_collector(backbone):
    """TorchRL's modules are deterministic there by default; the policy gradient would be exactly zero."""
    policy, _ = build(backbone)
    state = states(backbone, 3)
    a, b = policy(state.clone())["action"], policy(state.clone())["action"]
    assert not torch.equal(a, b)
    policy.get_dist(state.clone()).log_prob(a.detach()).sum().backward()
    assert gradient(policy) > 0
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        distribution = policy.get_dist(state.clone())
        assert torch.equal(policy(state.clone())["action"], distribution.mean)
    # What would be lost: at its own mean a Gaussian's log-probability has no gradient.
    distribution.log_prob(distribution.mean.detach()).sum().backward()
    assert gradient(policy) == 0


def test_gradients_flow_through_the_sample(backbone):
    """Reparametrised, as reward backpropagation needs it: the action's gradient is the mean's."""
    policy, _ = build(backbone)
    state = states(backbone, 4)
    weight = torch.randn(4, 4, 8, 8)
    found = []
    for tensor in (policy(state.clone())["action"], policy.get_dist(state.clone()).mean):
        (tensor * weight).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        policy.zero_grad()
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_collector_keeps_no_mean_and_no_std(backbone):
    policy, env = build(backbone)
    keys = set(collect(policy, env).keys(True, True))
    assert keys == {
        "latents",
        "step",
        "prompt_id",
        "group_id",
        "action",
        "action_log_prob",
        ("next", "reward"),
        ("next", "done"),
        ("next", "terminated"),
    }


def test_the_policys_parameters_are_the_networks(backbone):
    policy, _ = build(backbone)
    assert {id(p) for p in policy.parameters()} == {id(p) for p in backbone.unet.parameters()}
    assert not list(policy.buffers())


@pytest.mark.parametrize(("eta", "settings", "deterministic"), [
    (1.0, {"set_alpha_to_one": True, "timestep_spacing": "trailing"}, [3]),
    (0.0, {}, [0, 1, 2, 3]),
])  # fmt: skip
def test_deterministic_steps_are_sampled_but_have_no_density(backbone, eta, settings, deterministic):
    sampler = DDIMSampler(SCHEDULE | settings, STEPS, eta)
    policy, env = build(backbone, sampler=sampler)
    data = collect(policy, env)
    zero = torch.zeros(STEPS, dtype=torch.bool)
    zero[deterministic] = True
    assert data["action_log_prob"].isfinite().all()
    assert torch.equal(data["action_log_prob"] == 0, zero.expand(6, STEPS))
    last = data[:, -1]
    torch.testing.assert_close(last["action"], policy.get_dist(last.clone()).mean.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="1 of 1 transitions are deterministic"):
        policy.get_dist(data[:1, -1].clone()).log_prob(data[:1, -1]["action"])
    if not zero.all():
        others = data[:, :-1]
        policy.get_dist(others.clone()).log_prob(others["action"]).sum().backward()
        assert gradient(policy) > 0


def test_an_unknown_reduction_is_refused(backbone):
    with pytest.raises(ValueError, match="log_prob_reduction is 'median'"):
        build(backbone, log_prob_reduction="median")
