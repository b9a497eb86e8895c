"""Whether an image can still be told to be its prompt's, measured against the pretrained model's own images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import check_batch

SCALES = torch.logspace(-2, 4, 121)  # tried, in units of 1 / mean squared distance


class PromptFidelity:
    """Log-probability that a classifier fitted to the pretrained model's images gives an image's own prompt.

    It needs no model of text and no training, so any pipeline and prompt set has one: a held-out reward for runs whose
    reward knows nothing of the prompt. It falls when images lose what told the prompts apart, and is blind to what
    changes for all prompts alike. Never above 0; log(1 / P) for a guess among P prompts.

    The classifier takes the prompt whose mean features are nearest: logits are -s times the squared distances to the
    prompts' means. The scale s is the one under which the pretrained model's images, each left out of its own mean, are
    likeliest: so the score is calibrated on images like those (temperature scaling, Guo et al. 2017, arXiv:1706.04599).
    """

    name = "prompt_fidelity"
    differentiable = True

    def __init__(self, features: Callable[[Tensor], Tensor], images: Tensor, prompts: Sequence[str]) -> None:
        """Fit the classifier.

        Args:
            features: images [B, 3, H, W] in [0, 1] -> [B, D].
            images: of the pretrained model, [N, 3, H, W], from other noise than what will be scored.
            prompts: theirs, N; each at least twice.

        Raises:
            ValueError: a prompt has a single image, so that nothing is known of its spread.
        """
        check_batch(images, list(prompts))
        order = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        label = torch.tensor([order[prompt] for prompt in prompts])
        if label.bincount().min() < 2:
            single = list(order)[int(label.bincount().argmin())]
            raise ValueError(f"prompt {single!r} has a single image of {len(images)}; sample at least two of each")
        with torch.no_grad():
            encoded = torch.cat([features(chunk) for chunk in images.split(64)]).float()
        self._features, self._order = features, order
        self._means = torch.stack([encoded[label == number].mean(0) for number in range(len(order))])
        counts = label.bincount()
        distance = self._distances(encoded)
        # The mean without the image itself is farther from it: x - (M mu - x) / (M - 1) = M / (M - 1) (x - mu).
        own = torch.nn.functional.one_hot(label, len(order)).to(distance)
        left_out = distance * (1 + own * ((counts / (counts - 1)) ** 2 - 1).to(distance))
        scales = SCALES.to(distance) / distance.mean().clamp(min=1e-12)
        likelihood = [_own(-scale * left_out, label.to(distance.device)).mean() for scale in scales]
        self._scale = scales[torch.stack(likelihood).argmax()]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score a batch, see `Reward`.

        Raises:
            ValueError: a prompt that the classifier was not fitted to.
        """
        check_batch(images, prompts)
        unknown = [prompt for prompt in prompts if prompt not in self._order]
        if unknown:
            raise ValueError(
                f"prompt {unknown[0]!r} is none of the {len(self._order)} that the fidelity was fitted to; fit another "
                "to images of the pretrained model for these prompts"
            )
        encoded = self._features(images).float()
        own = torch.tensor([self._order[prompt] for prompt in prompts], device=encoded.device)
        return _own(-self._scale * self._distances(encoded), own)

    def _distances(self, encoded: Tensor) -> Tensor:
        """Squared distances [B, P] of features [B, D] from the prompts' means."""
        return torch.stack([(encoded - mean).square().sum(1) for mean in self._means], 1)


def _own(logits: Tensor, label: Tensor) -> Tensor:
    """Log-probability [B] of each row's own label [B] under logits [B, P]."""
    return logits.log_softmax(1).gather(1, label[:, None])[:, 0]
