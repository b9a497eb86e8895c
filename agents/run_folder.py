"""What a run leaves behind: configuration, metrics, evaluations, curve, pictures, weights, checkpoint."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torchrl.record.loggers import Logger, get_logger

from .evaluation import Evaluation
from .watch import Verdict

LoggerName = Literal["csv", "tensorboard", "wandb"]
SAMPLES = 12
TILE = 96  # pixels


class RunFolder:
    """One folder a run; `metrics.csv` has one row an iteration, whatever the logger."""

    def __init__(self, path: Path, config: Mapping[str, Any], *, logger: LoggerName = "csv") -> None:
        """Create the folder and write the resolved configuration.

        Args:
            path: the folder, which must not hold another run.
            config: the run's settings, written to `config.json`.
            logger: TorchRL's logger that gets every metric too; Weights & Biases is offline when not logged in.

        Raises:
            FileExistsError: the folder holds a run already.
        """
        self.path = path
        if (path / "config.json").exists():
            raise FileExistsError(f"{path} holds a run already; choose another --output or remove it")
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
        self._logger = _make_logger(path, logger, config)
        self._rows: list[dict[str, float]] = []
        self._evaluations: list[dict[str, float]] = []

    @property
    def rows(self) -> list[dict[str, float]]:
        """The metrics so far, one dict an iteration."""
        return self._rows

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append a row to `metrics.csv`; columns that come later leave earlier cells empty."""
        step = len(self._rows)
        self._rows.append({"iteration": step, **metrics})
        _write_rows(self.path / "metrics.csv", self._rows)
        for key, value in metrics.items():
            self._logger.log_scalar(key, value, step=step)

    def log_evaluation(
        self, iteration: int, evaluation: Evaluation, pretrained: Evaluation, verdict: Verdict
    ) -> dict[str, float]:
        """Append a row to `evaluations.csv`, 0 being before training, and draw the images of some prompts.

        The pictures, `samples/ITERATION.png`, are strips of the first image of each prompt in `samples/prompts.json`,
        from the same noise every time, at most `TILE` pixels a side.

        Returns:
            The row without `iteration`: `Evaluation.row`, `alarms` (how many), `kept` (0 or 1).
        """
        row = evaluation.row(pretrained) | {"alarms": float(len(verdict.alarms)), "kept": float(verdict.keep)}
        self._evaluations.append({"iteration": iteration, **row})
        _write_rows(self.path / "evaluations.csv", self._evaluations)
        _save_samples(self.path / "samples", iteration, evaluation)
        return row

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

    def save_before_after(self, before: Evaluation, after: Evaluation) -> None:
        """`before_after.png`: see `draw_before_after`."""
        draw_before_after(before, after, self.path / "before_after.png")

    def save_checkpoint(self, **parts: Any) -> None:
        """`checkpoint.pt`: the state dict of every part, written whole or not at all."""
        partial = self.path / "checkpoint.pt.partial"
        torch.save({name: part.state_dict() for name, part in parts.items()}, partial)
        os.replace(partial, self.path / "checkpoint.pt")


def draw_before_after(before: Evaluation, after: Evaluation, path: Path, *, columns: int = 9) -> None:
    """Draw the first image of each of 2 x `columns` prompts, above it the same before training."""
    plt = pyplot()
    shown = _shown(before, 2 * columns)
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
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _shown(evaluation: Evaluation, count: int) -> list[int]:
    """Up to `count` prompts' first images, spread over the prompt set."""
    prompts = len(set(evaluation.prompts))
    return list(range(0, prompts, max(1, prompts // count)))[:count]


def _save_samples(folder: Path, iteration: int, evaluation: Evaluation) -> None:
    """Write one strip of images side by side, and which prompts they are of."""
    folder.mkdir(exist_ok=True)
    shown = _shown(evaluation, SAMPLES)
    (folder / "prompts.json").write_text(json.dumps([evaluation.prompts[n] for n in shown]))
    images = evaluation.images[shown]
    scale = min(1.0, TILE / max(images.shape[-2:]))
    size = [max(1, round(side * scale)) for side in images.shape[-2:]]
    tiles = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
    pixels = torch.cat(list((tiles * 255).round().byte()), 2).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(folder / f"{iteration:06d}.png")


def _write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """Write a CSV whole or not at all; columns that come later leave earlier cells empty."""
    partial = path.with_suffix(".csv.partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def _make_logger(path: Path, name: LoggerName, config: Mapping[str, Any]) -> Logger:
    if name == "wandb":
        online = bool(os.environ.get("WANDB_API_KEY")) or "WANDB_MODE" in os.environ
        settings = {"config": dict(config), "mode": None if online else "offline", "project": "diffusion-env"}
        return get_logger("wandb", str(path), path.name, wandb_kwargs=settings)
    return get_logger(name, str(path / "logs"), name)


def pyplot() -> Any:
    """Matplotlib's pyplot, for files only: no window, no display."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
