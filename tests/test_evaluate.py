"""The evaluation of saved adapters: the example with small numbers, its table against an evaluation made here."""

import csv
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from agents import Evaluator, make_policy
from configs import RunSettings, build_backbone
from diffusion_env import DenoisingEnv
from examples.evaluate import Adapter, Settings, comparable, find_adapter
from rewards import StylePreference

ROOT = Path(__file__).parent.parent
PROMPTS = ("a cat", "a dog", "an ant")
DEFAULT = RunSettings()
SETTINGS = replace(DEFAULT, sampling=replace(DEFAULT.sampling, num_steps=3))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two run folders of the embedded pipeline, their adapters random; prompts beside them."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    for name, scale in (("little", 0.01), ("much", 0.05)):
        torch.manual_seed(0)
        backbone = build_backbone(SETTINGS.model)
        with torch.no_grad():
            for parameter in backbone.parameters():
                if parameter.requires_grad:
                    parameter.add_(scale * torch.randn_like(parameter))
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(asdict(SETTINGS), default=str))
        backbone.save(folder / name / "lora")
    return folder


@pytest.fixture(scope="module")
def output(runs):
    options = ["--prompts", "prompts.txt", "--samples", "2", "--batch", "4", "--output", "out"]
    command = [sys.executable, str(ROOT / "examples" / "evaluate.py"), "little", "much", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=runs)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (runs / "out" / "table.md").read_text() in done.stdout
    return runs / "out"


@pytest.fixture(scope="module")
def table(output):
    with (output / "table.csv").open() as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def test_the_table_orders_the_models(table):
    assert list(table) == ["pretrained", "pretrained, other noise", "little", "much"]
    for key in ("kl", "moved", "fid"):
        pretrained, little, much = (float(table[name][key]) for name in ("pretrained", "little", "much"))
        assert pretrained == pytest.approx(0, abs=1e-3)
        assert pretrained < little < much
    assert float(table["pretrained, other noise"]["kl"]) == 0
    assert float(table["pretrained, other noise"]["fid"]) > 1
    for row in table.values():
        assert row["images"] == "6"
        assert float(row["reward_p10"]) < float(row["reward"]) < float(row["reward_p90"])
        assert float(row["held_out_prompt_fidelity"]) < 0 < float(row["diversity"])
        assert 0 <= float(row["judged"]) <= 1


def test_a_row_is_that_models_evaluation(runs, table):
    backbone = build_backbone(SETTINGS.model)
    backbone.load(runs / "much" / "lora")
    policy = make_policy(backbone, backbone.sampler(3), backbone.conditioning(PROMPTS))
    env = DenoisingEnv(backbone, 3, StylePreference(), PROMPTS, batch_size=4)
    assert float(table["much"]["reward"]) == pytest.approx(Evaluator(env)(policy).mean, rel=1e-3)


def test_csv_and_markdown_say_the_same_and_pictures_are_there(output, table):
    lines = [line.strip("| \n").split(" | ") for line in (output / "table.md").read_text().splitlines()]
    assert lines[0] == list(table["much"])
    assert [lines[0], *lines[2:]] == [lines[0], *([*row.values()] for row in table.values())]
    for name in ("little", "much"):
        assert (output / f"{name}.png").stat().st_size > 1000


def test_an_adapter_is_found_with_its_runs_settings(runs, tmp_path):
    found = find_adapter(runs / "much")
    assert (found.name, found.weights) == ("much", runs / "much" / "lora")
    assert found.settings.sampling.num_steps == 3
    inside = find_adapter(runs / "much" / "lora")
    assert (inside.name, inside.weights, inside.settings) == ("much-lora", found.weights, found.settings)
    (runs / "much" / "lora").rename(tmp_path / "mine")
    bare = find_adapter(tmp_path / "mine")
    (tmp_path / "mine").rename(runs / "much" / "lora")
    assert (bare.name, bare.weights) == ("mine", tmp_path / "mine")
    assert bare.settings.sampling == DEFAULT.sampling
    assert set(bare.settings.model.lora_targets) == set(DEFAULT.model.lora_targets)
    with pytest.raises(FileNotFoundError, match="holds no"):
        find_adapter(tmp_path / "nothing")


def test_what_cannot_be_compared_is_refused():
    other = replace(SETTINGS, sampling=replace(SETTINGS.sampling, num_steps=4))
    with pytest.raises(ValueError, match="evaluate them one by one"):
        comparable([Adapter("a", Path("a"), SETTINGS), Adapter("b", Path("b"), other)])
    with pytest.raises(ValueError, match="rename a folder"):
        comparable([Adapter("a", Path("x/a"), SETTINGS), Adapter("a", Path("y/a"), SETTINGS)])
    with pytest.raises(ValueError, match="at least 2"):
        Settings((Path("a"),), samples=1)
    with pytest.raises(ValueError, match="no adapter"):
        Settings(())
