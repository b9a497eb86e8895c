"""A reward computed by another process or machine, asked over HTTP; `python -m rewards.serve` is the other end.

One POST a batch, JSON: `prompts`, and `images` as PNG pictures in base64, or as little-endian float32 in base64 with
their `shape`. The answer is `{"scores": [...]}`, or `{"error": "..."}` with a status that is not 200.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
import urllib.error
import urllib.request
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .base import check_batch, to_pil

RETRIED = (502, 503, 504)  # the server is not there yet, or overloaded; any other status is an answer
MAX_ERROR = 1 << 16  # bytes of an error that are read
# Straight to the server: a proxy of the environment knows nothing of this machine's own ports.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class HTTPReward:
    """Asks a server for the scores.

    Args:
        url: where the server listens: "http://127.0.0.1:8000".
        images: "png" sends 8 bits a value, what a reward sees that reads pictures from files; "raw" sends float32,
            eight times as much, without any rounding.
        batch_size: images a request.
        timeout: seconds to wait for an answer.
        retries: how often a request is repeated after no answer came, waiting 0.5 s, then 1 s, 2 s, ...
    """

    name = "http"
    differentiable: ClassVar[bool] = False

    def __init__(
        self,
        url: str,
        *,
        images: Literal["png", "raw"] = "png",
        batch_size: int = 16,
        timeout: float = 120.0,
        retries: int = 3,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the URL is {url!r}, expected one that begins with http:// or https://.")
        if images not in ("png", "raw") or batch_size < 1 or timeout <= 0 or retries < 0:
            raise ValueError(
                f"images={images!r}, batch_size={batch_size}, timeout={timeout}, retries={retries}: expected 'png' or "
                "'raw', at least 1, above 0, at least 0."
            )
        self._url, self._encode = url, encode_png if images == "png" else encode_raw
        self._batch_size, self._timeout, self._retries = batch_size, timeout, retries

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score a batch, see `Reward`.

        Raises:
            ConnectionError: no answer came, after all retries.
            ValueError: the server refused the request, or answered with something else than one finite number an image.
        """
        check_batch(images, prompts)
        scores: list[float] = []
        for start in range(0, len(images), self._batch_size):
            part = slice(start, start + self._batch_size)
            body = {"prompts": prompts[part], **self._encode(images[part].detach())}
            scores += self._scores(self._post(json.dumps(body).encode()), len(prompts[part]))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        for attempt in range(self._retries + 1):
            try:
                with _OPENER.open(request, timeout=self._timeout) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    message = _error_text(error.read(MAX_ERROR))
                if error.code not in RETRIED:
                    raise ValueError(f"the reward server {self._url} answered {error.code}: {message}") from error
                failure: Exception = error
            except (OSError, http.client.HTTPException) as error:  # refused, timed out, cut off half-way
                failure = error
            if attempt < self._retries:
                time.sleep(0.5 * 2**attempt)
        raise ConnectionError(
            f"the reward server {self._url} gave no answer to {self._retries + 1} requests of {self._timeout} s each, "
            f"at last {failure!r}. Is it running (python -m rewards.serve), and is the time-out long enough?"
        ) from failure

    def _scores(self, answer: bytes, count: int) -> list[float]:
        try:
            scores = json.loads(answer)["scores"]
            tensor = torch.tensor(scores, dtype=torch.float64)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the reward server {self._url} answered {answer[:200]!r}, no list of scores.") from error
        if tensor.shape != (count,) or not tensor.isfinite().all():
            raise ValueError(
                f"the reward server {self._url} answered {str(scores)[:200]}, expected {count} finite numbers, one an "
                "image."
            )
        return tensor.tolist()


def encode_png(images: Tensor) -> dict[str, Any]:
    """Images in [0, 1], [B, 3, H, W], as PNG files in base64."""
    files = []
    for picture in to_pil(images):
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=1)  # the network is faster than a better compression
        files.append(base64.b64encode(file.getvalue()).decode())
    return {"images": files}


def encode_raw(images: Tensor) -> dict[str, Any]:
    """Images as little-endian float32 in base64, with their shape."""
    values = images.float().cpu().contiguous().numpy().astype("<f4")
    return {"images": base64.b64encode(values.tobytes()).decode(), "shape": list(images.shape)}


def decode_images(images: Any, shape: Any) -> Tensor:
    """Float32 images [B, 3, H, W] of what `encode_png` (no shape) or `encode_raw` made.

    Raises:
        ValueError: it is neither.
    """
    if shape is None and isinstance(images, list):
        pictures = [_decode_png(image) for image in images]
        if not pictures or len({picture.shape for picture in pictures}) > 1:
            raise ValueError(f"{len(pictures)} images came, expected at least one and all of one size.")
        return torch.stack(pictures)
    if not isinstance(images, str) or not _is_shape(shape):
        raise ValueError(
            "expected images as a list of PNG files in base64, or as one string with a shape [B, 3, H, W]."
        )
    values = bytearray(base64.b64decode(images, validate=True))
    batch, channels, height, width = shape
    if len(values) != 4 * batch * channels * height * width:
        raise ValueError(f"{len(values)} bytes of images came, expected 4 a value of the shape {shape}.")
    import numpy as np

    return torch.from_numpy(np.frombuffer(values, dtype="<f4").astype("float32")).view(shape)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) == 4 and all(type(size) is int and size > 0 for size in shape)


def _decode_png(image: Any) -> Tensor:
    import numpy as np
    from PIL import Image

    if not isinstance(image, str):
        raise ValueError("an image is no string; expected PNG files in base64.")
    try:
        # Only PNG is read, and PIL refuses a picture of more pixels than it calls a decompression bomb.
        with Image.open(io.BytesIO(base64.b64decode(image, validate=True)), formats=["PNG"]) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"an image is no readable PNG file: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _error_text(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return repr(answer[:200])
