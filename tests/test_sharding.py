"""A UNet that is sharded over two processes trains as a whole one does: real processes under torchrun, gloo."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from configs import ModelSettings, RunSettings, build_backbone, build_experiment, parse_settings
from examples import nabla_db_aesthetic
from examples.evaluate import settings_of_run
from tests import shards
from tests.runs import (
    Program,
    checkpoint,
    equal,
    lose_process,
    metrics,
    on_two_processes,
    start,
    tensors,
    torchrun,
    wait_for,
)

UNET = "lora/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def single(tiny_folder):
    return shards.run(tiny_folder)


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    on_two_processes("shards.py", tiny_folder, folder, timeout=400)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_same_update(expected, found):
    """Shares are rows of the whole, a critic's weights are the same on both processes."""
    for weight, *shares in zip(expected["weights"], *(each["weights"] for each in found), strict=True):
        if len(shares[0]) == len(weight):
            assert torch.equal(*shares)
            shares.pop()
        torch.testing.assert_close(torch.cat(shares), weight, rtol=1e-5, atol=1e-6)
    assert found[0]["metrics"] == found[1]["metrics"]
    assert found[0]["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-6)
    assert expected["metrics"]["grad_norm"] > 0


@pytest.mark.parametrize("loss", shards.LOSSES)
def test_an_update_is_that_of_one_process_with_both_batches(single, both, loss):
    """Each has five transitions; of RWR's the first has ten and the second none."""
    assert_same_update(single["updates"][loss], [results["updates"][loss] for results in both])


def test_processes_need_not_have_as_many_micro_batches(single, both):
    assert_same_update(single["uneven"], [each["uneven"] for each in both])


def test_a_gradient_that_is_not_finite_is_skipped_everywhere(single, both):
    assert "step 2 of prompt" in single["broken"]["warnings"][0]
    for rank, found in enumerate(results["broken"] for results in both):
        assert found["metrics"] == {"skipped_updates": 1.0}
        assert found["unchanged"]
        assert ["which transition is to blame" in each for each in found["warnings"]] == [True] * (rank == 0)


def test_losses_whose_network_calls_depend_on_the_data_are_refused(single, both):
    assert not single["refused"]
    for results in both:
        assert results["refused"].keys() == {"AlignProp", "Nabla-DB"}
        for name, message in results["refused"].items():
            assert f"{name} calls the network more or less often" in message
            assert "--model.shard" in message


def test_half_precision_computes_in_it_and_trains_float32_weights(single, both):
    expected = single["bfloat16"]["output"]
    for results in both:
        torch.testing.assert_close(results["bfloat16"]["output"], expected, rtol=2e-2, atol=2e-2)
        assert set(results["bfloat16"]["computed"]) == {"torch.bfloat16"}
        assert results["bfloat16"]["trained"] == ["torch.float32"]


def test_a_run_is_that_of_whole_networks_and_leaves_one(folder):
    """But for rounding, which Adam magnifies."""
    whole, sharded = (folder / name for name in ("whole", "sharded"))
    rows = [
        [{key: float(value) for key, value in row.items() if value} for row in metrics(run)] for run in (sharded, whole)
    ]
    for ours, expected in zip(*rows, strict=True):
        assert ours == pytest.approx(expected, rel=1e-2, abs=1e-5)
    settings = settings_of_run(json.loads((sharded / "config.json").read_text()))  # for one process
    backbone = build_backbone(settings.model)
    before = vector(backbone.unet.state_dict())
    ours, expected = (vector(load_file(run / UNET)) for run in (sharded, whole))
    assert (ours - expected).norm() < 0.01 * (expected - before).norm()
    backbone.load(sharded / "lora")
    assert torch.equal(vector(backbone.unet.state_dict()), ours)


def vector(weights):
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def test_a_sharded_run_is_resumed_bit_for_bit(folder):
    resumed, sharded = (folder / name for name in ("resumed", "sharded"))
    assert metrics(resumed) == metrics(sharded)
    assert equal(*(load_file(run / UNET) for run in (resumed, sharded)))
    assert equal(*(tensors(run, shards.ITERATIONS) for run in (resumed, sharded)))


def test_a_share_is_half_of_a_checkpoint(folder):
    """No process holds the whole network or the optimiser's whole state."""
    parts = tensors(folder / "sharded", shards.ITERATIONS)
    (loss,) = (value["by_rank"] for name, value in parts.items() if "loss" in name)
    (optimizer,) = (value["by_rank"] for name, value in parts.items() if "optimizer" in name)
    weights = sum(weight.numel() for weight in load_file(folder / "sharded" / UNET).values())
    for of_process in optimizer:
        held = sum(each["exp_avg"].numel() for each in of_process["state"].values())
        assert 0.4 * weights < held < 0.6 * weights
    assert sum(each.numel() for own in loss for each in own.values() if each.ndim) == weights


def test_a_killed_process_ends_the_other_with_a_message(tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    options = ("--model.shard", "--model.lora-rank", "0", "--reward", "jpeg-compressibility", "--held-out")
    program = Program("ppo_aesthetic.py", tiny_folder, prompts, (*options, "jpeg-incompressibility"), 1000)
    process = start(torchrun(program.command(tmp_path / "run")))
    wait_for(checkpoint(tmp_path / "run", 1).exists, process)
    lose_process(process)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"shard": True}, "with adapters"), ({"shard": True, "lora_rank": 0, "dtype": "float16"}, "loses small updates")],
)
def test_what_cannot_be_sharded_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelSettings(**settings)


def test_a_single_process_has_nothing_to_share(tiny_folder):
    settings = RunSettings()
    with pytest.raises(ValueError, match="there is only one: start several with torchrun"):
        build_experiment(replace(settings, model=ModelSettings(name="nowhere", lora_rank=0, shard=True)))


def test_a_program_whose_loss_is_refused_says_so_at_once(capsys):
    arguments = ["--model.lora-rank", "0", "--model.shard"]
    with pytest.raises(SystemExit):
        parse_settings("", arguments, adapt=nabla_db_aesthetic.adapt, shardable=False)
    assert "model.shard: how often this program's method calls the network" in capsys.readouterr().err
