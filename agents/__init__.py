"""How a denoising policy is improved: one file, one method, one paper."""

from .advantage import GroupAdvantage, PromptAdvantage
from .critic import CriticAdvantage, RestoreNext, make_critic, make_q_critic
from .evaluation import Evaluation, Evaluator
from .experiment import Experiment, Optimisation
from .iql import iql_loss
from .kl_penalty import KLPenalty
from .nabla_db import NablaDBLoss
from .policy import DenoisingNormal, make_policy
from .ppo import OnPolicyRatioCheck, ddpo_is_loss
from .reinforce import ScoreFunctionLoss
from .reward_backprop import AlignPropLoss, DRaFTLoss, DRaFTLVLoss, ReFLLoss
from .reward_gradient import RewardGradient
from .rollout import RecomputeLogProb, TransitionSampler, make_collector, share_latents, trainable_steps
from .run_folder import RunFolder, summary
from .rwr import BestTrajectories, ExponentialWeights, RWRLoss
from .training import train
from .watch import OverOptimisationWarning, OverOptimisationWatch, WatchRule
from .worker_collector import WorkerCollector, make_worker_collector

__all__ = [
    "AlignPropLoss",
    "BestTrajectories",
    "CriticAdvantage",
    "DRaFTLVLoss",
    "DRaFTLoss",
    "DenoisingNormal",
    "Evaluation",
    "Evaluator",
    "Experiment",
    "ExponentialWeights",
    "GroupAdvantage",
    "KLPenalty",
    "NablaDBLoss",
    "OnPolicyRatioCheck",
    "Optimisation",
    "OverOptimisationWarning",
    "OverOptimisationWatch",
    "PromptAdvantage",
    "RWRLoss",
    "ReFLLoss",
    "RecomputeLogProb",
    "RestoreNext",
    "RewardGradient",
    "RunFolder",
    "ScoreFunctionLoss",
    "TransitionSampler",
    "WatchRule",
    "WorkerCollector",
    "ddpo_is_loss",
    "iql_loss",
    "make_collector",
    "make_critic",
    "make_policy",
    "make_q_critic",
    "make_worker_collector",
    "share_latents",
    "summary",
    "train",
    "trainable_steps",
]
