"""One run of the study: started or continued in its folder, then read into rows."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from types import FrameType

from agents.files import write_rows
from agents.policy import denoising_mean
from benchmarks.main_job import Row, read_rows
from benchmarks.study_methods import Cost, Method
from configs import RunSettings, build_experiment, build_folder
from configs.schema import RewardName, SamplingSettings


@dataclass(frozen=True)
class Task:
    """What is trained on what, how long, and how it is evaluated; what is not said here is the embedded preset's."""

    reward: RewardName = "style-preference"
    """What is maximised."""
    prompts: str = "animals"
    """What is trained on: a prompt set by name, or a text or JSONL file, one prompt a line."""
    model: str = "embedded"
    """As --model.name of the examples."""
    num_steps: int = SamplingSettings().num_steps
    """Denoising steps T."""
    iterations: int = 20
    """Rounds of sampling and updating."""
    images_per_iteration: int = 32
    """Images sampled before each round of updates."""
    evaluate_every: int = 5
    """Iterations between evaluations."""
    evaluation_samples: int = 2
    """Images a prompt in an evaluation; diversity and FID need two."""

    def base(self, seed: int) -> RunSettings:
        """The settings of a run but for what its method changes, see `method_settings`."""
        default = RunSettings()
        return replace(
            default,
            reward=self.reward,
            seed=seed,
            evaluate_every=self.evaluate_every,
            evaluation_samples=self.evaluation_samples,
            checkpoint_every=4,  # one with Nabla-DB's correction network is large
            model=replace(default.model, name=self.model),
            sampling=replace(
                default.sampling,
                prompts=self.prompts,
                num_steps=self.num_steps,
                images_per_iteration=self.images_per_iteration,
            ),
            training=replace(default.training, iterations=self.iterations),
        )


def method_settings(method: Method, base: RunSettings, *, learning_rate: float | None, output: Path) -> RunSettings:
    """The method's own settings, with what all methods of the study share; none ends before the others.

    Args:
        method: its example's settings are taken.
        base: of the task.
        learning_rate: None is the method's own.
        output: the run folder.
    """
    own = method.adapt(base)
    rate = own.training.learning_rate if learning_rate is None else learning_rate
    training = replace(own.training, learning_rate=rate)
    return replace(own, reward=base.reward, output=output, watch=base.watch, training=training)


def run(method: Method, settings: RunSettings, again: str) -> Cost:
    """Train in the folder `settings.output`, where a run that was stopped continues after its newest checkpoint.

    A run whose gradients are not finite again and again ends early, with the evaluations it has.

    Args:
        method: what trains.
        settings: from `method_settings`.
        again: the command that continues, shown when the run is stopped.

    Returns:
        What an iteration costs.

    Raises:
        ValueError: the folder holds a run with other settings.
        SystemExit: the run was stopped by a signal.
    """
    if (settings.output / "config.json").is_file():
        settings = replace(settings, resume=settings.output)
    experiment, loss = method.job(build_experiment(settings), settings)
    folder = build_folder(settings)
    try:
        experiment.run(loss, folder, resume_command=again)
    except FloatingPointError as error:
        print(f"{settings.output}: {error}")
    return method.cost(settings, denoising_mean(experiment.policy).sampler)


def rows_of(folder: Path, cost: Cost, measured_by: Mapping[str, str]) -> list[Row]:
    """A row an evaluation: `iteration`, the three axes (training alone, so far), what was measured, `measured_by`."""
    seconds = [
        float(row["seconds_sampling"]) + float(row["seconds_training"]) for row in read_rows(folder / "metrics.csv")
    ]
    until = [0.0, *accumulate(seconds)]
    rows = []
    for row in read_rows(folder / "evaluations.csv"):
        n = int(row["iteration"])
        axes = {"reward_calls": f"{n * cost.reward_calls:.0f}"}
        axes |= {"network_evaluations": f"{n * cost.network_evaluations:.0f}", "seconds": f"{until[n]:.1f}"}
        measured = {key: f"{float(value):.6g}" for key, value in row.items() if key != "iteration" and value}
        rows.append({"iteration": str(n)} | axes | measured | dict(measured_by))
    return rows


def add_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append to a CSV file all of `rows` or, when the machine stops, none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, [*read_rows(path), *rows])


class TimeLimit:
    """A context that after some minutes does to a run what SIGTERM does: it writes a checkpoint and leaves.

    Between runs nothing happens but that `over` is true.
    """

    def __init__(self, minutes: float | None) -> None:
        """None is no limit."""
        self.over = False
        self._seconds = None if minutes is None else 60 * minutes

    def __enter__(self) -> TimeLimit:
        """Set the alarm."""
        if self._seconds is not None:
            signal.signal(signal.SIGALRM, self._ring)
            # It rings every second from then on: a run that is being built cannot be told to stop yet.
            signal.setitimer(signal.ITIMER_REAL, self._seconds, 1.0)
        return self

    def __exit__(self, *_: object) -> None:
        """Turn the alarm off."""
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _ring(self, number: int, _: FrameType | None) -> None:
        self.over = True
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.raise_signal(signal.SIGTERM)
