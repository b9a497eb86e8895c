"""The gymnasium form of the environment against gymnasium, Stable-Baselines3 and `DenoisingEnv`."""

import math
import pickle
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

import diffusion_env
from diffusion_env import DenoisingEnv, LoRA, StableDiffusionBackbone
from diffusion_env.gym import LATENT_BOUND, colourfulness
from diffusion_env.prompts import animals
from tests.tiny import tiny_pipeline

NUM_STEPS = 4
PROMPTS = ("a cat", "a dog", "an ant")
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def backbone() -> StableDiffusionBackbone:
    return StableDiffusionBackbone(tiny_pipeline(), lora=LoRA())


@pytest.fixture
def env(backbone):
    return make(backbone)


def brightness_and_length(images, prompts):
    """A reward that depends on the image and on the prompt."""
    return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


def make(backbone, **arguments):
    settings = {"num_steps": NUM_STEPS, "reward": brightness_and_length, "prompts": PROMPTS}
    return gymnasium.make("Denoising-v0", decoder=backbone, **settings | arguments)


def actions(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((NUM_STEPS, *SHAPE)).astype(np.float32)


def finish(env):
    """Play an episode to its end and return its last step."""
    for action in actions():
        step = env.step(action)
    return step


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key])


def test_gymnasium_checker(backbone):
    check_env(make(backbone).unwrapped)  # also makes and renders the environment in each of its render modes
    check_env(make(backbone, render_mode="rgb_array").unwrapped)


def test_specification_can_be_stored(env):
    assert pickle.loads(pickle.dumps(gymnasium.spec("Denoising-v0"))).entry_point == "diffusion_env.gym:GymDenoisingEnv"
    assert isinstance(env.unwrapped, diffusion_env.GymDenoisingEnv)


@pytest.mark.parametrize("seed", [0, 7])
def test_equals_the_torchrl_environment(backbone, seed):
    reference = DenoisingEnv(backbone, NUM_STEPS, brightness_and_length, PROMPTS, batch_size=1, seed=seed)
    env = make(backbone)
    for episode in range(2):  # the second goes on with the random numbers of the first
        expected = reference.reset()
        observation, info = env.reset(seed=seed if episode == 0 else None)
        for i, action in enumerate(actions(seed)):
            assert_same(observation, {key: expected[key][0].squeeze().numpy() for key in observation})
            assert info == {"prompt": PROMPTS[expected["prompt_id"].item()]}
            expected = reference.step(expected.set("action", torch.tensor(action)[None]))["next"]
            observation, reward, terminated, truncated, info = env.step(action)
            assert type(reward) is float and reward == expected["reward"].item()
            assert (terminated, truncated) == (expected["terminated"].item(), False) == (i == NUM_STEPS - 1, False)
            expected = expected.exclude("reward")
        assert reward > 0
        assert_same(observation, {key: expected[key][0].squeeze().numpy() for key in observation})


def test_observations_are_in_their_space(env):
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    assert observation["latents"].shape == SHAPE and observation["latents"].dtype == np.float32
    observation, *_ = finish(env)
    assert observation in env.observation_space and observation["step"] == NUM_STEPS
    for sign in (-1, 1):  # the bounds themselves are inside
        env.reset()
        observation, *_ = env.step(np.full(SHAPE, sign * LATENT_BOUND, np.float32))
        assert observation in env.observation_space


def test_seeds(env):
    first, _ = env.reset(seed=3)
    second, _ = env.reset()
    assert not np.array_equal(first["latents"], second["latents"])
    assert_same(env.reset(seed=3)[0], first)
    assert_same(env.reset()[0], second)
    assert not np.array_equal(env.reset(seed=4)[0]["latents"], first["latents"])


def test_without_a_seed_environments_differ(backbone):
    assert not np.array_equal(make(backbone).reset()[0]["latents"], make(backbone).reset()[0]["latents"])


def test_seeding_leaves_the_global_generator_alone(env):
    before = torch.get_rng_state()
    env.reset(seed=0)
    finish(env)
    assert torch.equal(torch.get_rng_state(), before)


def test_options(env):
    latents = actions()[0]
    for prompt_id in (*range(3), np.int64(1)):
        observation, info = env.reset(options={"prompt_id": prompt_id, "latents": latents})
        np.testing.assert_array_equal(observation["latents"], latents)
        assert observation["prompt_id"] == prompt_id and observation["step"] == 0
        assert info == {"prompt": PROMPTS[prompt_id]}
        assert finish(env)[1] > len(PROMPTS[prompt_id])
    assert_same(env.reset(seed=5, options={})[0], env.reset(seed=5)[0])
    drawn = env.reset(seed=5)[0]
    given, _ = env.reset(seed=5, options={"latents": latents})
    assert given["prompt_id"] == drawn["prompt_id"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a cat"}, r"unknown reset options \['prompt'\]; known are prompt_id, latents"),
        ({"prompt_id": 3}, "prompt_id` is 3, but there are 3 prompts"),
        ({"prompt_id": -1}, "prompt_id` is -1, but there are 3 prompts"),
        ({"prompt_id": "a cat"}, "prompt_id` is 'a cat'; give an integer from 0 to 2"),
        ({"prompt_id": 1.0}, "give an integer"),
        ({"latents": np.zeros((1, *SHAPE))}, "option `latents` has shape"),
        ({"latents": np.full(SHAPE, np.nan)}, "256 elements that are not finite"),
        ({"latents": np.full(SHAPE, 101)}, "option `latents` reaches 101"),
    ],
)
def test_wrong_options_are_refused(env, options, message):
    env.reset(seed=0)
    second, _ = env.reset()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.reset(seed=1, options=options)
    assert env.step(actions()[0])[0]["step"] == 1  # the episode goes on
    assert_same(env.reset()[0], second)  # and so do the random numbers


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros((4, 8, 7)), r"the action has shape \(4, 8, 7\), expected latents of shape \(4, 8, 8\)"),
        (np.zeros((1, *SHAPE)), "the action has shape"),
        (np.full(SHAPE, np.nan), "256 elements that are not finite"),
        (np.full(SHAPE, -np.inf), "256 elements that are not finite"),
        (np.full(SHAPE, 100.1), "the action reaches 100.1, outside"),
        (np.full(SHAPE, -100.1), "the action reaches 100.1, outside"),
    ],
)
def test_wrong_actions_are_refused(env, action, message):
    first, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)
    assert env.step(first["latents"])[0]["step"] == 1  # the refused one was no step


def test_arrays_are_not_shared(env):
    action, latents = actions()[0], actions()[1]
    observation, _ = env.reset(options={"latents": latents})
    kept = observation["latents"].copy()
    latents[:] = 0
    np.testing.assert_array_equal(observation["latents"], kept)
    observation, *_ = env.step(action)
    kept = action.copy()
    action[:] = 0
    np.testing.assert_array_equal(observation["latents"], kept)


def test_what_the_caller_writes_changes_no_image(backbone):
    env = make(backbone, render_mode="rgb_array")
    action = actions()[0]
    observation, _ = env.reset()
    frame = env.render()
    observation["latents"][:] = 0
    np.testing.assert_array_equal(env.render(), frame)
    observation, *_ = env.step(action)
    frame = env.render()
    action[:], observation["latents"][:] = 0, 0
    np.testing.assert_array_equal(env.render(), frame)


def test_order_of_calls(backbone):
    env = make(backbone, render_mode="rgb_array").unwrapped  # without gymnasium's own guard
    for call in (env.render, lambda: env.step(actions()[0])):
        with pytest.raises(ResetNeeded, match=r"call reset\(\) first"):
            call()
    env.reset()
    finish(env)
    assert env.render() is not None
    with pytest.raises(ResetNeeded, match="the episode ended at step 4"):
        env.step(actions()[0])
    env.reset()
    assert finish(env)[2]


def test_render(backbone):
    env = make(backbone, render_mode="rgb_array")
    for options in ({"latents": actions()[0]}, {"latents": actions()[1]}):
        env.reset(options=options)
        expected = (backbone.decode(torch.tensor(options["latents"])[None])[0] * 255).round().permute(1, 2, 0)
        frame = env.render()
        assert frame.dtype == np.uint8 and frame.shape == (16, 16, 3) and frame.std() > 0
        np.testing.assert_array_equal(frame, expected.detach().numpy())
    env.step(actions()[2])
    assert not np.array_equal(env.render(), frame)


def test_render_modes(env, backbone):
    env.reset()
    with pytest.warns(UserWarning, match="without a render mode"):
        assert env.render() is None
    with (
        # gymnasium itself only warns.
        pytest.warns(UserWarning, match="not in the possible render_modes"),
        pytest.raises(ValueError, match=r"render_mode is 'ansi'; choose one of \['rgb_array'\]"),
    ):
        make(backbone, render_mode="ansi")


def test_wrong_constructor_arguments(backbone):
    with pytest.raises(ValueError, match="the prompt set is empty"):
        make(backbone, prompts=())
    with pytest.raises(ValueError, match="num_steps=0"):
        make(backbone, num_steps=0)


def test_prompts_are_animals_by_default(backbone):
    env = make(backbone, prompts=None)
    assert env.observation_space["prompt_id"].n == 45
    assert env.reset(options={"prompt_id": 44})[1] == {"prompt": animals()[44]}


def test_stable_baselines3(backbone):
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_checker import check_env as check_for_stable_baselines

    env = make(backbone)
    with warnings.catch_warnings():
        # Advice, not faults: latents have three dimensions but are no 8-bit image, and no range of [-1, 1] holds them.
        warnings.filterwarnings("ignore", "It seems that your observation", UserWarning)
        warnings.filterwarnings("ignore", "The minimal resolution for an image", UserWarning)
        warnings.filterwarnings("ignore", "We recommend you to use a symmetric and normalized Box", UserWarning)
        check_for_stable_baselines(env)
    model = PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    before = model.policy.action_net.weight.detach().clone()
    model.learn(16)
    assert model.num_timesteps == 16
    assert len(model.ep_info_buffer) == 16 // NUM_STEPS and all(info["r"] > 5 for info in model.ep_info_buffer)
    assert not torch.equal(model.policy.action_net.weight, before)


def test_colourfulness_by_hand():
    grey, red, blue = torch.full((3, 4, 4), 0.5), torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    red[0], blue[2] = 1, 1
    half = torch.cat([red[..., :2], grey[..., :2]], -1)
    found = colourfulness(torch.stack([grey, red, blue, half]), ["a cat"] * 4)
    # Half of `half` has rg = 1 and yb = 1/2, the rest 0: standard deviations and means are 1/2 and 1/4.
    expected = [0, 0.3 * math.hypot(1, 0.5), 0.3, 1.3 * math.hypot(0.5, 0.25)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_without_arguments():
    env = gymnasium.make("Denoising-v0", render_mode="rgb_array")
    observation, info = env.reset(seed=0, options={"prompt_id": 0})
    assert info == {"prompt": "a cat"}
    for _ in range(env.observation_space["step"].n - 1):
        observation, reward, terminated, _, _ = env.step(observation["latents"])
    assert terminated and 0 < reward < 2
    frame = env.render()
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.std() > 0
