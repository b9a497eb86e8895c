"""The fidelity of images to their prompts, on features whose classes are known."""

import pytest
import torch
from torch.distributions import Categorical

from rewards import PromptFidelity, Reward

PROMPTS = ("a cat", "a dog", "an ant")
CENTRES = torch.tensor([[0.2, 0.5, 0.5], [0.8, 0.5, 0.5], [0.5, 0.9, 0.1]])
SPREAD = 0.2


def colour(images):
    return images.mean((2, 3))


def plain(prompts, seed, centres=CENTRES, spread=SPREAD):
    """Images of one colour, each prompt's around its own."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
    colours = centres[label] + spread * torch.randn(len(prompts), 3, generator=generator)
    return colours[:, :, None, None].expand(-1, -1, 4, 4)


@pytest.fixture(scope="module")
def fidelity():
    prompts = PROMPTS * 200
    return PromptFidelity(colour, plain(prompts, 0), prompts)


def test_it_is_the_posterior_of_the_true_gaussians(fidelity):
    """With the means known and equal priors: log-odds -|x - mu|^2 / (2 sigma^2)."""
    prompts = list(PROMPTS * 30)
    images = plain(prompts, 1)
    distance = (colour(images)[:, None] - CENTRES).square().sum(2)
    label = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
    exact = Categorical(logits=-distance / (2 * SPREAD**2)).log_prob(label)
    found = fidelity(images, prompts)
    assert (found <= 0).all()
    assert exact.mean() < -0.05
    # The scale is one of a grid, found from samples.
    torch.testing.assert_close(found.mean(), exact.mean(), rtol=0.2, atol=0)
    assert torch.corrcoef(torch.stack([found, exact]))[0, 1] > 0.99


def test_it_falls_when_prompts_cannot_be_told_apart(fidelity):
    prompts = list(PROMPTS * 30)
    grey = CENTRES.mean(0).expand(3, -1)
    assert fidelity(plain(prompts, 1, centres=grey), prompts).mean() < fidelity(plain(prompts, 1), prompts).mean() - 0.5
    exchanged = prompts[1:] + prompts[:1]
    assert fidelity(plain(prompts, 1), exchanged).mean() < -3


def test_few_images_are_left_out_of_their_own_means():
    """Of noise alone nothing can be learned: the score is that of a guess, not of remembered images."""
    torch.manual_seed(0)
    prompts = list(PROMPTS * 2)
    noise = PromptFidelity(lambda images: images.flatten(1), torch.rand(6, 3, 8, 8), prompts)
    scores = noise(torch.rand(30, 3, 8, 8), list(PROMPTS * 10))
    assert scores.mean().item() == pytest.approx(torch.tensor(1 / 3).log().item(), abs=0.1)


def test_it_is_a_reward_and_differentiable(fidelity):
    images = plain(PROMPTS, 2).clone().requires_grad_()
    reward: Reward = fidelity
    assert (reward.name, reward.differentiable) == ("prompt_fidelity", True)
    scores = reward(images, list(PROMPTS))
    assert scores.shape == (3,)
    scores.sum().backward()
    assert images.grad.abs().max() > 0


def test_what_it_does_not_know_is_refused(fidelity):
    with pytest.raises(ValueError, match="'a bee' is none of the 3"):
        fidelity(plain(["a cat"], 0), ["a bee"])
    with pytest.raises(ValueError, match="'an ant' has a single image of 5"):
        PromptFidelity(
            colour, plain(["a cat", "a dog", "a cat", "a dog", "an ant"], 0), ["a cat", "a dog"] * 2 + ["an ant"]
        )
