"""What a run leaves behind: configuration, metrics, curve, before/after picture, weights."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import BaseFileLock, FileLock, Timeout
from torchrl.record.loggers import Logger, get_logger

from .checkpoint import differences
from .evaluation import Evaluation

LoggerName = Literal["csv", "tensorboard", "wandb"]
LOGS = "logs"


class RunFolder:
    """One folder a run; `metrics.csv` has one row an iteration, whatever the logger.

    While this object lives no other process can open the folder. Its state, for checkpoints, is the rows.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], *, logger: LoggerName = "csv", resume: bool = False
    ) -> None:
        """Create the folder and write the resolved configuration.

        Args:
            path: the folder, which must not hold another run.
            config: the run's settings, written to `config.json`.
            logger: TorchRL's logger that gets every metric too; Weights & Biases is offline when not logged in.
            resume: continue the run that the folder holds, whose `config.json` must say what `config` does.

        Raises:
            FileExistsError: the folder holds a run already, or another process has it open.
            FileNotFoundError: there is no run to resume.
            ValueError: the run to resume has other settings.
        """
        self.path, self.resumed = path, resume
        self.config: dict[str, Any] = json.loads(json.dumps(config, default=str))
        self._logger_name = logger
        if resume and not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no run to resume: it has no config.json")
        self._lock = _locked(path)
        try:
            self._claim(path / "config.json")
        except BaseException:
            self._lock.release()
            raise
        self._logger = _make_logger(path, logger, self.config)
        self._rows: list[dict[str, float]] = []

    def _claim(self, file: Path) -> None:
        if self.resumed:
            if differing := differences(json.loads(file.read_text()), self.config):
                raise ValueError(f"{file} holds other settings (there, here): {'; '.join(differing)}")
        elif file.exists():
            raise FileExistsError(f"{self.path} holds a run already; choose another --output, or --resume it")
        else:
            write_whole(file, json.dumps(self.config, indent=2) + "\n")

    @property
    def rows(self) -> list[dict[str, float]]:
        """The metrics so far, one dict an iteration."""
        return self._rows

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append a row to `metrics.csv`; columns that come later leave earlier cells empty."""
        self._rows.append({"iteration": len(self._rows), **metrics})
        self._write_rows()
        self._send(self._rows[-1])

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go back to these rows: later ones leave `metrics.csv`, and the logger starts anew with them."""
        self._rows = [dict(row) for row in state_dict["rows"]]
        self._write_rows()
        shutil.rmtree(self.path / LOGS, ignore_errors=True)
        self._logger = _make_logger(self.path, self._logger_name, self.config)
        for row in self._rows:
            self._send(row)

    def _write_rows(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in self._rows for key in row)))
        writer.writeheader()
        writer.writerows(self._rows)
        write_whole(self.path / "metrics.csv", text.getvalue())

    def _send(self, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            if key != "iteration":
                self._logger.log_scalar(key, value, step=int(row["iteration"]))

    def save_curve(self, baseline: Evaluation) -> None:
        """`reward_curve.png`: sampled and evaluated reward over iterations, beside the pretrained model's."""
        plt = pyplot()
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        iterations = [row["iteration"] for row in self._rows]
        reward = torch.tensor([row["reward"] for row in self._rows])
        std = torch.tensor([row["reward_std"] for row in self._rows])
        axes.fill_between(iterations, reward - std, reward + std, alpha=0.2, label="one standard deviation of images")
        axes.plot(iterations, reward, label="images sampled for training")
        evaluated = [(row["iteration"], row["eval_reward"]) for row in self._rows if "eval_reward" in row]
        axes.plot(*zip(*evaluated, strict=True), "o-", label="fixed prompts and noise")
        axes.axhline(baseline.mean, color="grey", linestyle=":", label="pretrained model, fixed prompts and noise")
        axes.set(xlabel="iteration", ylabel="reward")
        axes.legend(loc="lower right", fontsize="small")
        figure.savefig(self.path / "reward_curve.png", dpi=120)
        plt.close(figure)

    def save_before_after(self, before: Evaluation, after: Evaluation, *, columns: int = 9) -> None:
        """`before_after.png`: the first image of each of 2 x `columns` prompts, above it the same before training."""
        plt = pyplot()
        stride = max(1, len(set(before.prompts)) // (2 * columns))
        shown = list(range(0, len(set(before.prompts)), stride))[: 2 * columns]
        blocks = -(-len(shown) // columns)
        figure, axes = plt.subplots(
            2 * blocks, columns, figsize=(1.1 * columns, 2.35 * blocks), layout="constrained", squeeze=False
        )
        for axis in axes.flat:
            axis.axis("off")
        for n, image in enumerate(shown):
            row, column = 2 * (n // columns), n % columns
            for offset, (title, source) in enumerate((("before", before), ("after", after))):
                axis = axes[row + offset, column]
                axis.imshow(source.images[image].permute(1, 2, 0).numpy())
                caption = f"{title} ({source.rewards[image]:.2f})"
                axis.set_title(f"{source.prompts[image]}\n{caption}" if offset == 0 else caption, fontsize=6)
        figure.savefig(self.path / "before_after.png", dpi=150)
        plt.close(figure)


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, also when the machine stops or the disk is full.

    Raises:
        OSError: it cannot be written; what was there is there still.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        error.add_note(f"{path} could not be written; make room or make the folder writable, then resume")
        raise


def _locked(path: Path) -> BaseFileLock:
    """The folder's lock, which the system releases when this process ends, however it ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise FileExistsError(f"another process is writing to {path}; wait for it or choose another --output") from None
    except OSError as error:
        error.add_note(f"The run folder {path} cannot be written; choose another --output or make it writable")
        raise
    return lock


def _make_logger(path: Path, name: LoggerName, config: Mapping[str, Any]) -> Logger:
    if name == "wandb":
        online = bool(os.environ.get("WANDB_API_KEY")) or "WANDB_MODE" in os.environ
        settings = {"config": dict(config), "mode": None if online else "offline", "project": "diffusion-env"}
        return get_logger("wandb", str(path), path.name, wandb_kwargs=settings)
    return get_logger(name, str(path / LOGS), name)


def pyplot() -> Any:
    """Matplotlib's pyplot, for files only: no window, no display."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
