"""Mixtures and changed rewards; what training logs of their parts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from agents import PromptAdvantage, ScoreFunctionLoss, TransitionSampler, make_collector, make_policy, train
from diffusion_env import DenoisingEnv
from rewards import Clip, JPEGCompressibility, Mix, Scale, Threshold
from tests.test_rewards import some_images


def red(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


def contrast(images: Tensor, prompts: list[str]) -> Tensor:
    return 100 * images.std((1, 2, 3)) + 7


class Green(nn.Module):
    name = "green"
    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.weight * images[:, 1].mean((1, 2))


PROMPTS = ["a cat"] * 5


def test_a_mixture_is_the_weighted_sum_and_keeps_the_parts():
    images = some_images(5)
    mix = Mix([(red, 2.0), (contrast, -0.5), (Green(), 1.0)])
    score = mix(images, PROMPTS)
    parts = {"red": red(images, []), "contrast": contrast(images, []), "green": images[:, 1].mean((1, 2))}
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, 2 * parts["red"] - 0.5 * parts["contrast"] + parts["green"])
    assert list(mix.last_parts) == list(parts)
    for name, value in parts.items():
        torch.testing.assert_close(mix.last_parts[name], value)
    assert [name for name, _ in mix.named_parameters()] and not mix.last_parts["green"].requires_grad


def test_gradients_go_through_the_mixture_and_what_has_none_says_so():
    images = some_images(2).requires_grad_()
    mix = Mix([(red, 3.0), (Scale(red_of_another_name, -1.0), 1.0)])
    assert mix.differentiable
    mix(images, PROMPTS[:2]).sum().backward()
    expected = torch.zeros_like(images)
    expected[:, 0] = 2 / (64 * 64)
    torch.testing.assert_close(images.grad, expected)
    assert not Mix([(red, 1.0), (JPEGCompressibility(), 1.0)]).differentiable
    assert not Threshold(red, 0.5).differentiable and not Scale(JPEGCompressibility(), 2.0).differentiable


def red_of_another_name(images: Tensor, prompts: list[str]) -> Tensor:
    return red(images, prompts)


def test_normalised_parts_use_the_statistics_of_all_images_so_far():
    mix = Mix([(red, 1.0), (contrast, 2.0)], normalise=True)
    batches = [some_images(size, seed=seed) for seed, size in enumerate((5, 1, 8))]
    for n, images in enumerate(batches):
        score = mix(images, ["a cat"] * len(images))
        seen = torch.cat(batches[: n + 1])
        expected = torch.zeros(len(images))
        for weight, part in ((1.0, red), (2.0, contrast)):
            values = part(seen, [])
            expected += weight * (part(images, []) - values.mean()) / values.std(correction=0)
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mix.last_parts["contrast"], contrast(batches[2], []))  # as they are
    restored = Mix([(red, 1.0), (contrast, 2.0)], normalise=True)
    restored.load_state_dict(copy.deepcopy(mix.state_dict()))
    assert torch.equal(restored(batches[0], PROMPTS), mix(batches[0], PROMPTS))


def test_one_image_and_a_constant_part_are_no_trouble():
    mix = Mix([(red, 1.0), (constant, 1.0)], normalise=True)
    assert mix(some_images(1), PROMPTS[:1]).tolist() == [0.0]
    assert mix(some_images(5, seed=1), PROMPTS).isfinite().all()


def constant(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.full((len(images),), 3.0)


def test_changed_rewards_change_the_values():
    images = some_images(5)
    values = red(images, [])
    middle = values.median().item()
    torch.testing.assert_close(Clip(red, 0.0, middle)(images, PROMPTS), values.clamp(max=middle))
    torch.testing.assert_close(Clip(red, middle, 1.0)(images, PROMPTS), values.clamp(min=middle))
    torch.testing.assert_close(Scale(red, -2.0, 0.5)(images, PROMPTS), 0.5 - 2 * values)
    passed = Threshold(red, middle)(images, PROMPTS)
    assert passed.tolist() == [float(value >= middle) for value in values.tolist()] and passed.sum() == 3
    assert Threshold(JPEGCompressibility(), 0).name == "jpeg-compressibility"
    inner = Mix([(red, 1.0)])
    Clip(inner, 0, 1)(images, PROMPTS)
    outer = Mix([(Clip(inner, 0, 1), 1.0), (contrast, 1.0)])
    outer(images, PROMPTS)
    assert list(outer.last_parts) == ["mix", "red", "contrast"]


def test_what_cannot_be_mixed_is_refused():
    for parts in ([], [(red, 1.0), (red, 2.0)]):
        with pytest.raises(ValueError, match="at least one, and no two of one name"):
            Mix(parts)
    with pytest.raises(ValueError, match="'std', and would be logged as reward_std"):
        Mix([(red, 1.0), (std, 1.0)])
    with pytest.raises(ValueError, match="the bounds are 2 and 1"):
        Clip(red, 2, 1)
    with pytest.raises(ValueError, match=r"'red' returned \(5, 1\), expected a tensor of shape \(5,\)"):
        Mix([(renamed(lambda images, _: images.mean((1, 2, 3))[:, None]), 1.0)])(some_images(5), PROMPTS)
    with pytest.raises(ValueError, match="'red' is nan for image 2"):
        bad = renamed(lambda images, _: torch.tensor([0, 0, torch.nan, 0, 0]))
        Mix([(contrast, 1.0), (bad, 1.0)])(some_images(5), PROMPTS)
    with pytest.raises(ValueError, match="divide uint8 by 255"):
        Mix([(red, 1.0)])(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), PROMPTS)


def std(images: Tensor, prompts: list[str]) -> Tensor:
    return images.std((1, 2, 3))


def renamed(function):
    function.__name__ = "red"
    return function


def test_training_logs_the_mean_of_each_part(trained_backbone):
    prompts, steps = ("a cat", "a dog"), 2
    reward = Mix([(red, 2.0), (contrast, 0.1)])
    policy = make_policy(trained_backbone, trained_backbone.sampler(steps), trained_backbone.conditioning(prompts))
    env = DenoisingEnv(trained_backbone, steps, reward, prompts, batch_size=4, seed=0)
    loss = ScoreFunctionLoss(policy)
    optimizer = torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=1e-6)
    (metrics,) = train(
        make_collector(env, policy, iterations=1),
        loss,
        optimizer,
        advantage=PromptAdvantage(min_count=2),
        sampler=TransitionSampler([0]),
        reward_parts=lambda: reward.last_parts,
    )
    assert {"reward_red", "reward_contrast"} < set(metrics)
    assert 2 * metrics["reward_red"] + 0.1 * metrics["reward_contrast"] == pytest.approx(metrics["reward"], rel=1e-5)
