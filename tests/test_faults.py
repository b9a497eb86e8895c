"""What goes wrong around a run: each fault stops with an error that says what to do, or is survived."""

import errno
import re
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace

import huggingface_hub.constants
import pytest
import torch
from torch import nn

from agents import RunFolder
from agents.checkpoint import Checkpoints
from agents.memory import memory_advice
from agents.training import SkippedUpdateWarning
from configs import RunSettings, build_experiment, build_folder, parse_settings
from configs.presets import read_settings
from diffusion_env import DenoisingEnv, StableDiffusionBackbone, load_prompts
from examples import ppo_aesthetic


@contextmanager
def files_no_larger_than(size):
    """In this process; a write beyond is an error as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_earlier_checkpoints_and_metrics_whole(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    optimizer = torch.optim.Adam(nn.Linear(300, 300).parameters())
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", {"optimizer": optimizer, "metrics": folder}, {})
    folder.log({"reward": 1.0})
    checkpoints.save(1)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # 700 kB of averages
    metrics = (tmp_path / "run" / "metrics.csv").read_bytes()
    with files_no_larger_than(100_000), pytest.raises((OSError, RuntimeError), match="after 2 iterations .* resume"):
        checkpoints.save(2)
    with files_no_larger_than(10), pytest.raises(OSError, match="metrics.csv could not be written") as full:
        folder.log({"reward": 2.0})
    assert full.value.errno == errno.EFBIG
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == metrics
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-000000000001.torchrl"]
    checkpoints.load(checkpoints.newest())
    assert [row["reward"] for row in folder.rows] == [1.0]


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=f"The run folder {path} cannot be written; choose another --output"):
            RunFolder(path, {})


def settings(tiny_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    arguments = {
        "reward": "jpeg-compressibility",
        "model.name": tiny_folder,
        "model.lora-rank": 2,
        "sampling.prompts": tmp_path / "prompts.txt",
        "sampling.num-steps": 3,
        "sampling.images-per-iteration": 4,
        "training.iterations": 5,
        "training.advantage-min-count": 2,
        "evaluation-samples": 2,
        "output": tmp_path / "run",
    }
    return parse_settings("", [str(part) for key, value in arguments.items() for part in (f"--{key}", value)])


def test_a_run_whose_gradients_stay_nan_stops(tiny_folder, tmp_path):
    """The first update is so large that everything after it overflows."""
    chosen = settings(tiny_folder, tmp_path)
    training = replace(chosen.training, learning_rate=1e30, updates_per_epoch=2, max_skipped_updates=2)
    with (
        pytest.warns(SkippedUpdateWarning, match="of prompt [01] 'a (cat|dog)'"),
        pytest.raises(FloatingPointError, match="3 updates were skipped .* more than max_skipped_updates=2"),
    ):
        ppo_aesthetic.main(replace(chosen, training=training))
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3


def test_a_reward_that_raises_is_named_and_its_error_kept():
    class Decoder:
        latent_shape, device = (2, 1, 1), torch.device("cpu")

        def decode(self, latents):
            return latents

    def fragile(images, prompts):
        raise KeyError("no such model")

    env = DenoisingEnv(Decoder(), 1, fragile, ["a cat"], batch_size=2)
    with pytest.raises(KeyError, match="(?s)no such model.*Raised by the reward .*fragile for 2 images.*'a cat'"):
        env.rollout(1)


def test_running_out_of_memory_says_which_settings_help():
    @memory_advice()
    def allocate():
        torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(RuntimeError, match="(?s)--training.micro-batch.*--sampling.batch-size"):
        allocate()


def truncate(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def corrupt(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])


@pytest.mark.parametrize("damage", [truncate, corrupt, lambda folder: (folder / "model_index.json").unlink()])
def test_a_damaged_pipeline_is_named(damage, tiny_folder, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_folder, folder)
    damage(folder)
    with pytest.raises(Exception, match=f"The pipeline '{folder}' could not be loaded"):
        StableDiffusionBackbone.from_pretrained(folder)


def test_a_hub_out_of_reach_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Exception, match="'nobody/nothing' could not be loaded.* a hub name needs a connection"):
        StableDiffusionBackbone.from_pretrained("nobody/nothing")


def test_a_hundred_thousand_prompts_are_read(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {n}" for n in range(100_000)))
    assert load_prompts(tmp_path / "p.txt")[99_999] == "prompt 99999"


def test_a_prompt_of_ten_thousand_words_is_cut_as_in_diffusers(backbone):
    words = " ".join(["cat"] * 10_000)
    cut = backbone.conditioning([words])(torch.tensor([0]))["encoder_hidden_states"]
    short = backbone.conditioning([words[:200]])(torch.tensor([0]))["encoder_hidden_states"]
    assert torch.equal(cut, short)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sede": 1, "training": {"iteration": 3}}', "unknown settings: sede, training.iteration"),
        ('{"seed": "one"}', "(?s)seed.*valid integer"),
        ('{"training": {"iterations": 0}}', "iterations=0 must be at least 1"),
        ('{"reward": "beauty"}', "(?s)reward.*'jpeg-compressibility'"),
        ("not json", "config.json: .*"),
        ("[1]", "config.json"),
    ],
)
def test_a_wrong_settings_file_is_refused(content, message, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_settings(file)
    with pytest.raises(SystemExit):
        parse_settings("", ["--config", str(file)])
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["embedded", "sd15"])
def test_settings_survive_their_file(preset, tmp_path):
    chosen = parse_settings("", ["--preset", preset, "--seed", "7", "--output", str(tmp_path / "run")])
    build_folder(chosen)
    assert read_settings(tmp_path / "run" / "config.json") == chosen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "RUN", "--seed", "3"], "takes no others; got .*--seed"),
        (["--resume", "RUN", "--preset", "sd15"], "takes no others"),
        (["--resume", "nowhere"], "nowhere"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--config", "RUN/config.json", "--preset", "sd15"], "give one of them"),
    ],
)
def test_contradictory_sources_of_settings_are_refused(arguments, message, tmp_path, capsys):
    RunFolder(tmp_path / "run", {"seed": 3})
    with pytest.raises(SystemExit) as left:
        parse_settings("", [part.replace("RUN", str(tmp_path / "run")) for part in arguments])
    assert left.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_options_win_over_the_file(tmp_path):
    RunFolder(tmp_path / "run", {"seed": 3, "training": {"iterations": 9}})
    chosen = parse_settings("", ["--config", str(tmp_path / "run" / "config.json"), "--training.iterations", "4"])
    assert (chosen.seed, chosen.training.iterations) == (3, 4)
    assert chosen.config == tmp_path / "run" / "config.json"
    defaults = RunSettings().training
    assert replace(chosen.training, iterations=defaults.iterations) == defaults


def test_a_missing_prompt_file_shows_before_a_model_loads(tmp_path):
    with pytest.raises(ValueError, match="neither a prompt set nor a file"):
        build_experiment(parse_settings("", ["--sampling.prompts", str(tmp_path / "none.txt")]))
