"""What the README says holds: its programs run, its key table is a rollout's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agents import PromptAdvantage, make_collector, make_policy
from diffusion_env import DenoisingEnv
from rewards import JPEGCompressibility

README = (Path(__file__).parent.parent / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Where the README's program was run, its numbers made small."""
    folder = tmp_path_factory.mktemp("readme")
    program = PROGRAMS[0]
    for small, large in {"batch_size=4": "batch_size=32", "iterations=1": "iterations=10"}.items():
        assert large in program
        program = program.replace(large, small)
    run(program, folder)
    return folder


def run(program, folder):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_program_trains_an_adapter(workplace):
    assert (workplace / "my_lora" / "pytorch_lora_weights.safetensors").exists()


def test_the_adapter_goes_back_to_diffusers(workplace):
    program = PROGRAMS[2].replace("runs/ppo_aesthetic/lora", "my_lora")
    assert "(64, 64)" in run(program + "print(image.size)\n", workplace)


def test_the_own_reward_is_eight_lines_and_serves_in_the_first_program(trained_backbone, capsys):
    assert "JPEGCompressibility(), conditioning.prompts" in PROGRAMS[0]
    assert len([line for line in PROGRAMS[1].splitlines() if line.strip()]) == 8
    names = {}
    exec(PROGRAMS[1], names)
    images = names["images"]
    blueness = images[:, 2].mean((1, 2)) - images[:, :2].mean((1, 2, 3))
    sizes = JPEGCompressibility()(images, names["prompts"])
    torch.testing.assert_close(names["reward"](images, names["prompts"]), blueness + 0.1 * sizes)
    assert capsys.readouterr().out.startswith("tensor([")
    prompts, steps = ("a cat", "a dog"), 2
    policy = make_policy(trained_backbone, trained_backbone.sampler(steps), trained_backbone.conditioning(prompts))
    env = DenoisingEnv(trained_backbone, steps, names["reward"], prompts, batch_size=3, seed=0)
    (rollout,) = make_collector(env, policy, iterations=1)
    assert rollout["next", "reward"][:, -1].std() > 0
    assert list(env.reward_parts) == ["blueness", "jpeg-compressibility"]


def test_the_key_table_is_that_of_a_rollout(trained_backbone):
    prompts, batch, steps = ("a cat", "a dog"), 2, 3
    policy = make_policy(trained_backbone, trained_backbone.sampler(steps), trained_backbone.conditioning(prompts))
    env = DenoisingEnv(
        trained_backbone, steps, lambda images, _: images.mean((1, 2, 3)), prompts, batch_size=batch, seed=0
    )
    (rollout,) = make_collector(env, policy, iterations=1)
    rollout = PromptAdvantage()(rollout)
    shapes = {"*latent": trained_backbone.latent_shape, "[1]": (1,), "[]": ()}
    table = {}
    for names, shape, dtype in re.findall(r"^\| (`[^|]+`) \| (\S+) \| (float32|int64|bool) \|", README, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", names):
            key = tuple(re.findall(r'"(\w+)"', name)) or name
            table[key] = ((batch, steps, *shapes[shape]), getattr(torch, dtype))
    kept = {key: value for key, value in rollout.items(include_nested=True, leaves_only=True)}
    assert {key: (tuple(value.shape), value.dtype) for key, value in kept.items()} == table
