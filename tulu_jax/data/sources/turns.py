"""The pieces of instruction converters: texts that are valid Unicode, messages, what is noted.

Every converter here takes any JSON object and gives an example, `Dropped`, a list of these, or a
`ValueError`.
"""

from tulu_jax.data.sources import columns

TURNS = ("user", "assistant")


def texts(row: dict, *names: str) -> list[str]:
    """The columns `names`. Raises `ValueError` for one that is missing, no string, or not valid
    Unicode (a lone surrogate)."""
    return [text(value, name) for name, value in zip(names, columns.text(row, *names), strict=True)]


def text(value, name: str) -> str:
    """`value`, checked as a column of `texts` is; `name` is used in the error."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}; expected a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is not valid Unicode ({error})") from error
    return value


def objects(value, name: str) -> list[dict]:
    """`value`, a list of objects. Raises `ValueError` for anything else."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"found {name} of {_kinds(value)}; expected a list of objects")
    return value


def dialogue(contents: list[str]) -> list[dict]:
    """Messages of user and assistant in turn."""
    return [message(TURNS[index % 2], content) for index, content in enumerate(contents)]


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def example(messages: list[dict], row: dict, *noted: str) -> dict:
    """The example of `messages`; under `about`, the columns `noted` that are texts or numbers."""
    about = {name: row[name] for name in noted if isinstance(row.get(name), str | int | float)}
    for name, value in about.items():
        if isinstance(value, str):
            text(value, f"column {name!r}")
    return {"messages": messages} | ({"about": about} if about else {})


def _kinds(value) -> str:
    if not isinstance(value, list):
        return f"kind {type(value).__name__}"
    return f"{sorted({type(item).__name__ for item in value})} items"
