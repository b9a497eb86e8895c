"""Pretraining code on a handful of made-up drawings: it trains, it resumes, it augments without losing colour."""

import numpy as np
import pytest
import torch

from examples.pretraining.augment import compose, step_generator
from examples.pretraining.emoji import Drawings
from examples.pretraining.trainer import fit
from examples.pretraining.unet import Phase, train_unet
from examples.pretraining.vae import psnr, train_vae


@pytest.fixture
def drawings():
    """Eight discs of different colours, two of them held out."""
    y, x = np.mgrid[:64, :64]
    inside = (x - 32) ** 2 + (y - 32) ** 2 < 25**2
    rgba = np.zeros((8, 64, 64, 4), np.uint8)
    rgba[..., :3] = np.random.default_rng(0).integers(0, 256, (8, 1, 1, 3))
    rgba[..., 3] = 255 * inside
    return Drawings(
        rgba=rgba,
        caption=np.array([f"a disc {n}" for n in range(8)]),
        style=np.array(["noto"] * 8),
        concept=np.array([str(n) for n in range(8)]),
        animal=np.array([0, 1, -1, -1, 2, -1, 3, -1]),
        held_out=np.array([False] * 6 + [True] * 2),
    )


def test_compose_keeps_colours_and_fills_the_background(drawings):
    images = compose(torch.from_numpy(drawings.rgba), step_generator(0, 0))
    assert images.shape == (8, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1 + 1e-6
    colours = torch.from_numpy(drawings.rgba[:, 32, 32, :3]).float() / 255
    for image, colour in zip(images, colours, strict=True):
        distance = (image - colour[:, None, None]).abs().amax(0)
        # a disc of radius 25 scaled by 0.75 .. 1
        assert 3.14 * 18**2 < (distance < 1e-3).sum() < 3.15 * 26**2
        assert torch.equal(image[:, 0, 0], image[:, 0, -1])


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(tmp_path):
    def linear():
        torch.manual_seed(0)
        return torch.nn.Linear(3, 1)

    def loss_of(model, stop_at=None):
        def loss_at(step):
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 3, generator=step_generator(1, step))
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        return loss_at

    whole, stopped = linear(), linear()
    fit(whole, loss_of(whole), tmp_path / "whole.pt", steps=30, learning_rate=1e-2, save_every=7)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, loss_of(stopped, 17), tmp_path / "stopped.pt", steps=30, learning_rate=1e-2, save_every=7)
    resumed = linear()
    fit(resumed, loss_of(resumed), tmp_path / "stopped.pt", steps=30, learning_rate=1e-2, save_every=7)
    assert torch.equal(whole.weight, resumed.weight)
    assert not torch.equal(whole.weight, linear().weight)


def test_tiny_run_of_vae_and_unet(drawings, tmp_path):
    vae = train_vae(drawings, tmp_path, steps=3, batch=2)
    assert np.isfinite(psnr(vae, drawings))
    phases = [Phase(2, (0.75, 1.0), 0.5, 2, 1), Phase(1, (0.9, 1.0), 0.9, 1, 1)]
    unet = train_unet(drawings, vae, tmp_path, phases=phases, batch=4)
    data = torch.load(tmp_path / "latents-1.pt", weights_only=True)
    assert len(data["latents"]) == 2 * 3 + 3, "three animals twice, three other drawings once, nothing held out"
    assert 0.2 < data["latents"].float().std() < 5
    again = train_unet(drawings, vae, tmp_path, phases=phases, batch=4)
    for one, other in zip(unet.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
