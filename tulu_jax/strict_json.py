"""JSON that every reader takes, and JSON of anybody: what it may not be is a `ValueError`.

A number that is not finite has no form in JSON, though Python and others write NaN and 1e999.
"""

import json
import math
from typing import Any


def dumps(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON text, with null for NaN and the infinities."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def loads(text: str | bytes, *, finite: bool = True) -> Any:
    """What JSON text says; bytes are text in UTF-8, -16 or -32, with or without a byte-order mark.

    Raises `ValueError` for what is no JSON, nests brackets some thousand deep, or holds a number
    that is not finite. With `finite=False` such numbers are read, for whoever looks at each.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    try:
        return (_FINITE if finite else _ANY).decode(text)
    except RecursionError as error:
        raise ValueError("brackets are nested too deep; expected fewer than 1,000") from error


def _number(text: str) -> float:
    if math.isfinite(value := float(text)):
        return value
    raise ValueError(f"found {text}; expected a finite number")


_ANY = json.JSONDecoder()
_FINITE = json.JSONDecoder(parse_float=_number, parse_constant=_number)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
