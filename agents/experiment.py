"""A whole run around the loop: evaluate, train with a progress bar, log, evaluate and watch, save."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import Transform
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import LossModule
from tqdm import tqdm

from diffusion_env.env import Reward

from .evaluation import Evaluation, Evaluator
from .metrics import standard_error
from .rollout import TransitionSampler
from .run_folder import RunFolder
from .training import Check, train
from .watch import NO_VERDICT, OverOptimisationWarning, OverOptimisationWatch, Verdict, WatchRule


class Saveable(Protocol):
    """What can write the trained weights to a folder."""

    def save(self, folder: str) -> None:
        """Write them."""
        ...


@dataclass(frozen=True)
class Optimisation:
    """How the policy is improved from a batch of trajectories."""

    iterations: int = 48
    """Rounds of sampling and updating."""
    learning_rate: float = 2e-3
    """AdamW's, constant."""
    weight_decay: float = 1e-4
    """AdamW's."""
    updates_per_epoch: int = 2
    """Optimiser steps in one pass over the chosen transitions; fewer where these do not divide."""
    epochs: int = 1
    """Passes over a batch of trajectories."""
    micro_batch: int = 128
    """Transitions that go through the network at a time; bounds memory, changes nothing else."""
    max_grad_norm: float = 1.0
    """The gradient's global norm is clipped to this."""


@dataclass(frozen=True)
class Experiment:
    """Everything of a run but the loss: swapping the method is swapping that one object."""

    backbone: Saveable
    policy: ProbabilisticActor
    reward: Reward
    collector: Collector
    evaluator: Evaluator
    advantage: nn.Module
    prepare: Sequence[Callable[[TensorDictBase], TensorDictBase]]
    sampler: TransitionSampler
    optimisation: Optimisation
    evaluate_every: int
    transform: Transform | None = None
    """What is done to the transitions of an optimiser step when they are drawn, see `train`."""
    watch: WatchRule = field(default_factory=WatchRule)
    """When the run is taken to over-optimise its reward, see `agents/watch.py`."""

    def run(
        self, loss: LossModule, folder: RunFolder, *, checks: Sequence[Check] = ()
    ) -> tuple[Evaluation, Evaluation]:
        """Train with `loss`, leave everything in `folder`, and return the evaluations before and after.

        An `OverOptimisationWarning` says at which evaluation the watch raised an alarm.

        Args:
            loss: the method.
            folder: where metrics, pictures and weights go.
            checks: called with the first transitions before the first update.
        """
        trainable = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        # One kernel for all parameters instead of a loop over hundreds of small ones.
        settings = self.optimisation
        optimizer = torch.optim.AdamW(
            trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        before = after = self.evaluator(self.policy)
        watch = OverOptimisationWatch(self.watch, before)
        folder.log_evaluation(0, before, before, NO_VERDICT)
        loop = train(
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
            checks=checks,
        )
        images, verdict = self.collector.env.batch_size[0], NO_VERDICT
        with tqdm(total=settings.iterations, unit="iteration") as progress:
            progress.set_description(f"reward {before.mean:.3f} before")
            for iteration in range(settings.iterations):
                start = time.perf_counter()
                metrics = next(loop)
                metrics["images_per_second"] = images / (time.perf_counter() - start)
                if (iteration + 1) % self.evaluate_every == 0 or iteration + 1 == settings.iterations:
                    after = self.evaluator(self.policy)
                    verdict = watch(after)
                    metrics |= self._note(folder, iteration + 1, after, before, verdict)
                folder.log(metrics)
                progress.set_description(f"reward {metrics['reward']:.3f} (fixed noise {after.mean:.3f})")
                progress.set_postfix_str(f"{metrics['images_per_second']:.1f} images/s")
                progress.update()
                if verdict.stop:
                    break
        self.collector.shutdown()
        folder.save_curve(before)
        folder.save_before_after(before, after)
        self.backbone.save(str(folder.path / "lora"))
        folder.save_checkpoint(loss=loss, optimizer=optimizer, advantage=self.advantage)
        return before, after

    def _note(
        self, folder: RunFolder, iteration: int, evaluation: Evaluation, before: Evaluation, verdict: Verdict
    ) -> dict[str, float]:
        """Log an evaluation, keep its weights if they are the best so far, warn; returns its metrics."""
        if verdict.keep:
            self.backbone.save(str(folder.path / "lora_best"))
        for alarm in verdict.alarms:
            warnings.warn(f"iteration {iteration}: {alarm}", OverOptimisationWarning, stacklevel=3)
        row = folder.log_evaluation(iteration, evaluation, before, verdict)
        return {f"eval_{key}": value for key, value in row.items()}

    def _prepared(self, rollout: TensorDictBase) -> TensorDictBase:
        for step in self.prepare:
            rollout = step(rollout)
        return self.advantage(rollout)


def summary(before: Evaluation, after: Evaluation, folder: RunFolder) -> str:
    """The closing lines of a run: what was reached and where everything is."""
    gain = (after.mean - before.mean) / before.std
    error = standard_error(after.rewards)
    best = folder.path / "lora_best"
    return (
        f"reward on fixed prompts and noise: {before.mean:.4f} before, {after.mean:.4f} +- {error:.4f} after, "
        f"{gain:+.2f} standard deviations of the pretrained model's images ({len(after.rewards)} images)\n"
        f"curve         {folder.path / 'reward_curve.png'}\n"
        f"before/after  {folder.path / 'before_after.png'}\n"
        f"metrics       {folder.path / 'metrics.csv'}\n"
        f"evaluations   {folder.path / 'evaluations.csv'}\n"
        f"settings      {folder.path / 'config.json'}\n"
        f"checkpoint    {folder.path / 'checkpoint.pt'}\n"
        f"weights       {folder.path / 'lora'}   (diffusers: pipe.load_lora_weights(folder))\n"
        f"best held-out {best if best.exists() else 'none without alarm'}"
    )
