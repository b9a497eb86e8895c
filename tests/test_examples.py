"""Every example runs with small numbers and leaves what it promises."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name != "__init__.py")
SMALL = [
    "--sampling.images-per-iteration", "6",
    "--sampling.num-steps", "3",
    "--training.iterations", "2",
    "--evaluation-samples", "2",
    "--evaluate-every", "1",
]  # fmt: skip
RUNS = {
    "ppo_aesthetic.py": "style-preference",
    "a2c_aesthetic.py": "style-preference",
    "reinforce_compressibility.py": "jpeg-compressibility",
    "draft_aesthetic.py": "style-preference",
    "refl_aesthetic.py": "style-preference",
    "rwr_compressibility.py": "jpeg-compressibility",
    "nabla_db_aesthetic.py": "style-preference",
}


def test_no_example_is_forgotten():
    # The last two are tested in test_pretraining.py and test_evaluate.py.
    assert set(EXAMPLES) == {*RUNS, "pretrain_embedded.py", "evaluate.py"}
    listed = re.findall(r"^\| `python examples/(\w+\.py)`", (ROOT / "examples" / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_example_leaves_a_complete_run_folder(name, tmp_path):
    output = tmp_path / "run"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\nan ant\n")
    command = [sys.executable, str(ROOT / "examples" / name), *SMALL, "--output", str(output)]
    command += ["--sampling.prompts", str(prompts)]
    if name == "ppo_aesthetic.py":
        command += ["--training.clip-range", "0.01", "--training.kl-penalty", "0.1", "--profile"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert RUNS[name] in done.stdout
    for file in (
        "evaluations.csv",
        "reward_curve.png",
        "before_after.png",
        "metrics.csv",
        "checkpoints",
        "config.json",
    ):
        assert (output / file).stat().st_size > 0
        assert str(output / file) in done.stdout
    assert (output / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert json.loads((output / "config.json").read_text())["reward"] == RUNS[name]
    with (output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert float(rows[1]["grad_norm"]) > 0
    assert "eval_reward" in rows[0]
    if name == "ppo_aesthetic.py":
        assert float(rows[0]["loss_kl"]) == pytest.approx(0.1 * float(rows[0]["kl_reference"]), rel=1e-5)
        assert float(rows[1]["kl_reference"]) > 0
        shares = re.findall(
            r"^\| ([a-z ]+) \| [\d.]+ \| ([\d.]+)% \|", (output / "profile.md").read_text(), re.MULTILINE
        )
        assert all(float(share) > 1 for _, share in shares)
        assert [name for name, _ in shares][:4] == ["sampling", "decoding and reward", "training", "evaluation"]
        assert (output / "trace.json.gz").exists()
    with (output / "evaluations.csv").open() as file:
        evaluations = list(csv.DictReader(file))
    assert [row["iteration"] for row in evaluations] == ["0", "1", "2"]
    assert float(evaluations[0]["kl"]) == 0 < float(evaluations[2]["kl"])
    assert float(evaluations[0]["held_out_prompt_fidelity"]) < 0 < float(evaluations[0]["diversity"])
    assert len(list((output / "samples").glob("*.png"))) == 3
    assert [path.name for path in sorted((output / "checkpoints").iterdir())] == [
        "checkpoint-000000000001.torchrl",
        "checkpoint-000000000002.torchrl",
    ]


def test_an_impossible_setting_is_refused_before_anything_loads(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "ppo_aesthetic.py"), "--sampling.eta", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode != 0
    assert "eta=2" in done.stderr
    assert not list(tmp_path.iterdir())
