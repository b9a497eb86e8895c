"""The denoising process as a `gymnasium.Env`: one image an episode, `gymnasium.make("Denoising-v0")`."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from numpy.typing import ArrayLike, NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs.utils import step_mdp

from .backbones import StableDiffusionBackbone
from .embedded import embedded_folder
from .env import Decoder, DenoisingEnv
from .lora import LoRA
from .prompts import animals
from .scoring import Reward

Observation = dict[str, Any]
Latents = NDArray[np.float32]

# Finite, because Stable-Baselines3 refuses an infinite Box, and far outside anything a sampler produces: latents have
# about unit variance at every noise level.
LATENT_BOUND = 100.0
RESET_OPTIONS = ("prompt_id", "latents")


def colourfulness(images: Tensor, prompts: list[str]) -> Tensor:
    """Colourfulness [B] of images [B, 3, H, W] in [0, 1]: the third metric of Hasler and Suesstrunk 2003.

    sqrt(std(rg)^2 + std(yb)^2) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2) with rg = R - G and yb = (R + G) / 2 - B. A grey
    image has 0; times 255 it is on the paper's scale, where 33 is "moderately" and 109 "extremely colourful". The
    prompts do not matter.
    """
    red, green, blue = images.float().flatten(2).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue])
    spread, offset = opponents.std(-1, correction=0), opponents.mean(-1)
    return spread.norm(dim=0) + 0.3 * offset.norm(dim=0)


class GymDenoisingEnv(gymnasium.Env[Observation, Latents]):
    """`DenoisingEnv` with one image as a `gymnasium.Env`; the same seed and actions give the same states and rewards.

    Observation: `latents` float32 [*latent], `step` (0 to T, the index of the next decision) and `prompt_id`. Action:
    the next, less noisy latents, within +-`LATENT_BOUND`. The reward is 0 until step T, where the episode is
    `terminated`. `info["prompt"]` is the prompt's text.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(
        self,
        decoder: Decoder | None = None,
        num_steps: int = 10,
        reward: Reward = colourfulness,
        prompts: Sequence[str] | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Create the environment; without arguments, that of the embedded pipeline.

        Args:
            decoder: the backbone, or anything with `latent_shape`, `device` and `decode`; None loads the embedded
                pipeline.
            num_steps: T, the length of an episode; the sampler's `num_steps`.
            reward: (images in [0, 1] of shape [1, 3, H, W], prompts) -> one finite number, [1].
            prompts: the prompt set, from which prompts are drawn uniformly; None is the 45 animals.
            render_mode: "rgb_array" makes `render()` return the current latents as an image; None: no rendering.

        Raises:
            ValueError: an unknown render mode, or numbers that do not fit together.
        """
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode is {render_mode!r}; choose one of {self.metadata['render_modes']} or None")
        self.render_mode = render_mode
        if decoder is None:
            decoder = _embedded_decoder()
        prompts = animals() if prompts is None else prompts
        self._env = DenoisingEnv(decoder, num_steps, reward, prompts, batch_size=1)
        self._state: TensorDictBase | None = None
        self.action_space = _latent_space(decoder)
        self.observation_space = spaces.Dict(
            {
                "latents": _latent_space(decoder),
                "step": spaces.Discrete(num_steps + 1),  # T itself is the step of the finished image
                "prompt_id": spaces.Discrete(len(prompts)),
            }
        )

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw a prompt and the first noise.

        Args:
            seed: seeds prompts and noise as `DenoisingEnv` does; None goes on with the random numbers.
            options: `prompt_id` (int) and `latents` ([*latent]) take the place of what would be drawn.

        Raises:
            ValueError: an unknown option, or one outside its space.
        """
        start = self._start({} if options is None else options)
        super().reset(seed=seed)
        if seed is not None:
            self._env.set_seed(seed)
        self._state = self._env.reset(start)
        return self._observation(self._state), self._info(self._state)

    def step(self, action: Latents) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Make `action` the current latents.

        Returns:
            Observation, reward, `terminated`, `truncated` (never), info.

        Raises:
            ValueError: the action is outside `action_space`; it is never clipped.
            ResetNeeded: there was no reset yet, or the episode is over.
        """
        state = self._running_state()
        if state["done"].any():
            raise ResetNeeded(f"the episode ended at step {self._env.num_steps}; call reset() before the next step()")
        stepped = self._env.step(state.clone(False).set("action", self._as_batch("the action", action)))
        self._state = state = step_mdp(stepped)
        reward, terminated = stepped["next", "reward"].item(), stepped["next", "terminated"].item()
        return self._observation(state), float(reward), bool(terminated), False, self._info(state)

    @torch.no_grad()
    def render(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        """The current latents decoded, uint8 [H, W, 3]; None without a render mode.

        Raises:
            ResetNeeded: there was no reset yet.
        """
        if self.render_mode is None:
            gymnasium.logger.warn('render() was called without a render mode; create it with render_mode="rgb_array"')
            return None
        (image,) = self._env.decode(self._running_state()["latents"])
        return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy(force=True)

    def _start(self, options: Mapping[str, Any]) -> TensorDict:
        unknown = sorted(set(options) - set(RESET_OPTIONS))
        if unknown:
            raise ValueError(f"unknown reset options {unknown}; known are {', '.join(RESET_OPTIONS)}")
        start = TensorDict(batch_size=[1], device=self._env.device)
        if "prompt_id" in options:
            start["prompt_id"] = torch.tensor([[self._checked_prompt_id(options["prompt_id"])]])
        if "latents" in options:
            start["latents"] = self._as_batch("option `latents`", options["latents"])
        return start

    def _checked_prompt_id(self, value: Any) -> int:
        count = len(self._env.prompts)
        try:
            prompt_id = operator.index(value)
        except TypeError as error:
            raise ValueError(f"option `prompt_id` is {value!r}; give an integer from 0 to {count - 1}") from error
        if not 0 <= prompt_id < count:
            raise ValueError(f"option `prompt_id` is {prompt_id}, but there are {count} prompts, ids 0 to {count - 1}")
        return prompt_id

    def _as_batch(self, name: str, value: ArrayLike) -> Tensor:
        """A copy of `value` as a float32 batch of one, if it is in the action space; `name` is for the message."""
        latents = np.array(value, dtype=np.float32)  # a copy: the caller may write to its array again
        shape = self._env.action_spec.shape[1:]
        if latents.shape != shape:
            raise ValueError(f"{name} has shape {latents.shape}, expected latents of shape {tuple(shape)}")
        if not np.isfinite(latents).all():
            raise ValueError(f"{name} has {(~np.isfinite(latents)).sum()} elements that are not finite numbers")
        largest = np.abs(latents).max()
        if largest > LATENT_BOUND:
            raise ValueError(
                f"{name} reaches {largest:g}, outside +-{LATENT_BOUND:g}, which no sampler does: latents have about "
                "unit variance. Look for the error in the policy, or clip if you mean it"
            )
        return torch.from_numpy(latents)[None].to(self._env.device)

    def _running_state(self) -> TensorDictBase:
        if self._state is None:
            raise ResetNeeded("call reset() first")
        return self._state

    def _observation(self, state: TensorDictBase) -> Observation:
        return {
            "latents": state["latents"][0].numpy(force=True).copy(),  # the caller may write to what it was given
            "step": np.int64(state["step"].item()),
            "prompt_id": np.int64(state["prompt_id"].item()),
        }

    def _info(self, state: TensorDictBase) -> dict[str, Any]:
        return {"prompt": self._env.prompts[state["prompt_id"].item()]}


def _latent_space(decoder: Decoder) -> spaces.Box[np.float32]:
    return spaces.Box(-LATENT_BOUND, LATENT_BOUND, decoder.latent_shape, np.float32)


def _embedded_decoder() -> StableDiffusionBackbone:
    # Only shapes and `decode` are used here; without LoRA the backbone would keep a second copy of the network.
    return StableDiffusionBackbone.from_pretrained(embedded_folder(), lora=LoRA())


# The entry point is text, so that an environment's specification can be pickled and written as JSON.
gymnasium.register("Denoising-v0", entry_point="diffusion_env.gym:GymDenoisingEnv")
