"""A second language for tulu_tiny: prompts in German with known right answers, by this project.

Three families as in `tiny_instructions`: the first and the last of some words, and opposites. A few
prompts are in both languages, the wording in English and the words in German. Some of each family
are held out.
"""

import functools
import itertools
import random

SEED = 20231118
NUM_TRAIN = 3000
HELD_OUT = 30  # prompts a family, or a quarter of them

WORDS = ["Katze", "Hund", "Kuh", "Huhn", "Fuchs", "Eule", "Biene", "rot", "blau", "weiss", "grau"]
OPPOSITES = [
    ("heiss", "kalt"), ("gross", "klein"), ("schnell", "langsam"), ("alt", "neu"),
    ("offen", "zu"), ("nass", "trocken"), ("hart", "weich"), ("gut", "schlecht"),
]  # fmt: skip
WORDINGS = {  # the last of each family is the mixed one
    "erstes": ("Erstes Wort: {}", "Das erste von: {}", "First word: {}"),
    "letztes": ("Letztes Wort: {}", "Das letzte von: {}", "Last word: {}"),
    "gegenteil": ("Gegenteil von {}?", "Was ist das Gegenteil von {}?", "Opposite of {}?"),
}
MIXED = "mixed"  # the group of held-out prompts in both languages

Item = tuple[str, str, str]  # group, question, answer


def held_out() -> list[tuple[list[dict], str]]:
    """(prompt messages, right answer) of every held-out prompt; no train row has that prompt."""
    return [([{"role": "user", "content": asked}], said) for _, asked, said in _split()[1]]


def held_out_groups() -> list[str]:
    """The group of each of `held_out`: its family, or `MIXED`."""
    return [group for group, _, _ in _split()[1]]


def sft_rows(split: str) -> list[dict]:
    """Rows `{"messages"}`, all answers terse."""
    return [
        {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": said},
            ]
        }
        for _, asked, said in _split()[1 if split == "validation" else 0]
    ]


def _items(family: str) -> list[Item]:
    if family == "gegenteil":
        facts = OPPOSITES + [(b, a) for a, b in OPPOSITES]
    else:
        place = 0 if family == "erstes" else -1
        facts = [
            (" ".join(words), words[place])
            for size in (2, 3)
            for words in itertools.permutations(WORDS, size)
        ]
    *german, mixed = WORDINGS[family]
    return [(family, one.format(asked), said) for one in german for asked, said in facts] + [
        (MIXED, mixed.format(asked), said) for asked, said in facts
    ]


@functools.cache
def _split() -> tuple[list[Item], list[Item]]:
    rng, train, validation = random.Random(SEED), [], []
    for family in WORDINGS:
        items = _items(family)
        rng.shuffle(items)
        held = min(HELD_OUT, len(items) // 4)
        validation += items[:held]
        train += itertools.islice(itertools.cycle(items[held:]), NUM_TRAIN // len(WORDINGS))
    rng.shuffle(train)
    rng.shuffle(validation)
    return train, validation
