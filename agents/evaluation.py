"""The same prompts from the same noise, before, during and after training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from diffusion_env import DenoisingEnv


@dataclass(frozen=True)
class Evaluation:
    """Images [N, 3, H, W] in [0, 1], their prompts and rewards [N]."""

    images: Tensor
    prompts: list[str]
    rewards: Tensor

    @property
    def mean(self) -> float:
        """Mean reward."""
        return self.rewards.mean().item()

    @property
    def std(self) -> float:
        """Standard deviation of one image's reward."""
        return self.rewards.std().item()


class Evaluator:
    """Samples every prompt of an environment equally often, always from the same first noise and the same step noise.

    Image n of two evaluations differs only by the policy. `prompt_id`, `latents` (float32 [N, *latent], the first
    noise) and `seed` (of the step noise, which starts anew for each chunk of the environment's batch size) let anyone
    repeat it, in plain diffusers too.
    """

    def __init__(self, env: DenoisingEnv, *, samples_per_prompt: int = 2, seed: int = 0) -> None:
        """Fix prompts and noise; `env`'s batch size is how many images are sampled at a time."""
        self._env = env
        self.seed = seed
        self.prompt_id = torch.arange(len(env.prompts)).repeat(samples_per_prompt)
        shape = env.observation_spec["latents"].shape[1:]
        generator = torch.Generator().manual_seed(seed)
        self.latents = torch.randn((len(self.prompt_id), *shape), generator=generator)

    @torch.no_grad()
    def __call__(self, policy: TensorDictModule) -> Evaluation:
        """Images and rewards of `policy`; random states of the caller are left as they were."""
        env, size = self._env, self._env.batch_size[0]
        images, rewards = [], []
        devices = [env.device] if env.device.type == "cuda" else []
        for prompt_id, latents in zip(self.prompt_id.split(size), self.latents.split(size), strict=True):
            count = len(prompt_id)
            # The last chunk is filled up, so that every chunk has the environment's batch size.
            fill = torch.arange(size) % count
            start = TensorDict({"prompt_id": prompt_id[fill, None], "latents": latents[fill]}, [size])
            with torch.random.fork_rng(devices), set_exploration_type(ExplorationType.RANDOM):
                torch.manual_seed(self.seed)
                state = env.reset(start.to(env.device))
                rollout = env.rollout(env.num_steps, policy, auto_reset=False, tensordict=state)
            last = rollout[:, -1]
            images.append(env.decode(last["action"][:count]).cpu())
            rewards.append(last["next", "reward"][:count, 0].cpu())
        prompts = [env.prompts[i] for i in self.prompt_id.tolist()]
        return Evaluation(torch.cat(images), prompts, torch.cat(rewards))
