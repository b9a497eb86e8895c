"""Captioned emoji drawings from the Iconify packages: fetch, rasterise, split.

Every set is vector art under MIT, Apache-2.0 or CC-BY-4.0 (no share-alike). `emojione` is held out whole: no model
here is trained on it, so it measures what happens on an art style never seen. Of the other sets one drawing in
twenty, chosen by a hash of its name, is held out too.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_env.prompts import ANIMALS, with_article


@dataclass(frozen=True)
class EmojiSet:
    """One Iconify package: `version` as published, `licence` as the package states it."""

    version: str
    licence: str
    held_out: bool = False


EMOJI_SETS = {
    "fluent-emoji": EmojiSet("1.2.7", "MIT"),
    "fluent-emoji-flat": EmojiSet("1.2.6", "MIT"),
    "noto": EmojiSet("1.2.9", "Apache-2.0"),
    "noto-v1": EmojiSet("1.2.5", "Apache-2.0"),
    "fxemoji": EmojiSet("1.2.2", "Apache-2.0"),
    "twemoji": EmojiSet("1.2.5", "CC-BY-4.0"),
    "emojione": EmojiSet("1.2.3", "CC-BY-4.0", held_out=True),
}

# Unicode code points of DDPO's 45 animals: the animal, its face, its variants.
ANIMAL_CODE_POINTS = {
    code: entry.split()[0]
    for entry in (
        "cat 1f408 1f431,dog 1f415 1f436 1f9ae 1f429,horse 1f40e 1f434,monkey 1f412 1f435,rabbit 1f407 1f430,"
        "zebra 1f993,spider 1f577,bird 1f426 1f424,sheep 1f411,deer 1f98c,cow 1f404 1f42e,goat 1f410,lion 1f981,"
        "tiger 1f405 1f42f,bear 1f43b,raccoon 1f99d,fox 1f98a,wolf 1f43a,lizard 1f98e,beetle 1fab2 1f41e,ant 1f41c,"
        "butterfly 1f98b,fish 1f41f 1f420,shark 1f988,whale 1f40b 1f433,dolphin 1f42c,squirrel 1f43f,"
        "mouse 1f401 1f42d,rat 1f400,snake 1f40d,turtle 1f422,frog 1f438,chicken 1f414 1f413,duck 1f986,goose 1fabf,"
        "bee 1f41d,pig 1f416 1f437,turkey 1f983,fly 1fab0,llama 1f999,camel 1f42a 1f42b,bat 1f987,gorilla 1f98d,"
        "hedgehog 1f994,kangaroo 1f998"
    ).split(",")
    for code in entry.split()[1:]
}
# fxemoji and old twemoji names that differ from the Unicode names the other sets use.
OWN_NAMES = {
    "fxemoji": {
        "bunny": "1f430", "bunnyside": "1f407", "catside": "1f408", "cat": "1f431", "dogside": "1f415",
        "dog": "1f436", "horseface": "1f434", "horse": "1f40e", "monkeyface": "1f435", "mouseside": "1f401",
        "mouse": "1f42d", "pigside": "1f416", "pig": "1f437", "tigerside": "1f405", "tiger": "1f42f",
        "cowface": "1f42e", "wolfface": "1f43a", "dromedarycamel": "1f42a", "bactriancamel": "1f42b",
        "ladybeetle": "1f41e", "spurtingwhale": "1f433", "tropicalfish": "1f420", "babychick": "1f424",
    },
    "": {
        "bear-face": "1f43b", "lion-face": "1f981", "wolf-face": "1f43a", "frog-face": "1f438", "honeybee": "1f41d",
        "fox-face": "1f98a", "ewe": "1f411", "sheep": "1f411", "chipmunk": "1f43f", "tiger-face": "1f42f",
        "bear": "1f43b", "frog": "1f438",
    },
}  # fmt: skip
# Zero-width joiners, keycaps, skin tones and flags: letters and variants, not things to draw.
SKIPPED = ("200d", "20e3", "1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff", "1f1e")


@dataclass(frozen=True)
class Drawings:
    """Rasterised drawings; arrays of equal length N, `rgba` uint8 [N, size, size, 4] with straight alpha."""

    rgba: np.ndarray
    caption: np.ndarray
    style: np.ndarray
    concept: np.ndarray  # Unicode code point: the same thing drawn in several styles
    animal: np.ndarray  # index into ANIMALS, -1 for everything else
    held_out: np.ndarray  # never trained on

    def select(self, mask: np.ndarray) -> Drawings:
        """The drawings where `mask` is true."""
        return Drawings(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))


def load_drawings(cache: Path, size: int = 64) -> Drawings:
    """The data set, built into `cache` on first use (npm fetches 23 MB, rasterising takes about a minute)."""
    path = cache / f"emoji{size}.npz"
    if not path.exists():
        drawings = _rasterise(_fetch(cache), size)
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(partial, **vars(drawings))
        partial.rename(path)
    with np.load(path) as data:
        return Drawings(**data)


def _fetch(cache: Path) -> dict[str, Path]:
    cache.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, emoji_set in EMOJI_SETS.items():
        paths[name] = cache / f"iconify-json-{name}-{emoji_set.version}.tgz"
        if not paths[name].exists():
            package = f"@iconify-json/{name}@{emoji_set.version}"
            subprocess.run(["npm", "pack", "--silent", "--pack-destination", str(cache), package], check=True)
    return paths


def _rasterise(tarballs: dict[str, Path], size: int) -> Drawings:
    sets = {name: _read_icons(path) for name, path in tarballs.items()}
    code_of_name: dict[str, str] = {}
    for name in ("noto", "twemoji", "fluent-emoji-flat"):
        for code, icon in sets[name][1].items():
            code_of_name.setdefault(icon, code.replace("-fe0f", ""))
    name_of_code = {code: name for name, code in code_of_name.items()}
    rows = []
    for style, (icons, chars) in sets.items():
        own = {icon: code.replace("-fe0f", "") for code, icon in reversed(chars.items())}
        names = OWN_NAMES.get(style, OWN_NAMES[""])
        for icon, body in icons["icons"].items():
            code = names.get(icon) or own.get(icon) or code_of_name.get(icon)
            if not code or code not in name_of_code or any(part in code for part in SKIPPED):
                continue
            animal = ANIMAL_CODE_POINTS.get(code)
            label = animal or name_of_code[code].replace("-", " ")
            held_out = EMOJI_SETS[style].held_out or _hash(f"{style}/{code}") % 20 == 0
            index = ANIMALS.index(animal) if animal else -1
            rows.append((_draw(icons, body, size), with_article(label), style, code, index, held_out))
    return Drawings(*(np.array(column) for column in zip(*rows, strict=True)))


def _read_icons(tarball: Path) -> tuple[dict, dict]:
    with tarfile.open(tarball) as archive:
        icons, chars = (json.load(archive.extractfile(f"package/{name}.json")) for name in ("icons", "chars"))
    return icons, chars


def _draw(icons: dict, body: dict, size: int) -> np.ndarray:
    import resvg_py  # a maintainer's tool: only who rebuilds the data set needs it

    width, height = body.get("width", icons.get("width", 16)), body.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{body["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * size, height=4 * size))
    # Premultiplied while it shrinks: otherwise the colour of transparent pixels leaks into the edges.
    image = Image.open(io.BytesIO(png)).convert("RGBA").convert("RGBa").resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image.convert("RGBA"))


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)
