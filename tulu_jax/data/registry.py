"""Tasks and mixtures by name, in seqio's vocabulary: where rows come from and how many of each.

A task turns raw rows into examples: `{"messages": [...]}` for supervised fine-tuning, or
`{"prompt": [...], "chosen": [...], "rejected": [...]}` for preferences, each a list of
`{"role", "content"}`; either may carry `"about"`, a flat dict of texts and numbers for audits. A
mixture names tasks with a number of rows of each; an epoch visits each row once, which rate
sampling as seqio's cannot promise. Where a name is asked for, the path of a file of own rows does
as well (`own_rows`).
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping

from tulu_jax import validation

BUILT_IN = (  # they register this project's tasks
    "tulu_jax.data.tulu",
    "tulu_jax.data.preferences",
    "tulu_jax.data.tulu_tiny",
)
KINDS = ("sft", "preference")
SPLITS = ("train", "validation")
NOT_STATED = "not stated"


@dataclasses.dataclass(frozen=True)
class Dropped:
    """What a converter returns for what it leaves out by a stated rule; counted by `reason`."""

    reason: str


# A raw row gives one example, several (the chunks of a long conversation), or none: `Dropped`.
Part = dict | Dropped
Convert = Callable[[dict], Part | list[Part]]
Rows = Callable[[], Iterable[dict]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Raw rows in files: `paths`, which may be globs, relative to the data root of the run.

    Only rows whose columns equal `where` are read. With no such file, the set named `hub` is
    loaded through `datasets`: its split `hub_split` at `hub_revision` (None: the newest).
    """

    paths: tuple[str, ...]
    where: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hub: str | None = None
    hub_split: str = "train"
    hub_revision: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter:
    """Keeps the examples for which `keep(example)` holds; the others are counted under `name` and
    kept aside."""

    name: str
    keep: Callable[[dict], bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One named source of examples.

    `sources` gives the raw rows of a split: a path (relative to the data root given at run time,
    or absolute), `Files`, or a function that yields rows. With no `convert`, they are own rows in
    the common layouts (`sources.own`), their columns tell the `kind`, and a path may be relative to
    the working directory as well. `sample` draws that many raw rows of the train source with
    `seed`, in their order. `expected` is the number of train examples after that that the converter
    gives, before filters; of pairs, before any is dropped. None if unknown.

    Encoded rows are kept under a key. `version` stands in it for what `convert` and the filters do:
    raise it when that changes, in their code or in a file that they read. Beside it the key has
    what they are bound to (arguments of a partial, a closure). With no `version` the key has their
    code, and that of the modules of yours that theirs import, without comments and docstrings
    (`code_identity`), so that an edit encodes the rows again.
    """

    name: str
    kind: str | None = None
    sources: Mapping[str, str | Files | Rows]
    convert: Convert | None = None
    filters: tuple[Filter, ...] = ()
    sample: int | None = None
    seed: int = 42
    expected: int | None = None
    version: str | None = None
    licence: str = NOT_STATED
    origin: str = NOT_STATED

    def __post_init__(self):
        validation.check(
            self,
            lambda: (
                validation.one_of("kind", self.kind, KINDS) if self.kind else (True, ""),
                (
                    self.kind is not None or self.convert is None,
                    f"{self.name}: kind is missing; with a converter, expected one of {KINDS}",
                ),
                ("train" in self.sources, f"{self.name}: sources has no 'train'"),
                (
                    set(self.sources) <= set(SPLITS),
                    f"{self.name}: sources has {sorted(self.sources)}; expected {SPLITS}",
                ),
                (
                    self.sample is None or self.sample > 0,
                    f"{self.name}: sample = {self.sample}; expected a positive number of rows",
                ),
            ),
        )

    def source(self, split: str) -> str | Files | Rows:
        """The source that `split` is read from: its own, or the train source it is held out of.

        Raises `ValueError` for a split that is none of `SPLITS`.
        """
        check_split(split)
        return self.sources.get(split, self.sources["train"])


def check_split(split: str) -> None:
    """Raises `ValueError` with the known splits for one that is not among them."""
    if split not in SPLITS:
        raise ValueError(f"no split is named {split!r}; expected one of {SPLITS}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Named tasks, mixtures, or files of own rows, with the share of the train examples of each:
    None for all, a number of rows, or a fraction; rows are drawn with `seed`.

    Of a mixture inside a mixture all rows or a fraction are taken. The validation split is every
    held-out row of every task. `expected` is the number of examples before anything is dropped.
    """

    name: str
    tasks: Mapping[str, int | float | None]
    seed: int = 42
    expected: int | None = None

    def __post_init__(self):
        validation.check(
            self,
            lambda: (
                (bool(self.tasks), f"{self.name}: has no tasks"),
                *(
                    (
                        _is_amount(amount),
                        f"{self.name}: {amount!r} of {task!r}; expected None (all), a positive "
                        "number of rows, or a fraction above 0.0 and up to 1.0",
                    )
                    for task, amount in self.tasks.items()
                ),
            ),
        )


class Registry:
    """Objects by name, this project's among them. A name is taken once."""

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
        if name not in self:
            raise ValueError(
                f"no {self._noun} is named {name!r}{validation.nearest(name, self._items)}"
            )
        return self._items[name]

    def names(self) -> list[str]:
        _import_built_in()
        return sorted(self._items)

    def __contains__(self, name: str) -> bool:
        _import_built_in()
        return name in self._items


TaskRegistry = Registry("task")
MixtureRegistry = Registry("mixture")


def get_mixture_or_task(name: str) -> Mixture | Task:
    """The mixture or the task of that name. Raises `ValueError` with the nearest known name."""
    found = named(name)
    if found is None:
        raise ValueError(no_such_name(name))
    return found


def all_names() -> list[str]:
    """The names of every mixture and of every task, this project's and those added to them."""
    return MixtureRegistry.names() + TaskRegistry.names()


def name_of(wanted: str | Mixture | Task) -> str:
    return wanted if isinstance(wanted, str) else wanted.name


def expected_examples(wanted: str | Mixture | Task) -> int | None:
    """The number of train examples that is known for a mixture or task, None if none is."""
    found = named(wanted) if isinstance(wanted, str) else wanted
    return None if found is None else found.expected


def _import_built_in() -> None:
    for module in BUILT_IN:
        importlib.import_module(module)


def named(name: str) -> Mixture | Task | None:
    """The mixture or the task of that name, or None."""
    for items in (MixtureRegistry, TaskRegistry):
        if name in items:
            return items.get(name)
    return None


def no_such_name(name: str) -> str:
    """What to tell of a name that nothing has."""
    return (
        f"no mixture or task is named {name!r}{validation.nearest(name, all_names())}; mixtures "
        f"are {', '.join(MixtureRegistry.names())}, and tasks are listed in docs/data.md"
    )


def _is_amount(amount) -> bool:
    if amount is None:
        return True
    if isinstance(amount, float):
        return 0.0 < amount <= 1.0
    return amount > 0
