"""Evaluate fine-tuned adapters on any prompt set, beside the pretrained model and against it.

    python examples/evaluate.py runs/ppo_aesthetic runs/nabla_db_aesthetic
    python examples/evaluate.py runs/ppo_aesthetic/lora_best --prompts unseen-animals --samples 8
    python examples/evaluate.py my_lora --prompts prompts.txt --held-out jpeg-compressibility

Every model draws the same prompts from the same noise. Leaves in --output: `table.csv`, `table.md`, and for each
adapter `NAME.png`, the pretrained model's images above its own. Columns: reward, its standard error and quantiles;
held-out rewards; `diversity` within prompts, `moved` and `fid` to the pretrained model (`agents/metrics.py`); `kl` in
nats; `judged`, the share of images in which the independent judge sees their animal, where all prompts name one. The
first two rows are the pretrained model and the same from other noise. `moved` and `fid` compare images of the same
noise, so that they are 0 where nothing changed; the second row says how far the pretrained model is from itself
without that, which for few images of each prompt is far.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from agents import Evaluation, Evaluator, make_policy
from agents.metrics import FeatureExtractor
from agents.run_folder import draw_before_after
from configs import ModelSettings, RunSettings, build_backbone, build_held_out, build_reward
from configs.schema import HeldOutName, RewardName
from diffusion_env import DenoisingEnv, LoRA, prompt_set
from examples.pretraining.judge import animal_in, judged_accuracy
from rewards import CLIPFeatures, DreamSimFeatures, LiteFeatures

OTHER_NOISE = 1000  # seed of the pretrained model's second row, beyond those of evaluations


@dataclass(frozen=True)
class Settings:
    """What is evaluated, and on what."""

    adapters: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders that an adapter or a UNet was saved to."""
    prompts: str = "animals"
    """A prompt set by name, or a text or JSONL file, one prompt a line."""
    samples: int = 4
    """Images of each prompt; diversity and FID need two, and depend on how many."""
    reward: RewardName | None = None
    """By default that of the first run, or style-preference."""
    held_out: tuple[HeldOutName, ...] = ("prompt-fidelity",)
    """Further rewards."""
    features: Literal["lite0", "lite2", "clip", "dreamsim"] = "lite2"
    """Network of the features in diversity, FID and `moved`; lite2 is used by no reward, clip is ViT-L/14, dreamsim
    needs the package of that name."""
    kl_trajectories: int = 45
    """Trajectories that the KL divergence is measured along."""
    batch: int = 45
    """Images sampled at a time."""
    seed: int = 0
    """Of the noise."""
    output: Path = Path("runs/evaluation")
    """Where table and pictures go."""

    def __post_init__(self) -> None:
        """Refuse what cannot be evaluated."""
        if not self.adapters:
            raise ValueError("no adapter was given; name at least one run folder or adapter")
        if self.samples < 2:
            raise ValueError(f"samples={self.samples} must be at least 2: diversity and FID are within a prompt")
        if self.batch < 1 or self.kl_trajectories < 1:
            raise ValueError(f"batch={self.batch} and kl_trajectories={self.kl_trajectories} must be at least 1")


@dataclass(frozen=True)
class Adapter:
    """Trained weights and the settings that belong to them."""

    name: str
    weights: Path
    settings: RunSettings


def find_adapter(path: Path) -> Adapter:
    """The adapter at `path`, with its run's settings where it lies in a run folder, else the embedded preset's.

    Raises:
        FileNotFoundError: there is none.
    """
    run = path if (path / "lora").is_dir() else path.parent
    weights = path / "lora" if run == path else path
    name = path.name if run == path else f"{path.parent.name}-{path.name}"
    if (run / "config.json").is_file():
        return Adapter(name, weights, settings_of_run(json.loads((run / "config.json").read_text())))
    lora = LoRA.saved_in(weights)
    model = ModelSettings(lora_rank=lora.rank, lora_alpha=lora.alpha, lora_targets=lora.targets)
    return Adapter(path.name, weights, replace(RunSettings(), model=model))


def settings_of_run(config: dict[str, Any]) -> RunSettings:
    """What of a run's `config.json` an evaluation needs: model, sampling, reward."""
    default = RunSettings()
    model = config["model"] | {"lora_targets": tuple(config["model"]["lora_targets"])}
    if model.get("shard"):  # it is whole here, and its weights are float32
        model |= {"shard": False, "dtype": "float32"}
    sampling = {key: config["sampling"][key] for key in ("num_steps", "eta")}
    return replace(
        default,
        reward=config["reward"],
        reward_head=config["reward_head"],
        held_out=(),
        model=replace(default.model, **model),
        sampling=replace(default.sampling, **sampling),
    )


def comparable(adapters: list[Adapter]) -> None:
    """Refuse adapters of different pretrained models or samplers: no row would say what made the difference."""

    def setting(adapter: Adapter) -> tuple[object, ...]:
        model, sampling = adapter.settings.model, adapter.settings.sampling
        return model.name, model.guidance_scale, sampling.num_steps, sampling.eta

    for adapter in adapters:
        if setting(adapter) != setting(adapters[0]):
            raise ValueError(
                f"{adapter.name} was trained with (model, guidance, steps, eta) = {setting(adapter)}, "
                f"{adapters[0].name} with {setting(adapters[0])}; evaluate them one by one"
            )
    names = [adapter.name for adapter in adapters]
    if len(set(names)) < len(names):
        raise ValueError(f"two adapters would have the same name in the table: {', '.join(names)}; rename a folder")


class Bench:
    """Evaluates one adapter and its pretrained model."""

    def __init__(self, adapter: Adapter, settings: Settings) -> None:
        """Load everything."""
        run = adapter.settings
        backbone = build_backbone(run.model)
        backbone.load(adapter.weights)
        sampler = backbone.sampler(run.sampling.num_steps, run.sampling.eta)
        prompts = prompt_set(settings.prompts)
        self.policy = make_policy(backbone, sampler, backbone.conditioning(prompts))
        name = settings.reward or run.reward
        head = run.reward_head if name == run.reward else None
        reward = build_reward(name, head=head, device=backbone.device)
        self.env = DenoisingEnv(backbone, sampler.num_steps, reward, prompts, batch_size=settings.batch)
        self.features = build_features(settings.features, backbone.device)
        self.backbone = backbone

    def evaluator(self, settings: Settings, *, seed: int, held_out: dict[str, Any]) -> Evaluator:
        """Of these settings' prompts and noise."""
        return Evaluator(
            self.env,
            samples_per_prompt=settings.samples,
            seed=seed,
            held_out=held_out,
            features=self.features,
            kl_trajectories=settings.kl_trajectories,
        )


def build_features(name: str, device: torch.device) -> FeatureExtractor:
    """The network of that name."""
    if name == "dreamsim":
        return DreamSimFeatures(device)
    features = CLIPFeatures() if name == "clip" else LiteFeatures(name)
    return features.to(device)


def row(name: str, evaluation: Evaluation, pretrained: Evaluation) -> dict[str, object]:
    """A line of the table."""
    measured = evaluation.row(pretrained)
    try:
        for prompt in evaluation.prompts:
            animal_in(prompt)
    except ValueError:
        pass  # the judge knows nothing of these prompts
    else:
        measured["judged"] = judged_accuracy(evaluation.images, evaluation.prompts)
    return {"model": name, "images": len(evaluation.prompts)} | {key: f"{v:.5g}" for key, v in measured.items()}


def write_table(rows: list[dict[str, object]], folder: Path) -> None:
    """The same as CSV and as Markdown."""
    columns = list(dict.fromkeys(key for line in rows for key in line))
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    lines = [columns, ["---"] * len(columns), *([str(line.get(column, "")) for column in columns] for line in rows)]
    (folder / "table.md").write_text("".join(f"| {' | '.join(cells)} |\n" for cells in lines))


def main(settings: Settings) -> None:
    """Evaluate and write."""
    prompt_set(settings.prompts)  # a missing file shows before a model loads
    adapters = [find_adapter(path) for path in settings.adapters]
    comparable(adapters)
    settings = replace(settings, reward=settings.reward or adapters[0].settings.reward)
    settings.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for adapter in adapters:
        bench = Bench(adapter, settings)
        if not rows:
            held_out = build_held_out(settings.held_out, bench.env, bench.policy, bench.features)
            evaluate = bench.evaluator(settings, seed=settings.seed, held_out=held_out)
            again = bench.evaluator(settings, seed=OTHER_NOISE, held_out=held_out)
            with bench.backbone.reference():
                pretrained, other = evaluate(bench.policy), again(bench.policy)
            rows += [row("pretrained", pretrained, pretrained), row("pretrained, other noise", other, pretrained)]
        evaluation = bench.evaluator(settings, seed=settings.seed, held_out=held_out)(bench.policy)
        rows.append(row(adapter.name, evaluation, pretrained))
        draw_before_after(pretrained, evaluation, settings.output / f"{adapter.name}.png")
        write_table(rows, settings.output)
    print(f"{settings.reward} on {settings.prompts}\n{(settings.output / 'table.md').read_text()}\n{settings.output}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
