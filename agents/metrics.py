"""What an evaluation measures beside the reward, as pure functions: diversity, distances between sets, divergence.

Features come from any callable images [N, 3, H, W] in [0, 1] -> [N, D]. All numbers depend on that callable and on how
many images there are: compare only what was measured with the same of both, and say which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.modules import ProbabilisticActor

from diffusion_env import normal_kl

from .policy import denoising_mean

FeatureExtractor = Callable[[Tensor], Tensor]
KL_BATCH = 64


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent `values` [N]; infinite for a single one, of which nothing is known."""
    return (values.double().std() / len(values) ** 0.5).item() if len(values) > 1 else float("inf")


def labels_of(prompts: Sequence[str]) -> Tensor:
    """int64 [N], equal where the prompts are equal: 0 for the first prompt, 1 for the next new one, ..."""
    order = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([order[prompt] for prompt in prompts])


def diversity(features: Tensor, labels: Tensor) -> float:
    """Mean squared distance between the features of two different images of one prompt, averaged over prompts.

        1/P sum_p 2 / (M_p (M_p - 1)) sum_{i<j} |f_pi - f_pj|^2

    Domingo-Enrich et al. 2024, "Adjoint Matching", arXiv:2409.08861, appendix G.4, whose formula the Nabla-GFlowNet
    papers follow. It is twice the unbiased variance of a prompt's features summed over their dimensions, which others
    of these papers report: halve it before comparing. With features of unit length it is 2 (1 - mean cosine).

    Args:
        features: float [N, D].
        labels: int64 [N], which prompt an image belongs to; prompts with a single image are left out.

    Raises:
        ValueError: no prompt has two images.
    """
    _check(features, labels)
    spreads = []
    for label in labels.unique():
        of_prompt = features[labels == label].double()
        if len(of_prompt) > 1:
            spreads.append(2 * of_prompt.var(0, correction=1).sum())  # E|x - y|^2 = 2 Var
    if not spreads:
        raise ValueError(
            f"{len(labels)} images of {len(labels)} prompts: diversity within a prompt needs two images of one; "
            "sample more images a prompt"
        )
    return torch.stack(spreads).mean().item()


def paired_distance(features: Tensor, reference: Tensor) -> float:
    """Mean squared distance between the features of image n and of reference image n, both [N, D].

    With images of one evaluator before and after training: how far each picture moved from what the pretrained model
    draws from the same noise (as LPIPS is used, in whatever features there are).
    """
    if features.shape != reference.shape:
        raise ValueError(
            f"features {tuple(features.shape)} and reference {tuple(reference.shape)} differ in shape; image n is "
            "compared with image n, so take both from one evaluator"
        )
    return (features - reference).double().square().sum(1).mean().item()


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to features [N, D] and [M, D]; FID with Inception's features.

        |mu_1 - mu_2|^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

    Heusel et al. 2017, arXiv:1706.08500. With S_k = A_k^T A_k, A_k the centred features / sqrt(N_k - 1), the last trace
    is the sum of the singular values of A_1 A_2^T, of size N x M. That is exact where there are fewer images than
    features and takes milliseconds there; the usual eigenvalues of the D x D product take seconds for each prompt.
    With few images the distance is biased upwards: give the pretrained model against itself, other noise, beside it.

    Raises:
        ValueError: fewer than two images, or features of different size.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"features are {tuple(first.shape)} and {tuple(second.shape)}, expected [N, D] and [M, D]")
    if min(len(first), len(second)) < 2:
        raise ValueError(f"{len(first)} and {len(second)} images: a covariance needs at least two; sample more")
    means, roots = [], []
    for features in (first.double(), second.double()):
        mean = features.mean(0)
        means.append(mean)
        roots.append((features - mean) / (len(features) - 1) ** 0.5)
    traces = roots[0].square().sum() + roots[1].square().sum()
    distance = (means[0] - means[1]).square().sum() + traces - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return distance.clamp(min=0).item()  # rounding alone can make it negative


def prompt_frechet_distance(first: Tensor, second: Tensor, labels: Tensor) -> float:
    """`frechet_distance` between the images of each prompt, averaged over prompts.

    This is what the Nabla-GFlowNet papers call FID (defined in VGG-Flow, arXiv:2512.05116): between images of the
    fine-tuned and of the pretrained model, prompt by prompt. Of few images it is large even for the same model.

    Args:
        first: features [N, D].
        second: features [N, D], of the same prompts in the same order.
        labels: int64 [N], which prompt an image belongs to.
    """
    _check(first, labels)
    _check(second, labels)
    distances = [frechet_distance(first[labels == label], second[labels == label]) for label in labels.unique()]
    return sum(distances) / len(distances)


@torch.no_grad()
def kl_to_pretrained(policy: ProbabilisticActor, trajectories: TensorDictBase) -> Tensor:
    """KL divergence of the policy from the pretrained model along each trajectory, in nats, float32 [B].

        sum_i KL(N(mu_theta(x_i), sigma_i^2 I) || N(mu_pretrained(x_i), sigma_i^2 I))

    Exact at every step, at the states given; its mean over trajectories of the policy is an unbiased estimate of the
    divergence between the two distributions of trajectories, which bounds that between the images from above (Fan et
    al. 2023, "DPOK", arXiv:2305.16381, section 4.2). Summed over latent elements whatever the policy's reduction is.
    Deterministic steps have no divergence and are left out. Two network calls a state.

    Args:
        policy: made by `make_policy`, the pretrained model is its backbone within `reference()`.
        trajectories: states `latents`, `step`, `prompt_id` of whole trajectories, [B, T].
    """
    denoiser = denoising_mean(policy)
    parts = []
    for states in trajectories.select("latents", "step", "prompt_id").reshape(-1).split(KL_BATCH):
        inputs = states["latents"], states["step"], states["prompt_id"]
        mean, std, _ = denoiser(*inputs)
        with denoiser.backbone.reference():
            reference, _, _ = denoiser(*inputs)
        random = std > 0
        kl = normal_kl(mean, std.where(random, 1.0), reference, std.where(random, 1.0), "sum")
        parts.append(kl.where(random.flatten(), 0.0))
    return torch.cat(parts).view(trajectories.batch_size).sum(1)


def _check(features: Tensor, labels: Tensor) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features are {tuple(features.shape)} and labels {tuple(labels.shape)}, expected [N, D], [N]")
