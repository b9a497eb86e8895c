"""A chain of linear-Gaussian denoising steps whose tilted optimum is known in closed form."""

from contextlib import contextmanager

import torch
from tensordict import TensorDict
from torch import nn

from agents import NablaDBLoss, RewardGradient, make_policy
from diffusion_env import ConditioningCache, DDIMSampler
from tests.tiny import SCHEDULE

STEPS = 4
PROMPTS = ("up", "down")
LATENT = (1, 2, 2)
# Slope of an image's pixels in the latents.
GAIN = 0.25
BETA = 2.0  # of `solved`


class LinearBackbone(nn.Module):
    """out = k_i x + m_i + sigma_i^2 / b_i (slope_i x + offset_i), the offset prompt by prompt.

    k and m are pretrained, slope and offset train: the residual forward score is slope x + offset.
    """

    latent_shape = LATENT
    device = torch.device("cpu")

    def __init__(self, sampler):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        steps = sampler.num_steps
        self.timesteps = sampler.timesteps
        self.scale = (sampler.std**2 / sampler.mean_out).view(-1, 1, 1, 1)
        self.k = torch.rand(steps, 1, 1, 1, generator=generator) * 0.6 + 0.2
        self.m = torch.randn(steps, *LATENT, generator=generator) * 0.3
        self.slope = nn.Parameter(torch.zeros(steps, 1, 1, 1))
        self.offset = nn.Parameter(torch.zeros(steps, len(PROMPTS), *LATENT))
        self.pretrained = False

    def forward(self, x_t, timestep, conditioning):
        i = (timestep[:, None] == self.timesteps).float().argmax(1)
        out = self.k[i] * x_t + self.m[i]
        if self.pretrained:
            return out
        return out + self.scale[i] * (self.slope[i] * x_t + self.offset[i, conditioning["id"]])

    def decode(self, latents):
        """Three equal channels, 0.5 + GAIN x."""
        return (0.5 + GAIN * latents).expand(-1, 3, -1, -1)

    @contextmanager
    def reference(self):
        self.pretrained = True
        yield
        self.pretrained = False


class TableCorrection(nn.Module):
    """g as a table of constants over states and prompts."""

    def __init__(self, timesteps):
        super().__init__()
        self.timesteps = torch.cat([timesteps, timesteps[-1:] - 1])
        self.table = nn.Parameter(torch.zeros(len(timesteps) + 1, len(PROMPTS), *LATENT))

    def forward(self, x, timestep, conditioning):
        i = (timestep[:, None] == self.timesteps).float().argmax(1)
        return self.table[i, conditioning["id"]]


def encode(prompts):
    return TensorDict({"id": torch.tensor([PROMPTS.index(prompt) for prompt in prompts])}, [len(prompts)])


def linear_reward(images, prompts):
    """Weighted brightness, "down" with the other sign."""
    sign = torch.tensor([1.0 if prompt == "up" else -1.0 for prompt in prompts])
    return sign * (images * WEIGHT).sum((1, 2, 3))


WEIGHT = torch.tensor([[[0.3, -0.2], [0.1, 0.4]]]).expand(3, 2, 2)
# The gradient of `linear_reward` by the clean latents, [prompts, *latent]: three equal channels of slope GAIN.
GRADIENT = torch.stack([3 * GAIN * WEIGHT[:1], -3 * GAIN * WEIGHT[:1]])


def chain(num_steps=STEPS, eta=1.0, **settings):
    """Backbone, sampler and policy."""
    sampler = DDIMSampler(SCHEDULE | settings, num_steps, eta)
    backbone = LinearBackbone(sampler)
    return backbone, sampler, make_policy(backbone, sampler, ConditioningCache(encode, PROMPTS), keep_model_output=True)


@torch.no_grad()
def transitions(policy, sampler, trajectories=16, seed=0):
    """Trajectories of `policy`, [trajectories, T], both prompts."""
    torch.manual_seed(seed)
    state = TensorDict(
        {
            "latents": torch.randn(trajectories, *LATENT),
            "step": torch.zeros(trajectories, 1, dtype=torch.int64),
            "prompt_id": torch.arange(trajectories)[:, None] % 2,
        },
        [trajectories],
    )
    taken = []
    for _ in range(sampler.num_steps):
        taken.append(policy(state.clone()))
        state = state.clone().set("latents", taken[-1]["action"]).set("step", state["step"] + 1)
    return torch.stack(taken, 1)


def slopes(backbone, sampler):
    """Slope of each step's mean and of each one-step prediction in x_t, pretrained model, both [T]."""
    one, i = torch.ones(sampler.num_steps, *LATENT), torch.arange(sampler.num_steps)
    mean = sampler.step(one, backbone.k * one, i).mean
    predicted = sampler.to_x0(one, backbone.k * one, i)
    return mean[:, 0, 0, 0], predicted[:, 0, 0, 0]


def flow(backbone, sampler, beta):
    """Gradient of the exact log flow at every state, [T + 1, prompts, *latent]: later slopes x beta x grad r."""
    mean_slope, _ = slopes(backbone, sampler)
    gradient = [beta * GRADIENT]
    for slope in reversed(mean_slope):
        gradient.insert(0, slope * gradient[0])
    return torch.stack(gradient)


def solution(backbone, sampler, beta):
    """What `offset` and `TableCorrection.table` are at the tilted optimum, with gamma = alpha_bar."""
    exact = flow(backbone, sampler, beta)
    _, predicted_slope = slopes(backbone, sampler)
    parametrised = beta * (sampler.signal_power[:-1] * predicted_slope).view(-1, 1, 1, 1, 1) * GRADIENT
    missing = torch.cat([exact[:-1] - parametrised, torch.zeros_like(exact[:1])])
    return exact[1:], missing


def solved(weighting="none", **arguments):
    """The chain at its tilted optimum with the correction that goes with it, its loss, and data of its policy."""
    backbone, sampler, policy = chain()
    correction = TableCorrection(sampler.timesteps)
    with torch.no_grad():
        for parameter, value in zip(
            (backbone.offset, correction.table), solution(backbone, sampler, BETA), strict=True
        ):
            parameter.copy_(value)
    loss = NablaDBLoss(policy, beta=BETA, correction=correction, weighting=weighting, **arguments)
    data = RewardGradient(policy, linear_reward)(transitions(policy, sampler).reshape(-1))
    return backbone, correction, loss, data


def total(losses):
    """The sum of a loss module's terms."""
    return sum(value for key, value in losses.items() if key.startswith("loss_"))


def gradients(module):
    """The gradients of a module's parameters by name, which are taken away."""
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found
