"""Rewards on CLIP and BLIP: small random weights of the true classes, saved and loaded as the published files are."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from benchmarks.stable_diffusion import letter_tokenizer
from rewards import CLIPScore, HPSv2, HPSv21, ImageReward, LAIONAesthetic, PickScore
from rewards.base import Scorer
from rewards.clip import clip_crop, image_tower
from rewards.hps import fit_and_pad
from rewards.image_reward import MEAN, STD
from rewards.laion import AestheticHead
from rewards.open_clip import from_open_clip
from tests.reward_networks import BLIPReward, OpenCLIP, randomise
from tests.test_rewards import as_pil, some_images

PROMPTS = ["a cat", "a dog riding a bike", "", "a cat"]
PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def clip_config(*, width: int = 32, projection: int = 24, activation: str = "quick_gelu") -> CLIPConfig:
    tower = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "hidden_act": activation}
    heads = {"num_attention_heads": 4, "projection_dim": projection}
    text = {"vocab_size": 64, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1}
    return CLIPConfig(
        text_config=tower | heads | text,
        vision_config=tower | heads | {"image_size": 48, "patch_size": 16},
        projection_dim=projection,
    )


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with its tokenizer, tiny but for the projection that the aesthetic head needs."""
    folder = tmp_path_factory.mktemp("clip")
    randomise(CLIPModel(clip_config(projection=768))).save_pretrained(folder)
    letter_tokenizer(16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(randomise(AestheticHead(), seed=1).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def open_clip() -> OpenCLIP:
    return randomise(OpenCLIP(), seed=3)


@pytest.fixture(scope="module")
def hps_folder(tmp_path_factory: pytest.TempPathFactory, open_clip: OpenCLIP) -> Path:
    """Both checkpoints (the later one is the first, negated) beside configuration and tokenizer of the original."""
    folder = tmp_path_factory.mktemp("hps")
    clip_config(activation="gelu").save_pretrained(folder)
    letter_tokenizer(16).save_pretrained(folder)
    weights = open_clip.state_dict()
    torch.save({"epoch": 3, "state_dict": weights}, folder / "HPS_v2_compressed.pt")
    negated = weights | {"visual.proj": -weights["visual.proj"]}
    torch.save({"state_dict": negated}, folder / "HPS_v2.1_compressed.pt")
    return folder


@pytest.fixture(scope="module")
def blip() -> BLIPReward:
    return BLIPReward()


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory, blip: BLIPReward) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    torch.save(blip.published(), folder / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "riding", "bike"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorers(clip_folder: Path, head_file: Path, hps_folder: Path, blip_folder: Path) -> dict[str, Scorer]:
    return {
        "laion": LAIONAesthetic(clip_folder, head_file),
        "clip": CLIPScore(clip_folder),
        "pick": PickScore(clip_folder, clip_folder),
        "hpsv2": HPSv2(hps_folder, hps_folder),
        "hpsv2.1": HPSv21(hps_folder, hps_folder),
        "image-reward": ImageReward(blip_folder, blip_folder),
    }


SCORERS = ("laion", "clip", "pick", "hpsv2", "hpsv2.1", "image-reward")


@pytest.mark.parametrize("name", SCORERS)
def test_a_score_does_not_depend_on_the_batch(scorers: dict[str, Scorer], name: str):
    images = torch.cat([some_images(7, 64, 96, seed) for seed in range(9)] + [some_images(1, 64, 96, 9)])
    prompts = (PROMPTS * 16)[:64]
    with torch.no_grad():
        together = scorers[name](images, prompts)
        alone = torch.cat([scorers[name](images[n : n + 1], prompts[n : n + 1]) for n in (0, 1, 2, 63)])
    assert together.shape == (64,) and together.dtype == torch.float32 and together.isfinite().all()
    torch.testing.assert_close(together[[0, 1, 2, 63]], alone, rtol=0, atol=1e-5)
    assert together.std() > 1e-3


@pytest.mark.parametrize("name", SCORERS)
def test_the_gradient_is_the_finite_difference_and_trains_nothing_else(scorers: dict[str, Scorer], name: str):
    reward = scorers[name]
    reward.train()  # dropout must stay off
    images = (0.6 * some_images(2, 80, 64) + 0.2).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:2]).sum(), images)
    norm = gradient.flatten(1).norm(dim=1)
    assert norm.min() > 1e-4 and gradient.isfinite().all()
    direction = gradient / norm[:, None, None, None]
    step = 0.02
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step * direction, PROMPTS[:2]) for sign in (1, -1))
    torch.testing.assert_close((ahead - behind) / (2 * step), norm, rtol=0.02, atol=2e-5)
    assert not any(parameter.requires_grad for parameter in reward.parameters())


@pytest.mark.parametrize("name", SCORERS)
def test_the_prompt_matters_to_all_but_the_aesthetic_score(scorers: dict[str, Scorer], name: str):
    images = some_images(1).expand(2, -1, -1, -1)
    cat, dog = scorers[name](images, ["a cat", "a dog riding a bike"])
    assert (cat == dog) == (name == "laion")


@pytest.mark.parametrize("name", SCORERS)
def test_half_precision_images_within_autocast_are_scored_in_float32(scorers: dict[str, Scorer], name: str):
    images = some_images(2).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside = scorers[name](images, PROMPTS[:2])
    assert torch.equal(inside, scorers[name](images.float(), PROMPTS[:2]))


def test_clip_score_and_pick_score_are_what_transformers_computes(clip_folder: Path, scorers: dict[str, Scorer]):
    images = some_images(4, 48, 48)  # CLIP's own size: nothing is resized
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48)
    pixels = processor([as_pil(image) for image in images], return_tensors="pt")["pixel_values"]
    tokens = letter_tokenizer(16)(PROMPTS, padding=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        logits = model(**tokens, pixel_values=pixels).logits_per_image.diagonal()
    torch.testing.assert_close(scorers["pick"](images, PROMPTS), logits, rtol=1e-5, atol=1e-5)
    cosine = logits / model.logit_scale.detach().exp()
    torch.testing.assert_close(scorers["clip"](images, PROMPTS), 2.5 * cosine, rtol=1e-5, atol=1e-5)


def test_a_long_prompt_is_cut_to_77_tokens(scorers: dict[str, Scorer]):
    image, letters = some_images(1), "abcdefgh" * 20  # begin, 75 letters, end
    whole, *changed = scorers["clip"](
        image.expand(3, -1, -1, -1), [letters] + [f"{letters[:n]}z{letters[n + 1 :]}" for n in (74, 75)]
    ).tolist()
    assert abs(changed[1] - whole) < 1e-6 < abs(changed[0] - whole)


def test_rewards_share_one_clip(clip_folder: Path, head_file: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = []
    original = CLIPModel.from_pretrained
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *a, **k: loaded.append(a) or original(*a, **k))
    source = f"{clip_folder}/."  # not held by any other test's reward
    aesthetic, score = LAIONAesthetic(source, head_file), CLIPScore(source)
    assert aesthetic.image_tower is score.image_tower
    assert len(loaded) == 2, "the aesthetic score let the text tower go"
    del aesthetic, score
    image_tower(source)
    assert len(loaded) == 3, "nobody held it any more"


@pytest.mark.parametrize("version", [HPSv2, HPSv21])
def test_hps_is_open_clips_cosine(version: type[HPSv2], hps_folder: Path, open_clip: OpenCLIP):
    images = some_images(4, 48, 48)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    tokens = letter_tokenizer(16)(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        image = open_clip.image((images - mean[:, None, None]) / std[:, None, None])
        cosine = torch.cosine_similarity(image, open_clip.text(tokens))
    sign = 1 if version is HPSv2 else -1
    score = version(hps_folder, hps_folder)(images, PROMPTS)
    torch.testing.assert_close(score, sign * cosine, rtol=1e-5, atol=1e-5)


def test_open_clips_vit_h_fills_transformers_to_the_last_weight():
    with torch.device("meta"):
        shapes = {"text_projection": (1024, 1024), "positional_embedding": (77, 1024), "logit_scale": ()}
        shapes |= {"token_embedding.weight": (49408, 1024), "ln_final.weight": (1024,), "ln_final.bias": (1024,)}
        shapes |= {"visual.class_embedding": (1280,), "visual.positional_embedding": (257, 1280)}
        shapes |= {"visual.proj": (1280, 1024), "visual.conv1.weight": (1280, 3, 14, 14)}
        for norm in ("ln_pre", "ln_post"):
            shapes |= {f"visual.{norm}.{kind}": (1280,) for kind in ("weight", "bias")}
        for prefix, width, layers in (("visual.transformer", 1280, 32), ("transformer", 1024, 24)):
            parts = {"attn.in_proj_": 3 * width, "attn.out_proj.": width, "mlp.c_fc.": 4 * width, "mlp.c_proj.": width}
            for n in range(layers):
                block = f"{prefix}.resblocks.{n}."
                for part, out in parts.items():
                    shapes[f"{block}{part}bias"] = (out,)
                    shapes[f"{block}{part}weight"] = (out, 4 * width if part == "mlp.c_proj." else width)
                shapes |= {
                    f"{block}{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")
                }
        converted = from_open_clip({key: torch.empty(shape) for key, shape in shapes.items()})
        common = {"hidden_act": "gelu", "projection_dim": 1024, "num_attention_heads": 16}
        text = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, **common)
        vision = CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14, **common
        )
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024))
    expected = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in converted.items()} == expected


def test_a_checkpoint_of_something_else_is_refused(hps_folder: Path, open_clip: OpenCLIP, tmp_path: Path):
    with pytest.raises(ValueError, match="weight 'decoder.weight', which is none of OpenCLIP's"):
        from_open_clip({"decoder.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="'transformer.resblocks.0.attn.k_norm.weight', which is none"):
        from_open_clip({"transformer.resblocks.0.attn.k_norm.weight": torch.zeros(1)})
    weights = open_clip.state_dict()
    del weights["visual.ln_post.bias"]
    torch.save({"state_dict": weights}, tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(ValueError, match="(?s)HPS_v2_compressed.pt is of another kind.*post_layernorm.bias"):
        HPSv2(tmp_path, hps_folder)


def test_a_clip_that_lacks_weights_is_refused(clip_folder: Path, tmp_path: Path):
    weights = CLIPModel.from_pretrained(clip_folder).state_dict()
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    with pytest.raises(ValueError, match="lacks 1 of its weights .visual_projection.weight"):
        image_tower(tmp_path)


def test_image_reward_is_blip_with_cross_attention_and_the_layers_by_hand(blip: BLIPReward, scorers: dict[str, Scorer]):
    images = some_images(2, 48, 48)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    # [CLS] a cat [SEP], [CLS] a dog riding a bike [SEP]; only the first three fields of 35 are words or ends
    sentences = [[2, 5, 6, 3], [2, 5, 7, 8, 5, 9, 3]]
    with torch.no_grad():
        picture = blip.vision((images - mean[:, None, None]) / std[:, None, None]).last_hidden_state
        for n, sentence in enumerate(sentences):
            states = blip.text(torch.tensor([sentence]), encoder_hidden_states=picture[n : n + 1]).last_hidden_state
            x = states[0, 0]
            for layer in (0, 2, 4, 6, 7):
                x = blip.head.layers[layer].weight @ x + blip.head.layers[layer].bias
            score = scorers["image-reward"](images[n : n + 1], [PROMPTS[n]])
            torch.testing.assert_close(score, (x - MEAN) / STD, rtol=1e-5, atol=1e-5)


def test_image_rewards_published_vision_names_are_blips(blip: BLIPReward):
    keys = set(blip.published())
    assert {
        "blip.visual_encoder.cls_token",
        "blip.visual_encoder.pos_embed",
        "blip.visual_encoder.patch_embed.proj.weight",
        "blip.visual_encoder.blocks.1.attn.qkv.bias",
        "blip.visual_encoder.blocks.0.attn.proj.weight",
        "blip.visual_encoder.blocks.0.norm1.weight",
        "blip.visual_encoder.blocks.0.mlp.fc1.weight",
        "blip.visual_encoder.norm.weight",
        "blip.text_encoder.embeddings.word_embeddings.weight",
        "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
        "blip.text_encoder.encoder.layer.1.attention.output.LayerNorm.weight",
        "mlp.layers.7.bias",
    } <= keys


PATTERNS = {
    "checks": lambda size: (np.indices((size, size)).sum(0) // 3 % 2)[..., None].repeat(3, -1) * 255,
    "stripes": lambda size: (np.indices((size, size))[1] % 2)[..., None] * np.array([255, 0, 255]),
    "noise": lambda size: np.random.default_rng(0).integers(0, 256, (size, size, 3)),
    "ramp": lambda size: np.stack([np.linspace(0, 255, size)] * size)[..., None].repeat(3, -1),
    "photograph": lambda size: np.asarray(Image.open(PHOTOGRAPH).resize((size, size), Image.Resampling.LANCZOS)),
}


@pytest.mark.parametrize("size", [64, 512])
@pytest.mark.parametrize("picture", PATTERNS)
def test_preprocessing_is_that_of_clips_own_processor(picture: str, size: int):
    pixels = PATTERNS[picture](size).astype(np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224, do_normalize=False)
    expected = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
    gap = (clip_crop(image, 224) - expected).abs()
    assert gap.max() < 1.5 / 255 and gap.mean() < 0.5 / 255
    if size == 512:  # a square: nothing to pad
        assert (fit_and_pad(image, 224).clamp(0, 1) - expected).abs().mean() < 2 / 255


def test_hps_pads_a_wide_picture_with_black_and_cuts_nothing():
    image = torch.ones(1, 3, 100, 200)
    padded = fit_and_pad(image, 50)
    assert padded.shape == (1, 3, 50, 50)
    torch.testing.assert_close(padded[..., 12:37, :], torch.ones(1, 3, 25, 50))
    assert padded[..., :12, :].abs().sum() == 0 and padded[..., 37:, :].abs().sum() == 0
    torch.testing.assert_close(fit_and_pad(image.transpose(2, 3), 50), padded.transpose(2, 3))


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


def test_laion_reads_the_older_linear_head(clip_folder: Path, tmp_path: Path):
    torch.manual_seed(2)
    head = nn.Linear(768, 1)
    torch.save(head.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    images = some_images(2)
    with torch.no_grad():
        expected = head(image_tower(clip_folder)(clip_crop(images, 48))).squeeze(1)
    assert torch.equal(LAIONAesthetic(clip_folder, tmp_path)(images, ["", ""]), expected)


def test_a_head_of_another_width_is_refused(clip_folder: Path, tmp_path: Path):
    torch.save(AestheticHead(512).state_dict(), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="(?s)head.pth is of another kind of model.*512"):
        LAIONAesthetic(clip_folder, tmp_path / "head.pth")


def test_laion_reads_safetensors_and_folders_alike(clip_folder: Path, head_file: Path, tmp_path: Path):
    save_file(torch.load(head_file, weights_only=True), tmp_path / "model.safetensors")
    images = some_images(2)
    expected = LAIONAesthetic(clip_folder, head_file)(images, ["", ""])
    for head in (tmp_path / "model.safetensors", str(tmp_path), head_file.parent):
        assert torch.equal(LAIONAesthetic(clip_folder, head)(images, ["", ""]), expected)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (512, 512), (300, 411), (224, 224), (640, 360)])
def test_clip_crop_agrees_with_clips_own_processor(height: int, width: int):
    image = some_images(1, height, width)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224, do_normalize=False)
    expected = processor(as_pil(image[0]), return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 3, 224, 224)
    assert (clip_crop(image, 224) - expected).abs().max() < 1.5 / 255


def test_laion_missing_files_say_what_to_fetch(clip_folder: Path, head_file: Path, tmp_path: Path):
    missing = tmp_path / "missing.pth"
    with pytest.raises(
        FileNotFoundError, match="missing.pth.*offline in .*hf download trl-lib/ddpo-aesthetic-predictor.*path"
    ):
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


@pytest.mark.parametrize(
    ("make", "command"),
    [
        (lambda folder, clip: CLIPScore(folder), "openai/clip-vit-large-patch14"),
        (lambda folder, clip: PickScore(folder, clip), "yuvalkirstain/PickScore_v1"),
        (lambda folder, clip: PickScore(clip, folder), "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        (lambda folder, clip: HPSv2(folder, clip), "xswu/HPSv2 HPS_v2_compressed.pt"),
        (lambda folder, clip: HPSv21(folder, clip), "xswu/HPSv2 HPS_v2.1_compressed.pt"),
        (lambda folder, clip: ImageReward(folder, clip), "THUDM/ImageReward ImageReward.pt"),
    ],
)
def test_missing_weights_say_which_command_fetches_them(make, command: str, clip_folder: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(tmp_path))}.*offline in .*hf download {command}"):
        make(tmp_path, clip_folder)
