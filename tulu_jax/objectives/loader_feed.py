"""Batches of rows that lie encoded on disk, read ahead: what SFT trains on, and others add to."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tulu_jax import validation
from tulu_jax.data import loader

Batch = dict[str, Any]


class LoaderFeed:
    """The rows of a run's mixture (`objective.Feed`).

    `attach(split, rows, batch)` gives the batch with the fields that the rows do not have.
    `splits` are the rows of "train" and, if the run has them, of "eval".
    """

    def __init__(self, run, attach: Callable[[str, loader.Rows, Batch], Batch] | None = None):
        self._run, self._attach = run, attach or (lambda split, rows, batch: batch)
        config = run.config
        self.eval_rows = config.micro_batch_size or config.batch_size  # of a batch
        with validation.reading():
            self.rows = loader.prepare(config.data, split="train")
            held_out = loader.prepare(config.data, split="validation")
        self.splits = {"train": self.rows} | ({} if held_out is None else {"eval": held_out})
        for rows in self.splits.values():
            _require_known_ids(rows, config.model.vocab_size)
        self._next, self._batches = None, None

    def begin(self, initial, weights: str) -> None:
        """Nothing here depends on the parameters."""

    def __call__(self, step: int, params) -> Batch:
        if step != self._next:
            self._batches = loader.batches(
                self.rows,
                batch_size=self._run.config.batch_size,
                start_step=step - 1,
                num_steps=self._run.num_steps,
                workers=self._run.config.data.workers,
                **self._part(),
            )
        self._next = step + 1
        return self._attach("train", self.rows, next(self._batches))

    def evaluation(self) -> Iterator[Batch] | None:
        if "eval" not in self.splits:
            return None
        rows = self.splits["eval"]
        batches, _ = self.in_order(rows, batch_size=self.eval_rows)
        return (self._attach("eval", rows, batch) for batch in batches)

    def in_order(
        self, rows: loader.Rows, *, batch_size: int, first_row: int = 0
    ) -> tuple[Iterator[Batch], int]:
        """The batches of `batch_size` rows of one pass over `rows` in their fixed order, from
        `first_row` on, and how many they are; the last ends in empty rows."""
        options = {"batch_size": batch_size, "first_row": first_row}
        batches = loader.eval_batches(rows, **options, **self._part())
        return batches, loader.num_eval_batches(rows, **options)

    def groups(self, examples: list[Mapping[str, Any]]) -> dict[str, float]:
        return {}

    def _part(self) -> dict[str, int]:
        part, parts = self._run.row_share
        return {"process_index": part, "process_count": parts}


def _require_known_ids(rows: loader.Rows, vocab_size: int) -> None:
    for shard in rows.store.shards:
        if shard.max_id >= vocab_size:
            raise validation.UsageError(
                f"{shard.file}: found the token id {shard.max_id}, expected ids below "
                f"{vocab_size}, the model's vocabulary; give the tokenizer that belongs to it"
            )
