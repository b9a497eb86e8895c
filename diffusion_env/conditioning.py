"""What a prompt stands for, fetched by its id: the step TensorDict carries ids only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDict
from torch import Tensor


class ConditioningCache:
    """Encoded prompts, encoded on demand, within a bounded number of bytes.

    While every prompt of the set fits, each is encoded once and a look-up is one gather on the device. Otherwise the
    least recently used make room, and a look-up waits for the device to learn which prompts it needs.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], TensorDict],
        prompts: Sequence[str],
        *,
        max_bytes: int = 1 << 28,
    ) -> None:
        """Create an empty cache.

        Args:
            encode: prompts -> TensorDict of batch size [len(prompts)], the fields its backbone understands.
            prompts: the prompt set; a prompt's id is its place here.
            max_bytes: bound on the memory of the table.

        Raises:
            ValueError: the set is empty, or not even one prompt fits.
        """
        if not prompts:
            raise ValueError("the prompt set is empty; give at least one prompt")
        self.prompts = tuple(prompts)
        self._encode = encode
        first = encode([self.prompts[0]])
        each = sum(leaf.numel() * leaf.element_size() for leaf in first.values(True, True))
        capacity = min(len(self.prompts), max_bytes // each)
        if capacity == 0:
            raise ValueError(f"one encoded prompt takes {each} bytes, more than max_bytes={max_bytes}; raise max_bytes")
        self._table = first.expand(capacity).clone()
        self._slot_of_id = torch.full((len(self.prompts),), -1, device=first.device)
        self._slot_of_id[0] = 0
        self._slots: OrderedDict[int, int] = OrderedDict({0: 0})  # id -> slot, least recently used first

    @property
    def num_bytes(self) -> int:
        """Bytes held by the table."""
        return sum(leaf.numel() * leaf.element_size() for leaf in self._table.values(True, True))

    def __call__(self, prompt_id: Tensor) -> TensorDict:
        """The encoded prompts of int64 ids [B], a TensorDict of batch size [B].

        Raises:
            ValueError: one call asks for more distinct prompts than fit.
        """
        if len(self._slots) < len(self.prompts):
            self._make_resident(prompt_id.unique().tolist())
        return self._table[self._slot_of_id[prompt_id]]

    def _make_resident(self, ids: list[int]) -> None:
        capacity = self._table.batch_size[0]
        if len(ids) > capacity:
            raise ValueError(
                f"{len(ids)} distinct prompts are needed at once but {capacity} fit; raise max_bytes or use fewer "
                "prompts a batch"
            )
        missing = [i for i in ids if i not in self._slots]
        for i in ids:
            if i in self._slots:
                self._slots.move_to_end(i)
        for start in range(0, len(missing), 64):  # bounds the text encoder's activations
            chunk = missing[start : start + 64]
            encoded = self._encode([self.prompts[i] for i in chunk])  # first: if it fails, nothing has changed
            slots = torch.tensor([self._free_slot(i) for i in chunk], device=self._slot_of_id.device)
            self._table[slots] = encoded
            self._slot_of_id[torch.tensor(chunk, device=slots.device)] = slots

    def _free_slot(self, i: int) -> int:
        slot = len(self._slots)
        if slot == self._table.batch_size[0]:
            evicted, slot = self._slots.popitem(last=False)
            self._slot_of_id[evicted] = -1
        self._slots[i] = slot
        return slot
