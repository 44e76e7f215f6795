"""Encoded examples in memory-mapped Arrow files, addressed by one index over several tasks."""

from collections.abc import Sequence

import numpy as np

from tulu_jax import strict_json
from tulu_jax.data import cache_files, encode, truncation


class ExampleStore:
    """The examples of some cached folders, in order. Reading one copies no more than itself.

    `lengths` int64 [examples] counts tokens after the shift; of a pair, those of the longer side,
    or with `one_row` those of both sides with their prompt once. `task_of[i]` is the number of the
    folder that example i is from, `cut[i]` tells whether it was cut to fit. `shards` are the files.

    Raises `UsageError` for a folder that is not as it was written; reading an example raises it,
    too, if the example's file has changed since.
    """

    def __init__(self, folders: Sequence, *, kind: str, one_row: bool):
        numbered = [
            (number, shard, batch)
            for number, folder in enumerate(folders)
            for shard in cache_files.listing(folder).shards
            for batch in cache_files.table(shard).to_batches()
        ]
        folder_of = [number for number, _, _ in numbered]
        self.shards = [shard for _, shard, _ in numbered]
        batches = [batch for _, _, batch in numbered]
        kept = [np.flatnonzero(batch["outcome"].to_numpy() <= truncation.CUT) for batch in batches]
        self._batches, self._rows = batches, kept
        self.task_of = np.repeat(folder_of, [len(rows) for rows in kept]).astype(int)
        cut = [
            b["outcome"].to_numpy()[r] == truncation.CUT for b, r in zip(batches, kept, strict=True)
        ]
        self.cut = np.concatenate([np.zeros(0, bool), *cut])
        self._starts = np.cumsum([0] + [len(rows) for rows in kept])
        self._sides = [
            (_Lists(batches, kept, side), _Lists(batches, kept, f"{side}_spans"))
            for side in encode.SIDES[kind]
        ]
        lengths = [ids.lengths - 1 for ids, _ in self._sides]
        if one_row:
            self.lengths = np.sum(lengths, axis=0) - self._sides[0][1].firsts()
        else:
            self.lengths = np.max(lengths, axis=0)

    def __len__(self) -> int:
        return len(self.lengths)

    def sides(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids [n + 1], trained ranges of targets [turns, 2]) of each side of one example."""
        self._batch_of(index)
        return [(ids[index], spans[index].reshape(-1, 2)) for ids, spans in self._sides]

    def name(self, index: int) -> str:
        """The id, "task/rownumber", of one example."""
        return self._value("id", index)

    def about(self, index: int) -> dict:
        """What the converter told about one example: texts and numbers by name."""
        return strict_json.loads(self._value("about", index), finite=False)

    def _batch_of(self, index: int) -> int:
        """The number of the batch that an example lies in, whose file has not changed."""
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        cache_files.check(self.shards[batch])
        return batch

    def _value(self, column: str, index: int) -> str:
        batch = self._batch_of(index)
        row = int(self._rows[batch][index - self._starts[batch]])
        return self._batches[batch][column][row].as_py()


class _Lists:
    """A list column over several record batches: numpy views into the mapped file."""

    def __init__(self, batches, kept: list[np.ndarray], name: str):
        self._values, batch_of, starts, stops = [], [], [], []
        for number, (batch, rows) in enumerate(zip(batches, kept, strict=True)):
            offsets = batch[name].offsets.to_numpy()
            self._values.append(batch[name].values.to_numpy())
            batch_of.append(np.full(len(rows), number))
            starts.append(offsets[rows])
            stops.append(offsets[rows + 1])
        self._batch_of, self._starts, self._stops = map(_joined, (batch_of, starts, stops))
        self.lengths = self._stops - self._starts

    def firsts(self) -> np.ndarray:
        """The first value of each list, int64 [lists]."""
        return np.array(
            [self._values[b][s] for b, s in zip(self._batch_of, self._starts, strict=True)],
            np.int64,
        )

    def __getitem__(self, index: int) -> np.ndarray:
        return self._values[self._batch_of[index]][self._starts[index] : self._stops[index]]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
