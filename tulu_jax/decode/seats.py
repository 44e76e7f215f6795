"""The rows of a call on a CPU, side by side from program to program (`models/row_attention.py`)."""

import numpy as np

from tulu_jax.decode import programs, same_bits
from tulu_jax.decode.pages import Row
from tulu_jax.models import paged_attention, row_attention


class Seats:
    """Which row has which place of `arrays`, where it stays until it ends.

    There are places for `fewest`, twice as many, ... rows: with few rows left they move together.
    """

    def __init__(self, page: int, fewest: int):
        self.arrays: row_attention.Rows = ()
        self.fewest = fewest
        self.page, self.width = page, 0  # positions of a page, pages of a place
        self.rows: list[Row | None] = []

    def place(self, cache: paged_attention.Cache, rows: list[Row], steps: int) -> dict[int, Row]:
        """The places of `rows` for so many steps; those that have begun are copied from `cache`."""
        size = max(self.fewest, same_bits.filled(len(rows)))
        last = max(row.position + min(steps, row.most - len(row.ids)) for row in rows)
        width = programs.rounded(-(-last // self.page))
        if size == len(self.rows):
            width = max(width, self.width)
        had = {id(row) for row in rows}
        self.rows = [row if id(row) in had else None for row in self.rows]
        if (size, width) != (len(self.rows), self.width):
            self._make(cache, size, width)
        seated = {id(row) for row in self.rows}
        for row in rows:
            if id(row) not in seated:
                slot = self.rows.index(None)
                pages = np.full(width, paged_attention.NOBODYS, np.int32)
                own = row.pages[: -(-row.position // self.page)]
                pages[: len(own)] = own
                self.arrays = programs.begin(self.arrays, cache, np.int32(slot), pages)
                self.rows[slot] = row
        return {n: row for n, row in enumerate(self.rows) if row is not None}

    def _make(self, cache: paged_attention.Cache, size: int, width: int) -> None:
        """Places for so many rows of so many pages; those that are there come first."""
        kept = [n for n, row in enumerate(self.rows) if row is not None]
        slots = np.zeros(size, np.int32)
        slots[: len(kept)] = kept
        self.arrays = programs.seat(self.arrays if kept else (), cache, slots, pages=width)
        self.rows = [self.rows[n] for n in kept] + [None] * (size - len(kept))
        self.width = width
