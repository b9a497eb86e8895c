"""BERTScore and LLaVA: the recall against brute force, and DDPO's rewards end to end with tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DebertaConfig,
    DebertaModel,
    DebertaTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from rewards import LLaVABERTScore, LLaVACounting
from rewards.bert_score import BERTScoreRecall, greedy_recall
from rewards.llava import LLaVA, number_and_thing
from tests.test_reward_models import randomise
from tests.test_rewards import as_pil, some_images

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,:?"


def brute_force_recall(candidate: Tensor, reference: Tensor) -> float:
    """Of token states [M, D] and [N, D], by loops in double precision."""
    total = 0.0
    for wanted in reference.double():
        total += max((wanted @ said / (wanted.norm() * said.norm())).item() for said in candidate.double())
    return total / len(reference)


@pytest.fixture(scope="module")
def deberta_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers with the relative attention of the published model; one token a letter."""
    folder = tmp_path_factory.mktemp("deberta")
    vocab = {token: n for n, token in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "Ġ", *LETTERS])}
    DebertaTokenizer(vocab=vocab).save_pretrained(folder)
    config = DebertaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=-1,
        pad_token_id=3,
    )
    randomise(DebertaModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    vocab = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>", "▁", "\n", *LETTERS])}
    tokenizer = LlamaTokenizer(vocab=vocab, pad_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=28, patch_size=14),
        text_config=LlamaConfig(**tower, **special, vocab_size=len(tokenizer), max_position_embeddings=256),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    model = randomise(LlavaForConditionalGeneration(config), seed=1)
    model.generation_config.update(**special)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(llava_folder: Path) -> LLaVA:
    return LLaVA(llava_folder, dtype=torch.float32, batch_size=3)


def test_greedy_recall_is_the_brute_force_over_tokens_that_count():
    generator = torch.Generator().manual_seed(0)
    candidate, reference = (torch.randn(4, length, 6, generator=generator) for length in (5, 7))
    said = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 1]]).bool()
    wanted = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1]]).bool()
    expected = [brute_force_recall(candidate[n][said[n]], reference[n][wanted[n]]) for n in range(4)]
    recall = greedy_recall(candidate, said, reference, wanted)
    torch.testing.assert_close(recall.double(), torch.tensor(expected).double(), rtol=0, atol=1e-6)
    assert greedy_recall(reference, wanted, reference, wanted).sub(1).abs().max() < 1e-6


@pytest.mark.parametrize("layers", [2, 3])
def test_bert_score_takes_the_layer_and_scores_each_pair_for_itself(deberta_folder: Path, layers: int):
    candidates = ["A cat rides.", " the dog", "mouse", "A cat, a bike and a much longer sentence."]
    references = ["The image contains a cat", "a dog", "The image contains a mouse", "b"]
    model = DebertaModel.from_pretrained(deberta_folder).eval()
    tokenizer = DebertaTokenizer.from_pretrained(deberta_folder)

    def states(text: str) -> Tensor:
        tokens = torch.tensor([tokenizer(text.strip())["input_ids"]])
        assert tokens[0, 0] == 1 and tokens[0, -1] == 2, "[CLS] ... [SEP]"
        with torch.no_grad():
            return model(tokens, output_hidden_states=True).hidden_states[layers][0]

    # What bert-score does: [CLS] and [SEP] of the candidate may be matched, those of the reference are not looked for.
    expected = [brute_force_recall(states(c), states(r)[1:-1]) for c, r in zip(candidates, references, strict=True)]
    recall = BERTScoreRecall(deberta_folder, layers=layers)
    found = recall(candidates, references)
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=0, atol=1e-5)
    assert found.std() > 1e-3
    assert recall(["", " ", "The image"], ["a", "b", "The image"]).sub(torch.tensor([0.0, 0, 1])).abs().max() < 1e-6


def test_bert_score_wants_as_many_layers_as_there_are(deberta_folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="has 3 layers, fewer than layers=40"):
        BERTScoreRecall(deberta_folder)
    with pytest.raises(FileNotFoundError, match="hf download microsoft/deberta-xlarge-mnli"):
        BERTScoreRecall(tmp_path)


def test_llava_answers_as_transformers_does_one_by_one(llava: LLaVA, llava_folder: Path):
    images = some_images(4, 40, 52)
    questions = ["What is it?", "How many turtles are there in this image?", "Why?", "What is it?"]
    answers = llava(images, questions)  # in batches of three, padded
    processor = LlavaProcessor.from_pretrained(llava_folder)
    model = LlavaForConditionalGeneration.from_pretrained(llava_folder, dtype=torch.float32)
    for image, question, answer in zip(images, questions, answers, strict=True):
        inputs = processor(images=as_pil(image), text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4
        tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert len(answer) > 3
    assert len(set(answers)) > 1, "the picture or the question matters"


def test_alignment_is_the_recall_of_the_prompt_in_the_description(llava_folder: Path, deberta_folder: Path):
    images, prompts = some_images(4), ["a cat", "a dog riding a bike", "", "a cat"]
    reward = LLaVABERTScore(llava_folder, deberta_folder, dtype=torch.float32, layers=3)
    said = reward.llava(images, ["Answer concisely: what is going on in this image?"] * 4)
    expected = BERTScoreRecall(deberta_folder, layers=3)(said, [f"The image contains {prompt}" for prompt in prompts])
    scores = reward(images, prompts)
    assert scores.dtype == torch.float32 and torch.equal(scores, expected)
    alone = torch.cat([reward(images[n : n + 1], prompts[n : n + 1]) for n in range(4)])
    torch.testing.assert_close(alone, scores, rtol=0, atol=1e-5)
    assert scores.std() > 1e-4


class Answers(torch.nn.Module):
    """Says what it is told to, and remembers what it was asked."""

    def __init__(self, *answers: list[str]) -> None:
        super().__init__()
        self.answers, self.asked = list(answers), []

    def forward(self, images: Tensor, questions: list[str]) -> list[str]:
        self.asked.append(questions)
        return self.answers[len(self.asked) - 1]


def test_counting_wants_the_very_words(llava_folder: Path):
    reward = LLaVACounting(llava_folder, dtype=torch.float32)
    assert set(reward(some_images(2), ["six turtles", "two cats"]).tolist()) <= {0.0, 0.5, 1.0}
    reward.llava = Answers(
        ["There are six turtles.", "Six", "6", "two"], ["turtles", "some turtles", "a dog", "cats and dogs"]
    )
    scores = reward(some_images(4), ["six turtles", "six turtles", "six turtles", "two mice"])
    assert scores.tolist() == [1.0, 0.5, 0.0, 0.5]
    assert reward.llava.asked == [
        ["How many turtles are there in this image?"] * 3 + ["How many mice are there in this image?"],
        ["What animals are in this image?"] * 4,
    ]


def test_counting_refuses_other_prompts(llava_folder: Path):
    assert number_and_thing("three komodo dragons") == ("three", "komodo dragons")
    with pytest.raises(ValueError, match="'turtles' is not a number and a thing, such as 'six turtles'"):
        LLaVACounting(llava_folder, dtype=torch.float32)(some_images(1), ["turtles"])


def test_both_rewards_share_one_llava(llava_folder: Path, deberta_folder: Path):
    counting = LLaVACounting(llava_folder, dtype=torch.float32)
    assert LLaVABERTScore(llava_folder, deberta_folder, dtype=torch.float32, layers=1).llava is counting.llava
    assert not counting.differentiable and not LLaVABERTScore.differentiable


def test_a_missing_llava_says_what_to_fetch(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="hf download llava-hf/llava-1.5-7b-hf"):
        LLaVACounting(tmp_path / "none")
