"""What does an iteration of each method cost, and where does its time go?

    python -m benchmarks.method_costs
    python -m benchmarks.method_costs --methods ddpo-is draft-1 --rounds 1

The methods of `benchmarks.study` on the embedded preset, the same reward for all. After iterations that warm up, an
iteration of the method and one of DDPO-IS take turns; `times_ddpo_is` is the median of their ratios. Network
evaluations are latents that go forward through the denoising network, as a hook counts them (a guided output is two);
`expected` is what `benchmarks.study_methods` says. One more iteration runs under torch.profiler for the shares of the
sections of `agents/profiling.py`: `reward` decodes and scores the sampled images, while the gradient of a reward, and
images that are decoded for it, are part of `training`.

A row a method in `benchmarks/results/method_costs.csv`, and a Markdown table.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from agents.policy import denoising_mean
from agents.profiling import ITERATION, SECTIONS, section_seconds
from benchmarks.collector_overhead import Clock, timed
from benchmarks.main_job import append, markdown, provenance
from benchmarks.study_methods import METHODS, MethodName
from benchmarks.study_runs import method_settings
from configs import ModelSettings, RunSettings, SamplingSettings, build_experiment

RESULTS = Path(__file__).parent / "results" / "method_costs.csv"
YARDSTICK = "ddpo-is"


@dataclass(frozen=True)
class Settings:
    """Which methods, and the size of an iteration."""

    methods: tuple[MethodName, ...] = tuple(METHODS)
    """Lines of the table."""
    images: int = SamplingSettings.images_per_iteration
    """Images an iteration."""
    num_steps: int = SamplingSettings.num_steps
    """Denoising steps T."""
    rounds: int = 3
    """Iterations of each that are timed."""
    clock: Clock = "wall"
    """As of benchmarks.collector_overhead."""
    model: str = "embedded"
    """As --model.name of the examples."""
    prompts: str = SamplingSettings.prompts
    """A prompt set by name, or a file."""
    results: Path = RESULTS
    """Where rows go."""

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        if not self.methods or self.rounds < 1:
            raise ValueError(f"methods={self.methods} and rounds={self.rounds}: there must be at least one of each")


class Running:
    """A method's loop, an iteration at a time."""

    def __init__(self, name: str, settings: Settings, *, iterations: int) -> None:
        """Build it for so many iterations and one more, which warms up."""
        method = METHODS[name]
        base = RunSettings(
            held_out=(),  # evaluations alone need one, and to draw its images takes time
            model=ModelSettings(name=settings.model),
            sampling=SamplingSettings(
                prompts=settings.prompts, num_steps=settings.num_steps, images_per_iteration=settings.images
            ),
        )
        run = method_settings(method, base, learning_rate=None, output=base.output)
        run = replace(run, training=replace(run.training, iterations=iterations + 1))
        experiment, loss = method.job(build_experiment(run), run)
        policy = denoising_mean(experiment.policy)
        self.network = policy.backbone.unet
        self.expected = method.cost(run, policy.sampler).network_evaluations
        self._loop = experiment.loop(loss, experiment.optimizer(loss))
        self.iterate()

    def iterate(self) -> None:
        """One iteration."""
        next(self._loop)

    def shares(self) -> dict[str, float]:
        """Share of each section in the time of one more iteration."""
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler, record_function(ITERATION):
            self.iterate()
        seconds = section_seconds(profiler.events())
        total = sum(seconds.values())
        names = {**SECTIONS, "else": "everything else"}
        return {f"share_{key}": seconds[name] / total for key, name in names.items() if key != "evaluation"}


@contextmanager
def counted(network: nn.Module) -> Iterator[Callable[[], int]]:
    """Within this context counts the latents that go forward through `network`; call what it gives for their number."""
    passes: list[int] = []
    hook = network.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    try:
        yield lambda: sum(passes)
    finally:
        hook.remove()


def measure(name: str, yardstick: Running, settings: Settings) -> dict[str, object]:
    """A line of the table."""
    running = Running(name, settings, iterations=settings.rounds + 1)
    with counted(running.network) as evaluations:
        pairs = [
            (timed(running.iterate, settings.clock), timed(yardstick.iterate, settings.clock))
            for _ in range(settings.rounds)
        ]
    each = settings.images * settings.rounds
    return {
        "method": name,
        "seconds_per_image": round(statistics.median(own for own, _ in pairs) / settings.images, 4),
        "times_ddpo_is": round(statistics.median(own / other for own, other in pairs), 3),
        "evaluations_per_image": round(evaluations() / each, 3),
        "expected": round(running.expected / settings.images, 3),
        **{key: round(share, 3) for key, share in running.shares().items()},
        "images": settings.images,
        "num_steps": settings.num_steps,
        "rounds": settings.rounds,
        "clock": settings.clock,
    }


def main(settings: Settings) -> None:
    """Measure each method and write its row."""
    commit, rows = provenance(), []
    yardstick = Running(YARDSTICK, settings, iterations=settings.rounds * len(settings.methods))
    for name in settings.methods:
        rows.append({**measure(name, yardstick, settings), **commit})
        append(rows[-1], settings.results)
        print(rows[-1], flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
