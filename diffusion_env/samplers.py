"""Timesteps and the Gaussian step of a diffusion sampler.

Decision i = 0 .. T-1 goes from `timesteps[i]`, noisiest first, to the next less noisy latent. Every step is
x_prev ~ N(a_i x_t + b_i out, sigma_i^2 I), where `out` is the (guided) network output, whatever it predicts. Rollout,
log-probability, KL and every loss use this one definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.distributions import Independent, Normal

Reduction = Literal["mean", "sum"]


class GaussianStep(NamedTuple):
    """Distribution of the next latents: `mean` [B, *latent], `std` [B, 1, ...] broadcasting over the latent."""

    mean: Tensor
    std: Tensor


class StepCoefficients(NamedTuple):
    """A step x_prev ~ N(x * x_t + out * output, std^2 I) in numbers, each [B, 1, ...] broadcasting over the latent."""

    x: Tensor
    out: Tensor
    std: Tensor


class NoisingStep(NamedTuple):
    """One step of the forward process, x_t ~ N(scale * x_prev, std^2 I), each [B, 1, ...]."""

    scale: Tensor
    std: Tensor


class NoisedLatents(NamedTuple):
    """Latents `x_t` [B, *latent] at some noise level and the `target` that the network should output there."""

    x_t: Tensor
    target: Tensor


class DDIMSampler(nn.Module):
    """DDIM with noise (Song et al. 2020, arXiv:2010.02502, eq. 12 and 16) as tables of coefficients.

    `eta` = 1 is the DDPM posterior; `eta` = 0 is deterministic and has no density. The tables are float32 buffers
    computed in float64; they move with `.to(device)` and are only ever indexed, so a step never waits for the device.

    Attributes:
        timesteps: int64 [T], the training timestep of each decision.
        mean_x: float32 [T], a of each decision, the factor of x_t in the step's mean.
        mean_out: float32 [T], b of each decision, the factor of the network's output in the step's mean.
        std: float32 [T], sigma of each decision.
        signal_power: float32 [T + 1], squared share of the image in the latents before each decision (alpha_bar), 1 in
            the finished ones.
        has_density: bool [T] on the CPU; False where sigma is 0 and a log-probability does not exist.
    """

    timesteps: Tensor
    mean_x: Tensor
    mean_out: Tensor
    std: Tensor
    signal_power: Tensor
    _noising_scale: Tensor
    _noising_std: Tensor
    _x0_x: Tensor
    _x0_out: Tensor
    _alphas_cumprod: Tensor

    def __init__(self, scheduler_config: Mapping[str, Any], num_steps: int, eta: float = 1.0) -> None:
        """Build the tables.

        Args:
            scheduler_config: configuration of any diffusers scheduler of the Stable Diffusion family.
            num_steps: T, the number of denoising steps, at most the number of training timesteps.
            eta: share of the DDPM posterior's standard deviation, in [0, 1].

        Raises:
            ValueError: a number is out of range, or the scheduler asks for something that is no Gaussian step.
        """
        super().__init__()
        scheduler = DDIMScheduler.from_config(dict(scheduler_config))
        _refuse_unsupported(scheduler, num_steps, eta)
        scheduler.set_timesteps(num_steps)
        self.prediction_type: str = scheduler.config.prediction_type
        timesteps = scheduler.timesteps.long()
        previous = timesteps - scheduler.config.num_train_timesteps // num_steps

        alphas = scheduler.alphas_cumprod.double()
        alpha = alphas[timesteps]
        alpha_prev = torch.where(previous >= 0, alphas[previous.clamp(min=0)], scheduler.final_alpha_cumprod.double())
        if self.prediction_type == "epsilon" and (alpha == 0).any():
            raise ValueError(
                "the schedule starts at zero signal-to-noise ratio (rescale_betas_zero_snr), where a prediction of the "
                "noise says nothing about the image; use a v-prediction model or timestep_spacing='leading'"
            )
        std = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).clamp(min=0).sqrt()
        x0_x, x0_out, eps_x, eps_out = _prediction_coefficients(alpha, self.prediction_type)
        direction = (1 - alpha_prev - std**2).clamp(min=0).sqrt()

        self.has_density = std > 0
        self._all_have_density = bool(self.has_density.all())
        for name, table in {
            "mean_x": alpha_prev.sqrt() * x0_x + direction * eps_x,
            "mean_out": alpha_prev.sqrt() * x0_out + direction * eps_out,
            "std": std,
            "signal_power": torch.cat([alpha, torch.ones_like(alpha[:1])]),
            "_noising_scale": (alpha / alpha_prev).sqrt(),
            "_noising_std": (1 - alpha / alpha_prev).sqrt(),
            "_x0_x": x0_x,
            "_x0_out": x0_out,
            "_alphas_cumprod": alphas,
        }.items():
            self.register_buffer(name, table.float(), persistent=False)
        self.register_buffer("timesteps", timesteps, persistent=False)

    @property
    def num_steps(self) -> int:
        """T, the length of an episode."""
        return len(self.timesteps)

    @property
    def num_train_timesteps(self) -> int:
        """How many training timesteps `add_noise` knows, 0 the cleanest."""
        return len(self._alphas_cumprod)

    @property
    def all_have_density(self) -> bool:
        """Whether every step is a proper Gaussian."""
        return self._all_have_density

    def step(self, x_t: Tensor, out: Tensor, i: Tensor) -> GaussianStep:
        """Distribution of the next latents.

        Args:
            x_t: latents before the step, [B, *latent].
            out: the network's (guided) output there, same shape, any floating dtype.
            i: int64 [B], the index of the decision, 0 first.

        Returns:
            Mean and standard deviation, float32.
        """
        step = self.coefficients(i, x_t)
        return GaussianStep(step.x * x_t.float() + step.out * out.float(), step.std)

    def coefficients(self, i: Tensor, like: Tensor) -> StepCoefficients:
        """The numbers of decisions `i` (int64 [B]), shaped to multiply latents `like` [B, *latent]."""
        return StepCoefficients(_at(self.mean_x, i, like), _at(self.mean_out, i, like), _at(self.std, i, like))

    def noising(self, i: Tensor, like: Tensor) -> NoisingStep:
        """The forward process across decisions `i` (int64 [B]), from the latents after them to those before.

        The Markov chain of DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 2), whatever `eta` is.
        """
        return NoisingStep(_at(self._noising_scale, i, like), _at(self._noising_std, i, like))

    def to_x0(self, x_t: Tensor, out: Tensor, i: Tensor) -> Tensor:
        """One-step prediction of the clean latents from `x_t` and the network's output at decision `i`."""
        return _at(self._x0_x, i, x_t) * x_t.float() + _at(self._x0_out, i, x_t) * out.float()

    def log_prob(self, x_prev: Tensor, step: GaussianStep, i: Tensor, reduction: Reduction) -> Tensor:
        """Log-density [B] of `x_prev` under `step` of decision `i`; see `normal_log_prob` for `reduction`.

        Raises:
            ValueError: some decision asked about is deterministic, so there is no density.
        """
        if not self._all_have_density and not self.has_density[i.cpu()].all():
            without = sorted(set(i[~self.has_density[i.cpu()]].tolist()))
            raise ValueError(
                f"decisions {without} are deterministic (standard deviation 0) and have no log-probability; leave "
                "them out (`sampler.has_density`) or raise `eta` above 0"
            )
        return normal_log_prob(x_prev, step.mean, step.std, reduction)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> NoisedLatents:
        """Forward process at any training timestep `t` (int64 [B]) and the network's training target there."""
        alpha = _at(self._alphas_cumprod, t, x0)
        signal, level = alpha.sqrt(), (1 - alpha).sqrt()
        target = noise if self.prediction_type == "epsilon" else signal * noise - level * x0
        return NoisedLatents(signal * x0 + level * noise, target)


def normal_log_prob(x: Tensor, mean: Tensor, std: Tensor, reduction: Reduction) -> Tensor:
    """Log-density of an isotropic Gaussian over the latent, float32 [B].

    "sum" is the log-density. "mean" divides it by the number D of latent elements, as DDPO's published code does: the
    importance ratio becomes ratio^(1/D), so a clip range of 1e-4 at D = 16,384 lets the true ratio move by a factor
    of five. A clip range belongs to its reduction.
    """
    density = Independent(Normal(mean, std.expand_as(mean), validate_args=False), mean.ndim - 1, validate_args=False)
    log_prob = density.log_prob(x)
    return log_prob / mean[0].numel() if reduction == "mean" else log_prob


def normal_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor, reduction: Reduction) -> Tensor:
    """KL(p || q) of two isotropic Gaussians over the latent, float32 [B]; reduced like `normal_log_prob`."""
    kl = torch.distributions.kl_divergence(
        Normal(mean_p, std_p.expand_as(mean_p), validate_args=False),
        Normal(mean_q, std_q.expand_as(mean_q), validate_args=False),
    ).flatten(1)
    return kl.mean(1) if reduction == "mean" else kl.sum(1)


def _prediction_coefficients(alpha: Tensor, prediction_type: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients of x_t and of the network output in the predicted clean latents and in the predicted noise."""
    signal, level = alpha.sqrt(), (1 - alpha).sqrt()
    if prediction_type == "epsilon":
        return 1 / signal, -level / signal, torch.zeros_like(alpha), torch.ones_like(alpha)
    return signal, -level, level, signal  # v-prediction: Salimans and Ho 2022, arXiv:2202.00512, appendix D


def _refuse_unsupported(scheduler: DDIMScheduler, num_steps: int, eta: float) -> None:
    config = scheduler.config
    if not 1 <= num_steps <= config.num_train_timesteps:
        raise ValueError(f"num_steps is {num_steps}; it must lie between 1 and {config.num_train_timesteps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie between 0 (deterministic) and 1 (DDPM posterior)")
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type is {config.prediction_type!r}; epsilon and v_prediction are supported")
    for setting in ("clip_sample", "thresholding"):
        if config[setting]:
            raise ValueError(
                f"the scheduler has {setting}=True, which bends the predicted image so that the step's mean is no "
                f"longer linear in the network's output; set {setting} to false in scheduler_config.json"
            )


def _at(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    return table[index].view(-1, *[1] * (like.ndim - 1))
