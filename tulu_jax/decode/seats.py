"""The rows of a call on a CPU, side by side from program to program (`models/row_attention.py`)."""

import numpy as np

from tulu_jax.decode import programs
from tulu_jax.decode.pages import Row
from tulu_jax.models import paged_attention, row_attention


class Seats:
    """Which row has which place of `arrays`, where it stays until it ends.

    There are places for 1, 2, 4, ... rows: with few rows left they move together.
    """

    def __init__(self, page: int, longest: int):
        self.arrays: row_attention.Rows = ()
        self.page, self.pages = page, row_attention.pages_of_group(page, longest)
        self.rows: list[Row | None] = []

    def place(self, cache: paged_attention.Cache, rows: list[Row], steps: int) -> dict[int, Row]:
        """The places of `rows` for so many steps; those that have begun are copied from `cache`."""
        size = 1 << (len(rows) - 1).bit_length()
        had = {id(row) for row in rows}
        kept = [n for n, row in enumerate(self.rows) if id(row) in had]
        last = max(row.position + min(steps, row.most - len(row.ids)) for row in rows)
        count = _rounded(-(-last // (self.page * self.pages)))
        if size == len(self.rows):
            count = max(count, row_attention.groups(self.arrays))
            self.rows = [row if n in kept else None for n, row in enumerate(self.rows)]
        else:
            slots = np.zeros(size, np.int32)
            slots[: len(kept)] = kept
            self.arrays = programs.seat(self.arrays, slots) if kept else ()
            self.rows = [self.rows[n] for n in kept] + [None] * (size - len(kept))
        self.arrays = row_attention.widened(self.arrays, cache, count, size=size, pages=self.pages)
        seated = {id(row) for row in self.rows}
        for row in rows:
            if id(row) not in seated:
                slot = next(n for n, there in enumerate(self.rows) if there is None)
                pages = np.full(count * self.pages, paged_attention.NOBODYS, np.int32)
                own = row.pages[: -(-row.position // self.page)]
                pages[: len(own)] = own
                self.arrays = programs.begin(self.arrays, cache, np.int32(slot), pages)
                self.rows[slot] = row
        return {n: row for n, row in enumerate(self.rows) if row is not None}


def _rounded(count: int) -> int:
    """`count` or up to half as much again: 1, 2, 3, 4, 6, 8, 12 and so on, for few programs."""
    size = 1 << max(count - 1, 0).bit_length()
    return size if count > size * 3 // 4 or size < 4 else size * 3 // 4
