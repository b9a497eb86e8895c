"""Nabla-DB's weights, terms, keys and refusals, on a linear-Gaussian chain."""

import pytest
import torch

from agents import NablaDBLoss, RewardGradient
from tests.chain import BETA, STEPS, TableCorrection, chain, linear_reward, solved, transitions


@pytest.mark.parametrize("weighting", ["none", "sigma", "output"])
@pytest.mark.parametrize("gamma_power", [0.0, 0.5, 1.0])
def test_weights_and_attenuation_are_those_of_the_formulas(weighting, gamma_power):
    backbone, sampler, policy = chain()
    with torch.no_grad():
        backbone.offset += 0.1
    data = RewardGradient(policy, linear_reward)(transitions(policy, sampler))  # [B, T] does as well
    loss = NablaDBLoss(policy, beta=BETA, weighting=weighting, gamma_power=gamma_power)
    expected = 0
    for i in range(STEPS):
        b, std = sampler.mean_out[i], sampler.std[i]
        gamma = sampler.signal_power[i + 1] ** gamma_power if i + 1 < STEPS else 1
        weight = {"none": 1, "sigma": std, "output": std**2 / b}[weighting]
        residual = 0.1 - BETA * gamma * data["next", "reward_grad"][:, i]
        expected += (weight * residual).square().mean() / STEPS
    torch.testing.assert_close(loss(data)["loss_forward"], expected, rtol=1e-4, atol=1e-7)


def test_the_trust_region_is_the_change_of_the_networks_output():
    backbone, sampler, policy = chain()
    data = RewardGradient(policy, linear_reward)(transitions(policy, sampler).reshape(-1))
    loss = NablaDBLoss(policy, beta=BETA, trust_region=50.0)
    assert loss(data)["loss_trust_region"] < 1e-9
    with torch.no_grad():
        backbone.offset += 0.2
    losses = loss(data)
    expected = 50 * (0.2 * backbone.scale).square().mean()
    torch.testing.assert_close(losses["loss_trust_region"], expected, rtol=1e-3, atol=0)
    losses["loss_trust_region"].backward()
    assert (backbone.offset.grad > 0).all()


def test_terms_have_their_weights_and_micro_batches_change_nothing():
    backbone, correction, loss, data = solved()
    with torch.no_grad():
        correction.table += 0.1
        backbone.offset += 0.1
    once = loss(data)
    torch.testing.assert_close(once["loss_terminal"], torch.tensor(0.1**2 / STEPS), rtol=1e-4, atol=0)
    weighted = NablaDBLoss(
        loss.actor_network, beta=BETA, correction=correction, backward_weight=3.0, terminal_weight=5.0
    )(data)
    for key, factor in {"loss_forward": 1, "loss_backward": 3, "loss_terminal": 5}.items():
        torch.testing.assert_close(weighted[key], factor * once[key])
        parts = [loss(part)[key] * len(part) / len(data) for part in data.split(5)]
        torch.testing.assert_close(sum(parts), once[key], rtol=1e-4, atol=1e-7)


def test_the_last_step_with_a_density_is_terminal():
    """A schedule that ends at alpha_bar = 1 has no noise in its last step: the state before it counts as the end."""
    backbone, sampler, policy = chain(set_alpha_to_one=True, timestep_spacing="trailing")
    assert sampler.has_density.tolist() == [True, True, True, False]
    data = RewardGradient(policy, linear_reward)(transitions(policy, sampler).reshape(-1))
    correction = TableCorrection(sampler.timesteps)
    with torch.no_grad():
        correction.table += 1.0
    loss = NablaDBLoss(policy, beta=BETA, correction=correction)
    with pytest.raises(ValueError, match="some transitions are deterministic"):
        loss(data)
    end = data[data["step"][:, 0] == 2]
    losses = loss(end)
    assert losses["loss_terminal"] == 1
    expected = (BETA * end["next", "reward_grad"]).square().mean()  # gamma = 1, and no correction
    torch.testing.assert_close(losses["loss_forward"], expected)


def test_an_earlier_step_can_be_the_last():
    """As if those after it had no density: g is 0 there, gamma 1; and before it nothing changes."""
    _, correction, loss, data = solved()
    with torch.no_grad():
        correction.table += 0.1
    arguments = {"beta": BETA, "correction": correction}
    shorter = NablaDBLoss(loss.actor_network, **arguments, last_step=1)
    end, before = (data[data["step"][:, 0] == step] for step in (1, 0))
    losses = shorter(end)
    assert not loss(end)["loss_terminal"]
    torch.testing.assert_close(losses["loss_terminal"], losses["correction_rms"] ** 2)
    plain = NablaDBLoss(loss.actor_network, beta=BETA, gamma_power=0.0)(end)
    torch.testing.assert_close(losses["loss_forward"], plain["loss_forward"])
    torch.testing.assert_close(shorter(before)["loss_forward"], loss(before)["loss_forward"])
    for missing in (-1, 7):
        with pytest.raises(ValueError, match=f"last_step={missing} is no decision with a density"):
            NablaDBLoss(loss.actor_network, **arguments, last_step=missing)


def test_renamed_keys():
    backbone, sampler, policy = chain()
    data = RewardGradient(policy, linear_reward)(transitions(policy, sampler).reshape(-1))
    loss = NablaDBLoss(policy, beta=BETA, trust_region=1.0, correction=TableCorrection(sampler.timesteps))
    expected = loss(data)
    names = {"action": "taken", "reward_grad": "slope", "model_output": "output"}
    loss.set_keys(**names)
    renamed = data.clone()
    for old, new in {**names, ("next", "reward_grad"): ("next", "slope")}.items():
        renamed.rename_key_(old, new)
    assert set(loss.in_keys) == set(renamed.select(*loss.in_keys).keys(True, True))
    found = loss(renamed)
    for key in loss.out_keys:
        torch.testing.assert_close(found[key], expected[key])


def test_what_is_missing_is_named():
    _, sampler, policy = chain()
    data = transitions(policy, sampler).reshape(-1)
    with pytest.raises(KeyError, match="reward_grad comes from RewardGradient"):
        NablaDBLoss(policy, beta=1)(data)
    data = RewardGradient(policy, linear_reward, before=False)(data)
    NablaDBLoss(policy, beta=1)(data)
    with pytest.raises(KeyError, match=r"no \['reward_grad'\]"):
        NablaDBLoss(policy, beta=1, backward_trains_policy=True)(data)
    with pytest.raises(KeyError, match="keep_model_output=True"):
        NablaDBLoss(policy, beta=1, trust_region=1.0)(data.exclude("model_output"))


def test_bad_settings_are_refused():
    _, sampler, policy = chain()
    with pytest.raises(ValueError, match="would be a constant"):
        NablaDBLoss(policy, beta=1, backward_weight=1.0)
    for setting in ("beta", "backward_weight", "terminal_weight", "trust_region", "gamma_power"):
        arguments = {"beta": 1, setting: -1}
        with pytest.raises(ValueError, match=f"{setting}=-1"):
            NablaDBLoss(policy, **arguments)
    with pytest.raises(ValueError, match="weighting is 'epsilon'"):
        NablaDBLoss(policy, beta=1, weighting="epsilon")
    with pytest.raises(ValueError, match="every step of this sampler is deterministic"):
        NablaDBLoss(chain(eta=0.0)[2], beta=1)
    with pytest.raises(TypeError, match="make it with `make_policy`"):
        NablaDBLoss(policy.module[-1], beta=1)
