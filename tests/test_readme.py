"""What the README says holds: its programs run, its key table is a rollout's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agents import PromptAdvantage, make_collector, make_policy
from diffusion_env import DenoisingEnv

README = (Path(__file__).parent.parent / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALL = PROGRAMS[0].replace("batch_size=32", "batch_size=4").replace("iterations=10", "iterations=1")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Where the README's program was run, its numbers made small."""
    folder = tmp_path_factory.mktemp("readme")
    assert "batch_size=4" in SMALL and "iterations=1)" in SMALL
    run(SMALL, folder)
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


def test_the_own_reward_is_eight_lines_and_trains_in_the_first_program(workplace):
    lines = [line for line in PROGRAMS[1].splitlines() if line.strip()]
    assert len(PROGRAMS[1].splitlines()) == 8 and lines[-1].startswith("print")
    own = "\n".join(lines)
    program = SMALL.replace("JPEGCompressibility(), conditioning", "reward, conditioning")
    assert program != SMALL
    printed = run(f"{own}\n{program}print(*env.reward_parts)\n", workplace)
    scores, *_, parts = printed.splitlines()
    assert scores.startswith("tensor([") and scores.count(",") == 3
    assert parts == "blueness jpeg-compressibility"


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
