"""What test_sharding.py runs on two processes, `torchrun shards.py PIPELINE RESULTS`, and in part on a single one.

There the UNet is sharded; here it is whole. Both make the same data with a whole one.
"""

import shutil
import sys
import warnings
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torchrl.objectives import A2CLoss, ClipPPOLoss, ReinforceLoss, SoftUpdate

from agents import (
    AlignPropLoss,
    DRaFTLoss,
    DRaFTLVLoss,
    KLPenalty,
    NablaDBLoss,
    ReFLLoss,
    RestoreNext,
    RWRLoss,
    ScoreFunctionLoss,
    ddpo_is_loss,
    iql_loss,
    make_collector,
    make_critic,
    make_policy,
)
from agents.distributed import from_first, join, rank, size
from agents.sharding import by_sharding, local
from agents.training import update
from configs import ModelSettings, RunSettings, SamplingSettings, TrainingSettings
from diffusion_env import DenoisingEnv, LoRA, StableDiffusionBackbone
from examples import ppo_aesthetic
from tests.ranks import IMAGES, PROMPTS, STEPS, brightness, own

ITERATIONS = 2


def a2c(policy):
    torch.manual_seed(5)
    return A2CLoss(policy, make_critic(policy, width=8), entropy_bonus=False, functional=False)


def reinforce(policy):
    torch.manual_seed(5)
    return ReinforceLoss(policy, make_critic(policy, width=8), functional=False)


def ppo(policy):
    torch.manual_seed(5)
    return ClipPPOLoss(policy, make_critic(policy, width=8), clip_epsilon=0.1, entropy_bonus=False, functional=False)


def iql(policy):
    torch.manual_seed(5)
    loss = iql_loss(policy, width=8)
    SoftUpdate(loss, tau=0.1)
    return loss


# Loss, and the step whose transitions train; None takes those of several.
LOSSES = {
    "DDPO-IS": (ddpo_is_loss, None),
    "DDPO-IS with KL": (lambda policy: KLPenalty(ddpo_is_loss(policy), policy, coefficient=0.1), None),
    "DDPO-SF": (ScoreFunctionLoss, None),
    "A2C": (a2c, None),
    "REINFORCE with a critic": (reinforce, None),
    "PPO with a critic": (ppo, None),
    "IQL": (iql, None),
    "RWR": (RWRLoss, 2),
    "DRaFT-K": (lambda policy: DRaFTLoss(policy, brightness, backprop_steps=2), 1),
    "DRaFT-LV": (lambda policy: DRaFTLVLoss(policy, brightness), 2),
    "ReFL": (lambda policy: ReFLLoss(policy, brightness, last_steps=2), 1),
}
REFUSED = {
    "AlignProp": lambda policy: AlignPropLoss(policy, brightness),
    "Nabla-DB": lambda policy: NablaDBLoss(policy, beta=1.0),
}


class Bench:
    """A policy that trains as a whole, its loss by name, a rollout."""

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self.rollout = self._rollout(self.policy(None)[1])
        self.mesh = init_device_mesh("cpu", (2,)) if size() == 2 else None
        self.backbone, self.trained = self.policy(self.mesh)
        self.start = [weight.detach().clone() for weight in self.backbone.unet.parameters()]

    def policy(self, mesh, **settings):
        backbone = StableDiffusionBackbone.from_pretrained(self.pipeline, guidance_scale=2.0, mesh=mesh, **settings)
        return backbone, make_policy(backbone, backbone.sampler(STEPS), backbone.conditioning(PROMPTS))

    def _rollout(self, policy):
        backbone = policy.module[0].module.backbone
        torch.manual_seed(1)
        env = DenoisingEnv(backbone, STEPS, brightness, PROMPTS, batch_size=IMAGES, seed=0)
        collector = make_collector(env, policy, iterations=1)
        (rollout,) = collector
        collector.shutdown()
        for name in ("advantage", "value_target", "weight"):
            rollout[name] = torch.rand(IMAGES, 1, 1).expand(IMAGES, STEPS, 1).clone()
        return RestoreNext()(rollout)

    def loss(self, name):
        """Of the network as it was, and what it trains on."""
        make, step = LOSSES[name]
        with torch.no_grad():
            for weight, start in zip(self.backbone.unet.parameters(), self.start, strict=True):
                local(weight).copy_(local(start))
        rows = self.rollout.reshape(-1)[:IMAGES] if step is None else self.rollout[:, step]
        return make(self.trained), rows.clone()

    def weights(self, loss):
        """All that trains, of what is sharded this process's share."""
        return [local(each).detach().clone() for each in loss.parameters() if each.requires_grad]


def optimizer(loss, **settings):
    groups = by_sharding(parameter for parameter in loss.parameters() if parameter.requires_grad)
    made = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2, fused=True, **settings)
    return made, [parameter for group in groups for parameter in group]


def updates(bench):
    """One optimiser step of each loss on ten transitions, in micro-batches of five that draw the same noise."""
    found = {}
    for name in LOSSES:
        loss, rows = bench.loss(name)
        # Adam divides by the gradient's size plus eps: with the usual 1e-8 it magnifies what is rounding alone.
        made, parameters = optimizer(loss, eps=1e-2)

        def same_noise(part, loss=loss):
            torch.manual_seed(int(part["latents"].sum() * 1e4) % 2**32)
            return loss(part)

        first = 10 if name == "RWR" else 5  # whose selection may leave a process none
        metrics = update(same_noise, made, parameters, own(rows, first), 5, 0.1)
        found[name] = {"weights": bench.weights(loss), "metrics": metrics}
    return found


def uneven(bench):
    """Transitions 7 and 3, in micro-batches of 4: two passes here and one, which is filled up, there."""
    loss, rows = bench.loss("DDPO-SF")
    made, parameters = optimizer(loss, eps=1e-2)
    metrics = update(loss, made, parameters, own(rows, 7), 4, 0.1)
    return {"weights": bench.weights(loss), "metrics": metrics}


def broken(bench):
    """A transition of the second process that is not finite."""
    loss, rows = bench.loss("DDPO-SF")
    rows["advantage"][8] = float("nan")
    made, parameters = optimizer(loss)
    before = bench.weights(loss)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = update(loss, made, parameters, own(rows, 6), 4, 0.1)
    unchanged = all(map(torch.equal, bench.weights(loss), before)) and not made.state
    return {"metrics": metrics, "unchanged": unchanged, "warnings": [str(each.message) for each in caught]}


def refused(bench):
    """Why some losses are."""
    messages = {}
    for name, make in REFUSED.items():
        try:
            make(bench.trained)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def bfloat16(bench):
    """The network's output in half precision, with a mesh and without, and the dtypes in which it comes about."""
    lora = None if bench.mesh else LoRA(2, 2.0)  # which adds nothing yet
    backbone, _ = bench.policy(bench.mesh, dtype="bfloat16", lora=lora, gradient_checkpointing=True)
    computed = []
    backbone.unet.mid_block.register_forward_hook(lambda *calls: computed.append(str(calls[-1].dtype)))
    first = bench.rollout[:, 0]
    output = backbone(
        first["latents"], torch.full((IMAGES,), 500), backbone.conditioning(PROMPTS)(first["prompt_id"].flatten())
    )
    output.square().mean().backward()
    trained = {
        str(each)
        for weight in backbone.parameters()
        if weight.requires_grad
        for each in (weight.dtype, weight.grad.dtype)
    }
    return {"output": output.detach(), "computed": computed, "trained": list(trained)}


def runs(pipeline, folder):
    """PPO with the whole UNet and the sharded one, and the latter resumed after its first iterations."""
    prompts = folder / "prompts.txt"
    from_first(lambda: prompts.write_text("a cat\na dog\nan ant\na bee\n"))
    for name, sharded in (("whole", False), ("sharded", True)):
        settings = RunSettings(
            output=folder / name,
            evaluate_every=2,
            evaluation_samples=1,
            model=ModelSettings(name=pipeline, lora_rank=0, shard=sharded),
            sampling=SamplingSettings(prompts=str(prompts), num_steps=2, images_per_iteration=4),
            training=TrainingSettings(iterations=ITERATIONS, clip_range=0.1, advantage_min_count=2),
        )
        ppo_aesthetic.main(settings)
    from_first(lambda: _copy_without_last(folder / "sharded", folder / "resumed"))
    ppo_aesthetic.main(RunSettings(**vars(settings) | {"resume": folder / "resumed"}))


def _copy_without_last(run, copy):
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "lora")
    max((copy / "checkpoints").glob("*.torchrl")).unlink()


CASES = (updates, uneven, broken, refused, bfloat16)


def run(pipeline):
    """Every case's results by name."""
    bench = Bench(pipeline)
    return {case.__name__: case(bench) for case in CASES}


if __name__ == "__main__":
    join("cpu")
    folder = Path(sys.argv[2])
    torch.save(run(sys.argv[1]), folder / f"{rank()}.pt")
    runs(sys.argv[1], folder)
