"""One job, every method: only the loss is replaced, and what its documentation says goes with it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import A2CLoss, ClipPPOLoss, KLPENPPOLoss, LossModule, ReinforceLoss, SoftUpdate

import agents
from agents import (
    AlignPropLoss,
    BestTrajectories,
    CriticAdvantage,
    DRaFTLoss,
    DRaFTLVLoss,
    ExponentialWeights,
    GroupAdvantage,
    KLPenalty,
    NablaDBLoss,
    PromptAdvantage,
    ReFLLoss,
    RestoreNext,
    RewardGradient,
    RWRLoss,
    ScoreFunctionLoss,
    TransitionSampler,
    ddpo_is_loss,
    iql_loss,
    make_collector,
    make_critic,
    make_policy,
    train,
)
from diffusion_env import CorrectionUNet, DenoisingEnv, LoRA, StableDiffusionBackbone

STEPS = 3
GROUP = 3
PROMPTS = ("a cat", "a dog")


@dataclass
class Method:
    """A loss, and what of the job changes with it."""

    loss: LossModule
    companions: dict[str, Any] = field(default_factory=dict)
    learns: tuple[nn.Module, ...] = ()
    """What trains beside the policy."""


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def with_critic(make_loss):
    def build(backbone, policy):
        critic = make_critic(policy, width=8)
        return Method(make_loss(policy, critic), {"advantage": CriticAdvantage(critic)}, (critic,))

    return build


def from_one_state(make_loss, **companions):
    def build(backbone, policy):
        loss = make_loss(policy)
        return Method(loss, {"sampler": loss.transition_sampler(), **companions})

    return build


def iql(backbone, policy):
    loss = iql_loss(policy, width=8)
    buffer = ReplayBuffer(storage=LazyTensorStorage(100), batch_size=16, transform=RestoreNext())
    companions = {"buffer": buffer, "target_update": SoftUpdate(loss, tau=0.1), "advantage": lambda rollout: rollout}
    return Method(loss, companions, (loss.qvalue_network_params, loss.value_network_params))


def nabla_db(backbone, policy, **settings):
    gradient = RewardGradient(policy, brightness)
    return Method(NablaDBLoss(policy, beta=100.0, **settings), {"transform": gradient})


def nabla_db_with_correction(backbone, policy):
    correction = CorrectionUNet(backbone, block_out_channels=(8, 8))
    method = nabla_db(backbone, policy, correction=correction, trust_region=1.0)
    method.learns = (correction,)
    return method


METHODS: dict[str, Callable[[StableDiffusionBackbone, ProbabilisticActor], Method]] = {
    "ddpo_is_loss": lambda backbone, policy: Method(ddpo_is_loss(policy)),
    "ScoreFunctionLoss": lambda backbone, policy: Method(ScoreFunctionLoss(policy)),
    "ScoreFunctionLoss, groups": lambda backbone, policy: Method(
        ScoreFunctionLoss(policy), {"advantage": GroupAdvantage(GROUP)}
    ),
    "ddpo_is_loss, KLPenalty": lambda backbone, policy: Method(
        KLPenalty(ddpo_is_loss(policy), policy, coefficient=0.1)
    ),
    "ReinforceLoss": with_critic(ReinforceLoss),
    "A2CLoss": with_critic(lambda policy, critic: A2CLoss(policy, critic, entropy_bonus=False)),
    "ClipPPOLoss": with_critic(lambda policy, critic: ClipPPOLoss(policy, critic, entropy_bonus=False)),
    "KLPENPPOLoss": with_critic(lambda policy, critic: KLPENPPOLoss(policy, critic, entropy_bonus=False)),
    "iql_loss": iql,
    "RWRLoss": from_one_state(RWRLoss, advantage=ExponentialWeights()),
    "RWRLoss, sparse": from_one_state(RWRLoss, advantage=BestTrajectories(percentile=0.5)),
    "DRaFTLoss": from_one_state(lambda policy: DRaFTLoss(policy, brightness, backprop_steps=2)),
    "DRaFTLVLoss": from_one_state(lambda policy: DRaFTLVLoss(policy, brightness)),
    "AlignPropLoss": from_one_state(lambda policy: AlignPropLoss(policy, brightness)),
    "ReFLLoss": from_one_state(lambda policy: ReFLLoss(policy, brightness, last_steps=2)),
    "NablaDBLoss": nabla_db,
    "NablaDBLoss, not residual": lambda backbone, policy: nabla_db(backbone, policy, residual=False),
    "NablaDBLoss, second order": lambda backbone, policy: nabla_db(backbone, policy, backward_trains_policy=True),
    "NablaDBLoss, correction": nabla_db_with_correction,
}


def test_no_loss_is_forgotten():
    exported = {name for name in agents.__all__ if name.lower().endswith("loss")}
    assert exported <= {name.split(",")[0] for name in METHODS}


def values(*modules):
    return {
        f"{k}.{name}": parameter.detach().clone()
        for k, module in enumerate(modules)
        for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_one_update_changes_what_trains_and_nothing_else(tiny_folder, name, dtype):
    lora = LoRA(rank=3, alpha=5.0, targets=("to_q", "to_k", "to_v", "to_out.0", "conv1"))
    backbone = StableDiffusionBackbone.from_pretrained(tiny_folder, dtype=dtype, lora=lora, guidance_scale=2.0)
    conditioning = backbone.conditioning(PROMPTS)
    policy = make_policy(
        backbone, backbone.sampler(STEPS), conditioning, keep_distribution=True, keep_model_output=True
    )
    env = DenoisingEnv(backbone, STEPS, brightness, PROMPTS, batch_size=2 * GROUP, samples_per_prompt=GROUP, seed=0)
    collector = make_collector(env, policy, iterations=1)
    method = METHODS[name](backbone, policy)
    trainable = [parameter for parameter in method.loss.parameters() if parameter.requires_grad]
    job = {
        "advantage": PromptAdvantage(min_count=2),
        "sampler": TransitionSampler(range(STEPS)),
        "micro_batch": 8,
    }
    frozen = (backbone.pipeline.vae, backbone.pipeline.text_encoder)
    parts = (backbone, *frozen, *method.learns)
    before = values(*parts)
    torch.manual_seed(0)
    (row,) = train(collector, method.loss, torch.optim.AdamW(trainable, lr=1e-2), **(job | method.companions))
    collector.shutdown()
    assert row["grad_norm"] > 0
    changed = {key for key, value in values(*parts).items() if not torch.equal(value, before[key])}
    adapters = {f"0.{key}" for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    learning = {key for key in before if int(key.split(".")[0]) > len(frozen)}
    # Adapters add nothing at first: their second factors, which are 0, move before the first ones do.
    assert {key for key in changed if "lora_B" in key} == {key for key in adapters if "lora_B" in key}
    assert changed <= adapters | learning
    for k in range(len(method.learns)):
        assert any(key.startswith(f"{k + 1 + len(frozen)}.") for key in changed)
    owned = {id(p) for module in (policy, *method.learns) for p in module.parameters() if p.requires_grad}
    assert {id(p) for p in trainable} == owned
