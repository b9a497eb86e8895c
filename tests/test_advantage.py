"""Advantages against a literal re-implementation of DDPO's `PerPromptStatTracker` in NumPy."""

from collections import deque

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from agents import (
    GroupAdvantage,
    PromptAdvantage,
    ScoreFunctionLoss,
    TransitionSampler,
    make_collector,
    make_policy,
    train,
)
from diffusion_env import DenoisingEnv


class PerPromptStatTracker:
    """As published with DDPO, in float64."""

    def __init__(self, buffer_size, min_count):
        self.buffer_size = buffer_size
        self.min_count = min_count
        self.stats = {}

    def update(self, prompts, rewards):
        unique = np.unique(prompts)
        advantages = np.empty_like(rewards)
        for prompt in unique:
            prompt_rewards = rewards[prompts == prompt]
            if prompt not in self.stats:
                self.stats[prompt] = deque(maxlen=self.buffer_size)
            self.stats[prompt].extend(prompt_rewards)
            if len(self.stats[prompt]) < self.min_count:
                mean = np.mean(rewards)
                std = np.std(rewards) + 1e-6
            else:
                mean = np.mean(self.stats[prompt])
                std = np.std(self.stats[prompt]) + 1e-6
            advantages[prompts == prompt] = (prompt_rewards - mean) / std
        return advantages


def batches(count, size, prompts, seed):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        # Few prompts are frequent, so that memories fill at different times; a few rewards are far out.
        ids = np.minimum(generator.geometric(0.3, size) - 1, prompts - 1)
        rewards = generator.normal(ids * 0.3, 0.5)
        rewards[generator.random(size) < 0.03] += 20
        yield ids, rewards.astype(np.float32)


@pytest.mark.parametrize(
    ("buffer_size", "min_count", "clip", "prompts"),
    [(32, 16, 5.0, 6), (8, 1, 2.0, 3), (4, 4, 5.0, 10), (16, 16, 1.0, 1), (1, 1, 5.0, 4)],
)
def test_equals_ddpos_tracker(buffer_size, min_count, clip, prompts):
    ours = PromptAdvantage(buffer_size=buffer_size, min_count=min_count, clip=clip)
    reference = PerPromptStatTracker(buffer_size, min_count)
    clipped = 0
    for ids, rewards in batches(12, 20, prompts, seed=prompts):
        expected = reference.update(ids, rewards.astype(np.float64))
        clipped += (np.abs(expected) > clip).sum()
        given = ours.update(ids.tolist(), torch.from_numpy(rewards))
        np.testing.assert_allclose(given.numpy(), np.clip(expected, -clip, clip), rtol=1e-3, atol=1e-4)
        assert given.dtype == torch.float32
    assert clipped or buffer_size == 1  # the clip was tried, too


def test_a_trajectorys_advantage_stands_at_each_of_its_steps():
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([0, 0, 1, 1, 0, 2])
    final = torch.randn(6, generator=generator)
    reward = torch.zeros(6, 4, 1)
    reward[:, -1, 0] = final
    data = TensorDict({"prompt_id": ids[:, None, None].expand(6, 4, 1), "next": {"reward": reward}}, [6, 4])
    written = PromptAdvantage(min_count=2)(data)["advantage"]
    assert written.shape == (6, 4, 1)
    assert (written == written[:, :1]).all()
    expected = PerPromptStatTracker(32, 2).update(ids.numpy(), final.double().numpy())
    np.testing.assert_allclose(written[:, 0, 0].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert written[5].abs().max() > 0.1  # the lonely prompt is compared with the batch


def test_rewards_of_earlier_steps_count():
    reward = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])[..., None]
    data = TensorDict({"prompt_id": torch.zeros(3, 2, 1, dtype=torch.int64), "next": {"reward": reward}}, [3, 2])
    returns = np.array([3.0, 7.0, 0.0])
    expected = (returns - returns.mean()) / (returns.std() + 1e-6)
    np.testing.assert_allclose(PromptAdvantage(min_count=1)(data)["advantage"][:, 0, 0].numpy(), expected, rtol=1e-5)


def test_equal_rewards_have_no_advantage():
    advantage = PromptAdvantage(min_count=1).update([0, 0, 1], torch.tensor([0.3, 0.3, 0.3]))
    assert advantage.abs().max() < 0.1  # not 0/0; rounding of the mean over 1e-6 remains


def test_state_dict_continues_where_it_stopped(tmp_path):
    data = list(batches(8, 20, 4, seed=1))
    whole, first, second = (PromptAdvantage(buffer_size=9, min_count=5) for _ in range(3))
    for ids, rewards in data[:4]:
        whole.update(ids.tolist(), torch.from_numpy(rewards))
        first.update(ids.tolist(), torch.from_numpy(rewards))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    fresh = PromptAdvantage(buffer_size=9, min_count=5)
    differs = False
    for ids, rewards in data[4:]:
        expected = whole.update(ids.tolist(), torch.from_numpy(rewards))
        assert torch.equal(second.update(ids.tolist(), torch.from_numpy(rewards)), expected)
        differs |= not torch.equal(fresh.update(ids.tolist(), torch.from_numpy(rewards)), expected)
    assert differs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buffer_size": 8, "min_count": 9}, "min_count=9 must lie between 1 and buffer_size=8"),
        ({"min_count": 0}, "min_count=0"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"clip": -1.0}, "clip is -1.0"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptAdvantage(**arguments)


def trajectories(groups, rewards):
    """Whole trajectories [B, T] with `group_id`, and rewards [B, T]."""
    done = torch.zeros(*rewards.shape, 1, dtype=torch.bool)
    done[:, -1] = True
    ids = torch.tensor(groups)[:, None, None].expand(*rewards.shape, 1)
    latents = torch.arange(rewards.numel()).reshape(rewards.shape)
    return TensorDict(
        {"group_id": ids, "latents": latents, "next": {"reward": rewards[..., None], "done": done}}, rewards.shape
    )


@pytest.mark.parametrize("size", [2, 4])
def test_group_advantages_compare_the_images_of_a_group(size):
    """In NumPy, whatever the order of the batch; twice, since nothing is remembered."""
    generator = np.random.default_rng(size)
    advantage = GroupAdvantage(size)
    for _ in range(2):
        groups = generator.permutation(np.repeat([7, 3, 11], size))
        rewards = np.zeros((len(groups), 3), np.float32)
        rewards[:, -1] = generator.normal(groups, 2.0)
        rewards[:, 0] = generator.normal(size=len(groups))  # rewards of earlier steps count
        returns = rewards.sum(1)
        expected = np.empty_like(returns)
        for group in set(groups.tolist()):
            mine = returns[groups == group]
            expected[groups == group] = (mine - mine.mean()) / mine.std(ddof=1)
        written = advantage(trajectories(groups.tolist(), torch.from_numpy(rewards)))
        assert written["advantage"].shape == (*rewards.shape, 1)
        np.testing.assert_allclose(
            written["advantage"][..., 0].numpy(), np.repeat(expected[:, None], 3, 1), rtol=1e-4, atol=1e-5
        )
        assert torch.equal(written["latents"].flatten(), torch.arange(rewards.size))


def test_equal_rewards_of_a_group_have_no_advantage():
    assert (GroupAdvantage(3)(trajectories([0] * 3, torch.ones(3, 2)))["advantage"] == 0).all()


def test_groups_of_another_size_are_refused():
    advantage = GroupAdvantage(3)
    for groups, incomplete in (([0, 0, 1, 1], 4), ([0, 0, 0, 1], 1), ([0] * 4, 1)):
        with pytest.raises(ValueError, match=f"{incomplete} of 4 trajectories"):
            advantage(trajectories(groups, torch.randn(4, 2)))
    advantage(trajectories([0] * 3, torch.randn(3, 2)))  # and nothing is left over
    with pytest.raises(ValueError, match="samples_per_prompt is 1"):
        GroupAdvantage(1)


def test_the_loop_trains_with_group_advantages(backbone):
    policy = make_policy(backbone, backbone.sampler(2), backbone.conditioning(("a cat", "a dog")))
    env = DenoisingEnv(
        backbone,
        2,
        lambda images, _: images.mean((1, 2, 3)),
        ("a cat", "a dog"),
        batch_size=6,
        samples_per_prompt=3,
        seed=0,
    )
    loss = ScoreFunctionLoss(policy)
    trainable = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    collector = make_collector(env, policy, iterations=2)
    loop = train(
        collector,
        loss,
        torch.optim.SGD(trainable, lr=1e-3),
        advantage=GroupAdvantage(3),
        sampler=TransitionSampler(range(2)),
    )
    assert all(row["grad_norm"] > 0 for row in loop)
    collector.shutdown()
