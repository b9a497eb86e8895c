"""Low-rank adapters: their settings, how they are put on a network, what is read back from a saved one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open
from torch import nn

from .folded_lora import FOLDED

ADAPTER = "policy"
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the network's layers whose names end in `targets`."""

    rank: int = 4
    alpha: float = 4.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def __post_init__(self) -> None:
        """Refuse what trains nothing."""
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise ValueError(f"LoRA needs rank >= 1, alpha > 0 and at least one target module, got {self}")

    @classmethod
    def saved_in(cls, folder: str | Path) -> LoRA:
        """The settings of the adapter that `StableDiffusionBackbone.save` wrote to `folder`.

        Raises:
            FileNotFoundError: there is none.
        """
        path = Path(folder) / LORA_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {LORA_FILE}; give the folder that a LoRA was saved to")
        with safe_open(path, "pt") as file:
            saved = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        if "unet.r" not in saved:
            raise ValueError(f"{path} does not say its rank and alpha; load it in diffusers and save it from there")
        # A set when it was made, so its order in the file means nothing.
        targets = tuple(sorted(saved["unet.target_modules"]))
        return cls(rank=saved["unet.r"], alpha=saved["unet.lora_alpha"], targets=targets)


def add_lora(unet: UNet2DConditionModel, lora: LoRA, *, folded: bool) -> None:
    """Put an adapter of that kind, called `ADAPTER`, on `unet`; it adds nothing yet.

    Args:
        unet: the network, changed in place.
        lora: which adapter.
        folded: with the layers of `folded_lora` in the place of PEFT's.

    Raises:
        ValueError: a target is the name of no layer.
    """
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(f"no linear or convolution layer of the UNet is called {target!r}; see LoRA.targets")
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), init_lora_weights="gaussian"
    )
    if folded:
        config._register_custom_module(FOLDED)
    unet.add_adapter(config, adapter_name=ADAPTER)
