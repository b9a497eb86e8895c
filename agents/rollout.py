"""From a collector's rollout to the transitions that train: latents kept once, a subset of steps drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.data import SamplerWithoutReplacement, Storage
from torchrl.modules import ProbabilisticActor

from diffusion_env import DDIMSampler, DenoisingEnv

KEPT_KEYS = (
    "latents",
    "action",
    "step",
    "prompt_id",
    "group_id",
    "action_log_prob",
    "loc",
    "scale",
    "model_output",
    "reward_grad",
    ("next", "reward_grad"),
    ("next", "reward"),
    ("next", "done"),
    ("next", "terminated"),
)


def share_latents(rollout: TensorDictBase, *, episodes: int = 1) -> TensorDictBase:
    """The collector's `postproc`: T + 1 latents a trajectory instead of 2 T.

    A state's `latents` are the action before it, so one tensor [B, T + 1, *latent] of the first latents and all actions
    holds both; the returned [B, T] TensorDict's `latents` and `action` are views of it and nothing else is shared with
    `rollout`. Whatever no loss reads is dropped; `loc` and `scale` are there only if the policy was told to keep them.

    Args:
        rollout: [B, T]; with more than one episode [B, episodes * T], one after the other, of which [episodes * B, T]
            are made, the first episode's trajectories first.
        episodes: how many follow each other.
    """
    # Images [B, episodes, T] to [episodes, B, T]; with one episode this moves nothing.
    one_by_one = rollout.unflatten(1, (episodes, rollout.shape[1] // episodes)).transpose(0, 1)
    kept = one_by_one.select(*KEPT_KEYS, strict=False).exclude("latents", "action").flatten(0, 1).clone()
    trajectory = torch.cat([one_by_one["latents"][:, :, :1], one_by_one["action"]], 2).flatten(0, 1)
    return kept.update({"latents": trajectory[:, :-1], "action": trajectory[:, 1:]})


class TransitionSampler(SamplerWithoutReplacement):
    """Draws, for every trajectory anew, a random subset of its steps, and deals them out in random order.

    This is DDPO's `timestep_fraction`: exactly `steps_per_trajectory` distinct steps of each trajectory, every step
    equally likely, so the loss stays an unbiased share of the whole. For a `TensorStorage` of B trajectories [B, T]
    with one storage dimension: torchrl 0.14 miscounts a storage that is given its data and `ndim=2`, and would silently
    deal out the first few trajectories only.
    """

    def __init__(
        self, steps: Sequence[int], fraction: float = 1.0, *, stratified: bool = False, always_last: bool = False
    ) -> None:
        """Choose among `steps`, the decisions that may train (see `trainable_steps`).

        Args:
            steps: the decisions, each once.
            fraction: share of them that trains, rounded to a number of steps, at least one.
            stratified: divide the trajectory evenly: one step of each of as many equal bins of neighbours as steps are
                drawn. Each step stays equally likely; what does not divide evenly is left out at random beforehand.
            always_last: the latest of `steps` is always among them, the others are drawn from the rest. With
                `stratified` this is how Nabla-DB draws (Liu et al. 2025, arXiv:2412.07775, the authors' code); the
                last step then counts for more than its share.

        Raises:
            ValueError: nothing would be trained.
        """
        super().__init__()
        if not len(steps):
            raise ValueError("there are no steps to train; give at least one, see `trainable_steps`")
        if not 0 < fraction <= 1:
            raise ValueError(f"timestep_fraction is {fraction}; it must lie in (0, 1]")
        ordered = torch.as_tensor(steps).sort().values
        self._stride = int(ordered[-1]) + 1
        self.steps_per_trajectory = max(1, round(fraction * len(steps)))
        self._always, self._steps = (ordered[-1:], ordered[:-1]) if always_last else (ordered[:0], ordered)
        self._stratified = stratified

    def sample(self, storage: Storage, batch_size: int) -> tuple[tuple[Tensor, Tensor], dict]:
        """Indices (trajectory, step) of up to `batch_size` transitions."""
        index, info = super().sample(storage, batch_size)
        return (index // self._stride, index % self._stride), info

    def _get_sample_list(self, storage: Storage | None, len_storage: int, batch_size: int) -> None:
        # The parent deals out `_sample_list`, here trajectory * stride + step; it asks again after each pass.
        steps = torch.cat([self._draw(len_storage), self._always.expand(len_storage, -1)], 1)
        chosen = (steps + torch.arange(len_storage)[:, None] * self._stride).flatten()
        self._sample_list = chosen[torch.randperm(len(chosen), generator=self._rng)]
        self._remaining_batches = -(len(chosen) // -batch_size)

    def _draw(self, trajectories: int) -> Tensor:
        """Steps [trajectories, steps_per_trajectory], less the one that is always there."""
        count = self.steps_per_trajectory - len(self._always)
        order = torch.rand(trajectories, len(self._steps), generator=self._rng).argsort(1)
        if not self._stratified or not count:
            return self._steps[order[:, :count]]
        size = len(self._steps) // count
        bins = order[:, : count * size].sort(1).values.view(trajectories, count, size)
        pick = torch.randint(size, (trajectories, count, 1), generator=self._rng)
        return self._steps[bins.gather(2, pick).squeeze(2)]


def trainable_steps(sampler: DDIMSampler, min_noise: float = 0.0) -> list[int]:
    """Indices of the decisions with a density whose standard deviation is at least `min_noise` of the largest one's.

    Raises:
        ValueError: no step has a density, or `min_noise` is outside [0, 1].
    """
    if not 0 <= min_noise <= 1:
        raise ValueError(f"min_noise={min_noise} must lie in [0, 1]: it is a share of the noisiest step's deviation")
    stds = sampler.std.tolist()
    if not max(stds) > 0:
        raise ValueError("every step of this sampler is deterministic and has no density to train; raise eta")
    return [step for step, std in enumerate(stds) if std > 0 and std >= min_noise * max(stds)]


def make_collector(env: DenoisingEnv, policy: ProbabilisticActor, *, iterations: int, episodes: int = 1) -> Collector:
    """TorchRL's collector, giving one batch of whole trajectories an iteration, latents stored once.

    Args:
        env: B images an episode.
        policy: what is trained.
        iterations: how many batches.
        episodes: how many of the environment's episodes make a batch [episodes * B, T]. With more than one, a thread
            computes the rewards of each while the next is denoised. All rewards are there before the batch is given
            out, and the policy changes only then: the batch is the one that rewards computed in turn would give. (Not
            TorchRL's `AsyncEnvPool`, whose environments answer in the order in which they finish, so that the policy's
            noise would go to other images in each run.)
    """
    frames = env.batch_size[0] * env.num_steps * episodes
    rewards = env.score_in_background() if episodes > 1 else None

    def postproc(rollout: TensorDictBase) -> TensorDictBase:
        batch = share_latents(rollout, episodes=episodes)
        if rewards is not None:
            batch["next", "reward"][:, -1, 0] = rewards()
        return batch

    return Collector(
        env,
        policy,
        frames_per_batch=frames,
        total_frames=frames * iterations,
        postproc=postproc,
        compact_obs=True,
        return_same_td=True,  # otherwise it clones after `postproc`, and each latent is there twice again
        use_buffers=False,  # they would keep every latent of the last batch twice, training included
        track_traj_ids=False,  # nobody reads them, and each step would wait for the device
        no_cuda_sync=True,  # no stream of its own: a thread that scores images would not wait for it
        auto_register_policy_transforms=False,
    )


class RecomputeLogProb:
    """Overwrites `action_log_prob` with what the training path computes, where the two differ (half precision)."""

    def __init__(self, policy: ProbabilisticActor, micro_batch: int) -> None:
        """Use `micro_batch` transitions at a time, as training will: the batch's shape decides the rounding."""
        self._policy, self._micro_batch = policy, micro_batch

    @torch.enable_grad()  # as in training: without, a compiled or folded network computes in another way
    def __call__(self, rollout: TensorDictBase) -> TensorDictBase:
        """Update a rollout [B, T]."""
        parts = rollout.select("latents", "step", "prompt_id", "action").reshape(-1).split(self._micro_batch)
        log_prob = torch.cat([self._policy.get_dist(part).log_prob(part["action"]).detach() for part in parts])
        return rollout.set("action_log_prob", log_prob.reshape(rollout.batch_size))
