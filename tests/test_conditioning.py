"""The cache of encoded prompts against the encoder itself, whatever fits."""

import random

import pytest
import torch
from tensordict import TensorDict

from diffusion_env import ConditioningCache

PROMPTS = tuple(f"prompt {i}" for i in range(20))
ROW_BYTES = 3 * 4 + 2 * 8  # one row of `encode`: three float32 and two int64


class Encoder:
    """Two fields that depend on the prompt in a known way; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts):
        self.asked += prompts
        ids = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
        states = torch.stack([ids.float(), ids.float() ** 2, -ids.float()], 1)
        return TensorDict({"states": states, "pooled": {"size": torch.stack([ids, ids + 100], 1)}}, [len(prompts)])


def assert_rows(cache, ids):
    rows = cache(torch.tensor(ids))
    expected = Encoder()([PROMPTS[i] for i in ids])
    assert rows.batch_size == expected.batch_size
    assert (rows == expected).all()


def test_embeddings_equal_the_pipelines(backbone):
    prompts = ["a cat", "a very long dog", "x"]
    cache = backbone.conditioning(prompts)
    rows = cache(torch.tensor([2, 0, 1, 0]))["encoder_hidden_states"]
    for row, i in enumerate((2, 0, 1, 0)):
        expected, _ = backbone.pipeline.encode_prompt(prompts[i], "cpu", 1, do_classifier_free_guidance=False)
        torch.testing.assert_close(rows[row], expected[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(rows[0], rows[1])
    assert not rows.requires_grad


def test_each_prompt_is_encoded_once_while_all_fit():
    encoder = Encoder()
    cache = ConditioningCache(encoder, PROMPTS)
    generator = random.Random(0)
    for _ in range(50):
        assert_rows(cache, generator.choices(range(20), k=8))
    assert sorted(encoder.asked) == sorted(PROMPTS)
    assert cache.num_bytes == 20 * ROW_BYTES


def test_only_what_is_asked_for_is_encoded():
    encoder = Encoder()
    cache = ConditioningCache(encoder, PROMPTS)
    assert_rows(cache, [7, 7, 3])
    assert set(encoder.asked) == {PROMPTS[0], PROMPTS[3], PROMPTS[7]}  # the first tells how large one is


@pytest.mark.parametrize("capacity", [1, 3, 7, 19])
def test_rows_are_right_whatever_was_evicted(capacity):
    encoder = Encoder()
    cache = ConditioningCache(encoder, PROMPTS, max_bytes=capacity * ROW_BYTES + ROW_BYTES - 1)
    assert cache.num_bytes == capacity * ROW_BYTES
    generator = random.Random(capacity)
    for _ in range(300):
        distinct = generator.sample(range(20), generator.randint(1, capacity))
        assert_rows(cache, generator.choices(distinct, k=generator.randint(1, 12)))
    assert cache.num_bytes == capacity * ROW_BYTES


def test_the_least_recently_used_make_room():
    """Against a literal list of ids, oldest first."""
    capacity, encoder = 4, Encoder()
    cache = ConditioningCache(encoder, PROMPTS, max_bytes=capacity * ROW_BYTES)
    recent = [0]
    generator = random.Random(1)
    for _ in range(300):
        i = min(int(generator.expovariate(0.3)), 19)
        encoder.asked.clear()
        assert_rows(cache, [i])
        assert encoder.asked == ([] if i in recent else [PROMPTS[i]])
        recent = [*(j for j in recent if j != i), i][-capacity:]


def test_more_prompts_than_the_encoder_takes_at_once():
    prompts = [f"p{i}" for i in range(150)]
    sizes = []

    def encode(chunk):
        sizes.append(len(chunk))
        return TensorDict({"x": torch.tensor([float(prompt[1:]) for prompt in chunk])}, [len(chunk)])

    cache = ConditioningCache(encode, prompts)
    assert cache(torch.arange(150))["x"].tolist() == list(range(150))
    assert max(sizes) == 64


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="prompt set is empty"):
        ConditioningCache(Encoder(), ())
    with pytest.raises(ValueError, match=f"takes {ROW_BYTES} bytes, more than max_bytes={ROW_BYTES - 1}"):
        ConditioningCache(Encoder(), PROMPTS, max_bytes=ROW_BYTES - 1)
    cache = ConditioningCache(Encoder(), PROMPTS, max_bytes=2 * ROW_BYTES)
    with pytest.raises(ValueError, match="3 distinct prompts are needed at once but 2 fit"):
        cache(torch.tensor([1, 2, 3]))
    assert_rows(cache, [2, 1])  # the refusal left it whole


def test_an_encoder_that_fails_once_leaves_no_wrong_rows():
    encoder = Encoder()
    failures = []

    def encode(prompts):
        if PROMPTS[5] in prompts and not failures:
            failures.append(prompts)
            raise MemoryError("once")
        return encoder(prompts)

    cache = ConditioningCache(encode, PROMPTS, max_bytes=3 * ROW_BYTES)
    with pytest.raises(MemoryError):
        cache(torch.tensor([4, 5]))
    assert_rows(cache, [5, 4])
