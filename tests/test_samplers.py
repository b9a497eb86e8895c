"""The sampler against diffusers' own scheduler and torch.distributions."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal

from diffusion_env.samplers import DDIMSampler, normal_log_prob
from tests.tiny import SCHEDULE as STABLE_DIFFUSION

GRID = list(
    itertools.product(
        (1, 2, 7, 10, 50),
        (0.0, 0.3, 1.0),
        ("epsilon", "v_prediction"),
        ("leading", "trailing"),
        (0, 1),
        (False, True),
    )
)


@pytest.mark.parametrize(("num_steps", "eta", "prediction", "spacing", "offset", "to_one"), GRID)
def test_step_equals_diffusers(num_steps, eta, prediction, spacing, offset, to_one):
    config = STABLE_DIFFUSION | {
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "set_alpha_to_one": to_one,
    }
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(num_steps)
    sampler = DDIMSampler(config, num_steps, eta)
    assert torch.equal(sampler.timesteps, scheduler.timesteps)
    generator = torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps):
        x, out, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
        index = torch.full((2,), i)
        expected = scheduler.step(out, t, x, eta=eta, variance_noise=noise if eta > 0 else None)
        mean, std = sampler.step(x, out, index)
        # diffusers works in float32 throughout: at the noisiest step of epsilon prediction x0 is 14 times as large.
        torch.testing.assert_close(mean + std * noise, expected.prev_sample, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(sampler.to_x0(x, out, index), expected.pred_original_sample, rtol=1e-5, atol=1e-5)


def test_each_sample_uses_its_own_step():
    sampler = DDIMSampler(STABLE_DIFFUSION, 10)
    x, out = torch.randn(2, 3, 4, 8, 8)
    together = sampler.step(x, out, torch.tensor([0, 5, 9]))
    for row, i in enumerate((0, 5, 9)):
        alone = sampler.step(x[row : row + 1], out[row : row + 1], torch.tensor([i]))
        assert torch.equal(alone.mean[0], together.mean[row])
        assert torch.equal(alone.std[0], together.std[row])


def test_log_prob_equals_torch_and_ddpo():
    sampler = DDIMSampler(STABLE_DIFFUSION, 10)
    x, out, noise = torch.randn(3, 5, 4, 8, 8)
    i = torch.tensor([0, 3, 5, 8, 9])
    step = sampler.step(x, out, i)
    x_prev = step.mean + step.std * noise
    every = Normal(step.mean.double(), step.std.double()).log_prob(x_prev.double())
    torch.testing.assert_close(
        sampler.log_prob(x_prev, step, i, "sum"), every.sum((1, 2, 3)).float(), rtol=1e-5, atol=1e-3
    )
    # DDPO's own expression: mean over all dimensions but the batch.
    ddpo = -((x_prev - step.mean) ** 2) / (2 * step.std**2) - step.std.log() - 0.5 * torch.tensor(torch.pi * 2).log()
    torch.testing.assert_close(sampler.log_prob(x_prev, step, i, "mean"), ddpo.mean((1, 2, 3)), rtol=1e-5, atol=1e-6)


def test_add_noise_and_target_equal_diffusers():
    t = torch.tensor([0, 400, 999])
    x0, noise = torch.randn(2, 3, 4, 8, 8)
    for prediction in ("epsilon", "v_prediction"):
        config = STABLE_DIFFUSION | {"prediction_type": prediction}
        scheduler = DDIMScheduler.from_config(config)
        noised = DDIMSampler(config, 10).add_noise(x0, noise, t)
        torch.testing.assert_close(noised.x_t, scheduler.add_noise(x0, noise, t))
        expected = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
        torch.testing.assert_close(noised.target, expected)


def test_the_true_output_predicts_the_clean_latents():
    for prediction in ("epsilon", "v_prediction"):
        sampler = DDIMSampler(STABLE_DIFFUSION | {"prediction_type": prediction}, 10)
        x0, noise = torch.randn(2, 10, 4, 8, 8)
        noised = sampler.add_noise(x0, noise, sampler.timesteps)
        torch.testing.assert_close(sampler.to_x0(noised.x_t, noised.target, torch.arange(10)), x0, rtol=1e-4, atol=1e-4)


def test_steps_without_density_are_named_and_refused():
    config = STABLE_DIFFUSION | {"set_alpha_to_one": True, "timestep_spacing": "trailing"}
    sampler = DDIMSampler(config, 4)
    assert sampler.has_density.tolist() == [True, True, True, False]
    x, out = torch.randn(2, 2, 4, 8, 8)
    step = sampler.step(x, out, torch.tensor([2, 3]))
    with pytest.raises(ValueError, match=r"decisions \[3\] are deterministic"):
        sampler.log_prob(x, step, torch.tensor([2, 3]), "mean")
    assert not DDIMSampler(STABLE_DIFFUSION, 4, eta=0.0).has_density.any()


@pytest.mark.parametrize(
    ("config", "steps", "eta", "message"),
    [
        ({}, 0, 1.0, "num_steps is 0"),
        ({}, 1001, 1.0, "num_steps is 1001"),
        ({}, 10, 1.5, "eta is 1.5"),
        ({"prediction_type": "sample"}, 10, 1.0, "prediction_type is 'sample'"),
        ({"clip_sample": True}, 10, 1.0, "clip_sample=True"),
        ({"thresholding": True}, 10, 1.0, "thresholding=True"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 10, 1.0, "zero signal-to-noise"),
    ],
)
def test_what_is_no_gaussian_step_is_refused(config, steps, eta, message):
    with pytest.raises(ValueError, match=message):
        DDIMSampler(STABLE_DIFFUSION | config, steps, eta)


def test_reductions_differ_by_the_number_of_elements():
    x, mean = torch.randn(2, 3, 4, 8, 8)
    std = torch.rand(3, 1, 1, 1) + 0.1
    torch.testing.assert_close(normal_log_prob(x, mean, std, "sum") / 256, normal_log_prob(x, mean, std, "mean"))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_public_numbers_are_those_of_the_step(prediction):
    config = STABLE_DIFFUSION | {"prediction_type": prediction}
    sampler = DDIMSampler(config, 10, 0.7)
    x, out = torch.randn(2, 10, 4, 8, 8)
    i = torch.arange(10)
    step, coefficients = sampler.step(x, out, i), sampler.coefficients(i, x)
    assert torch.equal(step.mean, coefficients.x * x + coefficients.out * out)
    assert torch.equal(step.std, coefficients.std)
    for table, number in zip((sampler.mean_x, sampler.mean_out, sampler.std), coefficients, strict=True):
        assert torch.equal(number, table[:, None, None, None])
    alphas = DDIMScheduler.from_config(config).alphas_cumprod
    torch.testing.assert_close(sampler.signal_power, torch.cat([alphas[sampler.timesteps], torch.ones(1)]))


def test_noising_undoes_the_steps():
    """From the clean latents through every noising step to the marginal of DDPM (Ho et al. 2020, eq. 4)."""
    sampler = DDIMSampler(STABLE_DIFFUSION | {"set_alpha_to_one": True, "steps_offset": 1}, 10)
    signal, variance = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for i in reversed(range(10)):
        noising = sampler.noising(torch.tensor([i]), signal)
        signal, variance = noising.scale * signal, noising.scale**2 * variance + noising.std**2
        torch.testing.assert_close(signal.flatten() ** 2, sampler.signal_power[i : i + 1])
        torch.testing.assert_close(variance.flatten(), 1 - sampler.signal_power[i : i + 1])
