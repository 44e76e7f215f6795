"""What converters are built from: the columns of a raw row, checked, and messages made of them.

A converter takes any JSON object and gives an example, `Dropped`, a list of these, or a
`ValueError` that says what the row has instead. Texts are valid Unicode, without lone surrogates.
Which pairs are dropped for every preference task (an empty side, identical sides, a pair that was
there before) is decided in `examples.py`; a converter drops what only it can know, such as ties.
"""

import math

from tulu_jax.data.registry import Dropped

TURNS = ("user", "assistant")
TIES = ("drop", "keep")


def present(row: dict, name: str):
    """A column, whatever it holds."""
    if name not in row:
        raise ValueError(f"missing column {name!r}; found {sorted(row)}")
    return row[name]


def texts(row: dict, *names: str) -> list[str]:
    """The columns `names`, each checked as `text` does."""
    return [text(present(row, name), f"column {name!r}") for name in names]


def text(value, name: str) -> str:
    """`value`. Raises `ValueError` that calls it `name` if it is no string or no valid Unicode."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_kind(value)}; expected a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is not valid Unicode ({error})") from error
    return value


def number(row: dict, name: str) -> float:
    """The finite number in a column. Raises `ValueError` for anything else, truth values too."""
    value = present(row, name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if math.isfinite(value):
            return value
    raise ValueError(f"column {name!r} is {_kind(value)}; expected a finite number")


def mapping(row: dict, name: str) -> dict:
    value = present(row, name)
    if not isinstance(value, dict):
        raise ValueError(f"column {name!r} is {_kind(value)}; expected an object")
    return value


def mappings(row: dict, name: str) -> list[dict]:
    value = present(row, name)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"column {name!r} is {_kind(value)}; expected a list of objects")
    return value


def listed(row: dict, name: str) -> list[dict]:
    """A column of `{"role", "content"}` messages, without what else they carry."""
    found = []
    for index, item in enumerate(mappings(row, name)):
        where = f"column {name!r}, message {index}"
        role, content = (text(item.get(key), f"{where}: {key!r}") for key in ("role", "content"))
        found.append(message(role, content))
    return found


def noted(row: dict, *names: str) -> dict[str, str | int | float]:
    """Those of the columns `names` that are texts or numbers, for an example's `about`."""
    found = {name: row[name] for name in names if isinstance(row.get(name), str | int | float)}
    for name, value in found.items():
        if isinstance(value, str):
            text(value, f"column {name!r}")
    return found


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def dialogue(contents: list[str]) -> list[dict]:
    """Messages of user and assistant in turn."""
    return [message(TURNS[index % 2], content) for index, content in enumerate(contents)]


def conversation(said: list[dict], about: dict[str, str | int | float]) -> dict:
    """The supervised example of the messages `said`."""
    return {"messages": said} | ({"about": about} if about else {})


def pair(prompt: list[dict], chosen: str, rejected: str, **about: str | int | float) -> dict:
    """The preference example of two answers to the same messages."""
    example = {
        "prompt": prompt,
        "chosen": [message("assistant", chosen)],
        "rejected": [message("assistant", rejected)],
    }
    return example | ({"about": about} if about else {})


def shared_prompt(chosen: list[dict], rejected: list[dict]) -> dict:
    """The example of two whole conversations that differ in their last message only.

    Raises `ValueError` for unequal lengths, and naming the first message that differs before it.
    """
    if not 2 <= len(chosen) == len(rejected):
        raise ValueError(
            f"chosen has {len(chosen)} messages, rejected {len(rejected)}; expected the same "
            "prompt on both sides, and one answer to it"
        )
    for index, (ours, theirs) in enumerate(zip(chosen[:-1], rejected[:-1], strict=True)):
        if ours != theirs:
            raise ValueError(
                f"the prompts of chosen and rejected differ at message {index} "
                f"({ours['role']!r}, {theirs['role']!r}); expected the same prompt on both sides"
            )
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def scored(example: dict, *, chosen: float, rejected: float, ties: str) -> dict | Dropped:
    """The example with its scores; equal scores prefer neither side and are dropped, or kept.

    Raises `ValueError` if the rejected side scores higher.
    """
    if ties not in TIES:
        raise ValueError(f"ties = {ties!r}; expected one of {TIES}")
    if chosen < rejected:
        raise ValueError(
            f"chosen scores {chosen}, rejected {rejected}; expected the chosen side to score higher"
        )
    if chosen == rejected and ties == "drop":
        return Dropped("equal scores")
    about = example.get("about", {}) | {"score_chosen": chosen, "score_rejected": rejected}
    return example | {"about": about}


def _kind(value) -> str:
    if value is None:
        return "absent or null"
    items = sorted({type(item).__name__ for item in value}) if isinstance(value, list) else []
    return f"a {type(value).__name__}" + (f" of {', '.join(items)}" if items else "")
