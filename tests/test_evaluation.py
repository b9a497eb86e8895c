"""Evaluation on fixed prompts and noise: what is measured is measured of those images, and nothing else moves."""

import pytest
import torch

from agents import Evaluator, make_policy
from agents.metrics import diversity, kl_to_pretrained, standard_error
from diffusion_env import DenoisingEnv
from rewards import Mix
from tests.runs import equal

STEPS = 3
PROMPTS = ("a cat", "a dog", "an ant")


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) + torch.tensor([float(len(prompt)) for prompt in prompts])


def pixels(images):
    return images.flatten(1)


@pytest.fixture
def policy(trained_backbone):
    return make_policy(trained_backbone, trained_backbone.sampler(STEPS), trained_backbone.conditioning(PROMPTS))


@pytest.fixture
def make(trained_backbone):
    def evaluator(batch_size=4, **options):
        env = DenoisingEnv(trained_backbone, STEPS, brightness, PROMPTS, batch_size=batch_size, seed=0)
        return Evaluator(env, **options)

    return evaluator


def test_what_is_measured_is_of_the_images(make, policy):
    """Six images in chunks of four: the last chunk is filled up, and its fill is left out again."""
    evaluation = make(held_out={"red": redness}, features=pixels)(policy)
    assert evaluation.images.shape == (6, 3, 16, 16)
    assert evaluation.prompts == [*PROMPTS, *PROMPTS]
    torch.testing.assert_close(evaluation.rewards, brightness(evaluation.images, None))
    torch.testing.assert_close(evaluation.held_out["red"], redness(evaluation.images, evaluation.prompts))
    torch.testing.assert_close(evaluation.features, evaluation.images.flatten(1))
    row = evaluation.row()
    assert row["reward"] == pytest.approx(evaluation.rewards.mean().item())
    assert row["reward_error"] == pytest.approx(evaluation.rewards.std().item() / 6**0.5)
    assert row["reward_p50"] == pytest.approx(evaluation.rewards.median().item(), rel=1e-2)
    assert row["reward_p10"] < row["reward_p50"] < row["reward_p90"]
    assert row["held_out_red"] == pytest.approx(evaluation.held_out["red"].mean().item())
    assert row["held_out_red_error"] == pytest.approx(standard_error(evaluation.held_out["red"]))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    assert row["diversity"] == pytest.approx(diversity(evaluation.features, labels))
    assert {"kl", "moved", "fid"}.isdisjoint(row)


def test_one_image_a_prompt_has_no_diversity(make, policy):
    evaluation = make(samples_per_prompt=1, features=pixels)(policy)
    assert "diversity" not in evaluation.row()
    assert "fid" not in evaluation.row(evaluation)
    assert "diversity" in make(samples_per_prompt=2, features=pixels)(policy).row()


def test_image_n_differs_by_the_policy_alone(make, policy, trained_backbone):
    evaluate = make(features=pixels)
    state = torch.get_rng_state()
    first = evaluate(policy)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(evaluate(policy).images, first.images)
    with trained_backbone.reference():
        pretrained = evaluate(policy)
    assert not torch.equal(pretrained.images, first.images)
    expected = (first.images - pretrained.images).square().flatten(1).sum(1).mean().item()
    row = first.row(pretrained)
    assert row["moved"] == pytest.approx(expected, rel=1e-4)
    # Two images of a prompt have a covariance u u^T of rank one; the root of u u^T v v^T has the trace |u v|.
    of_prompt = [images.flatten(1).double().view(2, 3, -1) for images in (first.images, pretrained.images)]
    (mean, half), (other, other_half) = (((x[0] + x[1]) / 2, (x[0] - x[1]) / 2**0.5) for x in of_prompt)
    cross = (half * other_half).sum(1).abs()
    distance = (mean - other).square().sum(1) + half.square().sum(1) + other_half.square().sum(1) - 2 * cross
    assert row["fid"] == pytest.approx(distance.mean().item(), rel=1e-4)
    assert not torch.equal(make(features=pixels, seed=1)(policy).images, first.images)


def test_images_of_a_prompt_share_no_step_noise(make, policy):
    """A chunk holds every prompt once here; with the same first noise, copies differ by the step noise alone."""
    evaluate = make(batch_size=len(PROMPTS), samples_per_prompt=2)
    first, second = evaluate.latents.chunk(2)
    second.copy_(first)
    one, other = evaluate(policy).images.chunk(2)
    assert ((one - other).flatten(1).abs().amax(1) > 1e-3).all()


def test_running_statistics_are_left_as_they_were(trained_backbone, policy):
    reward = Mix([(brightness, 1.0)], normalise=True)
    evaluate = Evaluator(DenoisingEnv(trained_backbone, STEPS, reward, PROMPTS, batch_size=4, seed=0))
    reward(torch.rand(3, 3, 8, 8), ["a"] * 3)
    before = {name: value.clone() for name, value in reward.statistics.state_dict().items()}
    evaluate(policy)
    assert equal(reward.statistics.state_dict(), before)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_kl_is_of_the_first_trajectories(make, policy, trained_backbone, batch_size, monkeypatch):
    measured = []

    def recording(policy, trajectories):
        measured.append(trajectories["prompt_id"][:, 0, 0].tolist())
        return kl_to_pretrained(policy, trajectories)

    monkeypatch.setattr("agents.evaluation.kl_to_pretrained", recording)
    evaluation = make(batch_size, kl_trajectories=5)(policy)
    assert sum(measured, []) == [0, 1, 2, 0, 1]
    assert evaluation.kl.shape == (5,)
    assert evaluation.kl.min() > 1e-3
    assert evaluation.row()["kl"] == pytest.approx(evaluation.kl.mean().item())
    with trained_backbone.reference():
        assert make(batch_size, kl_trajectories=5)(policy).row()["kl"] == 0


def test_a_held_out_reward_that_is_no_number_is_refused(make, policy):
    with pytest.raises(ValueError, match="nan for prompt 'a cat'"):
        make(held_out={"broken": lambda images, _: images.mean((1, 2, 3)) * float("nan")})(policy)
