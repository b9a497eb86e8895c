"""The tables of costs on a tiny pipeline: what they predict and count, against counts made otherwise."""

from math import prod

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from benchmarks import collector_overhead, cost_model, gpu, memory, method_costs, stable_diffusion
from benchmarks.main_job import markdown, read_rows
from configs import PRESETS
from diffusion_env import DDIMSampler, embedded_folder
from tests.test_readme import README


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_evaluations_and_bytes_are_the_predicted_ones(tiny_folder):
    size = cost_model.Size(images=3, num_steps=2, latent_side=4, lora_rank=5)
    row = cost_model.measure(size, tiny_folder)
    assert row["latent_numbers"] == 4 * 4 * 4
    assert row["evaluations_measured"] == row["evaluations_predicted"] == 3 * 2 * (2 + 2)
    assert row["stored_measured"] == row["stored_predicted"] == 3 * ((2 + 1) * 64 * 4 + 2 * 34 + 4)
    assert row["gradients_measured"] == row["adapter_measured"] == row["sent_predicted"] > 0


def test_the_architecture_is_stable_diffusion_15s():
    """The sizes of the published weights; peft's LoRA of rank 4 on its attention has as many as the formula says."""
    backbone = gpu.load(gpu.Settings(device="meta"))
    trained = sum(parameter.numel() for parameter in backbone.unet.parameters() if parameter.requires_grad)
    sizes = [parameters(part) for part in (backbone.unet, backbone.pipeline.vae, backbone.pipeline.text_encoder)]
    assert sizes == [859_520_964 + trained, 83_653_863, 123_060_480]
    layers = cost_model.adapted_layers(backbone.unet, backbone.lora.targets)
    assert cost_model.lora_parameters(layers, backbone.lora.rank) == trained == 797_184
    assert (backbone.latent_shape, backbone.unet.dtype) == ((4, 64, 64), torch.bfloat16)


@pytest.mark.parametrize(("preset", "column"), [("embedded", 2), ("sd15", 3)])
def test_the_readmes_costs_are_those_of_the_presets(preset, column):
    run, folder = PRESETS[preset](), embedded_folder()
    config, schedule = stable_diffusion.UNET, stable_diffusion.SCHEDULE
    if preset == "embedded":
        config = UNet2DConditionModel.load_config(folder, subfolder="unet")
        schedule = DDIMScheduler.load_config(folder, subfolder="scheduler")
    with torch.device("meta"):
        layers = cost_model.adapted_layers(UNet2DConditionModel.from_config(config), run.model.lora_targets)
    images, steps = run.sampling.images_per_iteration, run.sampling.num_steps
    sent = cost_model.sent_bytes(cost_model.lora_parameters(layers, run.model.lora_rank)) / 1e6
    stored = cost_model.stored_bytes(images, steps, config["in_channels"] * config["sample_size"] ** 2) / 1e6
    evaluations = cost_model.METHOD.cost(run, DDIMSampler(schedule, steps)).network_evaluations
    section = README.split("## What it costs when it grows")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("|")][2:]
    cells = [row[column + 1].strip() for row in rows]
    assert cells[0] == f"{evaluations:,.0f}"
    assert cells[1] == (f"{stored:.1f} MB" if stored < 100 else f"{stored:.0f} MB")
    assert cells[2] == cells[3] == f"{sent:.1f} MB"


def test_the_smaller_network_has_a_tenth_of_the_parameters():
    config = UNet2DConditionModel.load_config(embedded_folder(), subfolder="unet")
    with torch.device("meta"):
        large, small = (UNet2DConditionModel.from_config(config | own) for own in ({}, collector_overhead.TENTH))
    assert parameters(small) / parameters(large) == pytest.approx(0.1, rel=0.05)


def test_both_ways_to_sample_make_the_same_network_calls(backbone):
    settings = collector_overhead.Settings(images=2, num_steps=3, rounds=2)
    with method_costs.counted(backbone.unet) as evaluations:
        row = collector_overhead.compare(backbone, settings)
    assert evaluations() == 2 * (settings.rounds + 1) * 2 * 2 * 3
    assert 0 < row["lowest"] <= row["median_ratio"] <= row["highest"]


def test_a_row_of_memory(tiny_folder, tmp_path):
    settings = memory.Settings(
        images=2, num_steps=3, micro_batch=4, model=str(tiny_folder), results=tmp_path / "rows.csv"
    )
    memory.main(settings)
    (row,) = read_rows(settings.results)
    latents = 4 * 8 * 8 * 4
    assert int(row["floor"]) == 4 * latents
    assert int(row["bytes_per_trajectory"]) == 4 * latents + 3 * 34
    assert int(row["bytes_at_handover"]) > (4 + 2 * 3) * latents
    assert float(row["peak_resident_mib"]) > float(row["peak_iteration_mib"])


def test_a_row_of_method_costs(tiny_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    settings = method_costs.Settings(
        methods=("ddpo-sf",),
        images=4,
        num_steps=1,
        rounds=1,
        model=str(tiny_folder),
        prompts=str(prompts),
        results=tmp_path / "rows.csv",
    )
    method_costs.main(settings)
    (row,) = read_rows(settings.results)
    assert float(row["evaluations_per_image"]) == float(row["expected"]) == 2 * (1 + 1)
    shares = {key: float(value) for key, value in row.items() if key.startswith("share_")}
    assert list(shares) == ["share_sampling", "share_reward", "share_training", "share_else"]
    assert sum(shares.values()) == pytest.approx(1, abs=2e-3)
    assert min(shares["share_sampling"], shares["share_reward"], shares["share_training"]) > 0
    assert "| ddpo-sf |" in capsys.readouterr().out


@pytest.fixture
def small(tiny_folder, tmp_path):
    """A GPU's table on a CPU."""
    return gpu.Settings(
        model=str(tiny_folder),
        device="cpu",
        dtype="float32",
        compiled=False,
        peak_tflops=0.25,
        images=4,
        num_steps=2,
        micro_batch=4,
        rounds=1,
        results=tmp_path / "rows.csv",
    )


def operations_of_layers(parts, work):
    """Two for each product in linear layers, convolutions and attention while `work` runs, from shapes alone."""
    layers, queries, keys = [], [], []

    def note(module, inputs, output):
        layers.append(2 * output.numel() * prod(module.weight.shape[1:]))

    hooks = []
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            hooks.append(module.register_forward_hook(note))
        if isinstance(module, Attention):
            hooks.append(module.to_q.register_forward_hook(lambda module, inputs, output: queries.append(output)))
            hooks.append(module.to_k.register_forward_hook(lambda module, inputs, output: keys.append(output)))
    work()
    for hook in hooks:
        hook.remove()
    # Scores are a product of each query with each key, and what they weigh is as many again.
    attention = [2 * 2 * query.numel() * key.shape[1] for query, key in zip(queries, keys, strict=True)]
    return sum(layers) + sum(attention)


def test_operations_are_those_of_the_layers(small):
    backbone = gpu.load(small)
    job = gpu.Job(backbone, small, images=1)
    sampling = gpu.operations(job.sample)
    assert sampling == operations_of_layers([backbone.unet, backbone.pipeline.vae], job.sample)
    forward = operations_of_layers([backbone.unet], job.backpropagate)
    assert 0 < forward < sampling
    # A backward pass through frozen weights is as many again, through an adapter's own twice as many.
    assert 1.8 * forward < gpu.operations(job.backpropagate) < 2.2 * forward


def test_rates_and_shares_of_the_peak(small, capsys):
    gpu.main(small)
    (row,) = read_rows(small.results)
    assert (row["device"], row["mode"], row["images"]) == ("cpu", "eager", "4")
    for half in ("sampling", "training"):
        rate, work, share = (
            float(row[f"{half}_{name}"]) for name in ("images_per_second", "tflop_per_image", "share_of_peak")
        )
        assert share == pytest.approx(rate * work / 0.25, rel=0.01)
        assert 0 < share < 1
    assert "| cpu |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
    ],
)
def test_the_peak_of_a_chip(name, peak):
    assert gpu.peak_of(name) == peak


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA GH200 480GB"])
def test_no_peak_is_guessed(name):
    with pytest.raises(ValueError, match="--peak-tflops from its data sheet"):
        gpu.peak_of(name)


def test_what_would_be_measured_wrongly_is_refused():
    with pytest.raises(ValueError, match="no multiple of micro_batch=8"):
        gpu.Settings(images=12)
    with pytest.raises(ValueError, match="for half precision"):
        gpu.Settings(dtype="float32")
    with pytest.raises(ValueError, match="at least one"):
        method_costs.Settings(rounds=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_says_so(small):
    with pytest.raises(ValueError, match="no GPU was found"):
        gpu.main(gpu.Settings(results=small.results))


def test_rows_as_markdown():
    assert markdown([{"a": 1, "b": 0.5}, {"a": 2, "b": "x"}]) == "| a | b |\n| --- | --- |\n| 1 | 0.5 |\n| 2 | x |\n"
