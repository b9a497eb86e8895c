"""The same prompts from the same noise, before, during and after training, and what is measured of the images."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torch.profiler import record_function
from torchrl.envs.utils import ExplorationType, set_exploration_type

from diffusion_env import DenoisingEnv, checked_reward
from diffusion_env.scoring import Reward

from .distributed import from_first, numbered_seed, shared_out
from .metrics import (
    FeatureExtractor,
    diversity,
    kl_to_pretrained,
    labels_of,
    paired_distance,
    prompt_frechet_distance,
    standard_error,
)
from .sharding import is_sharded

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


@dataclass(frozen=True)
class Evaluation:
    """Images [N, 3, H, W] in [0, 1], their prompts and rewards [N], and whatever else the evaluator measures."""

    images: Tensor
    prompts: list[str]
    rewards: Tensor
    held_out: Mapping[str, Tensor] = field(default_factory=dict)
    """Rewards [N] that were not trained on, by name."""
    features: Tensor | None = None
    """Of the images, [N, D]."""
    kl: Tensor | None = None
    """KL divergence from the pretrained model in nats, of the trajectories of the first K images, [K]."""

    @property
    def mean(self) -> float:
        """Mean reward."""
        return self.rewards.mean().item()

    @property
    def std(self) -> float:
        """Standard deviation of one image's reward."""
        return self.rewards.std().item()

    def row(self, pretrained: Evaluation | None = None) -> dict[str, float]:
        """What was measured, as numbers by name; `..._error` is the standard error of the mean over images.

        Args:
            pretrained: the pretrained model's evaluation of as many images of the same prompts; adds `moved`, the
                squared feature distance of image n from its own, and where there are two images of each prompt `fid`,
                the Frechet distance within prompts.
        """
        row = {"reward": self.mean, "reward_error": standard_error(self.rewards)}
        row |= {f"reward_{name}": self.rewards.quantile(at).item() for name, at in QUANTILES.items()}
        for name, values in self.held_out.items():
            row |= {f"held_out_{name}": values.mean().item(), f"held_out_{name}_error": standard_error(values)}
        if self.features is not None:
            labels, reference = labels_of(self.prompts), None if pretrained is None else pretrained.features
            if len(set(self.prompts)) < len(self.prompts):
                row["diversity"] = diversity(self.features, labels)
            if reference is not None:
                row["moved"] = paired_distance(self.features, reference)
                if labels.bincount().min() > 1:
                    row["fid"] = prompt_frechet_distance(self.features, reference, labels)
        if self.kl is not None:
            row |= {"kl": self.kl.mean().item(), "kl_error": standard_error(self.kl)}
        return row


class Evaluator:
    """Samples every prompt of an environment equally often, always from the same first noise and the same step noise.

    Image n of two evaluations with the same batch size differs only by the policy. `prompt_id`, `latents` (float32
    [N, *latent], the first noise) and `seed` (of the step noise, which a chunk of the environment's batch size whose
    first image is number n draws from `numbered_seed(seed, n)`) let anyone repeat it, in plain diffusers too.
    """

    def __init__(
        self,
        env: DenoisingEnv,
        *,
        samples_per_prompt: int = 2,
        seed: int = 0,
        held_out: Mapping[str, Reward] | None = None,
        features: FeatureExtractor | None = None,
        kl_trajectories: int = 0,
    ) -> None:
        """Fix prompts and noise.

        Args:
            env: its prompts are evaluated, its reward is the one trained on, its batch size is how many images are
                sampled at a time.
            samples_per_prompt: images of each prompt; diversity needs two.
            seed: of first and step noise.
            held_out: rewards that were not trained on, by name.
            features: images [B, 3, H, W] in [0, 1] -> [B, D], for diversity and distances.
            kl_trajectories: K, the KL divergence from the pretrained model is measured along the trajectories of the
                first K images, which have different prompts where there are as many; two network calls a state.
        """
        self._env = env
        self._held_out = dict(held_out or {})
        self._features, self._kl_trajectories = features, kl_trajectories
        self.seed = seed
        self.prompt_id = torch.arange(len(env.prompts)).repeat(samples_per_prompt)
        shape = env.observation_spec["latents"].shape[1:]
        generator = torch.Generator().manual_seed(seed)
        self.latents = torch.randn((len(self.prompt_id), *shape), generator=generator)

    @torch.no_grad()
    @record_function("evaluation")
    def __call__(self, policy: TensorDictModule) -> Evaluation:
        """Images and rewards of `policy`; random states and the reward's running statistics are left as they were.

        Several processes share the chunks out among them; each has the whole evaluation, that of a single one. Those of
        a sharded network work on all chunks together, and have the first one's numbers.
        """
        size = self._env.batch_size[0]
        chunks = zip(self.prompt_id.split(size), self.latents.split(size), strict=True)
        jobs = [partial(self._chunk, policy, n * size, *chunk) for n, chunk in enumerate(chunks)]
        state = copy.deepcopy(self._env.get_extra_state())
        try:
            if not is_sharded(policy.parameters()):
                return _joined(shared_out(jobs))
            evaluation = _joined([job() for job in jobs])
            return from_first(lambda: evaluation)
        finally:
            self._env.set_extra_state(state)

    def _chunk(self, policy: TensorDictModule, first: int, prompt_id: Tensor, latents: Tensor) -> Evaluation:
        """Images number `first` and following."""
        env, count = self._env, len(prompt_id)
        # The last chunk is filled up, so that every chunk has the environment's batch size.
        fill = torch.arange(env.batch_size[0]) % count
        start = TensorDict({"prompt_id": prompt_id[fill, None], "latents": latents[fill]}, env.batch_size)
        devices = [env.device] if env.device.type == "cuda" else []
        with torch.random.fork_rng(devices), set_exploration_type(ExplorationType.RANDOM):
            torch.manual_seed(numbered_seed(self.seed, first))
            state = env.reset(start.to(env.device))
            rollout = env.rollout(env.num_steps, policy, auto_reset=False, tensordict=state)[:count]
        images = env.decode(rollout["action"][:, -1])
        prompts = [env.prompts[i] for i in prompt_id.tolist()]
        along = min(count, max(0, self._kl_trajectories - first))
        return Evaluation(
            images.cpu(),
            prompts,
            rollout["next", "reward"][:, -1, 0].cpu(),
            {name: checked_reward(reward(images, prompts), prompts).cpu() for name, reward in self._held_out.items()},
            None if self._features is None else self._features(images).float().cpu(),
            kl_to_pretrained(policy, rollout[:along]).cpu() if along else None,
        )


def _joined(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of the images of all `parts`."""
    features = [part.features for part in parts if part.features is not None]
    kl = [part.kl for part in parts if part.kl is not None]
    return Evaluation(
        torch.cat([part.images for part in parts]),
        [prompt for part in parts for prompt in part.prompts],
        torch.cat([part.rewards for part in parts]),
        {name: torch.cat([part.held_out[name] for part in parts]) for name in parts[0].held_out},
        torch.cat(features) if features else None,
        torch.cat(kl) if kl else None,
    )
