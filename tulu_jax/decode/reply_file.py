"""Replies to the rows of a file, JSON line by line: what was answered before a stop stays answered.

A row is `{"messages": […]}` or `{"prompt": "…"}`; a line of the replies is that row with its number
and `reply`. While a run goes on lines come as they end, each whole; at the end they are put in the
order of the rows. A run that is started again answers the rows that have no line.
"""

import pathlib
from typing import Any

from tulu_jax import atomic, strict_json, validation

NUMBER, REPLY = "row", "reply"
Line = dict[str, Any]


def read_rows(path: str) -> list[Line]:
    """The rows of a file. Raises `UsageError` that names the line of what is none."""
    rows = []
    for number, line in enumerate(_lines(pathlib.Path(path)), 1):
        if line.strip():
            row = _parsed(line, path, number)
            if ("messages" in row) == ("prompt" in row):
                raise validation.UsageError(
                    f"{path}, line {number}: found the fields {sorted(row)}; expected one of "
                    '"messages" and "prompt"'
                )
            if "prompt" in row and not (isinstance(row["prompt"], str) and row["prompt"].strip()):
                raise validation.UsageError(
                    f"{path}, line {number}: found the prompt {row['prompt']!r}; expected a text"
                )
            rows.append(row)
    if not rows:
        raise validation.UsageError(f"{path} has no rows; expected a JSON object on each line")
    return rows


def messages(row: Line) -> list[dict[str, str]]:
    """The conversation of a row, which its reply continues."""
    if "prompt" in row:
        return [{"role": "user", "content": row["prompt"]}]
    return row["messages"]


class ReplyFile:
    """The lines of `path` that answer `rows`, and the file open for more.

    Raises `UsageError` if it answers other rows. What a killed run left of a line is dropped.
    """

    def __init__(self, path: str, rows: list[Line]):
        self.path, self.rows = pathlib.Path(path), rows
        self.answered: dict[int, Line] = {}
        lines = _lines(self.path) if self.path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        for number, text in enumerate(lines, 1):
            line = _parsed(text, path, number)
            at = line.get(NUMBER)
            if (
                not isinstance(at, int)
                or not 0 <= at < len(rows)
                or self._line(at, "") != (line | {REPLY: ""})
            ):
                raise validation.UsageError(
                    f"{path}, line {number} is no reply to a row of the input; move the file away, "
                    "or give another --output"
                )
            self.answered[at] = line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(self.path, self._text(self.answered.values()))
        self.file = self.path.open("a", encoding="utf-8")

    @property
    def left(self) -> list[int]:
        """The numbers of the rows that have no reply."""
        return [number for number in range(len(self.rows)) if number not in self.answered]

    def add(self, number: int, reply: str) -> None:
        """Writes the reply of a row."""
        self.answered[number] = line = self._line(number, reply)
        self.file.write(self._text([line]))
        self.file.flush()

    def close(self) -> None:
        """Closes the file, and orders it if all rows are answered."""
        self.file.close()
        if not self.left:
            in_order = [self.answered[number] for number in range(len(self.rows))]
            atomic.write_text(self.path, self._text(in_order))

    def _line(self, number: int, reply: str) -> Line:
        return {**self.rows[number], NUMBER: number, REPLY: reply}

    @staticmethod
    def _text(lines) -> str:
        return "".join(strict_json.dumps(line) + "\n" for line in lines)


def _lines(path: pathlib.Path) -> list[str]:
    """The lines of a file with what ends each; `splitlines` would also cut inside a string."""
    with validation.reading():
        lines = path.read_bytes().decode().split("\n")
    return [line + "\n" for line in lines[:-1]] + lines[-1:] * bool(lines[-1])


def _parsed(line: str, path, number: int) -> Line:
    try:
        row = strict_json.loads(line)
    except ValueError as error:
        raise validation.UsageError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise validation.UsageError(f"{path}, line {number}: found {row!r}; expected an object")
    return row
