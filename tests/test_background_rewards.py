"""Rewards computed by a thread while the next images are denoised: the same numbers, sooner; errors reach the user."""

import threading
import time

import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.envs.utils import ExplorationType, set_exploration_type

from agents import make_collector, make_policy, share_latents
from diffusion_env import DenoisingEnv
from rewards import JPEGCompressibility, Mix
from tests.test_env import PROMPTS, Decoder

STEPS = 3
BATCH = 2


def brightness(images, prompts):
    return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


def env_of(backbone, reward, prompts=PROMPTS):
    return DenoisingEnv(backbone, STEPS, reward, prompts, batch_size=BATCH, seed=3)


def policy_of(backbone):
    return make_policy(backbone, backbone.sampler(STEPS), backbone.conditioning(PROMPTS))


@pytest.mark.parametrize("make_reward", [lambda: brightness, JPEGCompressibility])
def test_two_iterations_equal_rollouts_scored_in_turn_bit_for_bit(trained_backbone, make_reward):
    policy = policy_of(trained_backbone)
    collector = make_collector(env_of(trained_backbone, make_reward()), policy, iterations=2, episodes=3)
    torch.manual_seed(5)
    batches = list(collector)
    collector.shutdown()
    serial = env_of(trained_backbone, make_reward())
    torch.manual_seed(5)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        episodes = [share_latents(serial.rollout(STEPS, policy)) for _ in range(6)]
    for n, batch in enumerate(batches):
        expected = torch.cat(episodes[3 * n : 3 * n + 3])
        assert batch.batch_size == (3 * BATCH, STEPS)
        assert set(batch.keys(True, True)) == set(expected.keys(True, True))
        for key in expected.keys(True, True):
            assert torch.equal(batch[key], expected[key]), key
        assert batch["next", "reward"][:, -1].std() > 0 and (batch["next", "reward"][:, :-1] == 0).all()


def test_latents_are_still_stored_once(trained_backbone):
    collector = make_collector(
        env_of(trained_backbone, brightness), policy_of(trained_backbone), iterations=1, episodes=3
    )
    (batch,) = collector
    collector.shutdown()
    latents, action = batch["latents"], batch["action"]
    assert latents.untyped_storage().data_ptr() == action.untyped_storage().data_ptr()
    assert latents.untyped_storage().nbytes() == 3 * BATCH * (STEPS + 1) * 4 * 8 * 8 * 4


def test_a_mixture_keeps_its_statistics_and_every_part_of_the_iteration(trained_backbone):
    def mix():
        return Mix([(brightness, 1.0), (JPEGCompressibility(), 2.0)], normalise=True)

    policy = policy_of(trained_backbone)
    env = env_of(trained_backbone, mix())
    collector = make_collector(env, policy, iterations=1, episodes=3)
    torch.manual_seed(5)
    (batch,) = collector
    collector.shutdown()
    reward = mix()
    serial = env_of(trained_backbone, reward)
    torch.manual_seed(5)
    values, parts = [], []
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        for _ in range(3):
            values.append(serial.rollout(STEPS, policy)["next", "reward"][:, -1, 0])
            parts.append(serial.reward_parts)
    assert torch.equal(batch["next", "reward"][:, -1, 0], torch.cat(values))
    assert list(env.reward_parts) == ["brightness", "jpeg-compressibility"]
    for name, part in env.reward_parts.items():
        assert torch.equal(part, torch.cat([each[name] for each in parts]))


def slow_policy(seconds):
    """Takes `seconds` an episode."""

    def act(latents):
        time.sleep(seconds / STEPS)
        return 0.5 * latents

    return TensorDictModule(act, in_keys=["latents"], out_keys=["action"])


def test_a_slow_reward_costs_the_longer_of_the_two_and_not_their_sum():
    seconds, episodes, threads = 0.15, 4, set()

    def slow(images, prompts):
        threads.add(threading.current_thread().name)
        assert not torch.is_grad_enabled()
        time.sleep(seconds)
        return brightness(images, prompts)

    collector = make_collector(env_of(Decoder(), slow), slow_policy(seconds), iterations=1, episodes=episodes)
    start = time.perf_counter()
    (batch,) = collector
    took = time.perf_counter() - start
    collector.shutdown()
    assert (batch["next", "reward"][:, -1] > 0).all()
    # In turn it would be 8 times 0.15 s; here it is 5 times, and some overhead.
    assert 5 * seconds <= took < 6.5 * seconds
    assert threads == {"reward_0"}


def test_what_the_reward_raises_reaches_the_user_with_its_prompt():
    calls = []

    def broken(images, prompts):
        calls.append(prompts)
        if len(calls) == 2:
            raise ConnectionError("the server is gone")
        return brightness(images, prompts)

    collector = make_collector(env_of(Decoder(), broken), slow_policy(0), iterations=2, episodes=3)
    with pytest.raises(ConnectionError, match="the server is gone") as caught:
        list(collector)
    (note,) = (note for note in caught.value.__notes__ if "reward" in note)
    assert "broken for 2 images" in note and repr(calls[1][0]) in note
    assert len(calls) == 2, "nothing more was asked"


@pytest.mark.parametrize("episode", [0, 2])
def test_a_number_that_is_not_finite_is_refused_with_its_prompt(episode):
    calls = []

    def broken(images, prompts):
        calls.append(prompts)
        values = brightness(images, prompts)
        values[1] = torch.nan if len(calls) == episode + 1 else values[1]
        return values

    collector = make_collector(env_of(Decoder(), broken), slow_policy(0), iterations=1, episodes=3)
    with pytest.raises(ValueError, match="reward is nan for prompt") as caught:
        list(collector)
    assert repr(calls[episode][1]) in str(caught.value)
