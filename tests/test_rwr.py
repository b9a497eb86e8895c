"""Reward-weighted regression against the plain denoising loss, its weights against numbers worked by hand."""

import pytest
import torch
from diffusers import DDPMScheduler
from tensordict import TensorDict
from torch import nn

from agents import BestTrajectories, ExponentialWeights, RWRLoss, make_collector, make_policy, train
from agents.rwr import at_or_above_percentile, exponential_weights, weighted_regression
from diffusion_env import ConditioningCache, DDIMSampler, DenoisingEnv
from tests.tiny import SCHEDULE

STEPS = 3
PROMPTS = ("a cat", "a dog")


@pytest.fixture
def policy(trained_backbone):
    backbone = trained_backbone
    return make_policy(backbone, backbone.sampler(STEPS, eta=0.0), backbone.conditioning(PROMPTS))


def rollout(rewards, prompts=None):
    """Trajectories [B, T] with these final rewards."""
    count = len(rewards)
    generator = torch.Generator().manual_seed(3)
    reward = torch.zeros(count, STEPS, 1)
    reward[:, -1, 0] = torch.tensor(rewards)
    prompt_id = torch.zeros(count, dtype=torch.int64) if prompts is None else torch.tensor(prompts)
    return TensorDict(
        {
            "action": torch.randn(count, STEPS, 4, 8, 8, generator=generator),
            "step": torch.arange(STEPS).expand(count, -1)[..., None].clone(),
            "prompt_id": prompt_id[:, None, None].expand(count, STEPS, 1).clone(),
            ("next", "reward"): reward,
        },
        [count, STEPS],
    )


def trainable(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def gradient(value, module):
    value.backward()
    found = torch.cat([p.grad.flatten() for p in trainable(module) if p.grad is not None])
    module.zero_grad()
    assert found.norm() > 1e-4
    return found


def by_hand_errors(backbone, data):
    """Squared errors [N] of the guided output, noise added by diffusers."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    clean = data["action"]
    timestep = torch.randint(1000, (len(clean),))
    noise = torch.randn(clean.shape)
    noisy = scheduler.add_noise(clean, noise, timestep)
    out = backbone(noisy, timestep, backbone.conditioning(PROMPTS)(data["prompt_id"][:, 0]))
    return (out - noise).square().mean((1, 2, 3))


def test_at_inverse_temperature_0_it_is_the_plain_denoising_loss(policy, trained_backbone):
    data = ExponentialWeights(inverse_temperature=0.0)(rollout([5.0, -3.0, 0.0, 40.0], [0, 1, 1, 0]))[:, -1]
    loss = RWRLoss(policy)
    torch.manual_seed(1)
    losses = loss(data)
    torch.manual_seed(1)
    expected = by_hand_errors(trained_backbone, data).mean()
    torch.testing.assert_close(losses["loss_objective"], expected)
    torch.testing.assert_close(losses["denoising_error"], expected.detach())
    found = gradient(losses["loss_objective"], trained_backbone)
    torch.testing.assert_close(found, gradient(expected, trained_backbone), rtol=1e-3, atol=1e-5)


def test_each_image_counts_by_its_weight(policy, trained_backbone):
    data = ExponentialWeights(inverse_temperature=0.5)(rollout([1.0, -1.0, 2.0]))[:, -1]
    loss = RWRLoss(policy)
    torch.manual_seed(2)
    losses = loss(data)
    torch.manual_seed(2)
    errors = by_hand_errors(trained_backbone, data)
    weight = torch.tensor([1.0, -1.0, 2.0]).mul(0.5).exp()
    expected = (errors * weight / weight.sum()).sum()
    torch.testing.assert_close(losses["loss_objective"], expected)
    assert losses["denoising_error"].item() == pytest.approx(errors.mean().item(), rel=1e-4)
    found = gradient(losses["loss_objective"], trained_backbone)
    torch.testing.assert_close(found, gradient(expected, trained_backbone), rtol=1e-3, atol=1e-5)


def test_exponential_weights():
    weights = exponential_weights(torch.tensor([0.0, 1.0]).log1p(), 1.0)  # exp gives 1 and 2
    assert weights.tolist() == pytest.approx([2 / 3, 4 / 3])
    huge = exponential_weights(torch.tensor([1000.0, 1000.0, -1000.0]), 5.0)
    assert huge.tolist() == pytest.approx([1.5, 1.5, 0.0])


def test_at_or_above_percentile():
    rewards = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    assert at_or_above_percentile(rewards, 0.5).tolist() == [True, False, False, True, True]
    assert at_or_above_percentile(rewards, 1.0).tolist() == [False, False, False, True, False]
    assert at_or_above_percentile(rewards, 0.0).all()


def test_weighted_regression():
    out = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    value = weighted_regression(out, torch.zeros(2, 2), torch.tensor([1.0, 0.5]))  # errors 5 and 2
    assert value.item() == pytest.approx((5 + 0.5 * 2) / 2)


def test_weights_are_global_or_within_each_prompt():
    log = torch.tensor([1.0, 3.0, 2.0, 2.0]).log().tolist()
    data = rollout(log, [0, 0, 1, 1])
    everywhere = ExponentialWeights(inverse_temperature=1.0)(data.clone())["weight"]
    assert everywhere.shape == (4, STEPS, 1)
    assert (everywhere == everywhere[:, :1]).all()
    assert everywhere[:, 0, 0].tolist() == pytest.approx([0.5, 1.5, 1.0, 1.0])
    within = ExponentialWeights(inverse_temperature=1.0, per_prompt=True)(rollout([0.0, 9.0, 2.0, 2.0], [0, 1, 0, 1]))
    low, high = 2 / (1 + torch.tensor(2.0).exp()).item(), 2 / (1 + torch.tensor(-7.0).exp()).item()
    assert within["weight"][:, 0, 0].tolist() == pytest.approx([low, high, 2 - low, 2 - high], abs=1e-5)


def test_the_best_are_those_of_the_batch_or_of_each_prompt():
    rewards, prompts = [1.0, 2.0, 3.0, 10.0, 20.0, 30.0], [0, 0, 0, 1, 1, 1]
    kept = BestTrajectories(percentile=0.5)(rollout(rewards, prompts))
    assert kept["next", "reward"].sum((1, 2)).tolist() == [10.0, 20.0, 30.0]
    kept = BestTrajectories(percentile=0.5, per_prompt=True)(rollout(rewards, prompts))
    assert kept["next", "reward"].sum((1, 2)).tolist() == [2.0, 3.0, 20.0, 30.0]
    assert kept["weight"].shape == (4, STEPS, 1)
    assert (kept["weight"] == 1).all()


def test_impossible_settings_are_refused():
    for wrong in (-0.1, 1.1, 90, float("nan")):
        with pytest.raises(ValueError, match=r"it must lie in \[0, 1\]"):
            BestTrajectories(percentile=wrong)
    with pytest.raises(ValueError, match="inverse_temperature is -1"):
        ExponentialWeights(inverse_temperature=-1.0)


def test_what_is_no_finished_image_is_refused(policy):
    data = ExponentialWeights()(rollout([1.0, 2.0]))
    loss = RWRLoss(policy)
    with pytest.raises(ValueError, match=r"transitions of steps \[0, 1, 2\] came, but only those of the last step, 2"):
        loss(data.reshape(-1))
    with pytest.raises(ValueError, match="one weight a transition"):
        loss(data[:, -1].set("weight", torch.ones(2, 2)))


def test_renamed_keys(policy):
    data = ExponentialWeights()(rollout([1.0, 2.0]))[:, -1]
    loss = RWRLoss(policy)
    torch.manual_seed(0)
    expected = loss(data)["loss_objective"]
    loss.set_keys(weight="w", action="clean")
    assert loss.in_keys == ["clean", "step", "prompt_id", "w"]
    torch.manual_seed(0)
    renamed = data.clone().rename_key_("weight", "w").rename_key_("action", "clean")
    torch.testing.assert_close(loss(renamed)["loss_objective"], expected)


class GaussianData(nn.Module):
    """The exact denoiser of images that are N(mean, 0.25 I): noise prediction at x_t = signal x_0 + level noise."""

    latent_shape = (3, 1, 1)
    device = torch.device("cpu")
    variance = 0.25

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.alphas = scheduler.alphas_cumprod

    def forward(self, x_t, timestep, conditioning):
        alpha = self.alphas[timestep][:, None, None, None]
        off = x_t - alpha.sqrt() * self.mean[:, None, None]
        return off * (1 - alpha).sqrt() / (alpha * self.variance + 1 - alpha)

    def decode(self, latents):
        return latents


@pytest.mark.parametrize(
    ("weights", "share"),
    [
        (ExponentialWeights(inverse_temperature=1.0), lambda reward: reward.exp()),
        (BestTrajectories(percentile=0.8), lambda reward: (reward.argsort().argsort() >= 0.8 * len(reward)).float()),
    ],
)
def test_one_batch_moves_the_mean_to_that_of_the_weighted_images(weights, share):
    """The regression's optimum, whatever the noise; the reward is linear along the first element."""
    model = GaussianData()
    start = model.mean.detach().clone()
    cache = ConditioningCache(lambda prompts: TensorDict({"x": torch.zeros(len(prompts))}, [len(prompts)]), ["a"])
    policy = make_policy(model, DDIMSampler(SCHEDULE, 20), cache)
    env = DenoisingEnv(model, 20, lambda x, _: x[:, 0, 0, 0], ["a"], batch_size=4000, seed=0)
    torch.manual_seed(0)
    collector = make_collector(env, policy, iterations=1)
    loss = RWRLoss(policy)
    optimizer = torch.optim.SGD(trainable(loss), lr=0.3)
    images = []

    def weighted(data):
        images.append(data["action"][:, -1, :, 0, 0].clone())
        return weights(data)

    (row,) = train(
        collector,
        loss,
        optimizer,
        advantage=weighted,
        sampler=loss.transition_sampler(),
        epochs=150,
        micro_batch=4000,
        max_grad_norm=100.0,
    )
    collector.shutdown()
    (clean,) = images
    share = share(clean[:, 0])
    expected = (share[:, None] * clean).sum(0) / share.sum()
    assert expected[0] > start[0] + 0.15
    torch.testing.assert_close(model.mean.detach(), expected, rtol=0, atol=0.02)
    assert row["reward"] == pytest.approx(clean[:, 0].mean().item(), abs=1e-3)  # of all images, whatever was kept
