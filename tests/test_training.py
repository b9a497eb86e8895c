"""Learning on small problems: a chain whose gradient is known, TorchRL's own pieces alone, and `agents.train`."""

import copy
from collections import Counter
from itertools import product

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.objectives import ClipPPOLoss

from agents import (
    Evaluator,
    OnPolicyRatioCheck,
    PromptAdvantage,
    ScoreFunctionLoss,
    TransitionSampler,
    ddpo_is_loss,
    make_collector,
    make_policy,
    train,
)
from agents.training import SkippedUpdateWarning, update
from diffusion_env import ConditioningCache, DDIMSampler, DenoisingEnv, LoRA, StableDiffusionBackbone
from tests.tiny import SCHEDULE, tiny_pipeline

STEPS = 3
BATCH = 64
ITERATIONS = 8
PROMPTS = ("a cat", "a dog")
# Of three steps the first has standard deviation 0.65, the others 0.04 and 0.02: those hardly explore, and their
# score b / sigma drowns the first one's in noise.
TRAINED = [0]


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def small(*, channels_last=False, **options):
    """4 x 4 latents: a few seconds suffice to learn."""
    pipeline = tiny_pipeline()
    pipeline.unet.register_to_config(sample_size=4)
    if channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    lora = LoRA(rank=3, alpha=5.0, targets=("to_q", "to_k", "to_v", "to_out.0", "conv1"))
    return StableDiffusionBackbone(pipeline, lora=lora, guidance_scale=2.0, **options)


@pytest.fixture
def backbone():
    return small()


@pytest.fixture
def policy(backbone):
    return make_policy(backbone, backbone.sampler(STEPS), backbone.conditioning(PROMPTS))


def make_env(backbone, batch_size=BATCH):
    return DenoisingEnv(backbone, STEPS, brightness, PROMPTS, batch_size=batch_size, seed=0)


def trainable(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def values(module):
    return torch.cat([parameter.detach().flatten() for parameter in trainable(module)])


def collect(backbone, policy, batch_size=6):
    torch.manual_seed(1)
    collector = make_collector(make_env(backbone, batch_size), policy, iterations=1)
    (data,) = collector
    collector.shutdown()
    return PromptAdvantage(min_count=2)(data)


def assert_learned(before, after):
    """On the same prompts and noise: the gain in standard deviations of an image's reward, and its certainty."""
    difference = after.rewards - before.rewards
    assert difference.mean() > 0.4 * before.std
    assert difference.mean() > 6 * difference.std() / len(difference) ** 0.5


def test_without_the_loop(backbone, policy):
    """Nothing of ours but environment and policy: TorchRL's collector, buffer and loss suffice."""
    evaluate = Evaluator(make_env(backbone), samples_per_prompt=32)
    before = evaluate(policy)
    torch.manual_seed(0)
    frames = BATCH * STEPS
    collector = Collector(
        make_env(backbone),
        policy,
        frames_per_batch=frames,
        total_frames=frames * ITERATIONS,
        auto_register_policy_transforms=False,
    )
    loss = ClipPPOLoss(policy, None, clip_epsilon=0.1, entropy_bonus=False, critic_coeff=None)
    optimizer = torch.optim.AdamW(trainable(loss), lr=1e-2)
    buffer = ReplayBuffer(storage=LazyTensorStorage(BATCH), sampler=SamplerWithoutReplacement(), batch_size=BATCH // 2)
    for rollout in collector:
        returns = rollout["next", "reward"].sum(1, keepdim=True)
        rollout["advantage"] = ((returns - returns.mean()) / returns.std()).expand(BATCH, STEPS, 1)
        buffer.empty()
        buffer.extend(rollout[:, TRAINED].reshape(-1))
        for minibatch in buffer:
            loss(minibatch)["loss_objective"].backward()
            optimizer.step()
            optimizer.zero_grad()
    collector.shutdown()
    assert_learned(before, evaluate(policy))


@pytest.mark.parametrize(
    ("make_loss", "updates"), [(lambda policy: ddpo_is_loss(policy, clip_range=0.1), 2), (ScoreFunctionLoss, 1)]
)
def test_the_loop_learns(backbone, policy, make_loss, updates):
    learn(backbone, policy, make_loss(policy), updates)


@pytest.mark.parametrize("chosen", list(product((False, True), repeat=3)))
def test_the_loop_learns_whatever_makes_it_fast(chosen):
    options = dict(zip(("channels_last", "fold_lora", "gradient_checkpointing"), chosen, strict=True))
    backbone = small(**options)
    policy = make_policy(backbone, backbone.sampler(STEPS), backbone.conditioning(PROMPTS))
    learn(backbone, policy, ddpo_is_loss(policy, clip_range=0.1), 2)


def learn(backbone, policy, loss, updates):
    evaluate = Evaluator(make_env(backbone), samples_per_prompt=32)
    before = evaluate(policy)
    torch.manual_seed(0)
    collector = make_collector(make_env(backbone), policy, iterations=ITERATIONS)
    metrics = list(
        train(
            collector,
            loss,
            torch.optim.AdamW(trainable(loss), lr=1e-2),
            advantage=PromptAdvantage(min_count=4),
            sampler=TransitionSampler(TRAINED),
            updates_per_epoch=updates,
            micro_batch=27,
            checks=[OnPolicyRatioCheck(policy, clip_range=0.1)],
        )
    )
    collector.shutdown()
    assert len(metrics) == ITERATIONS
    assert metrics[0]["grad_norm"] > 1e-2
    assert metrics[0]["ratio_error"] < 1e-5
    assert all("ratio_error" not in row for row in metrics[1:])
    assert_learned(before, evaluate(policy))
    with backbone.reference():  # and the pretrained model is what it was
        assert torch.equal(evaluate(policy).rewards, before.rewards)


class Shift(nn.Module):
    """A denoiser whose output is one vector everywhere, so that the chain is Gaussian and the return linear."""

    latent_shape = (3, 1, 1)
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.output = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))

    def forward(self, x_t, timestep, conditioning):
        return self.output[:, None, None].expand_as(x_t)

    def decode(self, latents):
        return latents


@pytest.mark.parametrize("num_steps", [1, 3, 5])
@pytest.mark.parametrize("make_loss", [lambda policy: ddpo_is_loss(policy, clip_range=0.1), ScoreFunctionLoss])
def test_the_gradient_is_the_known_one(num_steps, make_loss):
    """With x' = a_i x + b_i out + noise and r = w x_0: d E[r] / d out = w sum_i b_i a_{i+1} ... a_{T-1}."""
    weight = torch.tensor([1.0, -2.0, 0.5])
    sampler = DDIMSampler(SCHEDULE, num_steps)
    model = Shift()
    cache = ConditioningCache(lambda prompts: TensorDict({"x": torch.zeros(len(prompts))}, [len(prompts)]), ["a"])
    policy = make_policy(model, sampler, cache, log_prob_reduction="sum")
    env = DenoisingEnv(model, num_steps, lambda x, _: (x[:, :, 0, 0] * weight).sum(1), ["a"], batch_size=20_000, seed=0)
    torch.manual_seed(0)
    collector = make_collector(env, policy, iterations=10)
    loss = make_loss(policy)
    found = []
    for data in collector:
        returns = data["next", "reward"].sum(1, keepdim=True)
        data["advantage"] = (returns - returns.mean()).expand(-1, num_steps, 1)
        loss(data.reshape(-1))["loss_objective"].backward()
        found.append(-num_steps * model.output.grad)  # the loss is a mean over steps, the chain's gradient a sum
        model.zero_grad()
    collector.shutdown()
    found = torch.stack(found)
    a, b = (coefficient(sampler, kind) for kind in ("x", "out"))
    exact = weight * sum(b[i] * a[i + 1 :].prod() for i in range(num_steps))
    assert ((found.mean(0) - exact).abs() < 5 * found.std(0) / 10**0.5).all()
    if num_steps > 1:  # and that says something: the first step's noise explores
        assert found.mean(0).norm() > 5 * found.std(0).norm() / 10**0.5


def coefficient(sampler, kind):
    """a_i or b_i of every step, from the step itself."""
    one, zero = torch.ones(sampler.num_steps, 1), torch.zeros(sampler.num_steps, 1)
    x, out = (one, zero) if kind == "x" else (zero, one)
    return sampler.step(x, out, torch.arange(sampler.num_steps)).mean[:, 0]


@pytest.mark.parametrize("make_loss", [lambda policy: ddpo_is_loss(policy, clip_range=0.1), ScoreFunctionLoss])
def test_micro_batches_change_nothing(backbone, policy, make_loss):
    minibatch = collect(backbone, policy).reshape(-1)[:10]
    loss = make_loss(policy)
    parameters = trainable(loss)
    losses = loss(minibatch.clone())
    losses["loss_objective"].backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
    loss.zero_grad()
    start = copy.deepcopy(backbone.state_dict())
    before = values(loss)
    for micro_batch in (3, 10, 100):  # 3, 3, 3 and 1
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        metrics = update(loss, optimizer, parameters, minibatch.clone(), micro_batch, max_grad_norm=1e9)
        torch.testing.assert_close(before - values(loss), gradient, rtol=1e-3, atol=1e-5)
        assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
        assert metrics["loss_objective"] == pytest.approx(losses["loss_objective"].item(), rel=1e-4, abs=1e-6)
        assert all(parameter.grad is None for parameter in parameters)
        backbone.load_state_dict(start)


def test_the_gradients_norm_is_clipped(backbone, policy):
    loss = ScoreFunctionLoss(policy)
    parameters = trainable(loss)
    before = values(loss)
    minibatch = collect(backbone, policy).reshape(-1)
    metrics = update(loss, torch.optim.SGD(parameters, lr=1.0), parameters, minibatch, 100, max_grad_norm=1e-2)
    assert metrics["grad_norm"] > 1e-2  # logged as it was before
    assert (before - values(loss)).norm().item() == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_and_its_transition_is_named(backbone, policy, value):
    loss = ScoreFunctionLoss(policy)
    parameters = trainable(loss)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    minibatch = collect(backbone, policy).reshape(-1)
    before = values(loss)
    broken = minibatch.clone()
    broken["advantage"][13] = value  # the fifth trajectory's second step
    prompt = int(minibatch["prompt_id"][13])
    expected = f"gradient's norm is nan.* step 1 of prompt {prompt} '{PROMPTS[prompt]}'"
    with pytest.warns(SkippedUpdateWarning, match=expected):
        metrics = update(loss, optimizer, parameters, broken, 4, max_grad_norm=1.0, prompts=PROMPTS)
    assert metrics == {"skipped_updates": 1.0}
    assert torch.equal(values(loss), before)
    assert not optimizer.state
    metrics = update(loss, optimizer, parameters, minibatch, 4, max_grad_norm=1.0)  # nothing of it remains
    assert metrics["skipped_updates"] == 0
    assert values(loss).isfinite().all()
    assert not torch.equal(values(loss), before)


def test_skipped_updates_are_counted_and_the_others_averaged(backbone, policy):
    loss = ScoreFunctionLoss(policy)
    calls = []

    def sometimes(rollout):
        rollout = PromptAdvantage(min_count=2)(rollout)
        calls.append(1)
        return rollout.set("advantage", rollout["advantage"] * float("nan")) if len(calls) == 2 else rollout

    collector = make_collector(make_env(backbone, 6), policy, iterations=3)
    optimizer = torch.optim.SGD(trainable(loss), lr=1e-3)
    loop = train(
        collector, loss, optimizer, advantage=sometimes, sampler=TransitionSampler([0, 1]), updates_per_epoch=2
    )
    with pytest.warns(SkippedUpdateWarning):
        rows = list(loop)
    collector.shutdown()
    assert [row["skipped_updates"] for row in rows] == [0, 2, 0]
    assert ["grad_norm" in row for row in rows] == [True, False, True]
    assert all(row["reward"] > 0 for row in rows)


@pytest.mark.parametrize(("updates", "epochs"), [(1, 1), (3, 1), (2, 2)])
def test_every_chosen_transition_trains_once_an_epoch(backbone, policy, updates, epochs):
    """Torchrl's sampler miscounts some storages and then deals out the first trajectories only."""
    loss = ScoreFunctionLoss(policy)
    seen = []

    def recording(part):
        seen.append(list(zip(part["group_id"][:, 0].tolist(), part["step"][:, 0].tolist(), strict=True)))
        return loss(part)

    optimizer = torch.optim.SGD(trainable(loss), lr=0.0)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    collector = make_collector(make_env(backbone, 6), policy, iterations=2)
    loop = train(
        collector,
        recording,
        optimizer,
        advantage=PromptAdvantage(min_count=2),
        sampler=TransitionSampler([0, 1], 0.5),
        updates_per_epoch=updates,
        epochs=epochs,
        micro_batch=4,
    )
    groups = set()
    for _ in loop:
        assert len(steps) == updates * epochs
        assert max(len(part) for part in seen) <= 4
        trajectories = Counter(group for part in seen for group, _ in part)
        assert len(trajectories) == 6  # all of them
        assert set(trajectories.values()) == {epochs}
        assert {step for part in seen for _, step in part} <= {0, 1}
        assert not groups & set(trajectories)  # and new ones in the next iteration
        groups |= set(trajectories)
        seen.clear()
        steps.clear()
    collector.shutdown()
    assert len(groups) == 12


def test_a_buffer_handed_in_serves_transitions_of_any_age(backbone, policy):
    loss = ScoreFunctionLoss(policy)
    drawn = []

    def recording(part):
        drawn.append(part["group_id"][:, 0].tolist())
        return loss(part)

    buffer = ReplayBuffer(storage=LazyTensorStorage(1000), batch_size=20)
    collector = make_collector(make_env(backbone, 6), policy, iterations=3)
    loop = train(
        collector,
        recording,
        torch.optim.SGD(trainable(loss), lr=1e-3),
        advantage=PromptAdvantage(min_count=2),
        sampler=TransitionSampler([0, 1]),
        updates_per_epoch=3,
        epochs=2,
        buffer=buffer,
    )
    for iteration, _ in enumerate(loop):
        assert len(buffer) == (iteration + 1) * 6 * 2
        assert set(buffer[:]["step"].flatten().tolist()) == {0, 1}
        assert [len(part) for part in drawn] == [20] * 6
        # A batch's groups are numbered on: those of this iteration and of each before it.
        assert {group // 6 for part in drawn for group in part} == set(range(iteration + 1))
        drawn.clear()
    collector.shutdown()


def test_metrics_are_those_of_the_rollout(backbone, policy):
    batches = []

    def advantage(data):
        batches.append(data["next", "reward"].clone())
        return PromptAdvantage(min_count=2)(data)

    loss = ScoreFunctionLoss(policy)
    collector = make_collector(make_env(backbone, 6), policy, iterations=2)
    optimizer = torch.optim.SGD(trainable(loss), lr=1e-3)
    for row in train(collector, loss, optimizer, advantage=advantage, sampler=TransitionSampler([0])):
        final = batches[-1][:, -1].double()
        assert row["reward"] == pytest.approx(final.mean().item(), rel=1e-5)
        assert row["reward_std"] == pytest.approx(final.std(correction=0).item(), rel=1e-3)
        assert row["seconds_sampling"] > 0
        assert row["seconds_training"] > 0
    collector.shutdown()
    assert len(batches) == 2
