"""What a run leaves behind: configuration, metrics, evaluations, curve, pictures, weights.

Of several processes the first one alone writes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torchrl.record.loggers import Logger, get_logger

from .checkpoint import differences
from .distributed import from_first, on_first
from .evaluation import Evaluation
from .files import locked, write_rows, write_whole
from .metrics import standard_error
from .watch import Verdict

LoggerName = Literal["csv", "tensorboard", "wandb"]
LOGS = "logs"
SAMPLES = 12
TILE = 96  # pixels


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
        self._rows: list[dict[str, float]] = []
        self._evaluations: list[dict[str, float]] = []
        self._open()
        self.path = from_first(lambda: path)  # it may have tried several, the others come here with their first

    @on_first
    def _open(self) -> None:
        if self.resumed and not (self.path / "config.json").is_file():
            raise FileNotFoundError(f"{self.path} holds no run to resume: it has no config.json")
        self._lock = locked(self.path)
        try:
            self._claim(self.path / "config.json")
        except BaseException:
            self._lock.release()
            raise
        self._logger = _make_logger(self.path, self._logger_name, self.config)

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
        on_first(write_rows)(self.path / "metrics.csv", self._rows)
        self._send(self._rows[-1])

    def state_dict(self) -> dict[str, Any]:
        """The rows of `metrics.csv` and `evaluations.csv`."""
        return {"rows": self._rows, "evaluations": self._evaluations}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go back to these rows: later ones leave the files, and the logger starts anew with them."""
        self._rows, self._evaluations = ([dict(row) for row in state_dict[key]] for key in ("rows", "evaluations"))
        self._write_again()

    @on_first
    def _write_again(self) -> None:
        write_rows(self.path / "metrics.csv", self._rows)
        write_rows(self.path / "evaluations.csv", self._evaluations)
        shutil.rmtree(self.path / LOGS, ignore_errors=True)
        self._logger = _make_logger(self.path, self._logger_name, self.config)
        for row in self._rows:
            self._send(row)

    @on_first
    def _send(self, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            if key != "iteration":
                self._logger.log_scalar(key, value, step=int(row["iteration"]))

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
        on_first(write_rows)(self.path / "evaluations.csv", self._evaluations)
        on_first(_save_samples)(self.path / "samples", iteration, evaluation)
        return row

    @on_first
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

    @on_first
    def save_before_after(self, before: Evaluation, after: Evaluation) -> None:
        """`before_after.png`: see `draw_before_after`."""
        draw_before_after(before, after, self.path / "before_after.png")


def summary(before: Evaluation, after: Evaluation, folder: RunFolder) -> str:
    """The closing lines of a run: what was reached and where everything is."""
    gain = "no spread"  # a reward that is 0 or 1 may not tell the pretrained model's images apart
    if before.std:
        gain = f"{(after.mean - before.mean) / before.std:+.2f} standard deviations"
    error = standard_error(after.rewards)
    best = folder.path / "lora_best"
    return (
        f"reward on fixed prompts and noise: {before.mean:.4f} before, {after.mean:.4f} +- {error:.4f} after, "
        f"{gain} of the pretrained model's images ({len(after.rewards)} images)\n"
        f"curve         {folder.path / 'reward_curve.png'}\n"
        f"before/after  {folder.path / 'before_after.png'}\n"
        f"metrics       {folder.path / 'metrics.csv'}\n"
        f"evaluations   {folder.path / 'evaluations.csv'}\n"
        f"settings      {folder.path / 'config.json'}\n"
        f"checkpoints   {folder.path / 'checkpoints'}\n"
        f"weights       {folder.path / 'lora'}   (diffusers: pipe.load_lora_weights(folder))\n"
        f"best held-out {best if best.exists() else 'none without alarm'}"
    )


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
