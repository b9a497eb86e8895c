"""Over-optimisation: the reward that is trained on keeps rising while what was not trained on falls.

Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization", arXiv:2210.10760: the true reward rises, then falls
along a run. The watch sees every evaluation, the pretrained model's first, and compares image with image from the same
noise. Its held-out score is the mean of the held-out rewards, each in standard deviations of the pretrained model's
images around their mean.

- Alarm, held-out: the score lies more than `held_out_drop` below the best one so far (the pretrained model's, 0,
  included), and by more than twice the standard error of the paired difference.
- Alarm, diversity: diversity within prompts is below `diversity_share` of the pretrained model's.
- The checkpoint to keep: of the evaluations without alarm whose score is within one standard error of the best such
  one, that with the highest reward (the one-standard-error rule of Breiman et al. 1984). It is found as the run goes
  on, so that one checkpoint is stored, not all. The pretrained model itself is not among the candidates. Without any
  held-out reward this is the highest reward without alarm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .evaluation import Evaluation
from .metrics import standard_error

SURE = 2.0  # standard errors


class OverOptimisationWarning(UserWarning):
    """The reward rises at the expense of what it does not measure."""


@dataclass(frozen=True)
class WatchRule:
    """When the watch raises an alarm, and what it then does."""

    held_out_drop: float = 0.5
    """Alarm when the held-out score has fallen this far below its best, in standard deviations of the pretrained
    model's images."""
    diversity_share: float = 0.5
    """Alarm when diversity within prompts is below this share of the pretrained model's."""
    stop: bool = False
    """End the run at the first alarm; otherwise it only warns."""

    def __post_init__(self) -> None:
        """Refuse thresholds that mean nothing."""
        if not self.held_out_drop > 0:
            raise ValueError(f"held_out_drop={self.held_out_drop} must be above 0 standard deviations")
        if not 0 <= self.diversity_share < 1:
            raise ValueError(f"diversity_share={self.diversity_share} must lie in [0, 1); 0 turns this alarm off")


class Verdict(NamedTuple):
    """What the watch says of one evaluation: what went wrong, whether to keep its weights, whether to end the run."""

    alarms: list[str]
    keep: bool
    stop: bool


NO_VERDICT = Verdict([], keep=False, stop=False)
"""Before training there is nothing to judge."""


class Seen(NamedTuple):
    """An evaluation's held-out scores [N] and mean reward."""

    scores: Tensor
    reward: float


class OverOptimisationWatch:
    """Applies the rules above to the evaluations of one run, in their order."""

    def __init__(self, rule: WatchRule, pretrained: Evaluation) -> None:
        """Compare with `pretrained`, the evaluation before training by the same evaluator."""
        self._rule, self._pretrained = rule, pretrained
        self._diversity = pretrained.row().get("diversity")
        self._highest = self._scores(pretrained)
        self._best: Tensor | None = None
        self._kept: Seen | None = None
        self.stopped = False
        """Whether a verdict has ended the run."""

    def state_dict(self) -> dict[str, Any]:
        """What the evaluations so far have left, for checkpoints."""
        kept = self._kept
        return {
            "highest": self._highest,
            "best": self._best,
            "kept": None if kept is None else tuple(kept),
            "stopped": self.stopped,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._highest, self._best = state_dict["highest"], state_dict["best"]
        self._kept = None if state_dict["kept"] is None else Seen(*state_dict["kept"])
        self.stopped = state_dict["stopped"]

    def __call__(self, evaluation: Evaluation) -> Verdict:
        """Judge the next evaluation."""
        seen = Seen(self._scores(evaluation), evaluation.mean)
        alarms = self._held_out_alarm(seen) + self._diversity_alarm(evaluation)
        if seen.scores.mean() > self._highest.mean():
            self._highest = seen.scores
        self.stopped = self.stopped or (bool(alarms) and self._rule.stop)
        return Verdict(alarms, not alarms and self._to_keep(seen), bool(alarms) and self._rule.stop)

    def _scores(self, evaluation: Evaluation) -> Tensor:
        """Held-out score of each image, [N]; zeros where nothing is held out."""
        scores = torch.zeros(len(evaluation.rewards), dtype=torch.float64)
        for name, values in evaluation.held_out.items():
            pretrained = self._pretrained.held_out[name].double()
            spread = pretrained.std().clamp(min=1e-9)
            scores += (values.double() - pretrained.mean()) / spread / len(evaluation.held_out)
        return scores

    def _held_out_alarm(self, seen: Seen) -> list[str]:
        difference = self._highest - seen.scores
        drop = difference.mean().item()
        if drop <= self._rule.held_out_drop or drop <= SURE * standard_error(difference):
            return []
        return [
            f"the held-out reward fell by {drop:.2f} standard deviations of the pretrained model's images from its "
            f"best (threshold {self._rule.held_out_drop}) while the trained reward went from "
            f"{self._pretrained.mean:.3f} to {seen.reward:.3f}"
        ]

    def _diversity_alarm(self, evaluation: Evaluation) -> list[str]:
        if self._diversity is None:
            return []
        share = evaluation.row()["diversity"] / max(self._diversity, 1e-12)
        if share >= self._rule.diversity_share:
            return []
        return [
            f"diversity within prompts is {share:.0%} of the pretrained model's "
            f"(threshold {self._rule.diversity_share:.0%})"
        ]

    def _to_keep(self, seen: Seen) -> bool:
        if self._best is None or seen.scores.mean() > self._best.mean():
            self._best = seen.scores
        if not _within_error(seen.scores, self._best):
            return False
        kept = self._kept
        if kept is not None and kept.reward >= seen.reward and _within_error(kept.scores, self._best):
            return False
        self._kept = seen
        return True


def _within_error(scores: Tensor, best: Tensor) -> bool:
    difference = best - scores
    return difference.mean().item() <= standard_error(difference)
