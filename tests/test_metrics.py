"""Metrics against brute force, other implementations and closed forms."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from agents.metrics import (
    diversity,
    frechet_distance,
    kl_to_pretrained,
    labels_of,
    paired_distance,
    prompt_frechet_distance,
    standard_error,
)
from tests.chain import chain, transitions


def features(count, size, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, size, generator=generator) @ torch.randn(size, size, generator=generator) + seed


def test_standard_error_is_that_of_repeated_means():
    torch.manual_seed(0)
    draws = torch.randn(2000, 25) * 3
    errors = torch.tensor([standard_error(draw) for draw in draws])
    assert errors.mean().item() == pytest.approx(draws.mean(1).std().item(), rel=0.05)
    assert standard_error(torch.tensor([1.0])) == float("inf")


def test_labels_number_prompts_in_their_order():
    assert labels_of(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]


def test_diversity_is_the_mean_over_pairs():
    f, labels = features(9, 5), torch.tensor([0, 1, 2, 0, 1, 0, 0, 1, 7])  # prompts 2 and 7 have one image
    by_prompt = []
    for label in (0, 1):
        chosen = f[labels == label]
        by_prompt.append(np.mean([(a - b).square().sum().item() for a, b in combinations(chosen, 2)]))
    assert diversity(f, labels) == pytest.approx(np.mean(by_prompt), rel=1e-5)


def test_diversity_of_unit_features_is_twice_one_minus_cosine():
    f = torch.nn.functional.normalize(features(6, 5), dim=1)
    cosines = [(a @ b).item() for a, b in combinations(f, 2)]
    assert diversity(f, torch.zeros(6, dtype=torch.int64)) == pytest.approx(2 - 2 * np.mean(cosines), rel=1e-5)


def test_diversity_needs_two_images_of_a_prompt():
    with pytest.raises(ValueError, match="sample more images a prompt"):
        diversity(features(3, 5), torch.arange(3))
    with pytest.raises(ValueError, match=r"labels \(2,\)"):
        diversity(features(3, 5), torch.arange(2))


@pytest.mark.parametrize(("counts", "size"), [((40, 60), 6), ((8, 5), 12)])
def test_frechet_distance_is_torchmetrics(counts, size):
    """Eigenvalues of the product of covariances, also where there are fewer images than features."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(torch.nn.Module):
        num_features = size

        def forward(self, x):
            return x

    first, second = features(counts[0], size, 1).double(), features(counts[1], size, 2, 0.5).double()
    metric = FrechetInceptionDistance(Identity()).set_dtype(torch.float64)
    metric.update(first, real=True)
    metric.update(second, real=False)
    assert frechet_distance(first, second) == pytest.approx(metric.compute().item(), rel=1e-5)


def test_frechet_distance_with_a_matrix_square_root():
    """The formula as it stands, the root of S_1^(1/2) S_2 S_1^(1/2) from numpy's symmetric eigenvectors."""

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    first, second = features(50, 4, 1).double(), features(30, 4, 2).double()
    one, two = np.cov(first.numpy().T), np.cov(second.numpy().T)
    trace = np.trace(one + two - 2 * root(root(one) @ two @ root(one)))
    expected = (first.mean(0) - second.mean(0)).square().sum().item() + trace
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_refuses_what_has_no_covariance():
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(features(1, 4), features(5, 4))
    with pytest.raises(ValueError, match="expected"):
        frechet_distance(features(5, 3), features(5, 4))


def test_prompt_frechet_distance_averages_over_prompts():
    first, second = features(10, 3, 1), features(10, 3, 2)
    labels = torch.tensor([0, 1] * 5)
    expected = (frechet_distance(first[::2], second[::2]) + frechet_distance(first[1::2], second[1::2])) / 2
    assert prompt_frechet_distance(first, second, labels) == pytest.approx(expected)
    # Pooled, what differs within prompts alone would be missed: the same images, prompts exchanged.
    exchanged = first.view(5, 2, 3).flip(1).reshape(10, 3)
    assert frechet_distance(first, exchanged) == pytest.approx(0, abs=1e-4)
    assert prompt_frechet_distance(first, exchanged, labels) > 0.1


def test_paired_distance_compares_image_with_image():
    first, second = features(4, 3, 1), features(4, 3, 2)
    expected = sum((a - b).square().sum().item() for a, b in zip(first, second, strict=True)) / 4
    assert paired_distance(first, second) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="differ in shape"):
        paired_distance(first, second[:3])


def moved_chain(slope, **settings):
    """A chain whose policy has left the pretrained model."""
    backbone, sampler, policy = chain(**settings)
    generator = torch.Generator().manual_seed(3)
    backbone.slope.data.fill_(slope)
    backbone.offset.data = torch.randn(backbone.offset.shape, generator=generator) * 0.5
    return backbone, sampler, policy


def test_kl_is_the_closed_form():
    """Means apart by sigma^2 (slope x + offset): KL = sum_i sigma_i^2 |slope x_i + offset_i|^2 / 2."""
    backbone, sampler, policy = moved_chain(slope=0.3)
    states = transitions(policy, sampler, trajectories=40)  # 160 states, more than a batch
    i, prompt = states["step"][..., 0], states["prompt_id"][..., 0]
    residual = 0.3 * states["latents"] + backbone.offset.detach()[i, prompt]
    expected = (sampler.std[i] ** 2 / 2 * residual.square().sum((2, 3, 4))).sum(1)
    torch.testing.assert_close(kl_to_pretrained(policy, states), expected, rtol=1e-4, atol=1e-6)
    assert expected.mean() > 0.1
    _, _, pretrained = chain()  # the pretrained model is at no distance from itself
    assert kl_to_pretrained(pretrained, states).abs().max() == 0


def test_kl_is_the_mean_log_ratio_of_trajectories():
    backbone, sampler, policy = moved_chain(slope=0.3)
    states = transitions(policy, sampler, trajectories=4000)
    flat = states.reshape(-1)

    def log_prob():
        distribution = policy.get_dist(flat)
        std = distribution.scale.detach().expand_as(distribution.loc).flatten(1)
        normal = MultivariateNormal(distribution.loc.detach().flatten(1), scale_tril=torch.diag_embed(std))
        return normal.log_prob(flat["action"].flatten(1)).view(states.batch_size).sum(1)

    ratio = log_prob()
    with backbone.reference():
        ratio = ratio - log_prob()
    kl = kl_to_pretrained(policy, states)
    assert abs((ratio - kl).mean()) < 4 * standard_error(ratio - kl)
    assert kl.mean() > 20 * standard_error(ratio - kl)  # and that says something


def test_deterministic_steps_have_no_divergence():
    _, sampler, policy = moved_chain(slope=0.3, set_alpha_to_one=True)
    assert not sampler.all_have_density
    states = transitions(policy, sampler, trajectories=3)
    kl = kl_to_pretrained(policy, states)
    assert kl.isfinite().all()
    torch.testing.assert_close(kl, kl_to_pretrained(policy, states[:, sampler.has_density]))
