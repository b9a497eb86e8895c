"""Scores of one denoising step: gradients of its log-density by the latents on either side, in closed form.

A step is x_prev ~ N(a x_t + b out(x_t), sigma^2 I). With e = x_prev - mean and J = d out / d x_t,

    grad_{x_prev} log p(x_prev | x_t) = -e / sigma^2
    grad_{x_t}    log p(x_prev | x_t) = (a e + b J^T e) / sigma^2
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion_env import NoisingStep, StepCoefficients

Weighting = Literal["none", "sigma", "output"]


class Evaluated(NamedTuple):
    """A network's output at x_t, e, and J^T e where it was asked for, all [N, *latent]."""

    out: Tensor
    error: Tensor
    pulled_back: Tensor | None


class StepScores(NamedTuple):
    """Gradients of a log-density ratio by x_prev and, where it was asked for, by x_t, both [N, *latent]."""

    by_x_prev: Tensor
    by_x_t: Tensor | None


def pull_back(out: Tensor, x_t: Tensor, error: Tensor, *, create_graph: bool) -> Tensor:
    """J^T e by a vector-Jacobian product; the graph of `out` is kept.

    Args:
        out: the network's output at `x_t`, with its graph.
        x_t: where to differentiate, a leaf that requires a gradient.
        error: e, same shape as `out`.
        create_graph: make the result differentiable by whatever `out` and `error` depend on.
    """
    vector = error if create_graph else error.detach()
    return torch.autograd.grad(out, x_t, vector, retain_graph=True, create_graph=create_graph)[0]


def residual_scores(policy: Evaluated, ref: Evaluated, step: StepCoefficients) -> StepScores:
    """Scores of log p(x_prev | x_t) - log p_ref(x_prev | x_t).

    What the two means have in common is cancelled on paper, the sampling noise of the first score altogether, so that
    float32 suffices at small sigma.
    """
    scale = step.out / step.std**2
    by_x_prev = scale * (policy.out - ref.out)
    if policy.pulled_back is None or ref.pulled_back is None:
        return StepScores(by_x_prev, None)
    return StepScores(by_x_prev, scale * (policy.pulled_back - ref.pulled_back) - step.x * by_x_prev)


def balance_scores(
    policy: Evaluated, x_t: Tensor, x_prev: Tensor, step: StepCoefficients, noising: NoisingStep
) -> StepScores:
    """Scores of log p(x_prev | x_t) - log q(x_t | x_prev), q the noising kernel."""
    noise = (x_t - noising.scale * x_prev) / noising.std**2
    by_x_prev = -policy.error / step.std**2 - noising.scale * noise
    if policy.pulled_back is None:
        return StepScores(by_x_prev, None)
    return StepScores(by_x_prev, (step.x * policy.error + step.out * policy.pulled_back) / step.std**2 + noise)


def step_weight(step: StepCoefficients, weighting: Weighting) -> Tensor:
    """What a step's residuals are multiplied by, [N, 1, ...]; see `agents.NablaDBLoss`."""
    if weighting == "none":
        return torch.ones_like(step.std)
    return step.std if weighting == "sigma" else step.std**2 / step.out.abs()
