"""Shown rows in a terminal: in colour, or with marks where there is none.

Plain ANSI codes: six styles of running text need no layout, and a library that wraps or interprets
markup (rich) would have to be kept from touching the text that is audited.
"""

import itertools
from collections.abc import Iterable, Mapping

from tulu_jax.audit import pieces
from tulu_jax.audit.show import Piece, ShownRow

GREEN, DIM, BOLD, RESET = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
COLOURS = {
    "text": "",
    "tag": "\x1b[36m",
    "special": "\x1b[1;35m",
    "typed": "\x1b[1;7;31m",
    "unknown": "\x1b[7;31m",
    "lost": "\x1b[4;31m",
    "cut": "\x1b[9;2;31m",
}
TRAINED = ("⟦", "⟧")
MARKS = {
    "typed": ("{typed ", "}"),
    "unknown": ("{unknown ", "}"),
    "lost": ("{lost ", "}"),
    "cut": ("{cut ", "}"),
}
MEANINGS = {
    "text": "read, not trained on",
    "tag": "a tag of the template",
    "special": "a special token of the template",
    "typed": "a special token that a message contains as text",
    "cut": "removed by truncation",
}


def listing(facts: Mapping[str, str], rows: Iterable[ShownRow], *, colour: bool) -> Iterable[str]:
    """Yields the lines, or groups of lines: what the rows are of, a legend, and every row."""
    width = max(map(len, facts))
    yield "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
    yield _legend(colour)
    for row in rows:
        yield "\n" + _styled(f"━━ {row}", BOLD, colour)
        for segment in row.segments:
            if len(segment.parts) == 1:
                heads = [f"── {segment.number} · {segment.example} · {segment.parts[0]}"]
            else:
                yield _styled(f"── {segment.number} · {segment.example}", BOLD, colour)
                heads = [f"   ─ {part}" for part in segment.parts]
            for head, part in zip(heads, segment.parts, strict=True):
                yield _styled(head, DIM, colour)
                yield text(part.pieces, colour=colour)


def text(shown: Iterable[Piece], *, colour: bool) -> str:
    """The text of some pieces. Without colour, ⟦ ⟧ are around what is trained."""
    groups = itertools.groupby(shown, key=lambda piece: (piece.trained, piece.kind))
    result, was_trained = [], False
    for (trained, kind), group in groups:
        if trained != was_trained and not colour:
            result.append(TRAINED[not trained])
        was_trained = trained
        result.append(_run(list(group), kind, trained, colour))
    return "".join(result) + (TRAINED[1] if was_trained and not colour else "")


def _run(group: list[Piece], kind: str, trained: bool, colour: bool) -> str:
    shown = "".join(pieces.visible(piece.text) or "�" for piece in group)
    if colour:
        code = (GREEN if trained else "") + COLOURS[kind]
        return "\n".join(_styled(line, code, colour) for line in shown.split("\n"))
    before, behind = MARKS.get(kind, ("", ""))
    return before + shown + behind


def _legend(colour: bool) -> str:
    if not colour:
        kinds = "  ".join(f"{''.join(MARKS[k])} {MEANINGS[k]}" for k in ("typed", "cut"))
        return f"{''.join(TRAINED)} trained on  {kinds}  ↵ a newline"
    shown = [_styled("trained on", GREEN, colour)]
    shown += [_styled(meaning, COLOURS[kind], colour) for kind, meaning in MEANINGS.items()]
    return " · ".join(shown) + " · ↵ a newline"


def _styled(line: str, code: str, colour: bool) -> str:
    return f"{code}{line}{RESET}" if colour and code and line else line
