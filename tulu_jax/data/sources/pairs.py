"""What preference converters are built from: named values of a raw row, and pairs of answers.

Which pairs are dropped for every preference task (an empty side, identical sides, a pair that was
there before) is decided in `examples.py`; a converter drops what only it can know, such as ties.
"""

import math

from tulu_jax.data.registry import Dropped

TIES = ("drop", "keep")


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def text_pair(prompt: list[dict], chosen: str, rejected: str, **about: str | int | float) -> dict:
    """The example of two answers to the same messages; `about` is kept for audits."""
    example = {
        "prompt": prompt,
        "chosen": [message("assistant", chosen)],
        "rejected": [message("assistant", rejected)],
    }
    return example | {"about": about} if about else example


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


def labels(row: dict, *names: str) -> dict[str, str]:
    """Those of the columns `names` that the row has as texts, for `about`."""
    return {name: row[name] for name in names if isinstance(row.get(name), str)}


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


def messages(row: dict, name: str) -> list[dict]:
    """A column of `{"role", "content"}` messages, without what else they carry."""
    return [_message(item, name, index) for index, item in enumerate(mappings(row, name))]


def present(row: dict, name: str):
    if name not in row:
        raise ValueError(f"missing column {name!r}; found {sorted(row)}")
    return row[name]


def _message(item: dict, name: str, index: int) -> dict:
    for key in ("role", "content"):
        if not isinstance(item.get(key), str):
            raise ValueError(
                f"column {name!r}, message {index}: {key!r} is {_kind(item.get(key))}; "
                "expected a string"
            )
    return message(item["role"], item["content"])


def _kind(value) -> str:
    if isinstance(value, list) and not all(isinstance(item, dict) for item in value):
        return "a list of other things"
    return f"a {type(value).__name__}" if value is not None else "absent or null"
