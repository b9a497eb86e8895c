"""The adapter to diffusers pipelines: encoded prompts, guided network output, decoding, LoRA.

Nothing outside this file knows what a pipeline's conditioning consists of or what its network predicts.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging as transformers_logging

from .conditioning import ConditioningCache
from .lora import ADAPTER, LORA_FILE, LoRA, add_lora
from .samplers import DDIMSampler
from .sharding import load_whole, save_whole, shard

# Importing the pipeline makes transformers log that image processors, which nobody uses here, lack torchvision.
_verbosity = transformers_logging.get_verbosity()
transformers_logging.set_verbosity_error()
from diffusers import StableDiffusionPipeline  # noqa: E402

transformers_logging.set_verbosity(_verbosity)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # in float16 small gradients underflow


class StableDiffusionBackbone(nn.Module):
    """A `StableDiffusionPipeline` seen as a denoiser: Stable Diffusion 1.x, 2.x, the embedded pipeline.

    Only the UNet is a submodule (a policy's parameters are the network's); VAE and text encoder are frozen. With
    `lora` the adapter is what trains; without, every weight of the UNet does and a frozen copy is the reference.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        *,
        guidance_scale: float = 5.0,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        fold_lora: bool = True,
        compile: bool = False,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """Take over `pipeline`, whose UNet is changed in place.

        Args:
            pipeline: a loaded pipeline, on its device and in its dtype.
            guidance_scale: weight w of classifier-free guidance, out_uncond + w (out_cond - out_uncond); 1 turns it
                off and saves half of the network's work.
            lora: adapters to train; None trains the whole network.
            gradient_checkpointing: recompute activations in the backward pass.
            fold_lora: with a float32 network, add the adapters to the weights in the forward pass rather than their
                output to the layers' (see `folded_lora`): the same function and gradients, faster. In half precision
                the sum would round small adapters away, and PEFT's own layers serve.
            compile: `torch.compile` the network, which takes minutes when it is first called and again at every other
                batch size; the same numbers but for rounding.
            mesh: processes over which the UNet, which may be on the CPU, and its frozen copy are divided, see
                `diffusion_env/sharding.py`; without `lora` only. It then computes in the text encoder's dtype.
        """
        super().__init__()
        if guidance_scale < 1:
            raise ValueError(f"guidance_scale is {guidance_scale}; it must be at least 1 (1 = no guidance)")
        self.guidance_scale = guidance_scale
        self.lora = lora
        self.unet = pipeline.unet
        self._pipeline = (pipeline,)  # a tuple hides it from nn.Module: its frozen parts are no policy parameters
        for part in (pipeline.vae, pipeline.text_encoder, self.unet):
            part.requires_grad_(False).eval()
        # Asked later, while a loss holds other parameters in the network's place, it would find none.
        self._dtype = self.unet.dtype
        self._references = 0  # contexts of `reference` entered
        self._reference: tuple[nn.Module, ...] = ()
        if lora is None:
            self._reference = (copy.deepcopy(self.unet),)
            self.unet.requires_grad_(True)
        else:
            add_lora(self.unet, lora, folded=fold_lora and self._dtype == torch.float32)
        cast_training_params(self.unet)  # float32 master weights, whatever the network computes in
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing(_checkpointed)
        if compile:
            self.unet.compile()
        if mesh is not None:
            if lora is not None or compile:
                raise ValueError("a mesh divides a network that trains as a whole and is not compiled; leave one out")
            for unet in (self.unet, *self._reference):
                shard(unet, mesh, pipeline.text_encoder.dtype)
        self._negative = self._encode([""])

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        guidance_scale: float = 5.0,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        fold_lora: bool = True,
        compile: bool = False,
        channels_last: bool = True,
        mesh: DeviceMesh | None = None,
    ) -> StableDiffusionBackbone:
        """Load a pipeline from a folder or by its hub name; the arguments are those of the constructor.

        Args:
            model: a diffusers folder, or a name such as "stable-diffusion-v1-5/stable-diffusion-v1-5".
            dtype: "float32" or "bfloat16" for the frozen weights; what trains is float32 in any case.
            device: where to put it.
            guidance_scale: see the constructor.
            lora: see the constructor.
            gradient_checkpointing: see the constructor.
            fold_lora: see the constructor.
            compile: see the constructor.
            channels_last: memory format of UNet and VAE, faster on most machines; a sharded UNet cannot have it.
            mesh: see the constructor; `dtype` then also is what the float32 UNet computes in.

        Raises:
            ValueError: full fine-tuning in half precision, which loses small updates.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
        if lora is None and dtype != "float32" and mesh is None:
            raise ValueError(f"full fine-tuning in {dtype} loses small updates; use dtype='float32' or LoRA")
        # diffusers notes that a text encoder is not CLIP's; only its token states are used, so it need not be.
        logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(_is_no_type_note)
        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                str(model),
                dtype={"unet": DTYPES["float32" if mesh else dtype], "default": DTYPES[dtype]},
                safety_checker=None,
                requires_safety_checker=False,
            )
            for part in (pipeline.vae, pipeline.text_encoder, *([] if mesh else [pipeline.unet])):
                part.to(device)
        except Exception as error:
            error.add_note(
                f"The pipeline '{model}' could not be loaded. A folder must hold a whole Stable Diffusion pipeline in "
                "diffusers' format (fetch a truncated file again); a hub name needs a connection or a copy in the cache"
            )
            raise
        if channels_last:
            if mesh is None:
                pipeline.unet.to(memory_format=torch.channels_last)
            pipeline.vae.to(memory_format=torch.channels_last)
        return cls(
            pipeline,
            guidance_scale=guidance_scale,
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
            fold_lora=fold_lora,
            compile=compile,
            mesh=mesh,
        )

    @property
    def pipeline(self) -> StableDiffusionPipeline:
        """The diffusers pipeline, sharing this network."""
        return self._pipeline[0]

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return self.unet.device

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents, (channels, height, width)."""
        config = self.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (config.in_channels, height, width)

    def sampler(self, num_steps: int, eta: float = 1.0) -> DDIMSampler:
        """The DDIM sampler of this pipeline's noise schedule, on its device."""
        return DDIMSampler(self.pipeline.scheduler.config, num_steps, eta).to(self.device)

    def conditioning(self, prompts: Sequence[str], *, max_bytes: int = 1 << 28) -> ConditioningCache:
        """A cache of encoded `prompts` for `forward`."""
        return ConditioningCache(self._encode, prompts, max_bytes=max_bytes)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> TensorDict:
        states, _ = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return TensorDict({"encoder_hidden_states": states}, [len(prompts)], device=self.device)

    def forward(self, x_t: Tensor, timestep: Tensor, conditioning: TensorDict) -> Tensor:
        """Guided network output, float32 [B, *latent].

        Args:
            x_t: latents [B, *latent].
            timestep: int64 [B].
            conditioning: what `conditioning(...)` returns for the batch's prompt ids.
        """
        x_t = x_t.to(self._dtype)
        states = conditioning["encoder_hidden_states"]
        if self.guidance_scale == 1:
            return self.unet(x_t, timestep, encoder_hidden_states=states).sample.float()
        negative = self._negative["encoder_hidden_states"].expand_as(states)
        out = self.unet(
            torch.cat([x_t, x_t]), timestep.repeat(2), encoder_hidden_states=torch.cat([negative, states])
        ).sample.float()
        out_uncond, out_cond = out.chunk(2)
        return out_uncond + self.guidance_scale * (out_cond - out_uncond)

    def decode(self, latents: Tensor, *, chunk: int = 16) -> Tensor:
        """Images float32 in [0, 1], [B, 3, H, W], of latents; gradients flow unless they are switched off.

        Args:
            latents: [B, *latent], the sampler's scale.
            chunk: images decoded at a time, which bounds memory.
        """
        vae = self.pipeline.vae
        scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
        images = torch.cat([vae.decode(part, return_dict=False)[0] for part in scaled.split(chunk)])
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within this context `forward` is the pretrained network: adapter off, or the frozen copy."""
        if self.lora is not None:
            self._references += 1
            self.unet.disable_adapters()
            try:
                yield
            finally:
                self._references -= 1
                if not self._references:  # a context within this one leaves the adapter off
                    self.unet.enable_adapters()
        else:
            trained, self.unet = self.unet, self._reference[0]
            try:
                yield
            finally:
                self.unet = trained

    def save(self, folder: str | Path) -> None:
        """Write what was trained: a folder for `pipe.load_lora_weights(folder)`, or the UNet in diffusers' format.

        All processes of a sharded UNet must call this; the first one writes.
        """
        if self.lora is None:
            save_whole(self.unet, folder)
            return
        StableDiffusionPipeline.save_lora_weights(
            str(folder),
            unet_lora_layers=get_peft_model_state_dict(self.unet, adapter_name=ADAPTER),
            unet_lora_adapter_metadata=self._lora_metadata(),
        )

    def load(self, folder: str | Path) -> None:
        """Take over what `save` of a backbone with the same `lora` wrote.

        Raises:
            FileNotFoundError: nothing of that kind is there.
            ValueError: it is of another rank or of other layers.
        """
        folder = Path(folder)
        if self.lora is None:
            if not (folder / "config.json").is_file():
                raise FileNotFoundError(f"{folder} holds no UNet in diffusers' format, which full fine-tuning saves")
            load_whole(self.unet, folder)
            return
        saved, own = LoRA.saved_in(folder), replace(self.lora, targets=tuple(sorted(self.lora.targets)))
        if saved != own:
            raise ValueError(f"{folder} holds {saved}, this backbone has {own}; build it with the saved one")
        weights = {key.removeprefix("unet."): value for key, value in load_file(folder / LORA_FILE).items()}
        set_peft_model_state_dict(self.unet, weights, adapter_name=ADAPTER)

    def _lora_metadata(self) -> dict[str, Any]:
        # Without it alpha is lost and diffusers would assume alpha = rank.
        return self.unet.peft_config[ADAPTER].to_dict()


def _checkpointed(module: nn.Module, *inputs: Any) -> Any:
    """`module(*inputs)`, recomputed with the attention kernels that are allowed now.

    By the time of the backward pass others may be: `NablaDBLoss` allows only the one that has a second derivative.
    """
    enabled = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    }
    allowed = [kernel for kernel, is_enabled in enabled.items() if is_enabled()]

    def run(*inputs: Any) -> Any:
        with sdpa_kernel(allowed):
            return module(*inputs)

    return checkpoint(run, *inputs, use_reentrant=False)


def _is_no_type_note(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Expected types for text_encoder")
