"""Published weights: found locally or fetched from the hub, read without executing anything, loaded once and shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

SUFFIXES = (".pt", ".pth", ".safetensors")

Module = TypeVar("Module", bound=nn.Module)

_SHARED: WeakValueDictionary[tuple[str, ...], nn.Module] = WeakValueDictionary()


def shared(key: tuple[str, ...], make: Callable[[], Module]) -> Module:
    """What `make` made for this key before, as long as anyone still holds it: rewards share their large models.

    Moving one of these rewards to a device therefore moves the shared model of the others too.
    """
    module = _SHARED.get(key)
    if module is None:
        module = _SHARED[key] = make()
    return cast(Module, module)


def load_model(kind: Any, source: str | Path, *, what: str, published: str, dtype: torch.dtype = torch.float32) -> Any:
    """`kind.from_pretrained(source)`, frozen, in evaluation mode.

    Args:
        kind: a model class of transformers.
        source: a local folder or a name on the hub.
        what: the model in words, for errors.
        published: its name on the hub, for errors.
        dtype: of the weights.

    Raises:
        FileNotFoundError: it is not there; says what to fetch.
        ValueError: the files lack some of the weights, which would otherwise be random numbers.
    """
    with explained(what, source, published):
        model, report = kind.from_pretrained(source, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        keys = sorted(report["missing_keys"])
        raise ValueError(
            f"{what} at {str(source)!r} lacks {len(keys)} of its weights ({', '.join(keys[:3])}, ...): this is another "
            "model, or a broken copy. Fetch it again."
        )
    return model.requires_grad_(False).eval()


def fill(model: Module, weights: dict[str, Tensor], *, what: str) -> Module:
    """`model` with these weights, each of them there and none left over, frozen, in evaluation mode.

    Raises:
        ValueError: the weights are those of another model.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{what} is of another kind of model than the published one: {error}") from error
    return model.requires_grad_(False).eval()


def load_tokenizer(source: str | Path, *, published: str) -> Any:
    """The tokenizer of a local folder or a name on the hub."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:  # ValueError: a folder without a tokenizer
        raise FileNotFoundError(_missing("the tokenizer", source, published)) from error


def find_weights(what: str, source: str | Path, names: Sequence[str], *, published: str) -> Path:
    """The file of published weights.

    Args:
        what: the weights in words, for errors.
        source: a file; a folder that holds one of `names`; or a name on the hub, whose first of `names` is fetched.
        names: file names that are looked for.
        published: the name on the hub that an error advises to fetch.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = Path(source)
    for candidate in (path, *(path / name for name in names)):
        if candidate.is_file():
            return candidate
    if isinstance(source, Path) or source.count("/") != 1 or path.suffix in SUFFIXES or path.exists():
        raise FileNotFoundError(_missing(what, source, published))
    from huggingface_hub import hf_hub_download

    with explained(what, source, f"{source} {names[0]}"):
        return Path(hf_hub_download(source, names[0]))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a PyTorch file that holds nothing but tensors; code in it never runs."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def explained(what: str, source: str | Path, published: str) -> Iterator[None]:
    """Say what to fetch where a file is missing: transformers' and the hub's own errors derive from OSError."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(_missing(what, source, published)) from error


def _missing(what: str, source: str | Path, published: str) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return (
        f"{what} was looked for at {str(source)!r} (a local path, else a name on the hub, offline in {HF_HUB_CACHE}) "
        f"and not found there: fetch it with `hf download {published}`, or pass the path of a local copy."
    )
