"""Which examples share a row: a plan for each (seed, epoch), recomputed whenever it is needed."""

import dataclasses

import numpy as np

from tulu_jax.data import fields

PACKINGS = ("best_fit", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows of one epoch: row i holds examples `order[starts[i]:starts[i + 1]]`, in that order."""

    order: np.ndarray
    starts: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> np.ndarray:
        return self.order[self.starts[index] : self.starts[index + 1]]


def epoch_plan(lengths: np.ndarray, *, capacity: int, packing: str, seed: int, epoch: int) -> Plan:
    """The shuffled plan of one epoch: every example once, at most `capacity` tokens a row.

    The number of rows depends on the multiset of lengths alone, thus is the same in every epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    ranks = rng.permutation(len(lengths))
    if packing == "none":
        return Plan(order=ranks, starts=np.arange(len(lengths) + 1))
    packed = _best_fit(lengths, ranks, capacity=capacity)
    shuffled = rng.permutation(packed.num_rows)
    sizes = np.diff(packed.starts)[shuffled]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
    order = packed.order[np.repeat(packed.starts[:-1][shuffled], sizes) + within]
    return Plan(order=order, starts=starts)


def ordered_plan(lengths: np.ndarray, *, capacity: int, packing: str) -> Plan:
    """A plan without chance, for evaluation; with packing "none", row i holds example i."""
    ranks = np.arange(len(lengths))
    if packing == "none":
        return Plan(order=ranks, starts=np.arange(len(lengths) + 1))
    return _best_fit(lengths, ranks, capacity=capacity)


def _best_fit(lengths: np.ndarray, ranks: np.ndarray, *, capacity: int) -> Plan:
    """Best-fit decreasing: longest first, each into the fullest row that still holds it.

    Equal lengths go in the order of `ranks`. `rows_with[r]` is a stack of the rows with r tokens
    left, and bit r of `nonempty` tells whether it has any, so the best row is the lowest set bit at
    or above the length: a few machine words at a capacity of 8,192.
    """
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"lengths from {lengths.min()} to {lengths.max()} do not fit in rows of {capacity}"
        )
    longest_first = np.lexsort((ranks, -lengths))
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    nonempty, num_rows = 0, 0
    row_of = np.empty(len(lengths), np.int64)
    chosen = []
    for length in lengths[longest_first].tolist():
        fitting = nonempty >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[left].pop()
            if not rows_with[left]:
                nonempty ^= 1 << left
        else:
            left, row = capacity, num_rows
            num_rows += 1
        chosen.append(row)
        left -= length
        rows_with[left].append(row)
        nonempty |= 1 << left
    row_of[longest_first] = chosen
    order = np.lexsort((ranks, row_of))
    starts = np.searchsorted(row_of[order], np.arange(num_rows + 1))
    return Plan(order=order, starts=starts)


def fill_row(
    examples: list[tuple[np.ndarray, np.ndarray]], *, capacity: int
) -> dict[str, np.ndarray]:
    """One row of `capacity` positions from (ids [n + 1], trained ranges of targets [turns, 2]).

    Each example's shift happens inside its own segment, so no target crosses into the next.
    """
    row, start = fields.empty_row(capacity, branches=False), 0
    for segment, (ids, spans) in enumerate(examples, 1):
        stop = start + len(ids) - 1
        _place(row, ids, spans, start=start, stop=stop, segment=segment)
        row["positions"][start:stop] = np.arange(stop - start)
        start = stop
    return row


def fill_pair_row(
    pairs: list[list[tuple[np.ndarray, np.ndarray]]], *, capacity: int
) -> dict[str, np.ndarray]:
    """One row of `capacity` positions from pairs of (ids, trained ranges), prompts stored once.

    A segment is a prompt without its last token (`branches` 0), then the chosen (1) and the
    rejected (2) answer, each after a copy of that last token, which has a target in both. Both
    branches continue the positions of the prompt. A key is visible to a query if it is not later
    in the row, in the same segment, and in the prompt or in the same branch.
    """
    row, start = fields.empty_row(capacity, branches=True), 0
    for segment, sides in enumerate(pairs, 1):
        shared = int(sides[0][1][0, 0])
        prompt, no_spans = sides[0][0][: shared + 1], np.zeros((0, 2), np.int64)
        stop = start + shared
        _place(row, prompt, no_spans, start=start, stop=stop, segment=segment)
        row["positions"][start:stop] = np.arange(shared)
        start = stop
        for branch, (ids, spans) in enumerate(sides, 1):
            answer, stop = ids[shared:], start + len(ids) - 1 - shared
            _place(row, answer, spans - shared, start=start, stop=stop, segment=segment)
            row["positions"][start:stop] = np.arange(shared, shared + stop - start)
            row["branches"][start:stop] = branch
            start = stop
    return row


def fill_row_to_ends(
    examples: list[tuple[np.ndarray, np.ndarray]], *, capacity: int
) -> dict[str, np.ndarray]:
    """`fill_row` without a shift, for what reads an example at its end: every id is an input, and
    its own target; `loss_mask` marks the ids that are trained otherwise. One position more each."""
    shifted = [(np.append(ids, ids[-1]), spans + 1) for ids, spans in examples]
    return _unshifted(fill_row(shifted, capacity=capacity))


def fill_pair_row_to_ends(
    pairs: list[list[tuple[np.ndarray, np.ndarray]]], *, capacity: int
) -> dict[str, np.ndarray]:
    """`fill_pair_row` without a shift: branch 0 is the whole prompt, and each answer follows it
    with its last id. One position more for each pair."""
    shifted = [[(np.append(ids, ids[-1]), spans + 1) for ids, spans in pair] for pair in pairs]
    return _unshifted(fill_pair_row(shifted, capacity=capacity))


def _unshifted(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    row["targets"] = row["tokens"].copy()
    return row


def _place(row, ids, spans, *, start: int, stop: int, segment: int) -> None:
    """Writes `ids`, shifted, to positions start:stop, and marks the trained of its targets."""
    if stop > len(row["tokens"]):
        raise ValueError(f"a row of {len(row['tokens'])} positions cannot hold {stop} tokens")
    row["tokens"][start:stop] = ids[:-1]
    row["targets"][start:stop] = ids[1:]
    row["segment_ids"][start:stop] = segment
    for first, last in spans:
        row["loss_mask"][start + first : start + last] = True
