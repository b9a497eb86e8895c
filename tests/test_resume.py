"""Runs that are killed, stopped or damaged continue as if nothing had happened: real processes, real signals."""

import json
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.objectives import SoftUpdate

from agents import RestoreNext, RunFolder, iql_loss
from agents.checkpoint import DamagedCheckpointWarning
from benchmarks.main_job import append, provenance
from configs import build_experiment, build_folder, parse_settings
from examples import ppo_aesthetic
from tests.runs import ROOT, Program, assert_same_run, checkpoint, finish, metrics, start, tensors, wait_for

ITERATIONS = 12
LONG = 30
KILL_LOOPS = ROOT / "benchmarks" / "results" / "kill_loops.csv"


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a cat\na dog\nan ant\na bee\n")
    return file


@pytest.fixture(scope="session")
def ppo(tiny_folder, prompts):
    options = ("--reward", "jpeg-compressibility", "--training.clip-range", "0.01", "--sampling.batch-size", "3")
    return Program("ppo_aesthetic.py", tiny_folder, prompts, options, ITERATIONS)


@pytest.fixture(scope="session")
def reference(ppo, tmp_path_factory):
    """The run that was never stopped."""
    run = tmp_path_factory.mktemp("reference") / "run"
    finish(ppo.command(run))
    return run


def in_process(command):
    """What the command does, without a process of its own."""
    ppo_aesthetic.main(parse_settings("", command[2:]))


@pytest.fixture
def copy(reference, tmp_path):
    """The finished run, to be tampered with."""
    shutil.copytree(reference, tmp_path / "copy")
    return tmp_path / "copy"


def is_newer(file, moment):
    return file.exists() and file.stat().st_mtime_ns > moment


def kill_and_resume(program, run, kills, seed):
    """Kill `program` at random moments of its sampling, training and writing, `kills` times; then let it finish."""
    chance = random.Random(seed)
    command, killed = program.command(run), 0
    while killed < kills:
        process = start(command)
        wait_for(partial(is_newer, run / "metrics.csv" if killed else run / "config.json", time.time_ns()), process)
        time.sleep(chance.uniform(0, 0.8))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run was finished before it could be killed"
        command, killed = program.resume(run), killed + 1
    finish(command)


def test_a_run_that_is_killed_twice_continues_bit_for_bit(ppo, reference, tmp_path):
    kill_and_resume(ppo, tmp_path / "run", 2, seed=0)
    assert_same_run(tmp_path / "run", reference, ITERATIONS)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", ["ppo_aesthetic.py", "rwr_compressibility.py", "nabla_db_aesthetic.py"])
def test_a_run_that_is_killed_seven_times_continues_bit_for_bit(name, seed, tiny_folder, prompts, tmp_path):
    measured_by = provenance()
    options = () if name == "nabla_db_aesthetic.py" else ("--reward", "jpeg-compressibility")
    program = Program(name, tiny_folder, prompts, options, LONG)
    finish(program.command(tmp_path / "reference"))
    kill_and_resume(program, tmp_path / "run", 7, seed=seed)
    assert_same_run(tmp_path / "run", tmp_path / "reference", LONG)
    append({"program": name, "kills": 7, "seed": seed, "iterations": LONG, "equal": True, **measured_by}, KILL_LOOPS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_writes_a_checkpoint_and_shows_how_to_resume(number, ppo, reference, tmp_path):
    run = tmp_path / "run"
    process = start(ppo.command(run))
    wait_for(checkpoint(run, 1).exists, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    done = len(metrics(run))
    assert 1 <= done < ITERATIONS
    assert checkpoint(run, done).exists()
    assert f"{number.name}: finishing this iteration" in errors
    assert f"stopped after {done} iterations by {number.name}" in errors
    command = errors.split("continue with: ")[1].split()
    assert command == ["python", *ppo.resume(run)[1:]]
    in_process(ppo.resume(run))
    assert_same_run(run, reference, ITERATIONS)


def test_a_second_ctrl_c_leaves_at_once(ppo, tmp_path):
    run, seconds = tmp_path / "run", 0.5
    process = start(replace(ppo, images=300).command(run))  # an iteration takes longer than that
    wait_for(checkpoint(run, 1).exists, process)
    time.sleep(seconds / 2)
    process.send_signal(signal.SIGINT)
    time.sleep(seconds / 2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "SIGINT: finishing this iteration" in errors
    assert "stopped after" not in errors


def test_the_checkpoint_before_a_damaged_one_continues(ppo, reference, copy):
    newest = checkpoint(copy, ITERATIONS)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(DamagedCheckpointWarning, match=newest.name):
        in_process(ppo.resume(copy))
    assert_same_run(copy, reference, ITERATIONS)


def test_a_finished_run_writes_its_pictures_and_weights_again(ppo, reference, copy):
    (copy / "reward_curve.png").unlink()
    shutil.rmtree(copy / "lora")
    in_process(ppo.resume(copy))
    assert (copy / "reward_curve.png").exists()
    assert_same_run(copy, reference, ITERATIONS)


def test_other_settings_are_refused(ppo, copy):
    config = json.loads((copy / "config.json").read_text())
    config["model"]["lora_rank"] = 5
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"belongs to another run .*settings.model.lora_rank is 3, 5"):
        in_process(ppo.resume(copy))


def test_a_run_is_repeated_from_its_settings(ppo, reference, tmp_path):
    run = tmp_path / "again"
    in_process([*ppo.resume(reference)[:2], "--config", str(reference / "config.json"), "--output", str(run)])
    assert metrics(run) == metrics(reference)


def test_a_second_run_in_the_same_folder_is_refused_or_gets_its_own(ppo, copy):
    first = RunFolder(copy, json.loads((copy / "config.json").read_text()), resume=True)
    done = subprocess.run(ppo.resume(copy), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert f"another process is writing to {copy}" in done.stderr
    assert build_folder(parse_settings("", ppo.command(copy)[2:])).path.name == "copy-2"
    del first


def test_a_full_disk_stops_the_run_with_a_message_and_it_continues_with_room(ppo, reference, tmp_path):
    """A limit on the size of a file stands for the full disk; it is above what comes before the checkpoint."""
    run = tmp_path / "run"
    limited = ["bash", "-c", 'ulimit -f 32; exec "$@"', "bash", *ppo.command(run)]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "The checkpoint after 1 iterations could not be written" in done.stderr
    assert list((run / "checkpoints").iterdir()) == []
    in_process(ppo.resume(run))
    assert_same_run(run, reference, ITERATIONS)


def test_a_read_only_run_folder_is_named(ppo, copy):
    mount = f"mount --bind {copy} {copy} && mount -o remount,bind,ro {copy}"
    namespace = ["unshare", "--mount", "bash", "-c"]
    if not shutil.which("unshare") or subprocess.run([*namespace, mount], capture_output=True).returncode:
        pytest.skip("mounting needs root or a system that lets users make mount namespaces")
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    command = [*namespace, f'{mount} && exec "$@"', "bash", *ppo.resume(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert f"The run folder {copy} cannot be written" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def off_policy(settings):
    """Implicit Q-learning, with a buffer that outlives iterations, critics and target networks."""
    experiment = build_experiment(settings)
    loss = iql_loss(experiment.policy, width=8)
    experiment = replace(
        experiment,
        advantage=torch.nn.Identity(),
        buffer=ReplayBuffer(storage=LazyTensorStorage(20), batch_size=12, transform=RestoreNext()),
        target_update=SoftUpdate(loss, tau=0.1),
    )
    experiment.run(loss, build_folder(settings))


def test_a_buffer_critics_and_target_networks_continue_too(ppo, tmp_path):
    program = replace(ppo, iterations=4)
    for run in ("run", "reference"):
        off_policy(parse_settings("", program.command(tmp_path / run)[2:]))
    checkpoint(tmp_path / "run", 4).unlink()  # as if it had been killed before that one
    off_policy(parse_settings("", program.resume(tmp_path / "run")[2:]))
    names = " ".join(tensors(tmp_path / "reference", 4))
    assert "buffer" in names
    assert "target_update" in names
    assert_same_run(tmp_path / "run", tmp_path / "reference", 4)
