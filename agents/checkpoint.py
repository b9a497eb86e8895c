"""Checkpoints: everything it takes to go on as if the run had never stopped, in TorchRL's archive format.

Each is one ZIP file, whose CRC-32 sums tell whether it is whole. TorchRL writes it beside its place and renames it; it
is flushed to the disk before the one before it can be dropped, so that at least one good checkpoint is there whenever
the process or the machine stops. Nothing in it is executed: tensors are read with `weights_only`.

With several processes the first one writes; in its file are the random states and whatever else each has of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.checkpoint import Checkpoint, CheckpointRotation, GlobalRNGState, StateDictCheckpointAdapter
from torchrl.objectives import LossModule

from .distributed import collected, on_first, rank, size
from .sharding import is_sharded, local

KEPT = 2
RANDOM = "random_states"
PROCESSES = "processes"


class Stateful(Protocol):
    """What can be part of a checkpoint: modules, optimisers, samplers, replay buffers."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Restore it in place."""
        ...


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint could not be read and the one before it is used."""


class TrainedState:
    """A loss's tensors without the pretrained weights, which a run loads from the pipeline in any case.

    What trains, buffers, critics and target networks remain: only what the policy itself holds frozen is left out.
    """

    def __init__(self, loss: LossModule, policy: TensorDictModuleBase) -> None:
        """Refer to the tensors of `loss`, which trains `policy`."""
        self._loss = loss
        self._pretrained = {id(parameter) for parameter in policy.parameters() if not parameter.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name, sharing memory with the loss; of those that are sharded this process's share."""
        return local(self._tensors())

    def replicated(self) -> dict[str, Tensor]:
        """Those of them that are not sharded over processes: each process has them, and they must be equal."""
        return {key: value for key, value in self._tensors().items() if not is_sharded([value])}

    def _tensors(self) -> dict[str, Tensor]:
        state = self._loss.state_dict(keep_vars=True)
        return {key: value.detach() for key, value in state.items() if id(value) not in self._pretrained}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy into the loss's tensors.

        Raises:
            ValueError: names or shapes differ; nothing was changed.
        """
        own = self.state_dict()
        if differing := sorted(own.keys() ^ state_dict.keys()):
            raise ValueError(
                f"{len(differing)} tensors are only here or only in the checkpoint, {differing[0]} for one: it belongs "
                "to another model, adapter or method"
            )
        for key, value in own.items():
            if value.shape != state_dict[key].shape:
                raise ValueError(
                    f"{key} has shape {tuple(state_dict[key].shape)} in the checkpoint and {tuple(value.shape)} here: "
                    "it belongs to another model or to an adapter of another rank"
                )
        for key, value in own.items():
            value.copy_(state_dict[key])


class OfEachProcess:
    """A part that each process has of its own: a checkpoint holds all of them, by rank."""

    def __init__(self, part: Stateful) -> None:
        """Of this process it is `part`."""
        self._part = part
        self._states: list[Any] = []

    def collect(self) -> None:
        """Bring the states of all processes to the first one, which can then give its `state_dict`."""
        self._states = collected(self._part.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """What `collect` brought."""
        return {"by_rank": self._states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore this process's part."""
        self._part.load_state_dict(state_dict["by_rank"][rank()])


class Checkpoints:
    """The checkpoints of one run, the newest `KEPT` of them."""

    def __init__(
        self,
        directory: Path,
        parts: Mapping[str, Stateful],
        identity: Mapping[str, Any],
        *,
        of_each_process: Collection[str] = (),
    ) -> None:
        """Save `parts` to `directory` and load them from there.

        Args:
            directory: made when the first one is written.
            parts: by name; the process's random states (Python, NumPy, PyTorch) are added.
            identity: what the run is, as JSON; a checkpoint of another one is refused.
            of_each_process: names of parts that differ between processes; the random states do in any case.
        """
        self._directory, self._identity = directory, json.loads(json.dumps(identity))
        self._rotation = CheckpointRotation(directory, keep_last=KEPT)
        self._checkpoint = Checkpoint(format="archive")
        # One file a part; unlike memory-mapped files, a full disk is an error here and not a crash.
        adapter = StateDictCheckpointAdapter(payload_format="torch")
        self._of_each: list[OfEachProcess] = []
        for name, part in {**parts, RANDOM: GlobalRNGState()}.items():
            if size() > 1 and name in {*of_each_process, RANDOM}:
                part = OfEachProcess(part)
                self._of_each.append(part)
            self._checkpoint.register(name, part, adapter=adapter)

    def save(self, iteration: int) -> None:
        """Write the state after `iteration` iterations.

        Raises:
            OSError: it cannot be written, RuntimeError where PyTorch says so; earlier checkpoints are whole.
        """
        for part in self._of_each:
            part.collect()
        self._write(iteration)

    @on_first
    def _write(self, iteration: int) -> None:
        try:
            metadata = {**self._identity, PROCESSES: size()}
            path = self._rotation.save(self._checkpoint, step=iteration, metadata=metadata)
            _flush(path)
            _flush(self._directory)
        except (OSError, RuntimeError) as error:
            error.add_note(
                f"The checkpoint after {iteration} iterations could not be written to {self._directory}; earlier ones "
                "are whole. Make room or make the folder writable, then resume"
            )
            raise

    def newest(self) -> Path | None:
        """The newest good checkpoint, None if the run stopped before it had written one.

        Damaged ones are renamed, with a `DamagedCheckpointWarning`, and what was left unfinished is removed.

        Raises:
            FileNotFoundError: there are damaged ones only.
        """
        for unfinished in self._directory.glob(".checkpoint-*"):
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        for path in sorted(self._directory.glob("checkpoint-*.torchrl"), reverse=True):
            problem = damage(path)
            if problem is None:
                return path
            path.rename(path.with_suffix(".damaged"))
            warnings.warn(
                f"{path} is damaged ({problem}) and was renamed; the one before it is used",
                DamagedCheckpointWarning,
                stacklevel=2,
            )
        if any(self._directory.glob("checkpoint-*.damaged")):
            raise FileNotFoundError(
                f"every checkpoint in {self._directory} is damaged; a new run with the same settings: --config "
                f"{self._directory.parent / 'config.json'}"
            )
        return None

    def load(self, path: Path) -> None:
        """Restore every part but the random states.

        Raises:
            ValueError: the checkpoint is another run's, or of another number of processes; the message says which.
            CheckpointError: a part does not fit.
        """
        saved = dict(Checkpoint.manifest(path)["metadata"])
        processes = saved.pop(PROCESSES, 1)
        if processes != size():
            raise ValueError(
                f"{path} was written by {processes} process(es), here are {size()}: each continues with its own images "
                f"and random numbers. Resume with torchrun --nproc-per-node {processes}, or plain python for 1"
            )
        if differing := differences(saved, self._identity):
            raise ValueError(
                f"{path} belongs to another run (there, here): {'; '.join(differing)}. Resume with the program and the "
                "settings that wrote it"
            )
        self._checkpoint.load(path, components=set(self._checkpoint.components) - {RANDOM})

    def load_random_states(self, path: Path) -> None:
        """Restore the process's random states; last, as anything else may draw numbers."""
        self._checkpoint.load(path, components={RANDOM})


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's file, or None: its table of contents and each part's CRC-32 are checked."""
    try:
        components = Checkpoint.manifest(path)["components"]
        with zipfile.ZipFile(path) as archive:
            broken, present = archive.testzip(), set(archive.namelist())
    except Exception as error:  # whatever a reader of ZIP or JSON makes of arbitrary bytes
        return f"{type(error).__name__}: {error}"
    expected = {f"{part['path']}/{file}" for part in components.values() for file in part["files"]}
    if broken or expected - present:
        return f"{broken or min(expected - present)} is broken"
    return None


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Where two JSON values differ: "model.lora_rank is 4, 16" for each leaf."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        return [line for key in keys for line in differences(there.get(key), here.get(key), f"{name}.{key}".strip("."))]
    return [] if there == here else [f"{name} is {there!r}, {here!r}"]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
