"""Rollouts in other processes: the images of single-process collectors, of the policy as it is now, resumed exactly."""

import gc
import io
import os
import pickle
import signal
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from agents import make_collector, make_worker_collector
from agents.distributed import numbered_seed, seed_generators
from agents.workers import TrainedWeights, gather, to_send
from tests.rollouts import PROMPTS, STEPS, make
from tests.runs import Program, assert_same_run, checkpoint, finish, start, wait_for

SEED, WORKERS, IMAGES = 5, 2, 8


def trained(policy):
    return [each for each in policy.parameters() if each.requires_grad]


@torch.no_grad()
def set_weights(policy, version):
    generator = torch.Generator().manual_seed(version)
    for each in trained(policy):
        each.copy_(torch.randn(each.shape, generator=generator) * 0.3)


@pytest.fixture(scope="module", params=["process", pytest.param("ray", marks=pytest.mark.long)])
def seen(request, tiny_folder):
    """What two workers gave: a batch, one after an update, and the one after that twice, resumed in between."""
    if request.param == "ray":
        request.getfixturevalue("local_ray")
    maker = partial(make, tiny_folder, IMAGES // WORKERS)
    env, policy = maker(SEED)
    set_weights(policy, 1)
    collector = make_worker_collector(
        maker,
        policy,
        workers=WORKERS,
        kind=request.param,
        seed=SEED,
        images=IMAGES,
        num_steps=STEPS,
        prompts=PROMPTS,
        iterations=9,
    )
    batches = iter(collector)
    found = SimpleNamespace(first=next(batches), parts=collector.env.reward_parts, maker=maker)
    set_weights(policy, 2)
    found.second = next(batches)
    file = io.BytesIO()
    torch.save(collector.env.state_dict(), file)
    found.third = next(batches)
    file.seek(0)
    collector.env.load_state_dict(torch.load(file, weights_only=True))
    collector.reset()
    found.third_again = next(batches)
    found.error = failure(collector, batches) if request.param == "process" else None
    collector.shutdown()
    return found


def failure(collector, batches):
    """What is raised when a worker is killed."""
    collector._collector.procs[1].kill()
    with pytest.raises(Exception) as raised:
        next(batches)
    return raised.value


@pytest.fixture(scope="module")
def local_ray():
    """A Ray of two workers, which are not at the end of the queue for a processor that others use too."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with warnings.catch_warnings(action="ignore"):  # Ray leaves files open, and warns of its own future
            ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
        yield
        with warnings.catch_warnings(action="ignore"):
            ray.shutdown()
            gc.collect()


def single_process(maker, seed):
    """The first two batches of a collector without workers, the policy updated in between."""
    env, policy = maker(seed)
    set_weights(policy, 1)
    collector = make_collector(env, policy, iterations=2)
    seed_generators(seed)
    batches = iter(collector)
    first, parts = next(batches), env.reward_parts
    set_weights(policy, 2)
    second = next(batches)
    collector.shutdown()
    return first, parts, second


def assert_equal(batch, expected):
    """Bit for bit, and no key more or less."""
    assert set(batch.keys(True, True)) == set(expected.keys(True, True))
    for key in batch.keys(True, True):
        assert torch.equal(batch[key], expected[key]), key


def test_batches_are_those_of_single_process_collectors_with_the_workers_seeds(seen):
    singles = [single_process(seen.maker, numbered_seed(SEED, worker)) for worker in range(WORKERS)]
    for batch, index in ((seen.first, 0), (seen.second, 2)):
        expected = torch.cat([single[index] for single in singles])
        groups = [2 * single[index]["group_id"] + worker for worker, single in enumerate(singles)]
        assert_equal(batch, expected.set("group_id", torch.cat(groups)))
        assert len(batch["group_id"].unique()) == IMAGES // 2  # two images a prompt; none shared by two workers
    half = IMAGES // WORKERS
    assert not torch.equal(seen.first["latents"][:half], seen.first["latents"][half:])
    for name, values in seen.parts.items():
        assert torch.equal(values, torch.cat([single[1][name] for single in singles])), name
    total = seen.parts["brightness"] + 0.5 * seen.parts["redness"]
    torch.testing.assert_close(seen.first["next", "reward"][:, -1, 0], total)


def test_latents_are_stored_once(seen):
    latents, action = seen.first["latents"], seen.first["action"]
    assert latents.untyped_storage().data_ptr() == action.untyped_storage().data_ptr()
    assert latents.untyped_storage().nbytes() == IMAGES * (STEPS + 1) * 4 * 8 * 8 * 4


def test_a_saved_state_gives_the_same_batch_again(seen):
    assert_equal(seen.third_again, seen.third)
    assert not torch.equal(seen.third["latents"], seen.second["latents"])


def test_a_worker_that_ended_is_named(seen):
    if seen.error is not None:
        assert any("A worker that makes rollouts failed" in note for note in seen.error.__notes__)


def test_what_is_sent_is_no_more_than_it_must_be(tiny_folder):
    """To a worker the weights that train, once; from it on Ray T + 1 latents a trajectory and a few numbers a step."""
    env, policy = make(tiny_folder, 4, SEED)
    sent = TrainedWeights(policy).copied()
    bytes_of_weights = sum(each.numel() * 4 for each in trained(policy))
    assert sum(each.numel() for each in policy.parameters()) > 5 * bytes_of_weights / 4
    overhead = 600 * len(trained(policy))  # names and shapes
    assert bytes_of_weights < len(pickle.dumps(sent)) < bytes_of_weights + overhead
    with torch.no_grad():
        rollout = env.rollout(STEPS, policy)
    latents = 4 * (STEPS + 1) * 4 * 8 * 8 * 4
    packed = pickle.dumps(to_send(rollout.exclude(("next", "latents"))))
    assert latents < len(packed) < latents + 15_000
    batch = gather(pickle.loads(packed), workers=1, device=torch.device("cpu"))
    for key in ("latents", "action", "group_id"):
        assert torch.equal(batch[key], rollout[key]), key


def test_what_cannot_work_is_refused(tiny_folder, monkeypatch):
    arguments = {"num_steps": STEPS, "prompts": PROMPTS, "iterations": 1, "seed": 0, "images": 9}
    with pytest.raises(ValueError, match="images=9 cannot be shared out evenly among workers=2"):
        make_worker_collector(None, None, workers=2, **arguments)
    monkeypatch.setattr("agents.worker_collector.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need Ray, which is not installed: pip install 'diffusion-env\[ray\]'"):
        make_worker_collector(None, None, workers=3, kind="ray", **arguments)
    monkeypatch.setattr("agents.worker_collector.size", lambda: 2)
    with pytest.raises(ValueError, match="workers=3 under torchrun, which started 2 processes"):
        make_worker_collector(None, None, workers=3, **arguments)


@pytest.mark.long
def test_a_run_with_workers_is_stopped_and_resumed_bit_for_bit(tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    program = Program("ppo_aesthetic.py", tiny_folder, prompts, options=("--sampling.workers", "2"))
    finish(program.command(tmp_path / "whole"))
    run = tmp_path / "stopped"
    process = start(program.command(run), own_group=True)
    wait_for(lambda: checkpoint(run, 1).exists(), process)
    os.killpg(process.pid, signal.SIGTERM)  # as a cluster's scheduler does: the workers get it, too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors[-3000:]
    finish(program.resume(run))
    assert_same_run(run, tmp_path / "whole", program.iterations)
