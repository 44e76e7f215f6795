"""Programs for tulu_tiny: a few lines of Python and what they print, written by this project.

Four families: the value of a name, of a name after two were swapped, of a word in a list, and the
numbers of a range. Some of each family are held out.
"""

import functools
import itertools

from tulu_jax.data.sources import tiny_instructions, tiny_items

SEED = 20231119
NUM_TRAIN = 4000
HELD_OUT = 30  # programs a family
NAMES = "abcd"


def _two() -> list[tuple[str, str, str, str]]:
    """Two names and their values."""
    names, words = itertools.permutations(NAMES, 2), tiny_instructions.WORDS
    return [(*pair, *values) for pair in names for values in itertools.permutations(words, 2)]


def _value() -> list[tuple[str, str]]:
    return [
        (f'{a} = "{x}"\n{b} = "{y}"\nprint({shown})', said)
        for a, b, x, y in _two()
        for shown, said in ((a, x), (b, y))
    ]


def _swapped() -> list[tuple[str, str]]:
    return [
        (f'{a}, {b} = "{x}", "{y}"\n{a}, {b} = {b}, {a}\nprint({shown})', said)
        for a, b, x, y in _two()
        for shown, said in ((a, y), (b, x))
    ]


def _listed() -> list[tuple[str, str]]:
    return [
        (f'{name} = ["{x}", "{y}", "{z}"]\nprint({name}[{place}])', said)
        for name in NAMES
        for x, y, z in itertools.permutations(tiny_instructions.ANIMALS, 3)
        for place, said in enumerate((x, y, z))
    ]


def _ranged() -> list[tuple[str, str]]:
    numbers = range(1, tiny_instructions.LARGEST + 1)
    return [
        (f"{name} = {start}\nprint(*range({name}, {end}))", " ".join(map(str, range(start, end))))
        for name in NAMES
        for start in numbers
        for end in numbers
        if 2 <= end - start <= 4
    ]


FAMILIES = {"value": _value, "swapped": _swapped, "listed": _listed, "ranged": _ranged}


@functools.cache
def items() -> tiny_items.Items:
    """The programs and what they print, by family."""
    families = {
        family: [(family, asked, said) for asked, said in made()]
        for family, made in FAMILIES.items()
    }
    return tiny_items.split(families, seed=SEED, train=NUM_TRAIN, held=HELD_OUT)


def sft_rows(split: str) -> list[dict]:
    """Rows `{"messages"}`: a program, and what it prints."""
    return items().rows(split)
