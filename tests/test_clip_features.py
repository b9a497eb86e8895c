"""CLIP features against CLIP itself, on its own processor's pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from rewards import CLIPFeatures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP of the true class with random weights."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = tower | {"vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    vision = tower | {"image_size": 48, "patch_size": 16}
    path = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(path)
    return path


@torch.no_grad()
def test_they_are_clips_embeddings(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48)
    prepared = processor([Image.fromarray(image) for image in pixels], return_tensors="pt")["pixel_values"]
    expected = CLIPModel.from_pretrained(folder).eval().get_image_features(prepared).pooler_output
    expected = expected / expected.norm(dim=1, keepdim=True)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(CLIPFeatures(folder)(images), expected, rtol=0, atol=1e-6)


def test_missing_weights_say_what_was_sought(tmp_path):
    with pytest.raises(FileNotFoundError, match="hf download"):
        CLIPFeatures(tmp_path / "nothing")
