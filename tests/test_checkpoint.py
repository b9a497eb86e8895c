"""Checkpoints: what is in them, what makes them whole, what is refused. The runs are in test_resume.py."""

import copy
import random
import shutil
import warnings

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.checkpoint import CheckpointError
from torchrl.data import LazyTensorStorage, ReplayBuffer

from agents import RunFolder, ddpo_is_loss, make_policy
from agents.checkpoint import Checkpoints, DamagedCheckpointWarning, TrainedState, damage, differences
from diffusion_env import DenoisingEnv, LoRA, StableDiffusionBackbone
from rewards import Mix, Scale
from tests.runs import equal
from tests.tiny import tiny_pipeline

IDENTITY = {"loss": "A", "settings": {"model": {"lora_rank": 4}, "seed": 0}}


def loss_of(rank=3):
    lora = LoRA(rank=rank, targets=("to_q", "conv1")) if rank else None
    backbone = StableDiffusionBackbone(tiny_pipeline(), lora=lora, guidance_scale=1.0)
    policy = make_policy(backbone, backbone.sampler(3), backbone.conditioning(["a cat"]))
    return backbone, policy, ddpo_is_loss(policy, clip_range=0.1)


@pytest.mark.parametrize("rank", [3, 0])
def test_a_trained_state_is_what_trains_and_not_the_pretrained_weights(rank):
    backbone, policy, loss = loss_of(rank)
    state = TrainedState(loss, policy).state_dict()
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    assert sum(value.numel() for value in state.values() if value.numel() > 1) == sum(
        parameter.numel() for parameter in trained if parameter.numel() > 1
    )
    assert any("clip_epsilon" in key for key in state)  # and the loss's own numbers
    saved = {key: value.clone() for key, value in state.items()}
    before = [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1)
    TrainedState(loss, policy).load_state_dict(saved)
    assert all(map(torch.equal, trained, before))


def test_an_adapter_of_another_shape_is_refused_and_nothing_changes(tmp_path):
    _, policy, loss = loss_of(3)
    _, other_policy, other = loss_of(4)
    Checkpoints(tmp_path / "c", {"loss": TrainedState(loss, policy)}, {}).save(1)
    state = TrainedState(other, other_policy)
    before = {key: value.clone() for key, value in state.state_dict().items()}
    target = Checkpoints(tmp_path / "c", {"loss": state}, {})
    with pytest.raises(CheckpointError, match=r"lora_A.* has shape \(3, 16\) in the checkpoint and \(4, 16\) here"):
        target.load(target.newest())
    assert equal(before, state.state_dict())


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    Checkpoints(tmp_path, {}, IDENTITY).save(1)
    here = Checkpoints(tmp_path, {}, {"loss": "B", "settings": {"model": {"lora_rank": 8}, "seed": 0}})
    with pytest.raises(ValueError, match="loss is 'A', 'B'; settings.model.lora_rank is 4, 8"):
        here.load(here.newest())


def test_differences_are_named():
    assert differences({"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"b": 1, "c": [1]}, "e": 2}) == [
        "a.c is [1, 2], [1]",
        "d is 1, None",
        "e is None, 2",
    ]


def filled(seed):
    buffer = ReplayBuffer(storage=LazyTensorStorage(8), batch_size=3)
    torch.manual_seed(seed)
    for _ in range(2):  # more than it holds
        buffer.extend(TensorDict({"latents": torch.randn(5, 2), "step": torch.arange(5)[:, None]}, [5]))
    return buffer


def test_a_replay_buffer_goes_on_where_it_was(tmp_path):
    buffer, fresh = filled(0), ReplayBuffer(storage=LazyTensorStorage(8), batch_size=3)
    Checkpoints(tmp_path, {"buffer": buffer}, {}).save(1)
    new = TensorDict({"latents": torch.ones(3, 2), "step": torch.full((3, 1), 9)}, [3])
    buffer.extend(new.clone())
    expected = [buffer.sample() for _ in range(4)]
    checkpoints = Checkpoints(tmp_path, {"buffer": fresh}, {})
    checkpoints.load(checkpoints.newest())
    torch.manual_seed(99)
    checkpoints.load_random_states(checkpoints.newest())
    fresh.extend(new.clone())
    assert torch.equal(fresh[:]["latents"], buffer[:]["latents"])
    for batch in expected:
        assert torch.equal(fresh.sample()["latents"], batch["latents"])


def stepped(optimizer, parameter, times):
    for _ in range(times):
        parameter.grad = (parameter * 2 + torch.arange(parameter.numel()).view_as(parameter)).clone(
            memory_format=torch.preserve_format
        )
        optimizer.step()


def test_the_optimiser_goes_on_in_any_memory_layout(tmp_path):
    """The fused AdamW walks through memory: its averages must lie as the weights do."""

    def made():
        start = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
        parameter = nn.Parameter(start.to(memory_format=torch.channels_last))
        return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=True)

    (straight, optimizer), (resumed, fresh) = made(), made()
    stepped(optimizer, straight, 2)
    Checkpoints(tmp_path, {"optimizer": optimizer}, {}).save(1)
    with torch.no_grad():
        resumed.copy_(straight)
    checkpoints = Checkpoints(tmp_path, {"optimizer": fresh}, {})
    checkpoints.load(checkpoints.newest())
    stepped(optimizer, straight, 2)
    stepped(fresh, resumed, 2)
    assert torch.equal(straight, resumed)


def test_the_environment_repeats_what_it_had_drawn():
    class Decoder:
        latent_shape, device = (2, 1, 1), torch.device("cpu")

        def decode(self, latents):
            return latents

    def make(seed):
        return DenoisingEnv(Decoder(), 2, lambda x, _: x.sum((1, 2, 3)), ["a", "b", "c"], batch_size=5, seed=seed)

    env, other = make(3), make(4)
    for _ in range(3):
        drawn = env.reset()
    other.load_state_dict(env.state_dict())
    for _ in range(2):
        repeated = other.reset()
        assert all(torch.equal(repeated[key], drawn[key]) for key in ("latents", "prompt_id", "group_id"))
        drawn = env.reset()


def test_what_a_reward_remembers_is_kept_with_the_environment(backbone):
    policy = make_policy(backbone, backbone.sampler(1), backbone.conditioning(["a"]))

    def brightness(images, prompts):
        return images.mean((1, 2, 3))

    def make():
        reward = Scale(Mix([(brightness, 1.0)], normalise=True), 2.0)
        return DenoisingEnv(backbone, 1, reward, ["a"], batch_size=5, seed=3)

    def rewards(env, seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return env.rollout(1, policy)["next", "reward"].flatten()

    env, resumed = make(), make()
    rewards(env, seed=0)
    resumed.load_state_dict(copy.deepcopy(env.state_dict()))
    found = rewards(resumed, seed=1)
    last = resumed.reward_parts["brightness"]
    seen = torch.cat([env.reward_parts["brightness"], last])
    torch.testing.assert_close(found, 2 * (last - seen.mean()) / seen.std(correction=0), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    Checkpoints(directory, {"optimizer": torch.optim.Adam(nn.Linear(8, 8).parameters())}, IDENTITY).save(1)
    return next(directory.glob("*.torchrl"))


@pytest.mark.parametrize("seed", range(40))
def test_damage_is_found_or_harmless(seed, whole, tmp_path):
    """A byte is changed, or the end is cut off: it is noticed, or every part reads as before."""
    chance, content = random.Random(seed), bytearray(whole.read_bytes())
    if seed % 4 == 0:
        del content[chance.randrange(len(content)) :]
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path = tmp_path / whole.name
    path.write_bytes(content)
    assert seed % 4 or damage(path)
    if damage(path) is None:
        states = []
        for directory in (tmp_path, whole.parent):
            optimizer = torch.optim.Adam(nn.Linear(8, 8).parameters())
            checkpoints = Checkpoints(directory, {"optimizer": optimizer}, IDENTITY)
            checkpoints.load(directory / whole.name)
            checkpoints.load_random_states(directory / whole.name)
            states.append((optimizer.state_dict(), torch.get_rng_state()))
        assert equal(*states)


def test_the_one_before_a_damaged_checkpoint_is_used(whole, tmp_path):
    checkpoints = Checkpoints(tmp_path, {}, {})
    for step in (1, 2, 3):
        checkpoints.save(step)
    kept = sorted(tmp_path.glob("*.torchrl"))
    assert [path.stem[-1] for path in kept] == ["2", "3"]
    (tmp_path / ".checkpoint-000000000004.torchrl.stage-abc").mkdir()  # as a killed process leaves it
    kept[1].write_bytes(kept[1].read_bytes()[:100])
    with pytest.warns(DamagedCheckpointWarning, match="000003.torchrl is damaged .*the one before it is used"):
        assert checkpoints.newest() == kept[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.newest() == kept[0]
    assert not list(tmp_path.glob(".*"))
    kept[0].write_bytes(b"")
    with pytest.warns(DamagedCheckpointWarning), pytest.raises(FileNotFoundError, match="every checkpoint .* damaged"):
        checkpoints.newest()


def test_before_the_first_checkpoint_there_is_none(tmp_path):
    assert Checkpoints(tmp_path / "checkpoints", {}, {}).newest() is None


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    first = RunFolder(tmp_path / "run", {"seed": 1})
    with pytest.raises(FileExistsError, match="another process is writing"):
        RunFolder(tmp_path / "run", {"seed": 1}, resume=True)
    with pytest.raises(FileExistsError):
        RunFolder(tmp_path / "run", {"seed": 1})
    del first
    with pytest.raises(FileExistsError, match="holds a run already"):
        RunFolder(tmp_path / "run", {"seed": 1})
    with pytest.raises(ValueError, match="seed is 1, 2"):
        RunFolder(tmp_path / "run", {"seed": 2}, resume=True)
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        RunFolder(tmp_path / "nothing", {"seed": 2}, resume=True)
    RunFolder(tmp_path / "run", {"seed": 1}, resume=True)


def test_rows_beyond_the_checkpoint_are_logged_once(tmp_path):
    run, other = RunFolder(tmp_path / "run", {}), RunFolder(tmp_path / "other", {})
    for n in range(3):
        row = {"reward": 0.1 * n} | ({"eval_reward": 1 / 3} if n == 1 else {})
        run.log(row)
        if n < 2:
            other.log(row)
        if n == 1:
            state = run.state_dict() | {"rows": [dict(each) for each in run.rows]}
    run.load_state_dict(state)
    assert (run.path / "metrics.csv").read_text() == (other.path / "metrics.csv").read_text()
    logs = [sorted((each.path / "logs").rglob("*.csv")) for each in (run, other)]
    assert [file.read_text() for file in logs[0]] == [file.read_text() for file in logs[1]]
    shutil.rmtree(tmp_path / "other")
