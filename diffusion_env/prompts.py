"""Prompt sets: DDPO's animals and activities, counting, unseen subjects, and files of one's own.

Every set is a tuple of strings in a fixed order without duplicates: a prompt's index is its id, and statistics are
kept by id.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path

ANIMALS = (
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion",
    "tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale",
    "dolphin", "squirrel", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig",
    "turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo",
)  # fmt: skip
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")

# DDPO's 38 uncommon animals, then the two of AlignProp's six that are not among them.
UNSEEN_ANIMALS = (
    "elephant", "giraffe", "hippopotamus", "rhinoceros", "ostrich", "penguin", "seal", "otter", "walrus", "chimpanzee",
    "orangutan", "koala", "platypus", "crocodile", "alligator", "komodo dragon", "anaconda", "octopus", "squid",
    "lobster", "crab", "jellyfish", "starfish", "seahorse", "pelican", "flamingo", "toucan", "parrot", "peacock",
    "skunk", "badger", "porcupine", "armadillo", "sloth", "beaver", "moose", "reindeer", "shoebill stork", "snail",
    "cheetah",
)  # fmt: skip
UNSEEN_ACTIVITIES = ("driving a car", "reading a book", "playing the guitar", "cooking dinner", "flying a kite")
# Our own choice: of DDPO's fifty only the first, toaster, and the last, flower, are known to us.
EVERYDAY_OBJECTS = (
    "toaster", "chair", "table", "lamp", "sofa", "bed", "clock", "mirror", "pillow", "candle", "cup", "plate", "fork",
    "spoon", "knife", "bottle", "kettle", "teapot", "bowl", "frying pan", "refrigerator", "broom", "bucket", "towel",
    "toothbrush", "comb", "umbrella", "backpack", "suitcase", "hat", "shoe", "glove", "watch", "key", "wallet",
    "pencil", "book", "newspaper", "telephone", "laptop", "camera", "television", "radio", "guitar", "ball", "bicycle",
    "car", "hammer", "ladder", "flower",
)  # fmt: skip

_UNCHANGED_PLURALS = ("sheep", "deer", "fish", "moose", "squid")
_IRREGULAR_PLURALS = {"mouse": "mice", "wolf": "wolves", "goose": "geese"}


def with_article(noun: str) -> str:
    """`noun` with its indefinite article, by its first letter: "a cat", "an ant"."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """The plural of an animal's name: "cats", "butterflies", "mice", "sheep"."""
    if noun.endswith(_UNCHANGED_PLURALS):
        return noun
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "z", "ch", "sh")) else f"{noun}s"


def animals(article: bool = True) -> tuple[str, ...]:
    """DDPO's 45 animals: "a cat", ...; without `article` the bare names."""
    return tuple(with_article(animal) for animal in ANIMALS) if article else ANIMALS


def animal_activities(activities: Iterable[str] = ACTIVITIES) -> tuple[str, ...]:
    """Every animal at every activity, 135 prompts by default: "a cat riding a bike"."""
    activities = tuple(activities)
    return tuple(f"{animal} {activity}" for animal in animals() for activity in activities)


def counting() -> tuple[str, ...]:
    """Two to eight of every animal, 315 prompts: "six turtles"."""
    return tuple(f"{number} {plural(animal)}" for animal in ANIMALS for number in NUMBERS)


def unseen_animals() -> tuple[str, ...]:
    """Animals to evaluate on after training on `animals`: "an elephant"."""
    return tuple(with_article(animal) for animal in UNSEEN_ANIMALS)


def unseen_activities() -> tuple[str, ...]:
    """The 45 animals at activities to evaluate on after training on `animal_activities`: "a cat driving a car"."""
    return animal_activities(UNSEEN_ACTIVITIES)


def everyday_objects() -> tuple[str, ...]:
    """Fifty everyday objects, to evaluate on after training on animals: "an umbrella"."""
    return tuple(with_article(thing) for thing in EVERYDAY_OBJECTS)


PROMPT_SETS: dict[str, Callable[[], tuple[str, ...]]] = {
    "animals": animals,
    "animals-bare": lambda: animals(article=False),
    "animal-activities": animal_activities,
    "counting": counting,
    "unseen-animals": unseen_animals,
    "unseen-activities": unseen_activities,
    "everyday-objects": everyday_objects,
}


def prompt_set(name_or_path: str | PathLike[str]) -> tuple[str, ...]:
    """The prompt set of that name (see `PROMPT_SETS`), else the prompts of that file (see `load_prompts`).

    A name wins over a file of the same name; write `./animals` to mean the file.

    Raises:
        ValueError: if it is neither a known name nor a file, or the file is not a proper prompt file.
    """
    if name_or_path in PROMPT_SETS:
        return PROMPT_SETS[str(name_or_path)]()
    if not Path(name_or_path).is_file():
        raise ValueError(
            f"'{name_or_path}' is neither a prompt set nor a file; give a path or one of {', '.join(PROMPT_SETS)}"
        )
    return load_prompts(name_or_path)


def load_prompts(path: str | PathLike[str]) -> tuple[str, ...]:
    """Reads prompts from a UTF-8 file, one a line, and keeps them as written: spaces are part of a prompt.

    Args:
        path: A text file with one prompt a line; or a file ending in `.jsonl`, each line a JSON object with the key
            "prompt" (other keys are ignored) or a JSON string. A byte order mark and Windows line ends are dropped.

    Returns:
        The prompts in the file's order.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty or not UTF-8, or a line is empty, no proper JSON, or repeats a prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {path}; give a text file with one prompt a line")
    parse = _parse_json if path.suffix.lower() == ".jsonl" else str
    line_of_prompt: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        try:
            prompt = parse(line.decode())
            _check_prompt(prompt, line_of_prompt)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 ({error}); save the file as UTF-8") from error
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        line_of_prompt[prompt] = number
    if not line_of_prompt:
        raise ValueError(f"{path} is empty; write one prompt a line")
    return tuple(line_of_prompt)


def _lines(path: Path) -> list[bytes]:
    # Split before decoding: an error can then name its line, and only "\n" separates (`str.splitlines` knows eleven).
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix(b"\r") for line in lines]


def _check_prompt(prompt: str, line_of_prompt: dict[str, int]) -> None:
    if not prompt.strip():
        raise ValueError("the prompt is empty; delete the line or write a prompt")
    if prompt in line_of_prompt:
        raise ValueError(
            f"{prompt!r} is already on line {line_of_prompt[prompt]}; delete one, statistics are kept per prompt"
        )


def _parse_json(line: str) -> str:
    if not line.strip():
        return line
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f'{line!r} is not JSON ({error}); write {{"prompt": "a cat"}}') from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError(f'{line!r} holds no text under the key "prompt"; write {{"prompt": "a cat"}}')
    return prompt
