"""Budgets and rows of the measurements; and the main job learns, for three seeds and a second reward.

The latter takes about forty minutes on two cores (`make test-long`).
"""

from importlib import import_module

import numpy as np
import pytest
import torch

from agents import Evaluation, ScoreFunctionLoss, make_policy, share_latents
from benchmarks import methods
from benchmarks.gradient_signal import centred_rewards, step_gradient
from benchmarks.main_job import RESULTS, append, measure, read_rows, run_settings
from benchmarks.memory import kept_bytes, peak
from benchmarks.methods import pending
from configs import RunSettings
from diffusion_env import DenoisingEnv
from tests.test_examples import RUNS as RUNS_OF_EXAMPLES

RUNS = [("style-preference", 0), ("style-preference", 1), ("style-preference", 2), ("jpeg-compressibility", 0)]


def test_methods_that_have_a_row_are_not_run_again(tmp_path):
    results = tmp_path / "methods.csv"
    assert list(pending(results, ["a", "b"], [0, 1])) == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    append({"method": "b", "reward": "x", "seed": 0}, results)
    append({"method": "a", "reward": "x", "seed": 1}, results)
    assert list(pending(results, ["a", "b"], [0, 1])) == [("a", 0), ("b", 1)]


def test_every_method_has_the_same_budget():
    settings = methods.Settings(iterations=5, images_per_iteration=7)
    assert set(methods.METHODS) == {name.removesuffix(".py") for name in RUNS_OF_EXAMPLES}
    for name in methods.METHODS:
        run = methods.run_settings(import_module(f"examples.{name}"), 3, settings)
        assert (run.training.iterations, run.sampling.images_per_iteration, run.seed) == (5, 7, 3)
        assert run.model == RunSettings().model


def test_the_examples_table_is_that_of_the_committed_rows():
    readme = (methods.RESULTS.parents[2] / "examples" / "README.md").read_text()
    assert "\n".join(methods.table(read_rows(methods.RESULTS))) in readme


def test_means_and_standard_errors_are_over_seeds():
    rows = [
        {"method": "a", "before": "1", "after": str(after), "gain_in_std": str(after - 1), "processor_seconds": "90"}
        for after in (2.0, 3.0, 7.0)
    ]
    error = torch.tensor([2.0, 3.0, 7.0]).std() / 3**0.5
    assert methods.table(rows)[2:] == [
        f"| `a.py` | 1.00 | 4.00 ± {error:.2f} | +3.00 ± {error:.2f} | 2 min | "
        "![](../benchmarks/results/methods/a.png) |"
    ]


def test_images_of_the_same_noise_stand_below_each_other():
    def evaluation(value):
        images = torch.full((20, 3, 4, 4), value)
        images[-1] = 1
        return Evaluation(images, ["a cat"] * 20, torch.zeros(20))

    picture = np.asarray(methods.strip(evaluation(0.0), evaluation(0.2), columns=3))
    assert picture.shape == (8, 12, 3)
    assert (picture[:, 8:] == 255).all()  # the last image of all
    assert (picture[:4, :8] == 0).all()
    assert (picture[4:, :8] == 51).all()


@pytest.mark.long
@pytest.mark.filterwarnings("always::agents.OverOptimisationWarning")  # the row says what became of the animals
@pytest.mark.parametrize(("reward", "seed"), RUNS)
def test_reward_rises_by_two_standard_deviations_and_animals_stay(reward, seed, tmp_path):
    row = measure(run_settings(reward, seed, tmp_path / "run"))
    append(row, RESULTS)
    assert row["seconds"] <= 600
    if reward == "style-preference":
        assert row["gain_in_std"] >= 2
        assert row["judge_after"] >= row["judge_before"] * 2 / 3
    else:
        assert row["gain_in_std"] > 0.3


def test_a_stored_trajectory_is_its_latents_and_34_bytes_a_step(backbone):
    """step, prompt_id, group_id: int64; log-probability and reward: float32; done, terminated: bool."""
    policy = make_policy(backbone, backbone.sampler(3), backbone.conditioning(["a cat"]))
    env = DenoisingEnv(backbone, 3, lambda images, _: images.mean((1, 2, 3)), ["a cat"], batch_size=5, seed=0)
    with torch.no_grad():
        rollout = env.rollout(3, policy)
    assert kept_bytes(share_latents(rollout)) == 5 * (4 * (4 * 8 * 8) * 4 + 34 * 3)
    assert kept_bytes(rollout) > 2 * kept_bytes(share_latents(rollout))


def test_a_peak_is_what_was_held_at_once_and_given_back():
    size = 200 * 2**20
    # The system counts resident pages a processor at a time and adds them up later.
    assert 0.98 * size < peak(lambda: torch.ones(size // 4).sum()) < 1.2 * size
    assert peak(lambda: None) < 0.1 * size


def rollouts(backbone, prompts):
    """Policy and two batches of three images."""
    policy = make_policy(backbone, backbone.sampler(3), backbone.conditioning(prompts))
    env = DenoisingEnv(backbone, 3, lambda images, _: images.mean((1, 2, 3)), prompts, batch_size=3, seed=0)
    with torch.no_grad():
        return policy, [env.rollout(3, policy) for _ in range(2)]


def test_rewards_are_centred_by_the_other_images_of_their_prompt(backbone):
    _, batches = rollouts(backbone, ["a cat", "a dog"])
    images = [(row["prompt_id"][0].item(), row["next", "reward"][-1].item()) for batch in batches for row in batch]
    expected = []
    for here, (prompt, reward) in enumerate(images):
        others = [value for there, (name, value) in enumerate(images) if name == prompt and there != here]
        expected.append(reward - sum(others) / len(others) if others else 0.0)
    expected = torch.tensor(expected)
    torch.testing.assert_close(torch.cat(centred_rewards(batches)), expected / expected.std())


def test_a_steps_gradient_is_that_of_the_score_function_loss(trained_backbone):
    policy, batches = rollouts(trained_backbone, ["a cat", "a dog"])
    weights = centred_rewards(batches)
    loss = ScoreFunctionLoss(policy)
    data = torch.cat([batch[:, 1] for batch in batches])
    data["advantage"] = torch.cat(weights)[:, None]
    loss(data)["loss_objective"].backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    assert expected.norm() > 0
    torch.testing.assert_close(step_gradient(policy, batches, weights, 1), -expected, rtol=1e-4, atol=1e-7)
