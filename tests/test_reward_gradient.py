"""The reward's gradient: in closed form on the chain, by finite differences on a small true pipeline."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import ReplayBuffer, TensorStorage
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import check_env_specs

from agents import RewardGradient, TransitionSampler, make_collector, make_policy
from diffusion_env import DenoisingEnv
from tests.chain import GAIN, GRADIENT, LATENT, PROMPTS, STEPS, chain, linear_reward, slopes, transitions

KEYS = ("reward_grad", ("next", "reward_grad"))


def squares(images, prompts):
    return images.square().sum((1, 2, 3))


@pytest.mark.parametrize("jacobian", [True, False])
def test_on_the_chain_it_is_the_predictions_slope_times_the_rewards(jacobian):
    """Each prompt has its own sign: another sample's prompt would show."""
    backbone, sampler, policy = chain()
    data = RewardGradient(policy, linear_reward, jacobian=jacobian, micro_batch=3)(transitions(policy, sampler, 6))
    prompt = data["prompt_id"][:, 0, 0]
    predicted = slopes(backbone, sampler)[1] if jacobian else sampler._x0_x
    slope = torch.cat([predicted, torch.ones(1)])  # the clean latents are their own prediction
    for i in range(STEPS):
        torch.testing.assert_close(data["reward_grad"][:, i], slope[i] * GRADIENT[prompt])
        torch.testing.assert_close(data["next", "reward_grad"][:, i], slope[i + 1] * GRADIENT[prompt])


def test_on_a_true_pipeline_it_is_the_slope_of_the_reward(trained_backbone):
    """Against finite differences, through decoder and guided network; the clean case without the network."""
    backbone = trained_backbone
    sampler, cache = backbone.sampler(STEPS), backbone.conditioning(PROMPTS)
    policy = make_policy(backbone, sampler, cache)
    torch.manual_seed(0)
    x = 0.1 * torch.randn(3, 4, 8, 8)
    direction = torch.randn(3, 4, 8, 8)
    step, prompt_id = torch.tensor([[1], [3], [STEPS]]), torch.tensor([[1], [0], [1]])
    calls = []
    handle = backbone.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    gradient = RewardGradient(policy, squares).gradient(x, step, prompt_id)
    handle.remove()
    assert calls == [4], "two of three samples are noisy, each goes through with and without its prompt"
    assert gradient.shape == x.shape and gradient.dtype == torch.float32

    @torch.no_grad()
    def reward(latents):
        i = step[:2, 0]
        out = backbone(latents[:2], sampler.timesteps[i], cache(prompt_id[:2, 0]))
        clean = torch.cat([sampler.to_x0(latents[:2], out, i), latents[2:]])
        return squares(backbone.decode(clean).double(), None)

    eps = 1e-3
    expected = (reward(x + eps * direction) - reward(x - eps * direction)) / (2 * eps)
    found = (gradient * direction).sum((1, 2, 3)).double()
    assert expected.abs().min() > 0.05
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


def test_the_reward_is_computed_in_float32_even_under_autocast():
    _, sampler, policy = chain()
    seen = []

    def reward(images, prompts):
        product = images.flatten(1) @ torch.ones(12, 1)  # autocast would do this in bfloat16
        seen.append((images.dtype, product.dtype))
        return product.squeeze(1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        data = RewardGradient(policy, reward)(transitions(policy, sampler, 2))
    assert set(seen) == {(torch.float32, torch.float32)}
    assert all(data[key].dtype == torch.float32 for key in KEYS)


def test_noisy_copies_are_averaged():
    _, _, policy = chain()
    x, step = torch.randn(2, *LATENT), torch.full((2, 1), STEPS)
    arguments = (x, step, torch.tensor([[0], [1]]))
    prompts_seen = []

    def reward(images, prompts):
        prompts_seen.append(prompts)
        return squares(images, prompts)

    transform = RewardGradient(policy, reward, noisy_copies=5, noise_std=0.7)
    prompts_seen.clear()  # it tried the reward when it was built
    torch.manual_seed(3)
    found = transform.gradient(*arguments)
    torch.manual_seed(3)
    noise = 0.7 * torch.randn(10, 3, 2, 2).view(2, 5, 3, 2, 2)
    expected = 2 * GAIN * (3 * (0.5 + GAIN * x) + noise.mean(1).sum(1, keepdim=True))
    torch.testing.assert_close(found, expected)
    assert prompts_seen == [["up"] * 5 + ["down"] * 5]
    # For a linear reward copies change nothing, however many.
    plain, copies = (RewardGradient(policy, linear_reward, noisy_copies=n).gradient(*arguments) for n in (0, 3))
    torch.testing.assert_close(plain, copies)


def test_clipping_shortens_each_samples_gradient_to_the_norm():
    _, _, policy = chain()
    x = torch.stack([torch.full(LATENT, -0.5 / GAIN), torch.full(LATENT, 0.1), torch.full(LATENT, 9.0)])
    arguments = (x, torch.full((3, 1), STEPS), torch.zeros(3, 1, dtype=torch.int64))
    raw = RewardGradient(policy, squares).gradient(*arguments)
    norms = raw.flatten(1).norm(dim=1)
    assert norms[0] == 0 and 0 < norms[1] < 3 < norms[2]
    clipped = RewardGradient(policy, squares, max_norm=3.0).gradient(*arguments)
    assert torch.equal(clipped[:2], raw[:2])
    torch.testing.assert_close(clipped[2], raw[2] * 3 / norms[2])


def test_the_final_images_gradient_serves_the_whole_trajectory():
    _, sampler, policy = chain()
    data = transitions(policy, sampler, 4)
    expected = RewardGradient(policy, squares)(data.clone())["next", "reward_grad"][:, -1]
    final = RewardGradient(policy, squares, final_image=True)
    final(data)
    for key in KEYS:
        assert data[key].shape == (4, STEPS, *LATENT)
        for i in range(STEPS):
            torch.testing.assert_close(data[key][:, i], expected)
    for part in (data[:, :-1], data.reshape(-1)):
        with pytest.raises(ValueError, match="final_image needs whole trajectories"):
            final(part)


def test_only_what_is_asked_for_is_written():
    _, sampler, policy = chain()
    data = RewardGradient(policy, linear_reward, before=False)(transitions(policy, sampler, 2))
    assert "reward_grad" not in data.keys()
    assert ("next", "reward_grad") in data.keys(True)


def test_a_buffer_computes_it_for_what_it_draws_with_the_policy_of_the_moment():
    """One transform for one buffer after another, as the loop makes them."""
    backbone, sampler, policy = chain()
    transform = RewardGradient(policy, linear_reward)
    for slope in (0.0, 0.3):
        with torch.no_grad():
            backbone.slope.fill_(slope)
        stored = transitions(policy, sampler, 4)
        buffer = ReplayBuffer(
            storage=TensorStorage(stored),
            sampler=TransitionSampler(range(STEPS), 0.5),
            batch_size=8,
            transform=transform,
        )
        (drawn,) = list(buffer)
        assert drawn.shape == (8,)
        expected = RewardGradient(policy, linear_reward)(drawn.clone().exclude(*KEYS))
        for key in KEYS:
            torch.testing.assert_close(drawn[key], expected[key])
        assert "reward_grad" not in stored.keys()


def test_on_an_environment_it_is_what_it_is_on_transitions(backbone):
    policy = make_policy(backbone, backbone.sampler(3), backbone.conditioning(PROMPTS))
    plain = DenoisingEnv(backbone, 3, squares, PROMPTS, batch_size=2, seed=0)
    env = TransformedEnv(plain, RewardGradient(policy, squares))
    check_env_specs(env)
    collector = make_collector(env, policy, iterations=2)
    for rollout in collector:
        expected = RewardGradient(policy, squares)(rollout.clone().exclude(*KEYS))
        for key in KEYS:
            assert rollout[key].abs().max() > 0
            torch.testing.assert_close(rollout[key], expected[key], rtol=1e-3, atol=1e-5)
    collector.shutdown()
    final = TransformedEnv(
        DenoisingEnv(backbone, 3, squares, PROMPTS, batch_size=2, seed=0),
        RewardGradient(policy, squares, final_image=True),
    )
    with pytest.raises(ValueError, match="cannot be known while an environment steps"):
        final.reset()


def test_it_leaves_no_gradient_behind(backbone):
    policy = make_policy(backbone, backbone.sampler(STEPS), backbone.conditioning(PROMPTS))
    transform = RewardGradient(policy, squares)
    assert not list(transform.parameters())
    data = TensorDict(
        {
            "latents": torch.randn(2, 4, 8, 8),
            "action": torch.randn(2, 4, 8, 8),
            "step": torch.tensor([[0], [STEPS - 1]]),
            "prompt_id": torch.zeros(2, 1, dtype=torch.int64),
        },
        [2],
    )
    with torch.no_grad():
        transform(data)
    assert not any(data[key].requires_grad for key in KEYS)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_rewards_without_a_gradient_are_refused():
    _, _, policy = chain()

    class Compressibility:
        name = "jpeg_compressibility"
        differentiable = False

    with pytest.raises(ValueError, match="'jpeg_compressibility' is not differentiable"):
        RewardGradient(policy, Compressibility())
    with pytest.raises(ValueError, match="no gradient reaches the images"):
        RewardGradient(policy, lambda images, prompts: images.detach().mean((1, 2, 3)))
    with pytest.raises(ValueError, match="one number an image"):
        RewardGradient(policy, lambda images, prompts: images.mean())


def test_bad_settings_are_refused():
    _, _, policy = chain()
    for setting in ({"noisy_copies": -1}, {"noise_std": -0.1}, {"micro_batch": 0}):
        with pytest.raises(ValueError, match="must be at least 0, micro_batch"):
            RewardGradient(policy, linear_reward, **setting)
    with pytest.raises(ValueError, match="max_norm is 0"):
        RewardGradient(policy, linear_reward, max_norm=0)
