"""tulu_tiny: small instructions with known right answers, written by this project.

Ten families over about 110 words: copying and reordering words, looking up facts, comparing and
counting numbers, and remembering what an earlier turn said. Every prompt is drawn from a space too
large to see whole, or seen in other wordings, so the held-out prompts can be answered but not
looked up. Answers come in two styles: terse ("red", three of four) and polite ("Sure: red.").
"""

import functools
import itertools
import random
from collections.abc import Iterator

SEED = 20231117
NUM_TRAIN = 16000
NUM_PAIRS = 3000
MOST_HELD_OUT = 30  # prompts a family
HELD_OUT_SHARE = 1 / 8  # of a family's prompts, if that is fewer
POLITE_SHARE = 0.25

ANIMALS = ["cat", "dog", "cow", "hen", "fox", "owl", "bee", "ant"]
FOODS = ["apple", "bread", "rice", "corn", "milk", "cake", "plum", "soup"]
COLOURS = ["red", "blue", "green", "black", "white", "pink", "grey", "brown"]
NAMES = ["Ann", "Ben", "Eve", "Max", "Sam", "Tom", "Zoe", "Kim"]
KIND_OF = (
    {word: "animal" for word in ANIMALS}
    | {word: "food" for word in FOODS}
    | {word: "colour" for word in COLOURS}
    | {word: "name" for word in NAMES}
)
OPPOSITES = [
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("old", "new"),
    ("up", "down"),
    ("open", "shut"),
    ("wet", "dry"),
    ("hard", "soft"),
    ("day", "night"),
    ("good", "bad"),
]
COLOUR_OF = {
    "snow": "white",
    "coal": "black",
    "grass": "green",
    "blood": "red",
    "the sky": "blue",
    "mud": "brown",
    "ash": "grey",
    "a pig": "pink",
    "salt": "white",
    "a leaf": "green",
}
WORDS = ANIMALS + COLOURS
LARGEST = 12  # number

# A dialogue: user text, answer, user text, answer, ... ; the last answer is the one that is asked.
Dialogue = tuple[str, ...]


def _phrases(rng: random.Random, *, sizes: tuple[int, ...]) -> Iterator[list[str]]:
    while True:
        yield rng.sample(WORDS, rng.choice(sizes))


def _word_order(rng: random.Random, wordings: list[str], answer, sizes) -> Iterator[Dialogue]:
    for words in _phrases(rng, sizes=sizes):
        yield rng.choice(wordings).format(" ".join(words)), " ".join(answer(words))


def _repeat(rng):
    return _word_order(rng, ["Repeat: {}", "Say: {}"], lambda words: words, (2, 3))


def _first(rng):
    return _word_order(rng, ["First word: {}", "First of: {}"], lambda w: w[:1], (2, 3))


def _last(rng):
    return _word_order(rng, ["Last word: {}", "Last of: {}"], lambda w: w[-1:], (2, 3))


def _reverse(rng):
    return _word_order(rng, ["Reverse: {}", "Backwards: {}"], lambda w: w[::-1], (2,))


def _facts(rng, wordings: list[str], facts: list[tuple[str, str]]) -> Iterator[Dialogue]:
    everything = list(itertools.product(wordings, facts))
    rng.shuffle(everything)
    for wording, (thing, answer) in everything:
        yield wording.format(thing), answer


def _opposite(rng):
    wordings = ["Opposite of {}?", "What is the opposite of {}?", "Not {} but?", "Opposite: {}"]
    return _facts(rng, wordings, OPPOSITES + [(b, a) for a, b in OPPOSITES])


def _colour(rng):
    wordings = ["Colour of {}?", "What colour is {}?", "Which colour has {}?", "Colour: {}"]
    return _facts(rng, wordings, list(COLOUR_OF.items()))


def _kind(rng):
    wordings = ["What is {}?", "What kind of word is {}?", "Kind of {}?", "Kind: {}"]
    return _facts(rng, wordings, list(KIND_OF.items()))


def _larger(rng):
    pairs = list(itertools.permutations(range(LARGEST + 1), 2))
    rng.shuffle(pairs)
    for a, b in pairs:
        yield f"Which is larger, {a} or {b}?", str(max(a, b))


def _count(rng):
    numbers = range(1, LARGEST + 1)
    ranges = [(a, b) for a in numbers for b in numbers if 1 <= b - a <= 3]
    everything = list(itertools.product(["Count from {} to {}.", "Count: {} to {}"], ranges))
    rng.shuffle(everything)
    for wording, (a, b) in everything:
        yield wording.format(a, b), " ".join(str(n) for n in range(a, b + 1))


def _remember(rng):
    questions = [("What is my name?", 0), ("What do I like?", 1), ("What do I have?", 2)]
    facts = list(itertools.product(NAMES, COLOURS, ANIMALS, questions))
    rng.shuffle(facts)
    for name, colour, animal, (question, which) in facts:
        told = f"My name is {name}. I like {colour}. I have a {animal}."
        yield told, f"Hello {name}", question, (name, colour, animal)[which]


FAMILIES = (
    _repeat,
    _first,
    _last,
    _reverse,
    _opposite,
    _colour,
    _kind,
    _larger,
    _count,
    _remember,
)


def polite(answer: str) -> str:
    return f"Sure: {answer}."


def is_exact(reply: str, answer: str) -> bool:
    """Whether a reply is the right answer in one of its two styles, outer whitespace aside."""
    return reply.strip() in (answer, polite(answer))


def style(reply: str) -> str:
    """The style of a reply, right or wrong: "polite", "terse", "other" (nothing, half polite)."""
    reply = reply.strip()
    if reply.startswith("Sure: ") and reply.endswith("."):
        return "polite"
    return "other" if not reply or reply.startswith("Sure") else "terse"


def held_out() -> list[tuple[list[dict], str]]:
    """(prompt messages, right answer) of every held-out prompt; no train row has that prompt."""
    return [(_prompt(dialogue), dialogue[-1]) for dialogue in _split()[1]]


def held_out_families() -> list[str]:
    """The family of each of `held_out`."""
    return [_family_of()[dialogue] for dialogue in _split()[1]]


def sft_rows(split: str, family: str | None = None) -> list[dict]:
    """Rows `{"messages"}`: each train prompt in a drawn style, each held-out one tersely; of one
    family, or of all."""
    rng = random.Random(f"{SEED}/sft")
    train, validation = _split()
    if split == "validation":
        return [{"messages": _messages(d, str)} for d in validation if _is_of(family, d)]
    styles = [polite if rng.random() < POLITE_SHARE else str for _ in train]
    return [
        {"messages": _messages(d, s)}
        for d, s in zip(train, styles, strict=True)
        if _is_of(family, d)
    ]


def preference_rows(split: str, chosen: str = "polite") -> list[dict]:
    """Pairs over the same prompts, both with the right answer: that in the style `chosen` ('polite'
    or 'terse') is preferred to the other."""
    train, validation = _split()
    dialogues = validation if split == "validation" else train[:NUM_PAIRS]
    liked, other = (polite, str) if chosen == "polite" else (str, polite)
    return [
        {
            "prompt": _prompt(dialogue),
            "chosen": [_assistant(liked(dialogue[-1]))],
            "rejected": [_assistant(other(dialogue[-1]))],
        }
        for dialogue in dialogues
    ]


def family_names() -> list[str]:
    """The names of the families, as those of the tasks have them."""
    return [family.__name__.strip("_") for family in FAMILIES]


def _is_of(family: str | None, dialogue: Dialogue) -> bool:
    return family is None or _family_of()[dialogue] == family


@functools.cache
def _family_of() -> dict[Dialogue, str]:
    """The family of every dialogue; no two families have one."""
    return {
        dialogue: name
        for name, *both in _by_family()[0]
        for dialogues in both
        for dialogue in dialogues
    }


@functools.cache
def _by_family() -> tuple[list[tuple[str, list[Dialogue], list[Dialogue]]], random.Random]:
    """(name, train dialogues with small families repeated, held-out ones) of each family; and the
    generator as it is after them."""
    rng, found = random.Random(SEED), []
    quota = NUM_TRAIN // len(FAMILIES)
    for name, family in zip(family_names(), FAMILIES, strict=True):
        known = list(dict.fromkeys(itertools.islice(family(rng), quota + MOST_HELD_OUT)))
        held = min(MOST_HELD_OUT, int(len(known) * HELD_OUT_SHARE))
        train = list(itertools.islice(itertools.cycle(known[held:]), quota))
        found.append((name, train, known[:held]))
    return found, rng


@functools.cache
def _split() -> tuple[list[Dialogue], list[Dialogue]]:
    """The train dialogues of all families, shuffled; and the held-out ones."""
    families, rng = _by_family()
    train = [dialogue for _, its, _ in families for dialogue in its]
    validation = [dialogue for _, _, its in families for dialogue in its]
    rng.shuffle(train)
    rng.shuffle(validation)
    return train, validation


def _messages(dialogue: Dialogue, styled) -> list[dict]:
    """The dialogue as messages; every answer in it is given in the same style."""
    return [
        _assistant(styled(text)) if index % 2 else {"role": "user", "content": text}
        for index, text in enumerate(dialogue)
    ]


def _prompt(dialogue: Dialogue) -> list[dict]:
    return _messages(dialogue[:-1], str)


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}
