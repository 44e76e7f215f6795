"""The fields of a batch: names, shapes, dtypes and logical axes. Who makes, divides, checks or
compiles a batch reads them here."""

import dataclasses
from collections.abc import Mapping

import numpy as np

BY_POSITION = {
    "tokens": "int32",
    "targets": "int32",
    "loss_mask": "bool",
    "segment_ids": "int32",  # 1, 2, ... in a row; 0 is padding
    "positions": "int32",  # from 0 in each segment
}
BRANCHES = {"branches": "int32"}  # 0 a prompt, 1 its chosen, 2 its rejected answer


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a batch: its global shape, its dtype, and the logical axis of each dimension
    (`sharding.AXIS_RULES`; None: not divided)."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]


Fields = Mapping[str, Field]


def conversations(*, rows: int, length: int) -> Fields:
    """Rows of one conversation or several: [B, T] each."""
    return _by_position(BY_POSITION, (rows, length), ("batch", "length"))


def pairs(*, rows: int, length: int, packed: bool, places: int) -> Fields:
    """Rows of pairs: packed, [B, T] with `branches`, and `example` [B, P] for P = `places`; or
    plain, [B, 2, T] (chosen, rejected), and `example` [B].

    `example` is the pair's index in the encoded set, and −1 where there is none.
    """
    if packed:
        return {
            **_by_position(BY_POSITION | BRANCHES, (rows, length), ("batch", "length")),
            "example": Field((rows, places), "int32", ("batch", None)),
        }
    return {
        **_by_position(BY_POSITION, (rows, 2, length), ("batch", None, "length")),
        "example": Field((rows,), "int32", ("batch",)),
    }


def of_examples(fields: Fields, dtype: str, *more: int) -> Field:
    """A field with `more` dimensions for each example of a batch of `fields`."""
    example = fields["example"]
    return Field((*example.shape, *more), dtype, (*example.axes, *[None] * len(more)))


def empty_row(length: int, *, branches: bool) -> dict[str, np.ndarray]:
    """The fields by position of one row, [T] each, of padding."""
    names = BY_POSITION | BRANCHES if branches else BY_POSITION
    return {name: np.zeros(length, dtype) for name, dtype in names.items()}


def _by_position(names, shape, axes) -> Fields:
    return {name: Field(shape, dtype, axes) for name, dtype in names.items()}
