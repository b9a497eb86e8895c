"""What holds for any input: samplers, advantages, the choice of steps, settings, prompt files; and determinism."""

import json
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import ReplayBuffer, TensorStorage

from agents import PromptAdvantage, TransitionSampler, make_collector, make_policy
from configs import RunSettings, SamplingSettings, TrainingSettings
from configs.presets import read_settings
from diffusion_env import DDIMSampler, DenoisingEnv, load_prompts
from tests.tiny import SCHEDULE

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(
    num_steps=st.integers(1, 60),
    eta=st.floats(0.01, 1),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    seed=st.integers(0, 9),
)
def test_any_sampler_makes_finite_linear_steps_and_predicts_the_clean_latents(num_steps, eta, prediction, seed):
    sampler = DDIMSampler({**SCHEDULE, "prediction_type": prediction}, num_steps, eta)
    generator = torch.Generator().manual_seed(seed)
    x, out = (torch.randn(num_steps, 2, 3, generator=generator) for _ in range(2))
    i = torch.arange(num_steps)
    step = sampler.step(x, out, i)
    assert step.mean.isfinite().all()
    assert (step.std >= 0).all()
    assert (sampler.timesteps[:-1] > sampler.timesteps[1:]).all()
    assert torch.equal(sampler.has_density, sampler.std > 0)
    halves = sampler.step(x / 2, out / 2, i)
    torch.testing.assert_close(2 * halves.mean, step.mean, rtol=1e-5, atol=1e-5)
    x0, noise = (torch.randn(num_steps, 2, 3, generator=generator) for _ in range(2))
    noised = sampler.add_noise(x0, noise, sampler.timesteps)
    torch.testing.assert_close(sampler.to_x0(noised.x_t, noised.target, i), x0, rtol=1e-3, atol=1e-3)


@few
@given(
    rewards=st.lists(st.tuples(st.integers(0, 3), st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=40),
    clip=st.floats(0.1, 10),
    scale=st.floats(0.5, 8),
)
def test_advantages_are_bounded_in_the_rewards_order_and_without_unit(rewards, clip, scale):
    ids, values = [prompt for prompt, _ in rewards], torch.tensor([reward for _, reward in rewards])
    advantage = PromptAdvantage(min_count=2, clip=clip).update(ids, values)
    assert advantage.isfinite().all()
    assert advantage.abs().max() <= clip + 1e-6
    for a in range(len(ids)):
        for b in range(len(ids)):
            if ids[a] == ids[b] and values[a] >= values[b]:
                assert advantage[a] >= advantage[b]
    spread = [values[[n for n, prompt in enumerate(ids) if prompt == one]].std(correction=0) for one in set(ids)]
    if min([*spread, values.std(correction=0)]) > 1e-1:  # where the 1e-6 beside the standard deviation says nothing
        other = PromptAdvantage(min_count=2, clip=clip).update(ids, values * scale + 3)
        torch.testing.assert_close(other, advantage, rtol=1e-2, atol=1e-2)


@few
@given(
    steps=st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True),
    fraction=st.floats(0.01, 1),
    trajectories=st.integers(1, 9),
    batch=st.integers(1, 40),
    stratified=st.booleans(),
    always_last=st.booleans(),
)
def test_every_trajectory_gives_its_share_of_distinct_steps(
    steps, fraction, trajectories, batch, stratified, always_last
):
    sampler = TransitionSampler(steps, fraction, stratified=stratified, always_last=always_last)
    data = TensorDict(
        {
            "step": torch.arange(max(steps) + 1).expand(trajectories, -1).clone(),
            "of": torch.arange(trajectories)[:, None].expand(-1, max(steps) + 1).clone(),
        },
        [trajectories, max(steps) + 1],
    )
    buffer = ReplayBuffer(storage=TensorStorage(data), sampler=sampler, batch_size=batch)
    for _ in range(2):
        drawn = [pair for part in buffer for pair in zip(part["of"].tolist(), part["step"].tolist(), strict=True)]
        assert len(set(drawn)) == len(drawn)
        assert {step for _, step in drawn} <= set(steps)
        assert set(Counter(of for of, _ in drawn).values()) == {sampler.steps_per_trajectory}
        assert len({of for of, _ in drawn}) == trajectories
        if always_last:
            assert sum(step == max(steps) for _, step in drawn) == trajectories


@few
@given(
    seed=st.integers(0, 2**31),
    num_steps=st.integers(1, 1000),
    learning_rate=st.floats(1e-12, 1e3),
    groups=st.integers(1, 50),
    samples=st.integers(1, 9),
    prompts=st.text(st.characters(codec="utf-8"), min_size=1),
)
def test_settings_survive_their_file_whatever_they_are(
    seed, num_steps, learning_rate, groups, samples, prompts, tmp_path
):
    chosen = RunSettings(
        seed=seed,
        sampling=SamplingSettings(
            num_steps=num_steps, images_per_iteration=groups * samples, samples_per_prompt=samples, prompts=prompts
        ),
        training=TrainingSettings(learning_rate=learning_rate, updates_per_epoch=1),
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(asdict(chosen), default=str))
    assert read_settings(file) == chosen


@few
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".txt", ".jsonl"]))
def test_any_bytes_are_prompts_or_an_error_that_names_the_file(content, suffix, tmp_path):
    file = tmp_path / f"p{suffix}"
    file.write_bytes(content)
    try:
        prompts = load_prompts(file)
    except ValueError as error:
        assert file.name in str(error)
    else:
        assert prompts
        assert len(set(prompts)) == len(prompts)
        assert all(prompt.strip() for prompt in prompts)


line = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\ufeff"), min_size=1).filter(str.strip)


@few
@given(prompts=st.lists(line, min_size=1, max_size=8, unique=True), ending=st.sampled_from(["\n", "\r\n"]))
def test_prompts_come_back_as_they_were_written(prompts, ending, tmp_path):
    (tmp_path / "p.txt").write_bytes(ending.join(prompts).encode())
    (tmp_path / "p.jsonl").write_bytes("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts).encode())
    assert load_prompts(tmp_path / "p.txt") == load_prompts(tmp_path / "p.jsonl") == tuple(prompts)


def rollout(backbone, prompts, seed):
    torch.manual_seed(seed)
    policy = make_policy(backbone, backbone.sampler(3), backbone.conditioning(prompts))
    env = DenoisingEnv(backbone, 3, lambda images, _: images.mean((1, 2, 3)), prompts, batch_size=4, seed=seed)
    (data,) = make_collector(env, policy, iterations=1)
    return data


def test_a_seed_gives_the_same_numbers_bit_for_bit(trained_backbone):
    first, second, other = (rollout(trained_backbone, ("a cat", "a dog"), seed) for seed in (0, 0, 1))
    for key in ("latents", "action", "action_log_prob", ("next", "reward")):
        assert torch.equal(first[key], second[key])
    assert not torch.equal(first["action"], other["action"])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_sample_does_not_depend_on_its_batch(size, trained_backbone):
    """To 1e-5: kernels add in another order. That is far below what a step's noise or PPO's clip range resolves."""
    prompts = ("a cat", "a dog")
    policy = make_policy(trained_backbone, trained_backbone.sampler(3), trained_backbone.conditioning(prompts))
    data = rollout(trained_backbone, prompts, 0)
    alone = data[:1].select("latents", "step", "prompt_id", "action").reshape(-1)[:1]
    company = torch.cat([alone, *[data[1:].select(*alone.keys()).reshape(-1)[:size]]])
    means = [policy.get_dist(part) for part in (alone, company)]
    torch.testing.assert_close(means[0].loc[0], means[1].loc[0], rtol=1e-5, atol=1e-5)
    scores = [dist.log_prob(part["action"])[0] for dist, part in zip(means, (alone, company), strict=True)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)
