"""A whole run around the loop: evaluate, train with a progress bar, log, write checkpoints, watch, save."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import ReplayBuffer
from torchrl.envs import Transform
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import LossModule
from torchrl.objectives.utils import TargetNetUpdater
from tqdm import tqdm

from diffusion_env.scoring import Reward

from .checkpoint import Checkpoints, Stateful, TrainedState
from .distributed import draw_apart, from_first, on_first, rank, share_weights, size
from .equal_weights import EqualWeights, refuse_unshared
from .evaluation import Evaluation, Evaluator
from .memory import memory_advice
from .profiling import Profile
from .rollout import TransitionSampler
from .run_folder import RunFolder
from .sharding import OwnShares, by_sharding, is_sharded, naming_lost_processes
from .stopping import StopRequest, leave
from .training import SKIPPED, Check, Metrics, train
from .watch import NO_VERDICT, OverOptimisationWarning, OverOptimisationWatch, Verdict, WatchRule
from .worker_collector import WorkerCollector


class Saveable(Protocol):
    """What can write the trained weights to a folder."""

    def save(self, folder: str) -> None:
        """Write them; sharded ones when all processes call it, and then on the first one alone."""
        ...


@dataclass(frozen=True)
class Optimisation:
    """How the policy is improved from a batch of trajectories."""

    iterations: int = 80
    """Rounds of sampling and updating."""
    learning_rate: float = 5e-4
    """AdamW's, constant."""
    weight_decay: float = 1e-4
    """AdamW's."""
    updates_per_epoch: int = 1
    """Optimiser steps in one pass over the chosen transitions; fewer where these do not divide."""
    epochs: int = 1
    """Passes over a batch of trajectories."""
    micro_batch: int = 128
    """Transitions that go through the network at a time; bounds memory, changes nothing else."""
    max_grad_norm: float = 1.0
    """The gradient's global norm is clipped to this."""
    max_skipped_updates: int = 10
    """Updates whose gradient is not finite are skipped and counted; after more than this many the run stops."""
    compare_processes_every: int = 10
    """Updates between comparisons of the weights of several processes, which must be equal to the bit."""


@dataclass(frozen=True)
class Experiment:
    """Everything of a run but the loss: swapping the method is swapping that one object."""

    backbone: Saveable
    policy: ProbabilisticActor
    reward: Reward
    collector: Collector | WorkerCollector
    evaluator: Evaluator
    advantage: nn.Module
    prepare: Sequence[Callable[[TensorDictBase], TensorDictBase]]
    sampler: TransitionSampler
    optimisation: Optimisation
    evaluate_every: int
    checkpoint_every: int = 1
    """Iterations between checkpoints; there is one after the last iteration in any case."""
    transform: Transform | None = None
    """What is done to the transitions of an optimiser step when they are drawn, see `train`."""
    buffer: ReplayBuffer | None = None
    """What an off-policy loss trains on, see `train`; part of each checkpoint."""
    target_update: TargetNetUpdater | None = None
    """Of a loss with target networks, see `train`."""
    profile: bool = False
    """Leave a trace of the second iteration and a page about it, see `agents/profiling.py`."""
    watch: WatchRule = field(default_factory=WatchRule)
    """When the run is taken to over-optimise its reward, see `agents/watch.py`."""

    @memory_advice()
    @naming_lost_processes()
    def run(
        self, loss: LossModule, folder: RunFolder, *, checks: Sequence[Check] = (), resume_command: str | None = None
    ) -> tuple[Evaluation, Evaluation]:
        """Train with `loss`, leave everything in `folder`, and return the evaluations before and after.

        A resumed folder's run continues after its newest checkpoint as if it had never stopped. SIGTERM and Ctrl-C
        finish the iteration and write a checkpoint. An `OverOptimisationWarning` says at which evaluation the watch
        raised an alarm. Several processes start from the first one's weights, and the first one alone writes.

        Args:
            loss: the method.
            folder: where metrics, pictures, checkpoints and weights go.
            checks: called with the first transitions before the first update.
            resume_command: shown when the run is stopped; None is this program with `--resume`.

        Raises:
            ValueError: loss or reward are not for several processes.
            FloatingPointError: too many updates had to be skipped.
            UnequalWeightsError, LostProcessError: of several processes one trains another model, or has ended.
            SystemExit: SIGTERM or Ctrl-C came; the status is 128 and the signal's number, as shells have it.
        """
        settings = self.optimisation
        refuse_unshared(loss, self.reward)
        trained = TrainedState(loss, self.policy)
        share_weights(trained.replicated())
        draw_apart()
        optimizer = self.optimizer(loss)
        optimizer.register_step_post_hook(EqualWeights(trained.replicated, settings.compare_processes_every))
        before = after = self.evaluator(self.policy)
        watch = OverOptimisationWatch(self.watch, before)
        method = {"loss": type(loss).__name__, "advantage": type(self.advantage).__name__}
        checkpoints = self._checkpoints(method, trained, optimizer, folder, watch)
        if folder.resumed:
            self._resume(checkpoints, folder)
        first = len(folder.rows)
        if not first:
            folder.log_evaluation(0, before, before, NO_VERDICT)
        loop = self.loop(loss, optimizer, () if first else checks)
        images = self.collector.requested_frames_per_batch // self.collector.env.num_steps * size()
        left = range(0) if watch.stopped else range(first + 1, settings.iterations + 1)
        last, leaving = not left, None
        bar = tqdm(initial=first, total=settings.iterations, unit="iteration", disable=rank() > 0)
        profile = Profile(folder.path if self.profile and rank() == 0 else None)
        with StopRequest() as stop, bar as progress, profile, ExitStack() as ending:
            ending.callback(self.collector.shutdown)
            progress.set_description(f"reward {before.mean:.3f} before")
            for iteration in left:
                start = time.perf_counter()
                metrics = next(loop)
                metrics["images_per_second"] = images / (time.perf_counter() - start)
                last = iteration == settings.iterations
                if iteration % self.evaluate_every == 0 or last:
                    after = self.evaluator(self.policy)
                    verdict = watch(after)
                    last = last or verdict.stop
                    metrics |= self._note(folder, iteration, after, before, verdict)
                folder.log(metrics)
                self._stop_if_broken(folder)
                progress.set_description(f"reward {metrics['reward']:.3f} (fixed noise {after.mean:.3f})")
                progress.set_postfix_str(f"{metrics['images_per_second']:.1f} images/s")
                progress.update()
                leaving = stop.received()
                if iteration % self.checkpoint_every == 0 or last or leaving:
                    checkpoints.save(iteration)
                profile.step()
                if last or leaving:
                    break
        if leaving and not last:
            leave(leaving, folder.path, len(folder.rows), resume_command)
        if not left:  # it was stopped while it wrote what follows
            after = self.evaluator(self.policy)
        folder.save_curve(before)
        folder.save_before_after(before, after)
        self._save(folder.path / "lora")
        return before, after

    def optimizer(self, loss: LossModule) -> torch.optim.Optimizer:
        """AdamW over what of `loss` trains."""
        trainable = (parameter for parameter in loss.parameters() if parameter.requires_grad)
        return torch.optim.AdamW(
            [{"params": group} for group in by_sharding(trainable)],
            lr=self.optimisation.learning_rate,
            weight_decay=self.optimisation.weight_decay,
            fused=True,  # one kernel for all parameters instead of a loop over hundreds of small ones
        )

    def loop(
        self, loss: LossModule, optimizer: torch.optim.Optimizer, checks: Sequence[Check] = ()
    ) -> Iterator[Metrics]:
        """`train` over these parts, an iteration a turn: nothing is evaluated or written."""
        settings = self.optimisation
        return train(
            self.collector,
            loss,
            optimizer,
            advantage=self._prepared,
            sampler=self.sampler,
            updates_per_epoch=settings.updates_per_epoch,
            epochs=settings.epochs,
            micro_batch=settings.micro_batch,
            max_grad_norm=settings.max_grad_norm,
            transform=self.transform,
            buffer=self.buffer,
            target_update=self.target_update,
            checks=checks,
            reward_parts=lambda: self.collector.env.reward_parts,
            prompts=self.collector.env.prompts,
        )

    def _save(self, path: Path) -> None:
        save = self.backbone.save if is_sharded(self.policy.parameters()) else on_first(self.backbone.save)
        save(str(path))

    def _stop_if_broken(self, folder: RunFolder) -> None:
        skipped = sum(row[SKIPPED] for row in folder.rows)
        if skipped > self.optimisation.max_skipped_updates:
            raise FloatingPointError(
                f"{skipped:.0f} updates were skipped because their gradient was not finite, more than "
                f"max_skipped_updates={self.optimisation.max_skipped_updates}; the warnings above name steps and "
                "prompts. Lower the learning rate, or look for a reward or a network in half precision that overflows"
            )

    def _checkpoints(
        self,
        method: dict[str, str],
        trained: TrainedState,
        optimizer: torch.optim.Optimizer,
        folder: RunFolder,
        watch: OverOptimisationWatch,
    ) -> Checkpoints:
        sharded = is_sharded(self.policy.parameters())
        parts: dict[str, Stateful] = {
            "loss": trained,
            "optimizer": OwnShares(optimizer) if sharded else optimizer,
            "advantage": self.advantage,
            "environment": self.collector.env,
            "sampler": self.sampler,
            "metrics": folder,
            "watch": watch,
        }
        if self.buffer is not None:
            parts["buffer"] = self.buffer
        if self.target_update is not None:
            parts["target_update"] = self.target_update
        identity = {**method, "settings": folder.config}
        own = ("environment", "sampler", "buffer", *(("loss", "optimizer") if sharded else ()))
        return Checkpoints(folder.path / "checkpoints", parts, identity, of_each_process=own)

    def _resume(self, checkpoints: Checkpoints, folder: RunFolder) -> None:
        newest = from_first(checkpoints.newest)
        if newest is None:
            folder.load_state_dict({"rows": [], "evaluations": []})  # from the start, where everything is as it was
            return
        checkpoints.load(newest)
        self.collector.reset()  # draws again what the environment had drawn for the next iteration
        checkpoints.load_random_states(newest)

    def _note(
        self, folder: RunFolder, iteration: int, evaluation: Evaluation, before: Evaluation, verdict: Verdict
    ) -> dict[str, float]:
        """Log an evaluation, keep its weights if they are the best so far, warn; returns its metrics."""
        if verdict.keep:
            self._save(folder.path / "lora_best")
        ending = "; the run ends here, with --watch.no-stop it goes on" if verdict.stop else ""
        for alarm in verdict.alarms:
            on_first(warnings.warn)(f"iteration {iteration}: {alarm}{ending}", OverOptimisationWarning, stacklevel=6)
        row = folder.log_evaluation(iteration, evaluation, before, verdict)
        return {f"eval_{key}": value for key, value in row.items()}

    def _prepared(self, rollout: TensorDictBase) -> TensorDictBase:
        for step in self.prepare:
            rollout = step(rollout)
        return self.advantage(rollout)
