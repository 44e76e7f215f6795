"""Tasks and mixtures by name, in seqio's vocabulary: where rows come from and how many of each.

A task turns raw rows into examples: `{"messages": [...]}` for supervised fine-tuning, or
`{"prompt": [...], "chosen": [...], "rejected": [...]}` for preferences, each a list of
`{"role", "content"}`. A mixture names tasks with a number of rows of each; an epoch visits each
row once, which rate sampling as seqio's cannot promise.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping

from tulu_jax import validation

BUILT_IN = ("tulu_jax.data.tulu", "tulu_jax.data.tulu_tiny")  # they register this project's tasks
KINDS = ("sft", "preference")
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Dropped:
    """What a converter returns for a row it leaves out by a stated rule; counted by `reason`."""

    reason: str


Convert = Callable[[dict], dict | Dropped]
Rows = Callable[[], Iterable[dict]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter:
    """Keeps the examples for which `keep(example)` holds; the others are counted under `name`."""

    name: str
    keep: Callable[[dict], bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One named source of examples.

    `sources` gives the raw rows of a split: a path (relative to the data root given at run time,
    or absolute) or a function that yields rows. With no `validation` source, every
    `holdout_every`-th raw row is the validation split and is absent from the train split.
    `sample` draws that many raw rows of the train source with `seed`, in their order.
    `expected` is the number of raw rows of the published train source, None if unknown.
    """

    name: str
    kind: str
    sources: Mapping[str, str | Rows]
    convert: Convert
    filters: tuple[Filter, ...] = ()
    sample: int | None = None
    seed: int = 42
    holdout_every: int | None = 20
    expected: int | None = None
    licence: str
    origin: str

    def __post_init__(self):
        validation.check(
            self,
            lambda: (
                validation.one_of("kind", self.kind, KINDS),
                ("train" in self.sources, f"{self.name}: sources has no 'train'"),
                (
                    set(self.sources) <= set(SPLITS),
                    f"{self.name}: sources has {sorted(self.sources)}; expected {SPLITS}",
                ),
                (
                    self.holdout_every is None or self.holdout_every >= 2,
                    f"{self.name}: holdout_every = {self.holdout_every}; expected None or 2 up",
                ),
                (
                    self.sample is None or self.sample > 0,
                    f"{self.name}: sample = {self.sample}; expected a positive number of rows",
                ),
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Named tasks with the number of train rows of each: None for all, or that many, drawn with
    `seed`. The validation split is every held-out row of every task."""

    name: str
    tasks: Mapping[str, int | None]
    seed: int = 42

    def __post_init__(self):
        validation.check(
            self,
            lambda: (
                (bool(self.tasks), f"{self.name}: has no tasks"),
                *(
                    (
                        rows is None or rows > 0,
                        f"{self.name}: {rows} rows of {task!r}; expected a positive number or None",
                    )
                    for task, rows in self.tasks.items()
                ),
            ),
        )


class Registry:
    """Objects by name. A name is taken once."""

    def __init__(self, noun: str):
        self._noun = noun
        self._items = {}

    def add(self, item):
        if item.name in self._items:
            raise ValueError(f"a {self._noun} named {item.name!r} is already registered")
        self._items[item.name] = item
        return item

    def remove(self, name: str) -> None:
        self.get(name)
        del self._items[name]

    def get(self, name: str):
        if name not in self._items:
            raise ValueError(
                f"no {self._noun} is named {name!r}{validation.nearest(name, self._items)} "
                f"(registered: {', '.join(self.names())})"
            )
        return self._items[name]

    def names(self) -> list[str]:
        return sorted(self._items)

    def __contains__(self, name: str) -> bool:
        return name in self._items


TaskRegistry = Registry("task")
MixtureRegistry = Registry("mixture")


def get_mixture_or_task(name: str) -> Mixture | Task:
    """The mixture or the task of that name. Raises `ValueError` with the nearest known name."""
    for module in BUILT_IN:
        importlib.import_module(module)
    if name in MixtureRegistry:
        return MixtureRegistry.get(name)
    if name in TaskRegistry:
        return TaskRegistry.get(name)
    known = MixtureRegistry.names() + TaskRegistry.names()
    raise ValueError(
        f"no mixture or task is named {name!r}{validation.nearest(name, known)} "
        f"(registered: {', '.join(known)})"
    )


def components(name: str) -> list[tuple[Task, int | None, int]]:
    """The tasks behind a name, each with its number of train rows (None: all) and drawing seed.

    Raises `ValueError` for an unknown name, and for a mixture of supervised and preference tasks.
    """
    found = get_mixture_or_task(name)
    if isinstance(found, Task):
        return [(found, None, found.seed)]
    parts = [(TaskRegistry.get(task), rows, found.seed) for task, rows in found.tasks.items()]
    kinds = {task.name: task.kind for task, _, _ in parts}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"mixture {name!r} has tasks of different kinds: {kinds}")
    return parts


def kind_of(name: str) -> str:
    """`"sft"` or `"preference"`, for a mixture or task name."""
    return components(name)[0][0].kind
