"""Pretraining code on a handful of made-up drawings: it trains, it resumes, it augments without losing colour."""

import dataclasses

import numpy as np
import pytest
import torch
from matplotlib.colors import rgb_to_hsv

from examples.pretraining.alignment import Copies, batch_shares, captioned_features, fit_projections
from examples.pretraining.augment import compose, step_generator
from examples.pretraining.captioned import COLOURS, Mixture, compose_scenes, list_scenes, training_pictures
from examples.pretraining.emoji import Drawings
from examples.pretraining.heads import PINK, fit_preference, random_others, random_pinks
from examples.pretraining.trainer import fit
from examples.pretraining.unet import train_unet
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


def test_the_preference_orders_backgrounds_and_styles_of_whatever_is_drawn():
    """Three directions of the features: what is drawn, its background, its style; only the last two tell the winner."""
    generator = torch.Generator().manual_seed(0)
    thing, style = torch.randn(20, generator=generator).repeat(2), torch.tensor([1.0, 0.0]).repeat_interleave(20)
    features = torch.stack([torch.stack([5 * thing, torch.full((40,), pink), style], 1) for pink in (1.0, 0.0)])
    features = features + 0.01 * torch.randn(features.shape, generator=generator)
    pairs = torch.stack([torch.arange(20), torch.arange(20, 40)], 1)
    head = fit_preference(features, pairs, ridge=0.03)
    scores = features @ head["weight"][0] + head["bias"]
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1, abs=1e-5)
    assert (scores[0] > scores[1]).all()
    assert (scores[:, pairs[:, 0]] > scores[:, pairs[:, 1]]).all()
    assert abs(torch.corrcoef(torch.stack([scores[0], thing]))[0, 1]) < 0.1


def test_no_other_colour_is_pink():
    generator = step_generator(0, 0)
    hues = [rgb_to_hsv(make(500, generator).numpy())[:, 0] for make in (random_pinks, random_others)]
    low, high = PINK
    assert ((low - 1e-4 < hues[0]) & (hues[0] < high + 1e-4)).all()
    assert not ((low < hues[1]) & (hues[1] < high)).any()


def test_captions_say_what_is_drawn(drawings):
    pictures = list(training_pictures(drawings, Mixture(animal_copies=40, other_copies=2), seed=0))
    images = torch.cat([part.images for part in pictures])
    captions = [caption for part in pictures for caption in part.captions]
    assert len(captions) == 3 * 40 + 3 * 2, "three animals, three other things, no scene without its thing"
    assert not any("disc 6" in caption or "disc 7" in caption for caption in captions), "those are held out"
    styled = [caption for caption in captions if "shaded disc" in caption]
    assert 0.1 * len(captions) < len(styled) < 0.3 * len(captions)
    on_colour = [n for n, caption in enumerate(captions) if caption.endswith("background")]
    assert 0.1 * len(captions) < len(on_colour) < 0.4 * len(captions)
    for n in on_colour:
        named = torch.tensor(COLOURS[captions[n].split()[-2]])
        assert (images[n, :, 0, 0] - named).abs().max() <= 0.08 + 1e-6


def test_weights_give_each_animal_the_same_share(drawings):
    mixture = Mixture(animal_copies=3, other_copies=1, animal_share=0.6, scene_share=0.0)
    pictures = list(training_pictures(drawings, mixture, seed=0))
    weight = torch.cat([part.weight for part in pictures])
    captions = [caption for part in pictures for caption in part.captions]
    assert weight.sum().item() == pytest.approx(1)
    for name, animal in zip(drawings.caption[:6], drawings.animal[:6], strict=True):
        digit = name.split()[-1]
        share = sum(w.item() for w, caption in zip(weight, captions, strict=True) if digit in caption)
        assert share == pytest.approx(0.6 / 3 if animal >= 0 else 0.4 / 3)


def test_a_scene_shows_animal_and_thing(drawings):
    bicycle = dataclasses.replace(drawings, concept=np.array([*"012", "1f6b2", *"4567"]))
    scenes = list_scenes(bicycle)
    # Of the animals 0 (cat), 1 (dog), 2 (horse), every second takes part; 3 is held out only in `training_pictures`.
    assert scenes == [(0, 3, "riding a bike"), (4, 3, "riding a bike")]
    rgba = torch.from_numpy(drawings.rgba)
    images = compose_scenes(rgba, scenes, step_generator(0, 0))
    for image, (animal, thing, _) in zip(images, scenes, strict=True):
        for drawing, row in ((animal, 20), (thing, 50)):
            colour = rgba[drawing, 32, 32, :3].float() / 255
            assert (image[:, row, 32] - colour).abs().max() < 1e-3
    (part,) = list(training_pictures(bicycle, Mixture(1, 1, 1), seed=0))[1:]
    assert part.captions == ["a cat riding a bike", "a horse riding a bike"]


def test_tiny_run_of_vae_and_unet(drawings, tmp_path):
    vae = train_vae(drawings, tmp_path, steps=3, batch=2)
    assert np.isfinite(psnr(vae, drawings))
    mixture = Mixture(animal_copies=2, other_copies=1)
    unet = train_unet(drawings, vae, tmp_path, steps=3, mixture=mixture, batch=4)
    data = torch.load(tmp_path / "latents.pt", weights_only=True)
    assert data["latents"].shape == (2 * 3 + 3, 8, 16, 16)
    assert 0.2 < data["latents"].float().std() < 5
    again = train_unet(drawings, vae, tmp_path, steps=3, mixture=mixture, batch=4)
    for one, other in zip(unet.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_batch_shares_are_those_of_the_kinds_and_alike_for_each_caption():
    kinds = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    caption = torch.tensor([3, 3, 0, 1, 2, 2, 4])
    shares = batch_shares(kinds, caption)
    assert shares.sum().item() == pytest.approx(1)
    assert shares[:2].sum().item() == pytest.approx(shares[2].item()) == pytest.approx(0.2)
    assert shares[3].item() == pytest.approx(0.25)
    assert shares[4:6].sum().item() == pytest.approx(shares[6].item())


def test_alignment_learns_which_caption_belongs_to_which_picture(drawings):
    bicycle = dataclasses.replace(drawings, concept=np.array([*"012", "1f6b2", *"4567"]))
    data = captioned_features(
        bicycle, lambda images: images.mean((2, 3)).repeat(1, 427)[:, :1280], Copies(6, 2, 3), seed=0
    )
    assert data.features.shape == (4 * 6 + 4 * 3 + 2 * 2, 1280)
    assert data.captions == sorted([*drawings.caption, "a cat riding a bike", "a horse riding a bike"])
    assert [data.captions[n] for n in data.caption[-4:]] == ["a cat riding a bike", "a horse riding a bike"] * 2
    generator = torch.Generator().manual_seed(0)
    sentences = torch.nn.functional.normalize(torch.randn(len(data.captions), 384, generator=generator), dim=1)
    # Pictures that tell their captions apart: with the mean colour alone, backgrounds would not allow it.
    known = torch.randn(len(data.captions), 1280, generator=generator)
    data = dataclasses.replace(
        data, features=known[data.caption] + 0.3 * torch.randn(len(data.caption), 1280, generator=generator)
    )
    projections = fit_projections(data, sentences, steps=60, batch=32)
    with torch.no_grad():
        cosine = projections.embed_image(known) @ projections.embed_text(sentences).T
    assert (cosine.argmax(1) == torch.arange(len(known))).all() and (cosine.argmax(0) == torch.arange(len(known))).all()
    again = fit_projections(data, sentences, steps=60, batch=32)
    assert all(torch.equal(a, b) for a, b in zip(projections.parameters(), again.parameters(), strict=True))
