"""Named columns of a raw row, with an error that says what the row has instead."""


def text(row: dict, *names: str) -> list[str]:
    """The string values of `names`. Raises `ValueError` for a missing or non-string column."""
    for name in names:
        if name not in row:
            raise ValueError(f"missing column {name!r}; found {sorted(row)}, expected {names}")
        if not isinstance(row[name], str):
            kind = type(row[name]).__name__
            raise ValueError(f"column {name!r} is a {kind}; expected a string")
    return [row[name] for name in names]
