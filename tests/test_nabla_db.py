"""Nabla-DB on linear-Gaussian chains, whose tilted optimum is known."""

import pytest
import torch
from tensordict import TensorDict

from agents import NablaDBLoss, RewardGradient
from diffusion_env import DDIMSampler
from tests.chain import (
    BETA,
    GAIN,
    LATENT,
    STEPS,
    TableCorrection,
    chain,
    gradients,
    linear_reward,
    solution,
    solved,
    total,
    transitions,
)
from tests.tiny import SCHEDULE


def rounding(sampler, weighting):
    """What float32 leaves of a score that should be zero: a mean square, a few roundings of outputs around 1."""
    b, std = sampler.mean_out, sampler.std
    weight = {"none": 1, "sigma": std, "output": std**2 / b}[weighting]
    return (weight * b / std**2 * 1e-6).square().mean()


@pytest.mark.parametrize("weighting", ["none", "sigma", "output"])
@pytest.mark.parametrize("backward_trains_policy", [False, True])
def test_every_loss_is_zero_at_the_tilted_optimum(weighting, backward_trains_policy):
    backbone, correction, loss, data = solved(weighting, backward_trains_policy=backward_trains_policy)
    zero = {key: rounding(DDIMSampler(SCHEDULE, STEPS), key) for key in ("none", weighting)}
    losses = loss(data)
    assert set(losses.keys()) == set(loss.out_keys)
    assert losses["loss_forward"] < zero[weighting]
    assert losses["loss_backward"] < zero["none"]
    assert losses["loss_terminal"] == 0
    assert losses["score_rms"] > 0.1
    # Each is sensitive: a few hundredths of the answer too much show.
    with torch.no_grad():
        backbone.offset.mul_(1.05)
        elsewhere = loss(data)
        correction.table[-1] += 0.05
    assert elsewhere["loss_forward"] > 100 * zero[weighting]
    assert elsewhere["loss_backward"] > 100 * zero["none"]
    assert loss(data)["loss_terminal"] > 1e-4


@pytest.mark.parametrize("weighting", ["none", "output"])
def test_a_run_from_elsewhere_converges_to_the_tilted_optimum(weighting):
    """Policy and correction are learned together, from data of the policy that is being learned."""
    backbone, sampler, policy = chain()
    correction = TableCorrection(sampler.timesteps)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (backbone.offset, backbone.slope):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    loss = NablaDBLoss(policy, beta=BETA, correction=correction, weighting=weighting)
    gradient = RewardGradient(policy, linear_reward, jacobian=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05, eps=1e-12)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    for iteration in range(1000):
        if iteration % 20 == 0:
            data = gradient(transitions(policy, sampler, trajectories=8, seed=iteration).reshape(-1))
        total(loss(data)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    offset, missing = solution(backbone, sampler, BETA)
    assert backbone.slope.abs().max() < 0.01
    for learned, exact in ((backbone.offset, offset), (correction.table, missing)):
        assert exact.abs().max() > 0.3
        torch.testing.assert_close(learned.detach(), exact, rtol=0.02, atol=0.01)


class QuadraticChain:
    """r = -sum of squared pixels on two steps, every latent element by itself; double precision, by integration."""

    beta = 3.0

    def __init__(self, backbone, sampler):
        self.k, self.m = backbone.k.double(), backbone.m.double().flatten(1)
        self.a, self.b, self.std = (table.double() for table in (sampler.mean_x, sampler.mean_out, sampler.std))
        self.last = sampler.num_steps - 1

    def after(self, x, i):
        """A grid over the latents after pretrained decision i from x [..., 4], and its log-weights in the tilt."""
        nodes = torch.linspace(-8, 8, 401).double().view(-1, *[1] * x.ndim)
        mean = self.a[i] * x + self.b[i] * (self.k[i].item() * x + self.m[i])
        grid = mean + self.std[i] * nodes
        return grid, self.log_flow(grid, i + 1) - nodes**2 / 2

    def log_flow(self, x, i):
        if i > self.last:
            return -3 * self.beta * (0.5 + GAIN * x) ** 2  # three equal channels
        return self.after(x, i)[1].logsumexp(0)

    def score(self, x, i):
        with torch.enable_grad():
            leaf = x.detach().double().flatten(1).requires_grad_()
            return torch.autograd.grad(self.log_flow(leaf, i).sum(), leaf)[0].view_as(x).float()

    def best_mean(self, x, i):
        """Mean of the tilted step from every element of x [n, 4]."""
        grid, log_weight = self.after(x.double(), i)
        return (log_weight.softmax(0) * grid).sum(0)


def test_the_optimum_of_a_quadratic_reward_is_the_best_fit():
    """The tilted steps are narrower; a policy of fixed width can match their means only, and does.

    There the expected gradient is zero. Two noises, +1 and -1, give the expectation exactly: all is affine.
    """
    backbone, sampler, policy = chain(num_steps=2)
    exact = QuadraticChain(backbone, sampler)
    with torch.no_grad():
        for i in range(2):
            zero, one = exact.best_mean(torch.stack([torch.zeros(4), torch.ones(4)]), i)
            backbone.slope[i] = (((one - zero)[0] - exact.a[i]) / exact.b[i] - exact.k[i]) / backbone.scale[i]
            backbone.offset[i] = (zero / exact.b[i] - exact.m[i]).view(LATENT) / backbone.scale[i]

    def quadratic_reward(images, prompts):
        return -images.square().sum((1, 2, 3))

    reward_gradient = RewardGradient(policy, quadratic_reward)

    class Missing(torch.nn.Module):
        """The exact score of the flow before the last decision, less the parametrised part."""

        def forward(self, x, timestep, conditioning):
            step = torch.ones(len(x), 1, dtype=torch.int64)
            raw = reward_gradient.gradient(x, step, torch.zeros_like(step))
            return exact.score(x, 1) - exact.beta * sampler.signal_power[1] * raw

    loss = NablaDBLoss(
        policy, beta=exact.beta, correction=Missing(), backward_weight=0, terminal_weight=0, weighting="output"
    )
    x_t = torch.linspace(-1.5, 1.5, 7).repeat_interleave(2)[:, None, None, None].expand(-1, *LATENT)
    noise = torch.tensor([1.0, -1.0]).repeat(7)[:, None, None, None]
    for i in range(2):
        data = TensorDict(
            {"latents": x_t, "step": torch.full((14, 1), i), "prompt_id": torch.zeros(14, 1, dtype=torch.int64)}, [14]
        )

        def gradient(data=data):
            distribution = policy.get_dist(data.clone())
            data["action"] = (distribution.mean + distribution.stddev * noise).detach()
            loss(reward_gradient(data))["loss_forward"].backward()
            return gradients(backbone)

        at_optimum = gradient()
        with torch.no_grad():
            backbone.offset[i] *= 1.1
            backbone.slope[i] += 0.05
        nearby = gradient()
        for name in ("offset", "slope"):
            assert at_optimum[name].abs().max() < 2e-3 * nearby[name].abs().max(), (i, name)


@pytest.mark.parametrize("backward_trains_policy", [False, True])
def test_not_residual_is_zero_where_every_equation_holds(backward_trains_policy):
    """exp(r) = q(x | x_0 = target): DDPM's posterior given that x_0 is the policy, q(x_i | x_0) the flow."""
    backbone, sampler, policy = chain()
    target = torch.tensor([[[0.5, -1.0], [0.2, 0.0]]])
    power = torch.cat([sampler.signal_power[:-1], sampler._alphas_cumprod[:1]]).view(-1, 1, 1, 1)
    with torch.no_grad():
        offset = -(power.sqrt() * target / (1 - power).sqrt())[:-1] - backbone.m
        backbone.offset += (offset / backbone.scale)[:, None]
        backbone.slope += (1 / (1 - power[:-1]).sqrt() - backbone.k) / backbone.scale

    def score(x, i):
        return -(x - power[i].sqrt() * target) / (1 - power[i])

    class Correction(torch.nn.Module):
        def forward(self, x, timestep, conditioning):
            i = (timestep[:, None] == sampler.timesteps).float()
            # 0 at the clean latents, where the reward's gradient, given below, is all.
            return torch.where(i.any(1).view(-1, 1, 1, 1), score(x, i.argmax(1)), 0)

    data = transitions(policy, sampler).reshape(-1)
    last = (data["step"] == STEPS - 1).view(-1, 1, 1, 1)
    data["next", "reward_grad"] = torch.where(last, score(data["action"], torch.full((len(data),), STEPS)), 0)
    data["reward_grad"] = torch.zeros_like(data["latents"])
    loss = NablaDBLoss(
        policy, beta=1, correction=Correction(), residual=False, backward_trains_policy=backward_trains_policy
    )
    losses = loss(data)
    assert losses["loss_forward"] < 1e-7 * losses["score_rms"] ** 2
    assert losses["loss_backward"] < 1e-7 * losses["score_rms"] ** 2
    assert losses["loss_terminal"] == 0
    with torch.no_grad():
        backbone.offset += 0.02 * losses["score_rms"]
    assert loss(data)["loss_forward"] > 1e-4 * losses["score_rms"] ** 2
