"""The denoising process of a text-to-image model as a batched TorchRL environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.profiler import record_function
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from .scoring import BackgroundScorer, Reward, score


class Decoder(Protocol):
    """What the environment needs of a backbone."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents."""
        ...

    @property
    def device(self) -> torch.device:
        """Where latents and images live."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, *latent] -> images [B, 3, H, W] in [0, 1]."""
        ...


class DenoisingEnv(EnvBase):
    """Denoising as a Markov decision process (Black et al. 2023, arXiv:2305.13301, section 4.2).

    State: the noisy `latents`, the index `step` of the next decision, `prompt_id`, `group_id`. Action: the next, less
    noisy latents. The transition is deterministic, the reward is 0 until the last step and then
    `reward(images, prompts)`. All elements of the batch begin and end together.
    """

    batch_locked = True

    def __init__(
        self,
        decoder: Decoder,
        num_steps: int,
        reward: Reward,
        prompts: Sequence[str],
        *,
        batch_size: int,
        samples_per_prompt: int = 1,
        same_noise: bool = False,
        seed: int | None = None,
    ) -> None:
        """Create the environment.

        Args:
            decoder: the backbone, or anything with `latent_shape`, `device` and `decode`.
            num_steps: T, the length of an episode; the sampler's `num_steps`.
            reward: (images in [0, 1] of shape [B, 3, H, W], prompts) -> one finite number an image, [B].
            prompts: the prompt set, from which prompts are drawn uniformly; a prompt's id is its place here.
            batch_size: B, images an episode.
            samples_per_prompt: each drawn prompt is repeated this often, under one `group_id`.
            same_noise: the images of a group start from the same noise.
            seed: seeds prompts and first noise; None draws a seed.

        Raises:
            ValueError: the numbers do not fit together.
        """
        if not prompts:
            raise ValueError("the prompt set is empty; give at least one prompt")
        if num_steps < 1 or batch_size < 1 or samples_per_prompt < 1:
            raise ValueError(
                f"num_steps={num_steps}, batch_size={batch_size} and samples_per_prompt={samples_per_prompt} must be "
                "at least 1"
            )
        if batch_size % samples_per_prompt:
            raise ValueError(
                f"batch_size={batch_size} is no multiple of samples_per_prompt={samples_per_prompt}; choose "
                f"{samples_per_prompt * max(1, batch_size // samples_per_prompt)}"
            )
        super().__init__(device=decoder.device, batch_size=[batch_size])
        self.prompts = tuple(prompts)
        self.num_steps = num_steps
        self.samples_per_prompt = samples_per_prompt
        self.same_noise = same_noise
        self._callables = (decoder.decode, reward)  # in a tuple: the environment owns no one's parameters
        self.reward_parts: dict[str, Tensor] = {}  # of the images scored last, where the reward has parts
        self._background: BackgroundScorer | None = None
        self._steps_done = 0
        self._groups_drawn = 0
        self._generator = torch.Generator()
        self._make_specs(decoder.latent_shape)
        self.set_seed(seed)
        self._before_reset = self._draws()

    def _make_specs(self, latent_shape: tuple[int, ...]) -> None:
        batch, device = self.batch_size, self.device
        latents = Unbounded((*batch, *latent_shape), dtype=torch.float32, device=device)
        self.observation_spec = Composite(
            latents=latents,
            # T itself is the step of the finished image, where nothing is left to decide.
            step=Bounded(0, self.num_steps, (*batch, 1), dtype=torch.int64, device=device),
            prompt_id=Bounded(0, len(self.prompts) - 1, (*batch, 1), dtype=torch.int64, device=device),
            group_id=Unbounded((*batch, 1), dtype=torch.int64, device=device),
            shape=batch,
        )
        self.action_spec = latents.clone()
        self.reward_spec = Unbounded((*batch, 1), dtype=torch.float32, device=device)
        done = Binary(shape=(*batch, 1), dtype=torch.bool, device=device)
        self.done_spec = Composite(done=done, terminated=done.clone(), shape=batch)

    def _set_seed(self, seed: int | None) -> None:
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def _draws(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "groups_drawn": self._groups_drawn}

    def get_extra_state(self) -> dict[str, Any]:
        """For `state_dict`: what prompts, first noise and group ids were drawn from BEFORE the last reset.

        A collector resets as soon as an episode ends, so that the next one's prompts and noise are drawn before anyone
        can save. Loading this state and resetting draws the same again. With it goes what the reward remembers, if it
        has `statistics`, a module.
        """
        statistics = self._statistics
        return self._before_reset | {"reward": {} if statistics is None else statistics.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned; the next reset repeats the one before it was taken."""
        self._generator.set_state(state["generator"])
        self._groups_drawn = state["groups_drawn"]
        self._before_reset = self._draws()
        if self._statistics is not None:
            self._statistics.load_state_dict(state["reward"])

    @property
    def _statistics(self) -> nn.Module | None:
        return getattr(self._callables[1], "statistics", None)

    def _reset(self, tensordict: TensorDictBase | None, **_: object) -> TensorDictBase:
        """Draw prompts and first noise, or take `prompt_id` and `latents` from `tensordict` where it has them.

        Raises:
            ValueError: what was given has the wrong shape or names no prompt.
        """
        self._before_reset = self._draws()
        given = TensorDict({}) if tensordict is None else tensordict
        prompt_id = given.get("prompt_id", None)
        latents = given.get("latents", None)
        prompt_id = self._draw_prompts() if prompt_id is None else self._checked_prompts(prompt_id)
        latents = self._draw_noise() if latents is None else self._checked_latents(latents)
        groups = self.batch_size[0] // self.samples_per_prompt
        group_id = torch.arange(self._groups_drawn, self._groups_drawn + groups, device=self.device)
        self._groups_drawn += groups
        self._steps_done = 0
        done = torch.zeros(*self.batch_size, 1, dtype=torch.bool, device=self.device)
        return TensorDict(
            {
                "latents": latents,
                "step": torch.zeros(*self.batch_size, 1, dtype=torch.int64, device=self.device),
                "prompt_id": prompt_id,
                "group_id": group_id.repeat_interleave(self.samples_per_prompt)[:, None],
                "done": done,
                "terminated": done.clone(),
            },
            batch_size=self.batch_size,
            device=self.device,
        )

    def _draw_prompts(self) -> Tensor:
        groups = self.batch_size[0] // self.samples_per_prompt
        drawn = torch.randint(len(self.prompts), (groups, 1), generator=self._generator)
        return drawn.repeat_interleave(self.samples_per_prompt, 0).to(self.device)

    def _draw_noise(self) -> Tensor:
        repeats = self.samples_per_prompt if self.same_noise else 1
        shape = (self.batch_size[0] // repeats, *self.observation_spec["latents"].shape[1:])
        # Drawn on the CPU, so that a seed gives the same images on every device.
        return torch.randn(shape, generator=self._generator).repeat_interleave(repeats, 0).to(self.device)

    def _checked_prompts(self, prompt_id: Tensor) -> Tensor:
        if prompt_id.min() < 0 or prompt_id.max() >= len(self.prompts):
            raise ValueError(
                f"prompt_id lies between {prompt_id.min()} and {prompt_id.max()}, but there are {len(self.prompts)} "
                f"prompts, ids 0 to {len(self.prompts) - 1}"
            )
        groups = prompt_id.view(-1, self.samples_per_prompt)
        if (groups != groups[:, :1]).any():
            raise ValueError(
                f"with samples_per_prompt={self.samples_per_prompt} each prompt_id must stand "
                f"{self.samples_per_prompt} times in a row; got {prompt_id.flatten().tolist()}"
            )
        return prompt_id

    def _checked_latents(self, latents: Tensor) -> Tensor:
        expected = self.observation_spec["latents"].shape
        if latents.shape != expected:
            raise ValueError(
                f"latents given to reset have shape {tuple(latents.shape)}, expected {tuple(expected)}: one first "
                "noise for each element of the batch"
            )
        return latents.to(torch.float32)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        latents = tensordict["action"]
        # Counted on the host: reading it from the device would make every step wait.
        self._steps_done += 1
        last = self._steps_done >= self.num_steps
        reward = self._score(tensordict, latents) if last else self.reward_spec.zero()
        done = torch.full((*self.batch_size, 1), last, dtype=torch.bool, device=self.device)
        return TensorDict(
            {
                "latents": latents,
                "step": tensordict["step"] + 1,
                "prompt_id": tensordict["prompt_id"],
                "group_id": tensordict["group_id"],
                "reward": reward,
                "done": done,
                "terminated": done.clone(),
            },
            batch_size=self.batch_size,
            device=self.device,
        )

    def any_done(self, tensordict: TensorDictBase) -> bool:
        """What TorchRL asks after each step, answered without waiting for the device: all episodes end together."""
        done = self._steps_done >= self.num_steps
        if done:
            tensordict.set("_reset", tensordict["done"].clone())
        return done

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of latents [B, *latent]."""
        return self._callables[0](latents)

    @torch.no_grad()
    def _score(self, tensordict: TensorDictBase, latents: Tensor) -> Tensor:
        step = tensordict["step"]
        if (step != self.num_steps - 1).any():
            raise RuntimeError(
                f"{self._steps_done} steps were taken since reset, but the TensorDict is at step "
                f"{step.flatten()[0].item()} of {self.num_steps}; step from what the last step returned, or reset"
            )
        prompts = [self.prompts[i] for i in tensordict["prompt_id"].flatten().tolist()]
        with record_function("reward"):
            reward, images = self._callables[1], self.decode(latents)
            if self._background is not None:
                self._background.submit(reward, images, prompts)
                return self.reward_spec.zero()
            values, self.reward_parts = score(reward, images, prompts)
            return values.to(self.device)[:, None]

    def score_in_background(self) -> Callable[[], Tensor]:
        """From now on a thread scores finished images, while the next episode begins.

        ("next", "reward") is then 0 at the last step too; whoever collects episodes puts the true rewards there before
        anything reads it, as `make_collector` of `agents` does.

        Returns:
            A function that waits for the thread and returns rewards float32 [episodes * B] of the episodes finished
            since its last call. What the reward raises comes from it, or from the end of the next episode.
        """
        scorer = self._background = BackgroundScorer()

        def rewards() -> Tensor:
            values, self.reward_parts = scorer.results()
            return values.to(self.device)

        return rewards
