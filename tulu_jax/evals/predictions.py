"""What an engine said, in a file: JSON line by line, each whole as soon as a request is answered.

`NAME.SUBSET.jsonl` has a row for each request, an `Answer`. Of a conversation of several turns
there is a row after each; the last one counts. `NAME.SUBSET.about.json` says what was asked for:
an evaluation that is started again goes on only if that is the same, and only with rows whose
prompts are those of now, by their hash. At the end rows are in the order of the requests, so a
stopped evaluation leaves the file that one run would have left.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from tulu_jax import atomic, strict_json, validation
from tulu_jax.evals.benchmark import Answer

SHOWN = 5  # ids in a message
_TYPES = {
    "id": str, "prompt_hash": str, "texts": [str], "ended": [str], "choice_logps": [float, int]
}  # fmt: skip


class Predictions:
    """The answers of `path` to requests with these `prompt_hashes` (by id, in their order), and the
    file open for more.

    Raises `UsageError`, with all that is wrong, if the file answers other prompts, was made with
    another `about`, or has a row that is none. What a killed process left of a line is dropped, and
    named.
    """

    def __init__(self, path: pathlib.Path, *, about: dict[str, Any], hashes: Mapping[str, str]):
        self.path, self.hashes = path, hashes
        self.answers: dict[str, Answer] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._take(about)
        atomic.write_text(_about_file(path), strict_json.dumps(about, indent=1) + "\n")
        atomic.write_text(path, _text(self.answers.values()))
        self._file = path.open("a", encoding="utf-8")

    def _take(self, about: dict[str, Any]) -> None:
        problems = _differences(_about_file(self.path), about)
        rows = read(self.path)
        strange = [row.id for row in rows if row.id not in self.hashes]
        others = [
            row.id
            for row in rows
            if row.id in self.hashes and row.prompt_hash != self.hashes[row.id]
        ]
        if strange:
            problems.append(
                f"{self.path} answers {len(strange)} requests that the benchmark does not have "
                f"({shown(strange)})"
            )
        if others:
            problems.append(
                f"{self.path} has {len(others)} rows whose prompt_hash is not that of the prompt "
                f"now ({shown(others)}): another prompt or tokenizer made them"
            )
        if problems:
            raise validation.UsageError(
                "; ".join(problems) + "; expected answers to what is asked now. Evaluate as "
                f"before, give another --out, or move {self.path.name} away"
            )
        self.answers = {row.id: row for row in rows}

    def add(self, answer: Answer) -> None:
        """Writes one row, and hands it to the system."""
        self.answers[answer.id] = answer
        self._file.write(_text([answer]))
        self._file.flush()

    def close(self) -> None:
        """Closes the file, and orders it if all requests are answered."""
        self._file.close()
        if len(self.answers) == len(self.hashes):
            in_order = [self.answers[id_] for id_ in self.hashes]
            atomic.write_text(self.path, _text(in_order))


def read(path: pathlib.Path) -> list[Answer]:
    """The rows of a file; of those with one id the last. A line at the end that is not whole is
    left out, with a word in the log. Raises `UsageError` that names the line of what is no row."""
    with validation.reading():
        *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        logging.warning(
            "%s, line %d was half written, and is dropped: %r", path, len(lines) + 1, rest[:80]
        )
    rows = [_row(line, path, number) for number, line in enumerate(lines, 1)]
    return list({row.id: row for row in rows}.values())


def read_about(path: pathlib.Path) -> dict[str, Any]:
    """What `about` was for the predictions `path`. Raises `UsageError` if that is not there."""
    file = _about_file(path)
    with validation.reading():
        found = strict_json.loads(file.read_bytes())
    if not isinstance(found, dict):
        raise validation.UsageError(f"{file} holds {found!r}; expected an object; evaluate again")
    return found


def shown(ids: Sequence[str]) -> str:
    """The first of many ids, for a message."""
    more = f" and {len(ids) - SHOWN:,} more" if len(ids) > SHOWN else ""
    return ", ".join(map(repr, ids[:SHOWN])) + more


def _about_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name.removesuffix(".jsonl") + ".about.json")


def _differences(file: pathlib.Path, about: dict[str, Any]) -> list[str]:
    if not file.exists():
        return [f"{file} is missing, so nobody knows what was asked"]
    try:
        before = strict_json.loads(file.read_bytes())
    except ValueError as error:
        return [f"{file} is not JSON ({error})"]
    now = strict_json.loads(strict_json.dumps(about))
    if not isinstance(before, dict):
        return [f"{file} holds {before!r}"]
    return [
        f"{file} was made with {name} = {before.get(name)!r}, and now it is {now.get(name)!r}"
        for name in dict.fromkeys((*now, *before))
        if before.get(name) != now.get(name)
    ]


def _row(line: bytes, path: pathlib.Path, number: int) -> Answer:
    try:
        found = strict_json.loads(line, finite=False)
    except ValueError as error:
        raise validation.UsageError(
            f"{path}, line {number} is not JSON: {error}; remove the line, and its request is "
            "asked again"
        ) from error
    if not isinstance(found, dict) or found.keys() != _TYPES.keys() or not all(
        _is_a(found[name], kind) for name, kind in _TYPES.items()
    ):  # fmt: skip
        raise validation.UsageError(
            f"{path}, line {number} is no prediction: expected the fields {sorted(_TYPES)}; remove "
            "the line, and its request is asked again"
        )
    return Answer(**found)


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(type(one) in kind for one in value)
    return type(value) is kind


def _text(answers) -> str:
    return "".join(strict_json.dumps(dataclasses.asdict(answer)) + "\n" for answer in answers)
