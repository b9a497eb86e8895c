"""The embedded pipeline: assembled whole, the same in plain diffusers and here."""

import hashlib
import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from agents import make_policy
from diffusion_env import LoRA, StableDiffusionBackbone, embedded, embedded_folder


@pytest.fixture(scope="module")
def folder():
    return embedded_folder()


def test_is_one_complete_folder_made_once(folder):
    parts = {path.name for path in folder.iterdir()}
    assert parts == {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    assert embedded_folder() == folder
    assert not list(folder.parent.glob(f"{folder.name}.*")), "a partial folder was left behind"


def test_a_wrong_text_encoder_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "minilm"
    shutil.copytree(embedded._minilm_folder(), source)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(embedded, "_minilm_folder", lambda: source)
    with pytest.raises(ValueError, match="not the\nweights|not the weights"):
        embedded.write_text_encoder(tmp_path / "out")


def test_shipped_text_encoder_checksum(folder):
    found = hashlib.sha256((folder / "text_encoder" / "model.safetensors").read_bytes()).hexdigest()
    assert found == embedded.TEXT_ENCODER_SHA256


def test_weights_are_small(folder):
    size = sum(path.stat().st_size for path in embedded.PACKAGE_FOLDER.glob("*/*.safetensors"))
    assert 0 < size <= 25e6


def test_plain_diffusers_sees_the_same_conditioning(folder):
    prompts = ["a cat", "a hedgehog washing the dishes", ""]
    plain = StableDiffusionPipeline.from_pretrained(folder)
    expected, _ = plain.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    backbone = StableDiffusionBackbone.from_pretrained(folder, lora=LoRA())
    found = backbone.conditioning(prompts)(torch.arange(3))["encoder_hidden_states"]
    assert torch.equal(found, expected)
    assert found.shape == (3, embedded.MAX_TOKENS, 384)
    # The encoder's attention mask is in use: padding does not change what the words mean.
    tokens = plain.tokenizer("a cat", return_tensors="pt")
    with torch.no_grad():
        alone = plain.text_encoder(**tokens)[0]
    torch.testing.assert_close(found[0, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-5)


def test_lora_folder_in_plain_diffusers_gives_the_policys_images(folder, tmp_path):
    backbone = StableDiffusionBackbone.from_pretrained(
        folder, guidance_scale=3.0, lora=LoRA(rank=2, alpha=6.0, targets=("to_q", "to_out.0", "conv1"))
    )
    torch.manual_seed(0)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    prompts = ["a cat", "a whale"]
    sampler, conditioning = backbone.sampler(4), backbone.conditioning(prompts)
    policy = make_policy(backbone, sampler, conditioning)
    x = start = torch.randn(2, *backbone.latent_shape)
    torch.manual_seed(7)
    with torch.no_grad():
        for i in range(4):
            x = policy(latents=x, step=torch.full((2, 1), i), prompt_id=torch.tensor([[0], [1]]))[0]
    expected = backbone.decode(x).detach()

    backbone.save(tmp_path)
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompts,
        latents=start,
        num_inference_steps=4,
        guidance_scale=3.0,
        eta=1.0,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-4)
