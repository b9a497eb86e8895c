"""The embedded pipeline's own prompt alignment, with the weights that ship."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from rewards import PromptAlignment
from rewards.minilm import SentenceEmbeddings
from tests.test_rewards import some_images


@pytest.fixture(scope="module")
def reward() -> PromptAlignment:
    return PromptAlignment()


def drawn(shape: str, colour: str) -> Tensor:
    """A plain shape on white, 64 x 64."""
    image = Image.new("RGB", (256, 256), "white")
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((24, 24, 232, 232), fill=colour)
    else:
        pen.rectangle((32, 32, 224, 224), fill=colour)
    pixels = torch.tensor(list(image.resize((64, 64), Image.Resampling.LANCZOS).tobytes()))
    return pixels.view(64, 64, 3).permute(2, 0, 1) / 255


def test_it_knows_what_was_drawn_here(reward: PromptAlignment):
    names = [(shape, colour) for shape in ("circle", "square") for colour in ("red", "blue", "green", "purple")]
    images = torch.stack([drawn(*name) for name in names])
    prompts = [*(f"a {colour} {shape}" for shape, colour in names), "a cat", "a dog riding a bike"]
    with torch.no_grad():
        scores = reward(images.repeat_interleave(10, 0), prompts * 8).view(8, 10)
    right = scores.diagonal()
    assert (right > scores[:, 8:].amax(1) + 0.1).all(), "a plain shape is neither a cat nor a dog"
    same_shape = scores[:4, :4].mean() + scores[4:, 4:8].mean()
    other_shape = scores[:4, 4:8].mean() + scores[4:, :4].mean()
    assert (same_shape - other_shape) / 2 > 0.15
    assert scores.abs().max() <= 1 + 1e-6


def test_a_score_does_not_depend_on_the_batch(reward: PromptAlignment):
    images, prompts = some_images(7, 48, 80), ["a cat", "a dog riding a bike", "", "a cat", "an ant", "b", "a dog"]
    with torch.no_grad():
        together = reward(images, prompts)
        alone = torch.cat([reward(images[n : n + 1], prompts[n : n + 1]) for n in range(7)])
    assert together.shape == (7,) and together.dtype == torch.float32 and together.std() > 1e-2
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_the_gradient_is_the_finite_difference(reward: PromptAlignment):
    reward.train()  # dropout must stay off
    images = (0.8 * some_images(2) + 0.1).requires_grad_()
    prompts = ["a cat", "a whale"]
    (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)
    norm = gradient.flatten(1).norm(dim=1)
    assert norm.min() > 1e-3
    step = 0.005  # long enough for float32, short enough for the curvature of a cosine
    with torch.no_grad():
        ahead, behind = (
            reward(images + sign * step * gradient / norm[:, None, None, None], prompts) for sign in (1, -1)
        )
    torch.testing.assert_close((ahead - behind) / (2 * step), norm, rtol=0.1, atol=0)
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_sentences_are_means_over_the_tokens_of_each_alone(reward: PromptAlignment):
    prompts = ["a cat", "a dog riding a bike beside a very long river", "a cat"]
    embeddings = reward.sentences(prompts)
    for prompt, embedding in zip(prompts, embeddings, strict=True):
        tokens = reward.sentences.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            mean = reward.sentences.model(tokens).last_hidden_state[0].mean(0)
        torch.testing.assert_close(embedding, mean / mean.norm(), rtol=0, atol=1e-5)


def test_other_weights_are_refused(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    monkeypatch.setattr("rewards.minilm.package_folder", lambda package: tmp_path)
    with pytest.raises(ValueError, match="model.safetensors is not the published file"):
        SentenceEmbeddings()
