"""Prompt sets and prompt files."""

from __future__ import annotations

import json

import pytest

from diffusion_env.prompts import (
    ACTIVITIES,
    ANIMALS,
    EVERYDAY_OBJECTS,
    NUMBERS,
    PROMPT_SETS,
    UNSEEN_ACTIVITIES,
    UNSEEN_ANIMALS,
    animal_activities,
    animals,
    counting,
    load_prompts,
    plural,
    prompt_set,
    unseen_activities,
    with_article,
)

SIZES = {
    "animals": 45,
    "animals-bare": 45,
    "animal-activities": 135,
    "counting": 315,
    "unseen-animals": 40,
    "unseen-activities": 225,
    "everyday-objects": 50,
}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_set_has_its_size_and_no_duplicates(name: str, size: int):
    prompts = prompt_set(name)
    assert isinstance(prompts, tuple)
    assert len(prompts) == len(set(prompts)) == size
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)


def test_every_name_is_tested():
    assert set(SIZES) == set(PROMPT_SETS)


def test_animals_keep_the_order_of_ddpo():
    assert animals()[:2] == ("a cat", "a dog")
    assert animals()[ANIMALS.index("ant")] == "an ant"
    assert animals()[-1] == "a kangaroo"
    assert animals(article=False) == prompt_set("animals-bare") == ANIMALS


@pytest.mark.parametrize(
    ("noun", "expected"), [("cat", "a cat"), ("ant", "an ant"), ("Owl", "an Owl"), ("umbrella", "an umbrella")]
)
def test_article(noun: str, expected: str):
    assert with_article(noun) == expected


def test_activities_go_with_every_animal():
    assert animal_activities()[:4] == (
        "a cat washing the dishes",
        "a cat riding a bike",
        "a cat playing chess",
        "a dog washing the dishes",
    )
    assert "an ant playing chess" in animal_activities()
    assert animal_activities(iter(["asleep"]))[:2] == ("a cat asleep", "a dog asleep")


def test_counting_takes_two_to_eight():
    assert counting()[:2] == ("two cats", "three cats")
    assert "six turtles" in counting()
    assert [prompt.split()[0] for prompt in counting()[:7]] == list(NUMBERS)


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("cat", "cats"),
        ("sheep", "sheep"),
        ("deer", "deer"),
        ("reindeer", "reindeer"),
        ("fish", "fish"),
        ("mouse", "mice"),
        ("wolf", "wolves"),
        ("goose", "geese"),
        ("butterfly", "butterflies"),
        ("fly", "flies"),
        ("monkey", "monkeys"),
        ("turkey", "turkeys"),
        ("donkey", "donkeys"),
        ("fox", "foxes"),
        ("walrus", "walruses"),
        ("ostrich", "ostriches"),
        ("bat", "bats"),
        ("kangaroo", "kangaroos"),
    ],
)
def test_plural(noun: str, expected: str):
    assert plural(noun) == expected


def test_unseen_is_unseen():
    assert not set(UNSEEN_ANIMALS) & set(ANIMALS)
    assert not set(UNSEEN_ACTIVITIES) & set(ACTIVITIES)
    assert not set(EVERYDAY_OBJECTS) & set(ANIMALS + UNSEEN_ANIMALS)
    assert set(unseen_activities()).isdisjoint(animal_activities())


def test_unseen_animals_hold_alignprops_six():
    assert {"snail", "hippopotamus", "cheetah", "crocodile", "lobster", "octopus"} <= set(UNSEEN_ANIMALS)
    assert all(animal == animal.lower() for animal in UNSEEN_ANIMALS)


@pytest.mark.parametrize("content", [b"a cat\nan ant\n", b"a cat\nan ant", b"\xef\xbb\xbfa cat\r\nan ant\r\n"])
def test_text_file(tmp_path, content: bytes):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert load_prompts(path) == load_prompts(str(path)) == prompt_set(str(path)) == prompt_set(path)
    assert load_prompts(path) == ("a cat", "an ant")


def test_only_line_ends_are_stripped(tmp_path):
    path = tmp_path / "prompts.txt"
    lines = (" a cat ", "a cat", "a cat\x0bwith\u2028breaks", '{"prompt": "kept as text"}', "ein Bär")
    path.write_text("\n".join(lines), encoding="utf-8")
    assert load_prompts(path) == lines


def test_jsonl_file(tmp_path):
    path = tmp_path / "prompts.JSONL"
    rows = ({"prompt": "a cat", "tag": 1}, "a dog", {"prompt": 'a "fox"\nin two lines'})
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode())
    assert load_prompts(path) == ("a cat", "a dog", 'a "fox"\nin two lines')


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("p.txt", b"", r"p\.txt is empty; write one"),
        ("p.txt", b"\xef\xbb\xbf", r"p\.txt is empty; write one"),
        ("p.txt", b"a cat\n\na dog\n", r"p\.txt, line 2: the prompt is empty; delete"),
        ("p.txt", b"a cat\r\n \t\r\n", r"p\.txt, line 2: the prompt is empty; delete"),
        ("p.txt", b"a cat\na \xff\n", r"p\.txt, line 2: not UTF-8 .*0xff.*save the file as UTF-8"),
        ("p.txt", b"a cat\na dog\na cat\n", r"p\.txt, line 3: 'a cat' is already on line 1; delete one"),
        ("p.jsonl", b'"a cat"\n{"prompt": "a dog"\n', r"p\.jsonl, line 2: .*a dog.* is not JSON .*; write"),
        ("p.jsonl", b'"a cat"\n{"text": "a dog"}\n', r"p\.jsonl, line 2: .*\"text\".* no text under .*\"prompt\""),
        ("p.jsonl", b'{"prompt": 3}\n', r"p\.jsonl, line 1: .*3.* no text under"),
        ("p.jsonl", b'["a cat"]\n', r"p\.jsonl, line 1: .*a cat.* no text under"),
        ("p.jsonl", b'"a cat"\n\n', r"p\.jsonl, line 2: the prompt is empty; delete"),
        ("p.jsonl", b'{"prompt": " "}\n', r"p\.jsonl, line 1: the prompt is empty; delete"),
        ("p.jsonl", b'"a cat"\n{"prompt": "a cat"}\n', r"p\.jsonl, line 2: 'a cat' is already on line 1"),
    ],
)
def test_bad_file_is_refused(tmp_path, name: str, content: bytes, match: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        load_prompts(tmp_path / name)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prompt file at .*absent\.txt; give"):
        load_prompts(tmp_path / "absent.txt")
    with pytest.raises(FileNotFoundError, match="no prompt file at"):
        load_prompts(tmp_path)


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="'animal' is neither a prompt set nor a file; .*animals-bare.*counting"):
        prompt_set("animal")


def test_a_name_wins_over_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "animals").write_text("a fish\n")
    assert prompt_set("animals") == animals()
    assert prompt_set("./animals") == ("a fish",)
