"""What rows of packed documents ask of attention, from the lengths of documents alone."""

import dataclasses
import functools

import numpy as np

SEED, ROWS = 0, 64


@dataclasses.dataclass(frozen=True)
class Documents:
    """Lengths of what a row holds: `mean` tokens of an example, log-normal with the spread `sigma`
    of their logarithms; None for one document as long as the row.

    For conversations of the V2 mixture the mean is the published 1,097 and the spread that of the
    quartiles 230 and 1,464; a packed pair of UltraFeedback has 773 (10.6 to a row of 8,192,
    `benchmarks/dpo_packing.py`).
    """

    mean: float | None
    sigma: float = 0.0

    def rows(self, length: int) -> tuple[tuple[int, ...], ...]:
        """Lengths of the documents of a few rows of `length` positions, filled to the end."""
        return _rows(self, length)

    def examples(self, length: int) -> float:
        """Expected number of documents in a row of `length`."""
        return 1.0 if self.mean is None else length / self.mean

    def visible(self, length: int) -> float:
        """Mean over rows of the sum of squared lengths: twice the visible (query, key) pairs."""
        return float(np.mean([sum(n * n for n in row) for row in self.rows(length)]))

    def pairs(self, length: int, *, block: int, shards: int, balanced: bool = False) -> float:
        """Pairs of blocks of a row that the most loaded of `shards` devices has to work, the mean
        over rows. Each has an equal run of queries, or `balanced` two chunks, an early and a late
        one (`parallel/balance.py`)."""
        return _pairs(self, length, block, shards, balanced)


@functools.cache
def _pairs(documents: Documents, length: int, block: int, shards: int, balanced: bool) -> float:
    counts = []
    for row in documents.rows(length):
        segment = np.repeat(np.arange(len(row)), row)
        first, last = segment[::block], segment[block - 1 :: block]
        queries, keys = np.arange(len(first))[:, None], np.arange(len(first))[None]
        seen = (keys <= queries) & (last[keys] >= first[queries])
        of_runs = seen.sum(axis=1).reshape((1 + balanced) * shards, -1).sum(axis=1)
        of_shards = of_runs[:shards] + of_runs[: shards - 1 : -1] if balanced else of_runs
        counts.append(of_shards.max())
    return float(np.mean(counts))


@functools.cache
def _rows(documents: Documents, length: int) -> tuple[tuple[int, ...], ...]:
    if documents.mean is None:
        return ((length,),)
    draw = np.random.default_rng(SEED)
    location = np.log(documents.mean) - documents.sigma**2 / 2
    rows = []
    for _ in range(ROWS):
        row, left = [], length
        while left:
            size = min(left, max(8, round(draw.lognormal(location, documents.sigma))))
            row.append(size)
            left -= size
        rows.append(tuple(row))
    return tuple(rows)


WHOLE = Documents(None)
CONVERSATIONS = Documents(1097.0, 1.37)
PAIRS = Documents(8192 / 10.6, 0.5)
OF_KIND = {"sft": CONVERSATIONS, "preference": PAIRS}  # packed rows, by the kind of their tasks
