"""A second language for tulu_tiny: prompts in German with known right answers, by this project.

Three families as in `tiny_instructions`: the first and the last of some words, and opposites. A few
prompts are in both languages, the wording in English and the words in German. Some of each family
are held out.
"""

import functools
import itertools

from tulu_jax.data.sources import tiny_items

SEED = 20231118
NUM_TRAIN = 3000
HELD_OUT, HELD_OUT_SHARE = 30, 1 / 4  # prompts a family, or a quarter of them

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


def _items(family: str) -> list[tiny_items.Item]:
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
def items() -> tiny_items.Items:
    """The items by their family, or as `MIXED`."""
    families = {family: _items(family) for family in WORDINGS}
    return tiny_items.split(
        families, seed=SEED, train=NUM_TRAIN, held=HELD_OUT, share=HELD_OUT_SHARE
    )


def sft_rows(split: str) -> list[dict]:
    """Rows `{"messages"}`, all answers terse."""
    return items().rows(split)
