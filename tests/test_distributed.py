"""Several processes are one run with a larger batch: real processes under torchrun, gloo on the CPU."""

import subprocess
from dataclasses import replace

import pytest
import torch
from torchrl.objectives import KLPENPPOLoss

from agents import Experiment, ScoreFunctionLoss, make_critic, make_policy
from agents.distributed import join
from agents.equal_weights import check_equal
from rewards import Mix
from tests import ranks
from tests.runs import (
    ROOT,
    Program,
    assert_same_run,
    checkpoint,
    equal,
    finish,
    lose_process,
    metrics,
    on_two_processes,
    start,
    tensors,
    torchrun,
    wait_for,
)

ITERATIONS = 6


@pytest.fixture(scope="module")
def single(tiny_folder):
    return ranks.run(tiny_folder)


@pytest.fixture(scope="module")
def both(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_two_processes("ranks.py", tiny_folder, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("first", [6, 10, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_update_is_that_of_one_process_with_both_batches(single, both, optimizer, first):
    """Divided 6 and 4 (micro-batches of 4, 2 and 4), 10 and none, 3 and 7."""
    expected, *found = (results["updates"][f"{optimizer} {first}"] for results in (single, *both))
    assert torch.equal(found[0]["weights"], found[1]["weights"])
    assert found[0]["metrics"] == found[1]["metrics"]
    torch.testing.assert_close(found[0]["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
    assert found[0]["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-6)
    assert expected["metrics"]["grad_norm"] > 0


def test_a_gradient_that_is_not_finite_is_skipped_everywhere(single, both):
    (warning,) = single["broken"]["warnings"]
    for rank, found in enumerate(results["broken"] for results in both):
        assert found["metrics"] == {"skipped_updates": 1.0}
        assert found["unchanged"]
        assert found["warnings"] == ([warning] if rank == 0 else [])
    assert "step 2 of prompt" in warning


def test_a_parameter_without_gradient_keeps_none_unless_another_process_has_one(both):
    for results in both:
        summed, elsewhere, nowhere = results["unused"]
        assert summed.tolist() == elsewhere.tolist() == [1.0, 1.0]
        assert nowhere is None


def test_advantages_are_those_of_all_images(single, both):
    expected, *found = (results["advantages"] for results in (single, *both))
    for results in found:
        assert results.keys() == expected.keys()
        assert results["memory"] == expected["memory"]
        for name, value in expected.items():
            if name != "memory":
                torch.testing.assert_close(results[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert len(expected["best 0"]) == 2


def test_the_loop_is_that_of_one_process_though_one_has_nothing_to_train(single, both):
    expected, *found = (results["loop"] for results in (single, *both))
    assert expected["transitions"] == found[0]["transitions"] == (6 + 8) * ranks.STEPS
    assert equal(found[0], found[1])
    torch.testing.assert_close(found[0]["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
    for row, ours in zip(expected["rows"], found[0]["rows"], strict=True):
        assert ours == pytest.approx(row, rel=1e-4, abs=1e-6)
    assert expected["rows"][0]["checked"] == 4
    assert expected["rows"][0]["reward_part"] == 4.5


def test_an_evaluation_is_shared_out_and_the_same(single, both):
    assert all(equal(results["evaluation"], single["evaluation"]) for results in both)


def test_weights_that_differ_are_found_and_named(single, both):
    assert single["comparison"] is None
    for results in both:
        number, message = results["comparison"]
        assert number == 4
        assert "1 of 2 tensors differ between processes 0 and 1, bias" in message
    check_equal({"nan": torch.tensor(float("nan"))})


def test_training_does_not_start_from_different_weights(single, both):
    assert single["unequal_start"] == []
    for results in both:
        assert "differ between processes 0 and 1, parameter 1" in results["unequal_start"]


def test_each_process_draws_its_own_numbers_and_the_first_those_of_a_single_one(single, both):
    expected, first, second = (results["random_numbers"] for results in (single, *both))
    assert equal(first, expected)
    assert torch.equal(second["same"], expected["same"])
    assert not torch.equal(second["apart"], expected["apart"])
    assert expected["seeds"] == [0, 1, -1]
    assert not set(second["seeds"]) & set(range(-1000, 1000))
    assert len(set(second["seeds"])) == 3


def test_a_signal_to_one_process_stops_all(single, both):
    assert [results["stopping"] for results in (single, *both)] == ["SIGTERM"] * 3


def as_one_of(monkeypatch, count):
    """The environment of a process that torchrun started."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:1", "names one GPU for all 64 processes"), ("cuda", "64 processes .* GPUs")]
)
def test_a_gpu_is_not_shared(monkeypatch, device, message):
    as_one_of(monkeypatch, 64)
    with pytest.raises(ValueError, match=message):
        join(device)


def test_processes_that_have_not_joined_do_not_train_apart(monkeypatch):
    as_one_of(monkeypatch, 2)
    with pytest.raises(RuntimeError, match="torchrun started 2 processes, which have not joined"):
        check_equal({})


@pytest.mark.parametrize("kind", ["loss", "reward"])
def test_what_each_process_would_have_of_its_own_is_refused(kind, backbone, monkeypatch):
    policy = make_policy(backbone, backbone.sampler(3), backbone.conditioning(["a cat"]))
    adapting = KLPENPPOLoss(policy, make_critic(policy, width=8), entropy_bonus=False)
    loss = adapting if kind == "loss" else ScoreFunctionLoss(policy)
    reward = Mix([(ranks.brightness, 1.0)], normalise=kind == "reward")
    rest = ("collector", "evaluator", "advantage", "prepare", "sampler", "optimisation", "evaluate_every")
    experiment = Experiment(backbone=backbone, policy=policy, reward=reward, **dict.fromkeys(rest))
    monkeypatch.setattr("agents.equal_weights.size", lambda: 2)
    message = {"loss": "several would train different models", "reward": "could not be compared"}[kind]
    with pytest.raises(ValueError, match=message):
        experiment.run(loss, None)


@pytest.fixture(scope="module")
def ppo(tiny_folder, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a cat\na dog\nan ant\na bee\n")
    options = ("--reward", "jpeg-compressibility", "--training.clip-range", "0.01", "--held-out")
    options += ("jpeg-incompressibility", "--training.compare-processes-every", "1")
    return Program("ppo_aesthetic.py", tiny_folder, prompts, options, ITERATIONS)


@pytest.fixture(scope="module")
def reference(ppo, tmp_path_factory):
    """A run of two processes that was never stopped, and its output."""
    run = tmp_path_factory.mktemp("reference") / "run"
    return run, finish(torchrun(ppo.command(run)))


def test_two_processes_train_one_model_on_different_images_and_one_writes(reference):
    run, done = reference
    assert done.stdout.count("reward on fixed prompts and noise") == 1
    assert len(metrics(run)) == ITERATIONS
    assert [path.name for path in run.parent.iterdir()] == ["run"]  # the other one has made no folder
    parts = tensors(run, ITERATIONS)
    (environment,) = (value["by_rank"] for name, value in parts.items() if "environment" in name)
    (random_states,) = (value["by_rank"] for name, value in parts.items() if "random_states" in name)
    assert not equal(*environment)
    assert not equal(*(states["torch_cpu"] for states in random_states))


def test_a_run_that_is_stopped_and_loses_a_process_continues_bit_for_bit(ppo, reference, tmp_path):
    run = tmp_path / "run"
    process = start(torchrun(ppo.command(run)))
    wait_for(checkpoint(run, 1).exists, process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    done = len(metrics(run))
    assert 1 <= done < ITERATIONS
    assert checkpoint(run, done).exists()
    assert errors.count(f"stopped after {done} iterations by SIGTERM") == 1
    assert f"continue with: torchrun --nproc-per-node 2 {ROOT}/examples/ppo_aesthetic.py --resume {run}" in errors

    process = start(torchrun(ppo.resume(run)))
    wait_for(checkpoint(run, done + 1).exists, process)
    lose_process(process)

    finish(torchrun(ppo.resume(run)))
    assert_same_run(run, reference[0], ITERATIONS)


def test_another_number_of_processes_is_refused(ppo, reference):
    done = subprocess.run(ppo.resume(reference[0]), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "was written by 2 process(es), here are 1" in done.stderr
    assert "torchrun --nproc-per-node 2" in done.stderr


def test_a_second_run_gets_a_folder_of_its_own_on_all_processes(ppo, reference):
    run, _ = reference
    finish(torchrun(replace(ppo, iterations=1).command(run)))
    assert sorted(path.name for path in run.parent.iterdir()) == ["run", "run-2"]
