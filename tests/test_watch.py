"""The over-optimisation watch: its rules on made-up evaluations, and a run that hacks its reward on purpose."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from agents import (
    DRaFTLoss,
    Evaluation,
    Evaluator,
    Experiment,
    Optimisation,
    OverOptimisationWarning,
    OverOptimisationWatch,
    PromptAdvantage,
    RunFolder,
    WatchRule,
    make_collector,
    make_policy,
)
from diffusion_env import DenoisingEnv, LoRA, StableDiffusionBackbone
from tests.tiny import tiny_pipeline

N = 200
NOISE = torch.randn(N, generator=torch.Generator().manual_seed(0))
FEATURES = torch.randn(N, 3, generator=torch.Generator().manual_seed(1))
ANOTHER = torch.randn(N, generator=torch.Generator().manual_seed(2))


def seen(reward, held_out, spread=1.0, jitter=0.0):
    """Held-out rewards of standard deviation 5 around `held_out` such deviations; image n keeps its own luck."""
    return Evaluation(
        torch.zeros(N, 3, 1, 1),
        ["a cat", "a dog"] * (N // 2),
        torch.full((N,), float(reward)),
        {"other": 5 * (NOISE + held_out + jitter * ANOTHER) + 7},
        FEATURES * spread,
    )


def verdicts(*evaluations, **rule):
    watch = OverOptimisationWatch(WatchRule(**rule), evaluations[0])
    return [watch(evaluation) for evaluation in evaluations[1:]]


def test_a_fall_from_the_best_is_caught():
    quiet, at_best, below = verdicts(seen(0, 0), seen(1, -0.3), seen(2, 0.4), seen(3, -0.2))
    assert not quiet.alarms
    assert not at_best.alarms
    (alarm,) = below.alarms  # -0.2 alone is less than half a standard deviation below the pretrained model's
    assert "fell by 0.6" in alarm
    assert "from 0.000 to 3.000" in alarm


def test_the_pretrained_model_counts_as_the_best_so_far():
    (verdict,) = verdicts(seen(0, 0), seen(1, -0.6))
    assert verdict.alarms
    assert not verdict.keep
    (verdict,) = verdicts(seen(0, 0), seen(1, -0.6), held_out_drop=0.7)
    assert not verdict.alarms


def test_a_fall_within_the_noise_is_none():
    """The same drop, once with every image's luck unchanged, once drowned in noise."""
    assert verdicts(seen(0, 0), seen(1, -0.55))[0].alarms
    noisy = seen(1, -0.7 - 7 * ANOTHER.mean(), jitter=7)
    assert not verdicts(seen(0, 0), noisy)[0].alarms


def test_lost_diversity_is_caught():
    """Diversity goes with the square of the features' spread."""
    enough, lost = verdicts(seen(0, 0), seen(1, 0, spread=0.8), seen(2, 0, spread=0.6))
    assert not enough.alarms
    assert lost.alarms == ["diversity within prompts is 36% of the pretrained model's (threshold 50%)"]
    assert enough.keep
    assert not lost.keep
    assert not verdicts(seen(0, 0), seen(2, 0, spread=0.6), diversity_share=0.3)[0].alarms


def test_it_stops_only_when_told():
    hacked = [seen(0, 0), seen(1, 0.1), seen(2, -1)]
    assert [verdict.stop for verdict in verdicts(*hacked)] == [False, False]
    assert [verdict.stop for verdict in verdicts(*hacked, stop=True)] == [False, True]


def test_the_best_held_out_is_kept_not_the_last():
    kept = [verdict.keep for verdict in verdicts(seen(0, 0), seen(1, 0.1), seen(2, 0.3), seen(3, 0.1), seen(4, -1))]
    assert kept == [True, True, False, False]


def test_within_the_noise_the_higher_reward_is_kept():
    """Jitter 2 among 200 images is a standard error of 0.14."""

    def near(reward, held_out):
        return seen(reward, held_out - 2 * ANOTHER.mean(), jitter=2)

    assert [v.keep for v in verdicts(seen(0, 0), seen(1, 0.3), near(2, 0.25), seen(1.5, 0.3))] == [True, True, False]
    # A new best so far above that what was kept is out of its noise takes its place, whatever its reward.
    assert [v.keep for v in verdicts(seen(0, 0), seen(3, 0.1), near(1, 0.4))] == [True, True]
    assert [v.keep for v in verdicts(seen(0, 0), seen(3, 0.35), near(1, 0.4))] == [True, False]


def test_without_held_out_rewards_the_highest_reward_is_kept():
    def bare(reward):
        return Evaluation(torch.zeros(2, 3, 1, 1), ["a", "b"], torch.full((2,), float(reward)))

    assert [v.keep for v in verdicts(bare(0), bare(2), bare(1), bare(3))] == [True, False, True]


@pytest.mark.parametrize(("rule", "message"), [({"held_out_drop": 0}, "drop=0"), ({"diversity_share": 1}, "share=1")])
def test_thresholds_that_mean_nothing_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        WatchRule(**rule)


STEPS, ITERATIONS, BATCH, PROMPTS = 3, 10, 16, ("a cat", "a dog")


def red(images, prompts):
    return images[:, 0].mean((1, 2))


def reddish(images, prompts):
    """What redness stands for: more of it is better, up to a point."""
    return -(red(images, prompts) - 0.53).abs()


def hacking_run(backbone, folder, **rule):
    """Redness raised along its gradient, far beyond what is meant by it within a few iterations."""
    torch.manual_seed(0)
    policy = make_policy(backbone, backbone.sampler(STEPS), backbone.conditioning(PROMPTS))
    loss = DRaFTLoss(policy, red, backprop_steps=2)
    env = DenoisingEnv(backbone, STEPS, red, PROMPTS, batch_size=BATCH, seed=0)
    evaluation_env = DenoisingEnv(backbone, STEPS, red, PROMPTS, batch_size=16, seed=0)
    experiment = Experiment(
        backbone=backbone,
        policy=policy,
        reward=red,
        collector=make_collector(env, policy, iterations=ITERATIONS),
        evaluator=Evaluator(
            evaluation_env,
            samples_per_prompt=8,
            held_out={"reddish": reddish},
            features=lambda images: images.flatten(1),
            kl_trajectories=2,
        ),
        advantage=PromptAdvantage(min_count=4),
        prepare=[],
        sampler=loss.transition_sampler(),
        optimisation=Optimisation(iterations=ITERATIONS, learning_rate=3e-2, updates_per_epoch=1),
        evaluate_every=1,
        watch=WatchRule(**rule),
    )
    return experiment.run(loss, folder)


@pytest.fixture(scope="module")
def hacked(tmp_path_factory):
    """The folder of a run that hacks its reward, its evaluations before and after; the run was stopped."""
    path = tmp_path_factory.mktemp("hacked")
    pipeline = tiny_pipeline()
    lora = LoRA(rank=3, alpha=5.0, targets=("to_q", "to_k", "to_v", "to_out.0", "conv1"))
    folder = RunFolder(path / "run", {})
    with pytest.warns(OverOptimisationWarning, match="(?s)the held-out reward fell by.*the run ends here"):
        before, after = hacking_run(StableDiffusionBackbone(pipeline, lora=lora, guidance_scale=2.0), folder, stop=True)
    return folder.path, before, after


def rows_of(path):
    with path.open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_run_that_hacks_its_reward_is_caught_and_stopped(hacked):
    folder, before, after = hacked
    rows = rows_of(folder / "evaluations.csv")
    assert after.mean > before.mean + before.std  # the reward rose all the while
    assert [row["iteration"] for row in rows] == list(range(len(rows)))  # the pretrained model's is the first
    assert 3 < len(rows) < ITERATIONS + 1  # neither at once, nor never
    assert [row["alarms"] for row in rows] == [0] * (len(rows) - 1) + [1]
    assert (
        max(row["held_out_reddish"] for row in rows[1:-1]) > rows[0]["held_out_reddish"] > rows[-1]["held_out_reddish"]
    )
    assert rows[0]["kl"] == rows[0]["moved"] == 0
    assert rows[-1]["kl"] > rows[1]["kl"] > 0
    assert rows[-1]["moved"] > rows[1]["moved"] > 0
    assert all(row["diversity"] > 0 for row in rows)
    metrics = rows_of(folder / "metrics.csv")
    assert len(metrics) == len(rows) - 1
    assert metrics[-1]["eval_held_out_reddish"] == rows[-1]["held_out_reddish"]
    assert metrics[-1]["eval_reward"] == pytest.approx(after.mean)


def test_what_is_kept_is_not_what_a_hacked_run_ends_with(hacked):
    folder, _, _ = hacked
    rows = rows_of(folder / "evaluations.csv")
    kept = [row for row in rows if row["kept"]]
    assert kept
    assert kept[-1]["held_out_reddish"] > rows[-1]["held_out_reddish"]
    best, last = ((folder / name / "pytorch_lora_weights.safetensors").read_bytes() for name in ("lora_best", "lora"))
    assert best != last


def test_samples_are_the_evaluations_images(hacked):
    folder, before, after = hacked
    strips = sorted((folder / "samples").glob("*.png"))
    assert len(strips) == len(rows_of(folder / "evaluations.csv"))
    assert json.loads((folder / "samples" / "prompts.json").read_text()) == list(PROMPTS)
    for strip, evaluation in ((strips[0], before), (strips[-1], after)):
        pixels = torch.from_numpy(np.asarray(Image.open(strip)).copy()).permute(2, 0, 1) / 255
        expected = torch.cat([evaluation.images[0], evaluation.images[1]], 2)
        torch.testing.assert_close(pixels, expected, rtol=0, atol=0.51 / 255)
