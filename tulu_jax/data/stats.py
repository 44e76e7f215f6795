"""What became of the rows: the counts of a prepared split, and a table of them."""

import dataclasses
from collections.abc import Sequence

from tulu_jax.data import encode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts of a prepared split; lengths in tokens after the shift, of a pair both sides.

    `positions` of the `rows_per_epoch * positions_per_row` hold a token.
    """

    tasks: tuple[encode.TaskCounts, ...]
    rows_per_epoch: int
    positions_per_row: int
    positions: int

    @property
    def examples(self) -> int:
        return sum(t.examples for t in self.tasks)

    @property
    def tokens(self) -> int:
        return sum(t.tokens for t in self.tasks)

    @property
    def trained_tokens(self) -> int:
        return sum(t.trained_tokens for t in self.tasks)

    @property
    def cut(self) -> int:
        return sum(t.cut for t in self.tasks)

    @property
    def dropped(self) -> dict[str, int]:
        """Number of rows left out, by reason."""
        reasons = sorted({reason for t in self.tasks for reason in t.dropped})
        return {reason: sum(t.dropped.get(reason, 0) for t in self.tasks) for reason in reasons}

    @property
    def examples_per_row(self) -> float:
        """Conversations (or pairs) in a row of T, on average."""
        return self.examples / self.rows_per_epoch

    @property
    def packing_efficiency(self) -> float:
        """Share of positions that hold a token."""
        return self.positions / (self.rows_per_epoch * self.positions_per_row)

    def __str__(self) -> str:
        lines = [table(self.tasks)]
        lines += [f"  left out: {count:,} × {reason}" for reason, count in self.dropped.items()]
        lines += [
            f"  {t.task}: {t.repeated_ids:,} examples have the upstream id of an earlier one; kept"
            for t in self.tasks
            if t.repeated_ids
        ]
        lines += [f"  {note}" for note in count_problems(self.tasks, expected=None, name="")]
        lines.append(
            f"  {self.rows_per_epoch:,} rows of {self.positions_per_row:,} positions, "
            f"{self.packing_efficiency:.1%} used, {self.examples_per_row:.2f} examples a row"
        )
        return "\n".join(lines)


def table(tasks: Sequence[encode.TaskCounts]) -> str:
    """A line for each task and one for their sum."""
    header = ("task", "raw", "added", "not drawn", "dropped", "cut", "kept", "tokens", "trained")
    lines = [
        (t.task, t.raw_rows, t.added_parts, t.not_drawn, sum(t.dropped.values()))
        + (t.cut, t.examples, t.tokens, t.trained_tokens)
        for t in tasks
    ]
    if len(lines) > 1:
        lines.append(("all",) + tuple(sum(column) for column in list(zip(*lines, strict=True))[1:]))
    cells = [header] + [(line[0],) + tuple(f"{n:,}" for n in line[1:]) for line in lines]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  "
        + row[0].ljust(widths[0])
        + "".join(c.rjust(w + 2) for c, w in zip(row[1:], widths[1:], strict=True))
        for row in cells
    )


def count_problems(
    tasks: Sequence[encode.TaskCounts], *, expected: int | None, name: str
) -> list[str]:
    """How the examples found differ from those that are expected: per task, and in all."""
    problems = [
        f"{t.task}: found {t.found:,} examples, expected {t.expected:,} ({t.found - t.expected:+,})"
        for t in tasks
        if t.expected not in (None, t.found)
    ]
    found = sum(t.found for t in tasks)
    if expected not in (None, found):
        problems.append(
            f"{name}: found {found:,} examples in all, expected {expected:,} "
            f"({found - expected:+,})"
        )
    return problems
