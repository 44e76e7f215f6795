"""JSON that every reader takes: a number that is not finite has no form there and becomes null."""

import json
import math
from typing import Any


def dumps(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON text, with null for NaN and the infinities."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
