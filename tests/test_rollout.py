"""From the collector to the transitions that train: storage, the draw of steps, recomputed log-probabilities."""

import pytest
import torch
from diffusers import DDIMScheduler
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.data import ReplayBuffer, TensorStorage
from torchrl.envs.utils import ExplorationType, set_exploration_type

from agents import RecomputeLogProb, TransitionSampler, make_collector, make_policy, share_latents, trainable_steps
from diffusion_env import DDIMSampler, DenoisingEnv
from tests.tiny import SCHEDULE as STABLE_DIFFUSION

STEPS = 4
PROMPTS = ("a cat", "a dog")


def build(backbone, batch_size=3):
    policy = make_policy(backbone, backbone.sampler(STEPS), backbone.conditioning(PROMPTS))
    return policy, DenoisingEnv(
        backbone, STEPS, lambda images, _: images.mean((1, 2, 3)), PROMPTS, batch_size=batch_size, seed=0
    )


def buffer_of(trajectories, length, sampler, batch_size):
    data = TensorDict(
        {
            "trajectory": torch.arange(trajectories)[:, None].expand(-1, length),
            "step": torch.arange(length).expand(trajectories, -1),
        },
        [trajectories, length],
    )
    return ReplayBuffer(storage=TensorStorage(data), sampler=sampler, batch_size=batch_size)


def one_pass(buffer):
    """The (trajectory, step) pairs of one pass, in the order they came."""
    return [pair for part in buffer for pair in zip(part["trajectory"].tolist(), part["step"].tolist(), strict=True)]


def test_share_latents_stores_each_latent_once(backbone):
    policy, env = build(backbone)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        rollout = env.rollout(STEPS, policy)
    before = rollout.clone()
    shared = share_latents(rollout)
    for key in ("latents", "action", "step", "prompt_id", "group_id", "action_log_prob", ("next", "reward")):
        assert torch.equal(shared[key], before[key]), key
    latents, action = shared["latents"], shared["action"]
    assert latents.untyped_storage().data_ptr() == action.untyped_storage().data_ptr()
    assert latents.untyped_storage().nbytes() == 3 * (STEPS + 1) * 4 * 8 * 8 * 4
    latents[:, 1].fill_(7.0)  # truly one tensor, one step apart
    assert (action[:, 0] == 7.0).all()
    assert not {"loc", "scale"} & set(shared.keys())
    assert ("next", "latents") not in shared.keys(True)
    # The collector writes its next rollout over this one.
    rollout.apply(lambda value: value.zero_(), inplace=True)
    for key in ("step", "prompt_id", "group_id", "action_log_prob", ("next", "reward"), ("next", "done")):
        assert torch.equal(shared[key], before[key]), key


def test_collector_gives_what_a_plain_rollout_gives(backbone):
    """The same seeds through TorchRL's own `rollout`, without a collector, postproc or compact observations."""
    policy, env = build(backbone)
    collector = make_collector(env, policy, iterations=2)
    torch.manual_seed(5)
    batches = list(collector)  # both are kept: the second must not overwrite the first
    collector.shutdown()
    assert [batch.batch_size for batch in batches] == [(3, STEPS)] * 2
    _, other = build(backbone)
    torch.manual_seed(5)
    expected = []
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        for batch in batches:
            start = other.reset(batch[:, 0].select("latents", "prompt_id"))
            expected.append(other.rollout(STEPS, policy, auto_reset=False, tensordict=start))
    assert not torch.equal(batches[0]["latents"][:, 0], batches[1]["latents"][:, 0])
    for given, wanted in zip(batches, expected, strict=True):
        for key in given.keys(True, True):
            assert torch.equal(given[key], wanted[key]) or key == "group_id", key


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: a number read from a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(trained_backbone):
    def waits(steps):
        policy = make_policy(
            trained_backbone, trained_backbone.sampler(steps), trained_backbone.conditioning(["a cat", "a dog"])
        )
        env = DenoisingEnv(
            trained_backbone, steps, lambda images, _: images[:, 0, 0, 0], ["a cat", "a dog"], batch_size=2
        )
        collector = make_collector(env, policy, iterations=2)
        batches = iter(collector)
        next(batches)
        with Waits() as counted:
            next(batches)
        collector.shutdown()
        return counted.count

    assert waits(6) == waits(3)


def test_what_the_collector_gives_shares_storage(backbone):
    policy, env = build(backbone)
    collector = make_collector(env, policy, iterations=1)
    (data,) = collector
    collector.shutdown()
    sizes = {}
    for value in data.values(True, True):
        sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    latents = 3 * (STEPS + 1) * 4 * 8 * 8 * 4
    others = 3 * STEPS * (3 * 8 + 2 * 4 + 2)  # step, prompt, group; log-probability, reward; done, terminated
    assert sum(sizes.values()) == latents + others


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.6, 1.0, 0.01])
def test_each_trajectory_gives_exactly_its_share_without_repeats(fraction):
    steps, trajectories, length = [0, 1, 3, 4, 6], 7, 8
    sampler = TransitionSampler(steps, fraction)
    each = max(1, round(fraction * 5))
    assert sampler.steps_per_trajectory == each
    buffer = buffer_of(trajectories, length, sampler, 4)
    for _ in range(5):
        pairs = one_pass(buffer)
        assert len(pairs) == len(set(pairs)) == trajectories * each
        for trajectory in range(trajectories):
            chosen = [step for t, step in pairs if t == trajectory]
            assert len(chosen) == each
            assert set(chosen) <= set(steps)


def test_batches_cover_a_pass_whatever_their_size():
    for batch_size in (1, 4, 5, 12, 100):
        buffer = buffer_of(4, 3, TransitionSampler([0, 1, 2]), batch_size)
        sizes = [len(part) for part in buffer]
        assert sum(sizes) == 12
        assert max(sizes) <= batch_size
        assert len(sizes) == -(-12 // batch_size)


def test_every_pass_draws_anew():
    torch.manual_seed(0)
    buffer = buffer_of(6, 10, TransitionSampler(range(10), 0.5), 100)
    passes = [one_pass(buffer) for _ in range(4)]
    assert len({frozenset(pairs) for pairs in passes}) == 4
    full = buffer_of(6, 10, TransitionSampler(range(10)), 100)
    first, second = one_pass(full), one_pass(full)
    assert sorted(first) == sorted(second) == [(t, s) for t in range(6) for s in range(10)]
    assert first != second


def test_steps_are_drawn_uniformly_and_in_random_order():
    torch.manual_seed(0)
    trajectories, passes, steps = 5, 600, [0, 2, 3, 5, 7, 8]
    buffer = buffer_of(trajectories, 9, TransitionSampler(steps, 0.34), 100)  # two of six
    counts = torch.zeros(trajectories, 9)
    first = torch.zeros(trajectories, 9)
    for _ in range(passes):
        pairs = one_pass(buffer)
        for trajectory, step in pairs:
            counts[trajectory, step] += 1
        first[pairs[0]] += 1
    counts, first = counts[:, steps], first[:, steps]
    assert counts.sum() == passes * trajectories * 2
    expected = passes / 3
    # A step is chosen or not, once a pass: binomial. Five standard deviations for each of 30 counts.
    assert (counts - expected).abs().max() < 5 * (passes / 3 * 2 / 3) ** 0.5
    # Chi-square over steps; two of six without replacement have 4/5 of the multinomial variance. 5 degrees of freedom.
    total = counts.sum(0)
    assert ((total - total.mean()) ** 2 / total.mean()).sum() < 20.5
    assert ((first - passes / 30) ** 2 / (passes / 30)).sum() < 58.3  # 29 degrees of freedom, one in a thousand


def test_pairs_of_steps_are_uniform_too():
    """A random offset would pass the test of single steps."""
    torch.manual_seed(1)
    buffer = buffer_of(20, 4, TransitionSampler(range(4), 0.5), 100)
    counts = torch.zeros(6)
    names = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for _ in range(150):
        pairs = one_pass(buffer)
        for trajectory in range(20):
            counts[names.index(tuple(sorted(s for t, s in pairs if t == trajectory)))] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # 5 degrees of freedom


def test_one_sampler_serves_one_buffer_after_another():
    """As the loop does it: a new buffer an iteration, also of another size."""
    sampler = TransitionSampler([0, 2], 1.0)
    for trajectories in (3, 3, 5, 2):
        pairs = one_pass(buffer_of(trajectories, 3, sampler, 4))
        assert sorted(pairs) == [(t, s) for t in range(trajectories) for s in (0, 2)]


def test_a_sampler_without_work_is_refused():
    with pytest.raises(ValueError, match="no steps to train"):
        TransitionSampler([])
    for fraction in (0.0, -0.5, 1.1):
        with pytest.raises(ValueError, match="timestep_fraction is"):
            TransitionSampler([0, 1], fraction)


def test_trainable_steps_are_those_with_a_density_and_enough_noise():
    trailing = STABLE_DIFFUSION | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    assert trainable_steps(DDIMSampler(trailing, 4)) == [0, 1, 2], "the last step ends at alpha = 1 without noise"
    leading = DDIMSampler(STABLE_DIFFUSION | {"steps_offset": 1}, 8)
    scheduler = DDIMScheduler.from_config(STABLE_DIFFUSION | {"steps_offset": 1})
    scheduler.set_timesteps(8)
    variances = [scheduler._get_variance(t, t - 125).item() for t in scheduler.timesteps.tolist()]
    expected = [i for i, variance in enumerate(variances) if variance >= 0.2**2 * max(variances)]
    assert 1 < len(expected) < 8
    assert trainable_steps(leading, 0.2) == expected
    assert trainable_steps(leading, 1.0) == [variances.index(max(variances))]
    with pytest.raises(ValueError, match="min_noise=5.0 must lie in"):
        trainable_steps(leading, 5.0)


def test_recomputed_log_probs_are_the_stored_ones(trained_backbone):
    policy, env = build(trained_backbone)
    collector = make_collector(env, policy, iterations=1)
    (data,) = collector
    collector.shutdown()
    stored = data["action_log_prob"].clone()
    for micro_batch in (1, 5, 100):
        wrong = data.clone().set("action_log_prob", torch.full_like(stored, 9.0))
        torch.testing.assert_close(
            RecomputeLogProb(policy, micro_batch)(wrong)["action_log_prob"], stored, rtol=1e-5, atol=1e-5
        )


def test_stratified_steps_are_one_of_each_bin_and_equally_likely():
    torch.manual_seed(0)
    trajectories, passes = 20, 150
    for length, fraction, count in ((9, 1 / 3, 3), (8, 0.375, 3), (5, 0.8, 4), (4, 1.0, 4)):
        sampler = TransitionSampler(range(length), fraction, stratified=True)
        assert sampler.steps_per_trajectory == count
        buffer = buffer_of(trajectories, length, sampler, 1000)
        counts = torch.zeros(length)
        for _ in range(passes):
            pairs = one_pass(buffer)
            assert len(set(pairs)) == len(pairs) == trajectories * count, "exactly that many, each once"
            for trajectory in range(trajectories):
                steps = sorted(step for t, step in pairs if t == trajectory)
                counts[steps] += 1
                if length % count == 0:
                    assert [step // (length // count) for step in steps] == list(range(count))
        expected = trajectories * passes * count / length
        assert (counts - expected).abs().max() <= 5 * (expected * (1 - count / length)) ** 0.5, (length, count)


@pytest.mark.parametrize("stratified", [False, True])
def test_the_last_step_is_always_there_and_once(stratified):
    torch.manual_seed(0)
    steps = [7, 0, 2, 3, 5]  # in any order; 7 is the latest
    for fraction, count in ((0.2, 1), (0.4, 2), (0.6, 3), (1.0, 5)):
        sampler = TransitionSampler(steps, fraction, stratified=stratified, always_last=True)
        buffer = buffer_of(30, 9, sampler, 1000)
        pairs = one_pass(buffer)
        assert len(set(pairs)) == len(pairs) == 30 * count
        assert sorted(t for t, step in pairs if step == 7) == list(range(30))
        others = {step for _, step in pairs} - {7}
        assert others == ({0, 2, 3, 5} if count > 1 else set())
