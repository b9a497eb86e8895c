"""Runs that are killed, stopped or damaged continue as if nothing had happened: real processes, real signals."""

import random
import signal
import time

import pytest

from tests.runs import Program, assert_same_run, checkpoint, finish, metrics, start, wait_for

ITERATIONS = 12


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a cat\na dog\nan ant\na bee\n")
    return file


@pytest.fixture(scope="session")
def ppo(tiny_folder, prompts):
    options = ("--reward", "jpeg-compressibility", "--training.clip-range", "0.01")
    return Program("ppo_aesthetic.py", tiny_folder, prompts, options, ITERATIONS)


@pytest.fixture(scope="session")
def reference(ppo, tmp_path_factory):
    """The run that was never stopped."""
    run = tmp_path_factory.mktemp("reference") / "run"
    finish(ppo.command(run))
    return run


def kill_and_resume(program, run, chance):
    """Kill `program` at a random moment after it has made its folder; again and again until it is finished."""
    command, kills = program.command(run), 0
    while True:
        process = start(command)
        wait_for(run / "config.json", process)
        if kills:  # the folder is there already: until it trains
            wait_for(run / "logs", process)
        time.sleep(chance.uniform(0, 2.5))
        process.kill()
        process.communicate()
        if process.returncode == 0:
            return kills
        assert process.returncode == -signal.SIGKILL
        command, kills = program.resume(run), kills + 1
        if kills == 2:
            finish(command)
            return kills


def test_a_killed_run_continues_bit_for_bit(ppo, reference, tmp_path):
    assert kill_and_resume(ppo, tmp_path / "run", random.Random(0)) == 2
    assert_same_run(tmp_path / "run", reference, ITERATIONS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_shows_how_to_resume(number, ppo, reference, tmp_path):
    run = tmp_path / "run"
    process = start(ppo.command(run))
    wait_for(checkpoint(run, 1), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    done = len(metrics(run))
    assert 1 <= done < ITERATIONS
    assert checkpoint(run, done).exists()
    assert f"stopped after {done} iterations by {number.name}" in errors
    command = errors.split("continue with: ")[1].strip().split()
    assert command == ["python", *ppo.resume(run)[1:]]
    finish(ppo.resume(run))
    assert_same_run(run, reference, ITERATIONS)
