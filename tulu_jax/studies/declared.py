"""What a study is: runs, what is evaluated on each, the numbers of its table, what it expects.

A study is one object in a file of its own. At scale 'paper' its runs are the paper's and its table
has the paper's cells; at scale 'tiny' it is the same question on the embedded task.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tulu_jax import validation
from tulu_jax.evals import paper_tables

SCALES = ("tiny", "paper")
AS_FILE = None  # the seed of a run that is trained once, with the seeds that its file has
CHARACTERS = "characters"  # as a metric: the mean length of an answer
TRAINING = "training"  # as a benchmark: metrics of the run itself, such as 'eval/loss'
DATA = "data card"  # as a benchmark: the lengths of its rows, as `prepare` counts them
CHANGE = "change"  # as a group of TRAINING: the last value from the first
SEEDS = (1, 2, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A complete config, with `overrides` of macros or of fields such as 'lora.LoRAConfig.rank'; a
    text that begins with @ or % is a reference of gin. It is trained once for each of `seeds`;
    without any, once as it is. `base` names the run of this study that it starts from, with the
    same seed where that has it, `reward` likewise that of its reward model. Of a run that is
    `only_prepared` the rows are wanted, no update.

    The answers of an evaluated run are scored by the reward model that `scored_by` names, if it
    names one. One with `best_of` n is not trained, only evaluated: the weights of its `base`, and
    of n answers drawn to each prompt the one that `scored_by` likes most. One that is not
    `is_evaluated` has no answers, as a reward model. One with `initial` is not trained
    either: what its file would start from is evaluated, and asked in that format, 'none' (raw
    texts, as a base model) or another of `evaluate --chat`."""

    name: str
    gin_file: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    base: str | None = None
    reward: str | None = None
    only_prepared: bool = False
    scored_by: str | None = None
    best_of: int | None = None
    is_evaluated: bool = True
    initial: str | None = None

    @property
    def is_trained(self) -> bool:
        """Whether it makes weights, or rows, of its own."""
        return self.best_of is None and self.initial is None

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the runs whose weights it takes."""
        return tuple(name for name in (self.base, self.reward, self.scored_by) if name)

    @property
    def tries(self) -> tuple[int | None, ...]:
        """Its seeds, or the one that its file has."""
        return self.seeds or (AS_FILE,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A number of an evaluated run: a metric of a benchmark (None: its first one, `CHARACTERS`: the
    mean length of an answer), of one group of its items (None: of all); or with an average of
    `paper_tables.AVERAGES`, with `TRAINING` or with `DATA` as the benchmark, what these have."""

    benchmark: str
    metric: str | None = None
    group: str | None = None

    def __str__(self):
        return ", ".join(part for part in (self.benchmark, self.metric, self.group) if part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A line of the table: a score of `run`, or with `minus` its difference from that of another
    run; `paper` is the printed cell that it answers, as (table, row, column), or `printed` a number
    of the paper that stands in no table."""

    run: str
    score: Score
    minus: str | None = None
    paper: tuple[str, str, str] | None = None
    printed: float | None = None

    def __str__(self):
        return f"{self.run} − {self.minus}" if self.minus else self.run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """The direction that a study expects of a cell, in the unit that the table shows (percent, or
    characters): its value is more than `above` and less than `below`, for every seed by itself."""

    says: str
    cell: Cell
    above: float = float("-inf")
    below: float = float("inf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Against:
    """A picture and a table: of each of `runs` its scores `ys` against its score `x`."""

    title: str
    runs: tuple[str, ...]
    x: Score
    ys: tuple[Score, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """A study at one scale. `varies` are the fields of a config that may differ between its runs,
    or what begins so, such as 'adapter'; `curves` are metrics of training that are drawn. With
    `stability` the page says of each run whether and when it went wrong. `asked` are further flags
    of `evaluate`. `against` shows what scores cost each other."""

    runs: tuple[Run, ...]
    benchmarks: tuple[str, ...]
    cells: tuple[Cell, ...]
    expected: tuple[Expected, ...] = ()
    varies: tuple[str, ...] = ()
    curves: tuple[str, ...] = ("train/loss", "eval/loss")
    stability: bool = False
    asked: tuple[str, ...] = ()
    against: tuple[Against, ...] = ()

    def __post_init__(self):
        validation.check(self, self._rules)

    def _rules(self):
        names = [run.name for run in self.runs]
        yield len(set(names)) == len(names), f"runs = {names}: expected each name once"
        used = {name for run in self.runs for name in run.needs}
        used |= {name for one in self.against for name in one.runs}
        cells = [*self.cells, *(one.cell for one in self.expected)]
        used |= {name for cell in cells for name in (cell.run, cell.minus) if name}
        yield used <= set(names), f"no run is named {', '.join(sorted(used - set(names)))}"
        for place, run in enumerate(self.runs):
            yield (
                run.best_of is None or bool(run.base and run.scored_by and not run.overrides),
                f"{run.name}: best_of = {run.best_of} is the base, evaluated; expected base and "
                "scored_by, and no overrides",
            )
            yield (
                run.initial is None or not (run.needs or run.only_prepared or run.best_of),
                f"{run.name}: initial is what its file starts from, evaluated; expected no base, "
                "reward, scored_by, best_of or only_prepared",
            )
            for kind in ("base", "reward", "scored_by"):
                name = getattr(run, kind)
                yield (
                    name is None or name in names[:place],
                    f"{run.name}: {kind} = {name!r} comes later; expected the {kind} first",
                )
                its = next((one.tries for one in self.runs if one.name == name), ())
                yield (
                    all(its.index(s) <= n for n, s in enumerate(run.tries) if s in its),
                    f"{run.name}: seeds = {run.seeds}, and {its} of its {kind}; expected one order",
                )
        for cell in cells:
            yield (
                cell.paper is None or paper_tables.cell(*cell.paper) is not None,
                f"the paper has no number at {cell.paper}",
            )

    def asked_of(self, run: Run) -> tuple[str, ...]:
        """The benchmarks that a run is evaluated on: all, of one with `initial` those of its
        cells, since the paper asked a base no chats."""
        if not run.is_evaluated or run.only_prepared:
            return ()
        wanted = {cell.score.benchmark for cell in self.cells if run.name in (cell.run, cell.minus)}
        return tuple(name for name in self.benchmarks if run.initial is None or name in wanted)

    def run(self, name: str) -> Run:
        """The run of that name."""
        return next(run for run in self.runs if run.name == name)

    def chosen(self, only: Sequence[str]) -> list[Run]:
        """The runs that `only` names (none: all), each after those that it starts from. Raises
        `UsageError` for names that there are not."""
        names = [run.name for run in self.runs]
        unknown = [name for name in only if name not in names]
        if unknown:
            raise validation.UsageError(
                f"--only={','.join(only)}: no run is named {', '.join(map(repr, unknown))}; "
                f"expected some of {', '.join(names)}{validation.nearest(unknown[0], names)}"
            )
        wanted = set(only or names)
        for run in reversed(self.runs):
            if run.name in wanted:
                wanted |= {*run.needs}
        return [run for run in self.runs if run.name in wanted]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """`question` in a sentence, and the designs of it, None where there is none."""

    name: str
    title: str
    question: str
    paper: Design | None = None
    tiny: Design | None = None

    def design(self, scale: str) -> Design:
        """The design of that scale. Raises `UsageError` where there is none."""
        found = {"tiny": self.tiny, "paper": self.paper}[scale]
        if found is None:
            other = next(name for name in SCALES if name != scale)
            raise validation.UsageError(
                f"{self.name} has no --scale={scale}; expected --scale={other}"
            )
        return found


def answers(table: str, runs: Mapping[str, str], columns: Sequence[str]) -> Iterator[Cell]:
    """The cells of a table of the paper for `runs` by the table's rows, those that it prints."""
    for row, run in runs.items():
        for column in columns:
            if paper_tables.cell(table, row, column) is not None:
                score = Score(benchmark=column)
                if column == "output_length":
                    score = Score(benchmark="alpaca_eval", metric=CHARACTERS)
                yield Cell(run=run, score=score, paper=(table, row, column))
