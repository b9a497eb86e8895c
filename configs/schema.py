"""Settings of a policy-gradient run as frozen dataclasses; impossible ones are refused before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from agents import Optimisation, WatchRule
from rewards import REWARDS

if TYPE_CHECKING:  # a type checker cannot read the registry; the command line offers and checks its names
    RewardName = str
    HeldOutName = str
else:
    RewardName = Literal[tuple(REWARDS)]
    HeldOutName = Literal[("prompt-fidelity", *REWARDS)]

ExperimentName = Literal["aesthetic", "alignment", "compressibility", "counting", "hpsv2", "image_reward"]


@dataclass(frozen=True)
class ModelSettings:
    """The pipeline and what of it is trained."""

    name: str = "embedded"
    """'embedded', a diffusers folder, or a hub name of a Stable Diffusion 1.x or 2.x pipeline."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights; what trains is float32 in any case. bfloat16 is approximate: a run whose importance ratio
    it moves by more than a tenth of the clip range is refused, see training.recompute-log-prob. (In float16, gradients
    of a mean over thousands of transitions underflow to 0.)"""
    device: str = "auto"
    """'auto' is cuda where there is one, else cpu."""
    guidance_scale: float = 2.0
    """Classifier-free guidance in sampling and training alike; 1 turns it off."""
    lora_rank: int = 16
    """0 trains the whole UNet."""
    lora_alpha: float = 16.0
    """Scale of the adapter is alpha / rank."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
    """Names of the UNet's layers that get an adapter."""
    gradient_checkpointing: bool = False
    """Exact. Recompute activations: less memory, a third more time in training."""
    channels_last: bool = True
    """Exact but for rounding. Memory format of UNet and VAE, faster on most machines."""
    fold_lora: bool = True
    """Exact but for rounding. Adapters are added to the weights in the forward pass rather than their output to the
    layers', those of convolutions where no gradient is recorded; in half precision, where that would round small
    adapters away, nothing is folded."""
    compile: bool = False
    """Exact but for rounding. torch.compile the network: minutes at the start and at every new batch size, which only a
    long run on a GPU is likely to win back."""
    shard: bool = False
    """Divide the whole UNet, its gradients and the optimiser's state over torchrun's processes (FSDP2). With dtype
    bfloat16 it computes in that, the weights being float32."""

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        _require(self.guidance_scale >= 1, f"guidance_scale={self.guidance_scale} must be at least 1 (1 = off)")
        _require(self.lora_rank >= 0, f"lora_rank={self.lora_rank} must be at least 0 (0 = train the whole UNet)")
        _require(self.lora_rank == 0 or self.lora_alpha > 0, f"lora_alpha={self.lora_alpha} must be above 0")
        _require(
            not self.shard or self.lora_rank == 0,
            f"shard divides a UNet that trains as a whole; with adapters (lora_rank={self.lora_rank}) each process has "
            "all of it. Set lora_rank=0 or leave out shard",
        )
        _require(not (self.shard and self.compile), "shard and compile have not been made to fit; leave out one")
        _require(
            self.lora_rank > 0 or self.dtype == "float32" or (self.shard and self.dtype == "bfloat16"),
            f"lora_rank=0 trains the whole UNet, which in {self.dtype} loses small updates; use dtype=float32, or "
            "bfloat16 with shard, which keeps float32 weights",
        )


@dataclass(frozen=True)
class SamplingSettings:
    """How images are made, in training and evaluation alike."""

    prompts: str = "animals"
    """A prompt set by name, or a text or JSONL file, one prompt a line."""
    num_steps: int = 4
    """Denoising steps T."""
    eta: float = 1.0
    """DDIM's noise, in (0, 1]; 1 is DDPM's posterior."""
    images_per_iteration: int = 64
    """Images sampled before each round of updates, by each process."""
    samples_per_prompt: int = 1
    """How often each drawn prompt is repeated in a batch."""
    batch_size: int | None = None
    """Images denoised at a time; None takes an iteration's all at once. Fewer need less memory, and while they are
    denoised a thread computes the rewards of those before. This is exact: the policy changes only when all rewards are
    there, and they are what computing them in turn gives, but for a reward that draws PyTorch's random numbers."""
    workers: int = 0
    """Other processes that make an iteration's images and rewards, an equal share each, with a network of their own; 0
    makes them in this one. A run with workers is resumed like any other, bit for bit on a CPU."""
    worker_kind: Literal["process", "ray"] = "process"
    """Where workers run: on this machine, or on a Ray cluster (`ray start`; without one Ray is started here)."""

    @property
    def episodes(self) -> int:
        """Batches an iteration."""
        return 1 if self.batch_size is None else self.images_per_iteration // self.batch_size

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        _require(1 <= self.num_steps <= 1000, f"num_steps={self.num_steps} must lie between 1 and 1000")
        _require(0 < self.eta <= 1, f"eta={self.eta} must lie in (0, 1]: at 0 no step has a log-probability to train")
        _require(self.images_per_iteration >= 1, f"images_per_iteration={self.images_per_iteration} must be at least 1")
        _require(
            self.samples_per_prompt >= 1 and self.images_per_iteration % self.samples_per_prompt == 0,
            f"images_per_iteration={self.images_per_iteration} is no multiple of "
            f"samples_per_prompt={self.samples_per_prompt}",
        )
        if self.batch_size is not None:
            _require(
                self.batch_size >= 1
                and self.images_per_iteration % self.batch_size == 0
                and self.batch_size % self.samples_per_prompt == 0,
                f"batch_size={self.batch_size} must divide images_per_iteration={self.images_per_iteration} and be a "
                f"multiple of samples_per_prompt={self.samples_per_prompt}",
            )
        self._check_workers()

    def _check_workers(self) -> None:
        _require(self.workers >= 0, f"workers={self.workers} must be at least 0 (0 = none beside this process)")
        _require(
            self.workers > 0 or self.worker_kind == "process",
            f"worker_kind={self.worker_kind} says where workers run, and there are none: set workers",
        )
        _require(
            not self.workers or self.images_per_iteration % (self.workers * self.samples_per_prompt) == 0,
            f"images_per_iteration={self.images_per_iteration} cannot be shared out among workers={self.workers} in "
            f"whole groups of samples_per_prompt={self.samples_per_prompt}",
        )
        _require(
            not (self.workers and self.batch_size),
            f"batch_size={self.batch_size} is for images made in this process; a worker makes its share of an "
            f"iteration, images_per_iteration / workers, at a time: use more workers and leave batch_size at None",
        )


@dataclass(frozen=True)
class TrainingSettings(Optimisation):
    """How the policy is improved: the method's own settings beside those of the optimisation."""

    clip_range: float = 1e-3
    """PPO's; it belongs to the reduction of the log-probability and the size of the latents."""
    kl_penalty: float = 0.0
    """Weight of each step's KL divergence to the pretrained model in a policy gradient's loss; 0 computes none, more
    than 0 costs one network call without gradient a transition."""
    log_prob_reduction: Literal["mean", "sum"] = "mean"
    """'mean' over the latent's elements as in DDPO's code, or the true 'sum'."""
    timestep_fraction: float = 1.0
    """Share of each trajectory's steps that train, drawn anew each time."""
    min_noise: float = 0.9
    """Steps train whose noise has at least this share of the noisiest step's standard deviation; here only the first of
    four. Gradients grow as 1 / std, and so does their noise: the last two steps' are five and a hundred times as large
    and hold no signal that two halves of 640 images would share (`benchmarks/gradient_signal.py`)."""
    advantage_buffer: int = 32
    """Rewards remembered a prompt."""
    advantage_min_count: int = 8
    """Below this many, the batch's statistics serve."""
    recompute_log_prob: bool = False
    """Compute old log-probabilities again on the training path: needed where half precision makes the two differ."""

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        for name in ("iterations", "updates_per_epoch", "epochs", "micro_batch", "compare_processes_every"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "clip_range", "max_grad_norm"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be above 0")
        _require(self.max_skipped_updates >= 0, f"max_skipped_updates={self.max_skipped_updates} must be at least 0")
        _require(self.kl_penalty >= 0, f"kl_penalty={self.kl_penalty} must be at least 0 (0 = none)")
        _require(0 <= self.min_noise <= 1, f"min_noise={self.min_noise} must lie in [0, 1]")
        _require(0 < self.timestep_fraction <= 1, f"timestep_fraction={self.timestep_fraction} must lie in (0, 1]")
        _require(
            1 <= self.advantage_min_count <= self.advantage_buffer,
            f"advantage_min_count={self.advantage_min_count} must lie between 1 and "
            f"advantage_buffer={self.advantage_buffer}",
        )


@dataclass(frozen=True)
class RunSettings:
    """A whole run."""

    preset: Literal["embedded", "sd15"] = "embedded"
    """Where the other defaults come from: the small pipeline that ships, or DDPO's published settings."""
    experiment: ExperimentName | None = None
    """Where prompts, reward and the numbers published for them come from; None is the program's own experiment."""
    config: Path | None = None
    """Instead of --preset and --experiment: a new run with the settings of this file, RUN/config.json; other options
    win over it."""
    resume: Path | None = None
    """Continue the run in this folder after its newest checkpoint; its settings are kept, no other option is taken."""
    reward: RewardName = "style-preference"
    """What is maximised; `python -m rewards` says what each needs."""
    reward_head: str | None = None
    """For laion-aesthetic: file with the published head's weights."""
    seed: int = 0
    """Seeds prompts, noise and adapters."""
    output: Path = Path("runs/ppo_aesthetic")
    """The run folder; a number is appended when it holds a run already."""
    logger: Literal["csv", "tensorboard", "wandb"] = "csv"
    """TorchRL's logger that gets the metrics beside metrics.csv."""
    evaluate_every: int = 10
    """Iterations between evaluations on fixed prompts and noise."""
    evaluation_samples: int = 2
    """Images a prompt in an evaluation; diversity within prompts needs two."""
    checkpoint_every: int = 1
    """Iterations between checkpoints, the newest two of which are kept; there is one after the last in any case."""
    held_out: tuple[HeldOutName, ...] = ("prompt-fidelity",)
    """Rewards that are evaluated and not trained on: what the watch goes by."""
    profile: bool = False
    """Leave a trace of the second iteration, trace.json.gz, and a page about where its time went, profile.md."""
    watch: WatchRule = field(default_factory=WatchRule)
    model: ModelSettings = field(default_factory=ModelSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        _require(self.reward in REWARDS, f"reward={self.reward!r} must be one of {', '.join(REWARDS)}")
        _require(
            self.reward_head is None or self.reward == "laion-aesthetic",
            f"reward_head={self.reward_head!r} is read by laion-aesthetic alone, not by {self.reward}",
        )
        _require(self.evaluate_every >= 1, f"evaluate_every={self.evaluate_every} must be at least 1")
        _require(self.checkpoint_every >= 1, f"checkpoint_every={self.checkpoint_every} must be at least 1")
        _require(
            not self.profile or self.training.iterations >= 2,
            f"profile needs at least 2 iterations, the first of which warms up; iterations={self.training.iterations}",
        )
        _require(self.evaluation_samples >= 1, f"evaluation_samples={self.evaluation_samples} must be at least 1")
        _require(
            self.reward not in self.held_out,
            f"held_out={self.held_out} names the reward that is trained on, {self.reward}; nothing would be held out",
        )
        steps = max(1, round(self.training.timestep_fraction * self.sampling.num_steps))
        transitions = steps * self.sampling.images_per_iteration
        _require(
            transitions >= self.training.updates_per_epoch,
            f"{self.sampling.images_per_iteration} images x {steps} trained steps are {transitions} transitions, too "
            f"few for updates_per_epoch={self.training.updates_per_epoch}",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
