"""How a denoising policy is improved: one file, one method, one paper."""

from .advantage import PromptAdvantage
from .evaluation import Evaluation, Evaluator
from .experiment import Experiment, summary
from .nabla_db import NablaDBLoss
from .policy import DenoisingNormal, make_policy
from .ppo import OnPolicyRatioCheck, ddpo_is_loss
from .reinforce import ScoreFunctionLoss
from .reward_gradient import RewardGradient
from .rollout import RecomputeLogProb, TransitionSampler, make_collector, share_latents, trainable_steps
from .run_folder import RunFolder
from .training import train

__all__ = [
    "DenoisingNormal",
    "Evaluation",
    "Evaluator",
    "Experiment",
    "NablaDBLoss",
    "OnPolicyRatioCheck",
    "PromptAdvantage",
    "RecomputeLogProb",
    "RewardGradient",
    "RunFolder",
    "ScoreFunctionLoss",
    "TransitionSampler",
    "ddpo_is_loss",
    "make_collector",
    "make_policy",
    "share_latents",
    "summary",
    "train",
    "trainable_steps",
]
