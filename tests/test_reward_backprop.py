"""Reward backpropagation against finite differences of the policy's own sampling, and what sets its methods apart."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from tensordict import TensorDict
from torch import nn

from agents import (
    AlignPropLoss,
    DRaFTLoss,
    DRaFTLVLoss,
    Evaluator,
    PromptAdvantage,
    ReFLLoss,
    make_collector,
    make_policy,
    train,
)
from agents.reward_backprop import clipped_shortfall
from diffusion_env import DenoisingEnv
from rewards import JPEGCompressibility
from tests.tiny import SCHEDULE

STEPS = 3
PROMPTS = ("a cat", "a dog")
PATTERN = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(9))


def reward(images, prompts):
    """Another one for each prompt, and curved."""
    raw = (images * PATTERN[..., : images.shape[-2], : images.shape[-1]].to(images)).sum((1, 2, 3)) / 10
    factor = torch.tensor([1.0 if prompt == "a cat" else -0.5 for prompt in prompts]).to(images)
    return factor * raw + raw**2 / 10


def build_policy(backbone, eta=1.0, steps=STEPS):
    return make_policy(backbone, backbone.sampler(steps, eta), backbone.conditioning(PROMPTS))


def states(step, count=4, seed=4, dtype=torch.float32):
    """As if a collector had left off before decision `step`."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDict(
        {
            "latents": torch.randn(count, 4, 8, 8, generator=generator).to(dtype),
            "step": torch.as_tensor(step).expand(count)[:, None].clone(),
            "prompt_id": torch.arange(count)[:, None] % 2,
        },
        [count],
    )


@torch.no_grad()
def sampled_reward(policy, backbone, start, seed, steps=STEPS):
    """Mean reward when the policy itself samples on from `start`; no loss takes part."""
    torch.manual_seed(seed)
    data = start.clone()
    while data["step"][0] < steps:
        data = policy(data)
        data["latents"], data["step"] = data["action"], data["step"] + 1
    prompts = [PROMPTS[i] for i in data["prompt_id"][:, 0].tolist()]
    return reward(backbone.decode(data["latents"]), prompts).mean()


def trainable(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def gradient(loss, data, seed=0):
    """The gradient of `loss` in one vector."""
    parameters = trainable(loss)
    torch.manual_seed(seed)
    loss(data)["loss_objective"].backward()
    found = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    loss.zero_grad()
    assert found.norm() > 1e-6
    return found


@pytest.fixture
def exact(trained_backbone, monkeypatch):
    """The whole chain in float64: finite differences in float32 would be right to two digits only."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    backbone = trained_backbone
    for part in (backbone.unet, backbone.pipeline.vae, backbone.pipeline.text_encoder):
        part.double()
    backbone._dtype = torch.float64
    backbone._negative = backbone._encode([""])
    policy = make_policy(backbone, backbone.sampler(STEPS).double(), backbone.conditioning(PROMPTS))
    return backbone, policy


def assert_is_the_derivative(found, parameters, value):
    """`value()`'s central differences along several directions that share the gradient's scale."""
    generator = torch.Generator().manual_seed(2)
    start = nn.utils.parameters_to_vector(parameters).detach()
    for _ in range(3):
        direction = found * torch.randint(2, found.shape, generator=generator) / found.norm()
        values = []
        for shift in (-1e-4, 1e-4):
            nn.utils.vector_to_parameters(start + shift * direction, parameters)
            values.append(value())
        nn.utils.vector_to_parameters(start, parameters)
        measured = (values[1] - values[0]) / 2e-4
        torch.testing.assert_close(measured, found @ direction, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backprop_steps", [None, 3, 2, 1])
def test_draft_is_the_derivative_of_the_reward_through_the_sampler(exact, backprop_steps):
    """From x_T on; for DRaFT-K from the state K steps before the end, so with the early part held fixed."""
    backbone, policy = exact
    loss = DRaFTLoss(policy, reward, backprop_steps=backprop_steps)
    first = STEPS - (backprop_steps or STEPS)
    assert list(loss.start_steps) == [first]
    start = states(first, dtype=torch.float64)
    torch.manual_seed(0)
    torch.testing.assert_close(loss(start)["backprop_reward"], sampled_reward(policy, backbone, start, 0))
    found = gradient(loss, start)
    assert_is_the_derivative(-found, trainable(loss), lambda: sampled_reward(policy, backbone, start, 0))


def test_draft_k_leaves_out_the_early_steps(trained_backbone):
    """The same trajectory with the same noise: the rest of DRaFT's gradient is that of the early steps."""
    policy = build_policy(trained_backbone, eta=0.0)
    start = states(0)
    with torch.no_grad():
        late = policy(start.clone())
    late["latents"], late["step"] = late["action"], late["step"] + 1
    whole = DRaFTLoss(policy, reward)
    last = DRaFTLoss(policy, reward, backprop_steps=2)
    assert whole(start)["loss_objective"].item() == pytest.approx(last(late)["loss_objective"].item(), rel=1e-4)
    full, part = gradient(whole, start), gradient(last, late)
    assert (full - part).norm() > 0.05 * full.norm()


def test_checkpointing_recomputes_and_changes_nothing(trained_backbone):
    policy = build_policy(trained_backbone)
    calls = []
    handle = trained_backbone.unet.register_forward_hook(lambda *_: calls.append(1))
    found = []
    for checkpointing, expected in ((True, 2 * STEPS), (False, STEPS)):
        calls.clear()
        found.append(gradient(DRaFTLoss(policy, reward, gradient_checkpointing=checkpointing), states(0)))
        assert len(calls) == expected
    handle.remove()
    torch.testing.assert_close(*found)


def test_alignprop_goes_on_from_each_state_by_its_own_number_of_steps(trained_backbone):
    policy = build_policy(trained_backbone, eta=0.0)
    start = states(torch.tensor([2, 0, 1, 0]))
    loss = AlignPropLoss(policy, reward)
    expected = 0
    for backprop_steps in (1, 2, 3):
        rows = (start["step"] == STEPS - backprop_steps).flatten()
        part = gradient(DRaFTLoss(policy, reward, backprop_steps=backprop_steps), start[rows])
        expected = expected + part * rows.sum() / len(start)
    torch.testing.assert_close(gradient(loss, start), expected, rtol=1e-3, atol=1e-5)


def test_alignprop_draws_its_truncation_once_a_trajectory(trained_backbone):
    policy = build_policy(trained_backbone, steps=6)
    loss = AlignPropLoss(policy, reward, min_steps=2, max_steps=4)
    assert list(loss.start_steps) == [2, 3, 4]
    sampler = loss.transition_sampler()
    assert sampler.steps_per_trajectory == 1
    assert set(sampler._steps.tolist()) == {2, 3, 4}


def test_draft_lv_averages_over_fresh_noise_at_the_last_step(trained_backbone):
    policy = build_policy(trained_backbone, eta=0.0)
    start = states(STEPS - 1, count=2)
    torch.manual_seed(0)
    torch.randn(2, 4, 8, 8)  # of the sampler's own step, which does not use it at eta = 0
    noise = torch.randn(6, 4, 8, 8)
    with torch.no_grad():
        clean = policy(start.clone())["action"]
    scheduler = DDPMScheduler(**SCHEDULE_OF_TRAINING)
    level = trained_backbone.sampler(STEPS).timesteps[-1]
    fresh = states(STEPS - 1, count=6)
    fresh["latents"] = scheduler.add_noise(clean.repeat(3, 1, 1, 1), noise, level.expand(6))
    single = DRaFTLoss(policy, reward, backprop_steps=1)
    expected = gradient(single, torch.cat([start, fresh]))
    torch.testing.assert_close(gradient(DRaFTLVLoss(policy, reward, noises=3), start), expected, rtol=1e-3, atol=1e-5)
    assert (expected - gradient(single, start)).norm() > 0.05 * expected.norm()


SCHEDULE_OF_TRAINING = {key: value for key, value in SCHEDULE.items() if key.startswith("beta") or key == "clip_sample"}


def by_hand_prediction(backbone, data):
    """The one-step prediction of diffusers' scheduler."""
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(STEPS)
    conditioning = backbone.conditioning(PROMPTS)(data["prompt_id"][:, 0])
    predictions = []
    for row, i in enumerate(data["step"][:, 0].tolist()):
        x_t, timestep = data["latents"][row : row + 1], scheduler.timesteps[i]
        out = backbone(x_t, timestep[None], conditioning[row : row + 1])
        predictions.append(scheduler.step(out, timestep, x_t).pred_original_sample)
    return torch.cat(predictions)


def test_refl_is_the_clipped_reward_of_the_one_step_prediction(trained_backbone):
    policy = build_policy(trained_backbone)
    data = states(torch.tensor([1, 2, 2, 1]))
    rewards = reward(trained_backbone.decode(by_hand_prediction(trained_backbone, data)), ["a cat", "a dog"] * 2)
    ceiling = rewards.sort().values[1:3].mean().item()  # two of four are above it
    loss = ReFLLoss(policy, reward, last_steps=2, ceiling=ceiling)
    assert list(loss.start_steps) == [1, 2]
    expected = sum((ceiling - r) / 4 for r in rewards if r < ceiling)
    expected.backward()
    by_hand = torch.cat([p.grad.flatten() for p in trainable(trained_backbone)])
    trained_backbone.zero_grad()
    losses = loss(data)
    torch.testing.assert_close(losses["loss_objective"], expected, rtol=1e-4, atol=1e-6)
    assert losses["clipped_fraction"] == 0.5
    assert losses["backprop_reward"].item() == pytest.approx(rewards.mean().item(), rel=1e-4)
    torch.testing.assert_close(gradient(loss, data), by_hand, rtol=1e-3, atol=1e-5)


def test_clipped_shortfall():
    rewards = torch.tensor([1.0, 5.0, 2.5], requires_grad=True)
    value = clipped_shortfall(rewards, 2.0)
    value.backward()
    assert value.item() == pytest.approx(1 / 3)
    assert rewards.grad.tolist() == pytest.approx([-1 / 3, 0, 0])


LOSSES = {
    "DRaFT": lambda policy, reward: DRaFTLoss(policy, reward),
    "DRaFT-1": lambda policy, reward: DRaFTLoss(policy, reward, backprop_steps=1),
    "DRaFT-LV": lambda policy, reward: DRaFTLVLoss(policy, reward),
    "AlignProp": lambda policy, reward: AlignPropLoss(policy, reward),
    "ReFL": lambda policy, reward: ReFLLoss(policy, reward, last_steps=2, ceiling=1.0),
}


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("name", LOSSES)
def test_the_loop_learns(backbone, name):
    def make_env(batch_size):
        return DenoisingEnv(backbone, STEPS, brightness, PROMPTS, batch_size=batch_size, seed=0)

    policy = build_policy(backbone)
    evaluate = Evaluator(make_env(16), samples_per_prompt=8)
    before = evaluate(policy)
    torch.manual_seed(0)
    loss = LOSSES[name](policy, brightness)
    collector = make_collector(make_env(8), policy, iterations=3)
    rows = list(
        train(
            collector,
            loss,
            torch.optim.AdamW(trainable(loss), lr=1e-2),
            advantage=PromptAdvantage(min_count=4),
            sampler=loss.transition_sampler(),
            micro_batch=5,
        )
    )
    collector.shutdown()
    assert len(rows) == 3
    assert all(row["grad_norm"] > 0 for row in rows)
    difference = evaluate(policy).rewards - before.rewards
    assert difference.mean() > 5 * difference.std() / len(difference) ** 0.5
    with backbone.reference():
        assert torch.equal(evaluate(policy).rewards, before.rewards)


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_policys_adapters_train(trained_backbone, name):
    adapters = {id(p) for p in trainable(trained_backbone)}
    loss = LOSSES[name](build_policy(trained_backbone), reward)
    assert {id(p) for p in loss.parameters() if p.requires_grad} == adapters
    assert set(loss(states(loss.start_steps[-1])).keys()) == set(loss.out_keys)


def test_renamed_keys(trained_backbone):
    loss = DRaFTLoss(build_policy(trained_backbone), reward)
    assert loss.in_keys == ["latents", "step", "prompt_id"]
    torch.manual_seed(0)
    expected = loss(states(0))["loss_objective"]
    loss.set_keys(latents="x", step="i", prompt_id="prompt")
    assert loss.in_keys == ["x", "i", "prompt"]
    renamed = states(0).rename_key_("latents", "x").rename_key_("step", "i").rename_key_("prompt_id", "prompt")
    torch.manual_seed(0)
    torch.testing.assert_close(loss(renamed)["loss_objective"], expected)


def test_impossible_numbers_of_steps_are_refused(backbone):
    policy = build_policy(backbone)
    for wrong in (4, 0, -1):
        with pytest.raises(ValueError, match=f"the last {wrong} steps of a trajectory of 3"):
            DRaFTLoss(policy, reward, backprop_steps=wrong)
    for fewest, most in ((0, 2), (3, 2), (1, 4)):
        with pytest.raises(ValueError, match=f"the last {fewest} to {most} steps of a trajectory of 3"):
            AlignPropLoss(policy, reward, min_steps=fewest, max_steps=most)
    with pytest.raises(ValueError, match="the last 1 to 10 steps of a trajectory of 3"):
        ReFLLoss(policy, reward)
    with pytest.raises(ValueError, match="noises is 0"):
        DRaFTLVLoss(policy, reward, noises=0)


class SaysNo:
    name = "refuser"
    differentiable = False

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


@pytest.mark.parametrize("name", LOSSES)
def test_a_reward_without_gradient_is_refused_when_the_loss_is_built(backbone, name):
    policy = build_policy(backbone)
    for wrong, shown in ((SaysNo(), "refuser"), (JPEGCompressibility(), "jpeg-compressibility")):
        with pytest.raises(ValueError, match=f"the reward '{shown}' is not differentiable"):
            LOSSES[name](policy, wrong)
    with pytest.raises(ValueError, match="is not differentiable"), torch.no_grad():
        LOSSES[name](policy, lambda images, _: images.detach().mean((1, 2, 3)))


def test_a_decoder_without_gradient_is_refused_when_the_loss_is_built(backbone, monkeypatch):
    monkeypatch.setattr(type(backbone), "decode", torch.no_grad()(type(backbone).decode))
    with pytest.raises(ValueError, match="decode stops gradients"):
        DRaFTLoss(build_policy(backbone), reward)


def test_a_state_of_another_step_is_refused(backbone):
    loss = DRaFTLoss(build_policy(backbone), reward, backprop_steps=2)
    with pytest.raises(ValueError, match=r"states of steps \[0, 2\] came, but the gradient starts at steps \[1\]"):
        loss(states(torch.tensor([1, 0, 2, 1])))


def test_a_reward_that_is_not_finite_is_refused(backbone):
    broken = False  # it works when the loss is built and tries it
    loss = DRaFTLoss(build_policy(backbone), lambda images, _: images.mean((1, 2, 3)) / (not broken))
    broken = True
    with pytest.raises(ValueError, match="the reward is inf for prompt 'a cat'"):
        loss(states(0))
