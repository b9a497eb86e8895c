"""DDPO's rewards from a vision-language model that looks at the picture (Black et al. 2023, arXiv:2305.13301).

Their published runs asked LLaVA 13B of early 2023 over HTTP, on pictures compressed to JPEG at quality 80; this asks
LLaVA 1.5, in this process, about the picture itself. Scores will not be theirs to the digit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import RewardCard, Scorer, to_pil
from .bert_score import DEBERTA, BERTScoreRecall
from .weights import explained, load_model, shared

LLAVA = "llava-hf/llava-1.5-7b-hf"
DESCRIBE = "Answer concisely: what is going on in this image?"
MAX_NEW_TOKENS = 64


class LLaVA(nn.Module):
    """Answers questions about pictures, greedily, in at most 64 tokens.

    Args:
        source: a name on the hub or a local folder of a `LlavaForConditionalGeneration` and its processor.
        dtype: of its weights, the one number format in this package that is not float32: DDPO used float16, and what
            comes out is words.
        batch_size: pictures at a time.
    """

    def __init__(self, source: str | Path = LLAVA, *, dtype: torch.dtype = torch.float16, batch_size: int = 16) -> None:
        super().__init__()
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        with explained("LLaVA's processor", source, LLAVA):
            self.processor = AutoProcessor.from_pretrained(source)
        self.processor.tokenizer.padding_side = "left"  # an answer follows its question directly
        self.model = load_model(
            LlavaForConditionalGeneration, source, what="the LLaVA model", published=LLAVA, dtype=dtype
        )
        self.batch_size = batch_size

    @torch.no_grad()
    def forward(self, images: Tensor, questions: list[str]) -> list[str]:
        """The answer to each picture's question."""
        answers: list[str] = []
        texts = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            answers += self._answer(to_pil(images[part]), texts[part])
        return answers

    def _answer(self, pictures: list[Any], texts: list[str]) -> list[str]:
        inputs = self.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def load_llava(source: str | Path, dtype: torch.dtype) -> LLaVA:
    """The model at `source`; whoever asks again gets the same module."""
    return shared(("llava", str(source), str(dtype)), lambda: LLaVA(source, dtype=dtype))


class LLaVABERTScore(Scorer):
    """Prompt alignment: BERTScore recall of "The image contains <prompt>" in LLaVA's description of the picture.

    Args:
        llava: a name on the hub or a local folder.
        deberta: BERTScore's model, a name on the hub or a local folder.
        dtype: of LLaVA's weights.
        layers: of DeBERTa's, how many are used.
    """

    name: ClassVar[str] = "llava-bertscore"
    differentiable: ClassVar[bool] = False
    card: ClassVar[RewardCard] = RewardCard(
        typical_range=(0.5, 0.9),
        source="Black et al. 2023, arXiv:2305.13301",
        licence="Llama 2 Community (LLaVA), MIT (DeBERTa)",
        needs="transformers; LLaVA 1.5 7B, DeBERTa xlarge MNLI",
        download_mb=17200,
    )

    def __init__(
        self,
        llava: str | Path = LLAVA,
        deberta: str | Path = DEBERTA,
        *,
        dtype: torch.dtype = torch.float16,
        layers: int = 40,
    ) -> None:
        super().__init__()
        self.llava = load_llava(llava, dtype)
        self.recall = BERTScoreRecall(deberta, layers=layers)
        self.train(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]."""
        said = self.llava(images, [DESCRIBE] * len(images))
        return self.recall(said, [f"The image contains {prompt}" for prompt in prompts]).to(images.device)


class LLaVACounting(Scorer):
    """Counting, strictly: the share of two questions that LLaVA answers with the very word of the prompt.

    For "six turtles": "How many turtles are there in this image?" must contain "six", "What animals are in this
    image?" must contain "turtles". As in DDPO's `llava_strict_satisfaction` upper and lower case differ, and a digit
    is not the word.

    Args:
        llava: a name on the hub or a local folder.
        dtype: of its weights.
    """

    name: ClassVar[str] = "llava-counting"
    differentiable: ClassVar[bool] = False
    card: ClassVar[RewardCard] = RewardCard(
        typical_range=(0.0, 1.0),
        source="Black et al. 2023, arXiv:2305.13301",
        licence="Llama 2 Community (LLaVA)",
        needs="transformers; LLaVA 1.5 7B",
        download_mb=14100,
    )

    def __init__(self, llava: str | Path = LLAVA, *, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.llava = load_llava(llava, dtype)
        self.train(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """0, 0.5 or 1 for each picture, [B].

        Raises:
            ValueError: a prompt is not a number and a thing.
        """
        wanted = [number_and_thing(prompt) for prompt in prompts]
        counts = self.llava(images, [f"How many {thing} are there in this image?" for _, thing in wanted])
        things = self.llava(images, ["What animals are in this image?"] * len(images))
        return torch.tensor(
            [
                ((number in count) + (thing in seen)) / 2
                for (number, thing), count, seen in zip(wanted, counts, things, strict=True)
            ],
            dtype=torch.float32,
            device=images.device,
        )


def number_and_thing(prompt: str) -> tuple[str, str]:
    """Both halves of a prompt of the set `counting`: "six" and "turtles" of "six turtles"."""
    number, _, thing = prompt.strip().partition(" ")
    if not number or not thing:
        raise ValueError(
            f"the prompt {prompt!r} is not a number and a thing, such as 'six turtles' of the set 'counting'."
        )
    return number, thing
