"""Tasks and mixtures by name, in seqio's vocabulary: where rows come from and how many of each.

A task turns raw rows into examples: `{"messages": [...]}` for supervised fine-tuning, or
`{"prompt": [...], "chosen": [...], "rejected": [...]}` for preferences, each a list of
`{"role", "content"}`; either may carry `"about"`, a flat dict of texts and numbers for audits. A
mixture names tasks with a number of rows of each; an epoch visits each row once, which rate
sampling as seqio's cannot promise. Where a name is asked for, the path of a file of own rows does
as well (`own_rows`).
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable, Mapping

from tulu_jax import validation
from tulu_jax.data.sources import file_sets

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """A task of a mixture: `amount` of its train examples (None: all, an int: rows, a float: a
    fraction), drawn with `seed`."""

    task: Task
    amount: int | float | None
    seed: int


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
    found = _named(name)
    if found is None:
        raise ValueError(_no_such_name(name))
    return found


def all_names() -> list[str]:
    """The names of every mixture and of every task, this project's and those added to them."""
    return MixtureRegistry.names() + TaskRegistry.names()


def components(
    wanted: str | Mixture | Task,
    *,
    data_root: str | None = None,
    split: str = "train",
    read: bool = True,
) -> list[Component]:
    """The tasks that a mixture or task, its name, or the path of a file of own rows stands for.

    Such a file is looked for in the working directory and below `data_root`, and its first row
    tells the kind of the task; all its rows are the source of `split`, too. Without `read` such a
    file need not be there, and the kind of its task is None. Raises `ValueError` for
    unknown names and splits, a task that is named twice, a number of rows of a mixture, and a
    mixture of supervised and preference tasks; all of them at once.
    """
    check_split(split)
    problems: list[str] = []
    find = functools.partial(_found, data_root=data_root, split=split, read=read)
    found = _flat(wanted, None, None, find, problems)
    names = [component.task.name for component in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        problems.append(f"mixture {name_of(wanted)!r} has tasks more than once: {twice}")
    kinds = {c.task.name: c.task.kind for c in found if c.task.kind is not None}
    if len(set(kinds.values())) > 1:
        problems.append(f"mixture {name_of(wanted)!r} has tasks of different kinds: {kinds}")
    if problems:
        raise ValueError("; ".join(problems))
    return found


def name_of(wanted: str | Mixture | Task) -> str:
    return wanted if isinstance(wanted, str) else wanted.name


def kind_of(wanted: str | Mixture | Task, *, data_root: str | None = None) -> str:
    """`"sft"` or `"preference"`, for what `components` takes."""
    return components(wanted, data_root=data_root)[0].task.kind


def expected_examples(wanted: str | Mixture | Task) -> int | None:
    """The number of train examples that is known for a mixture or task, None if none is."""
    found = _named(wanted) if isinstance(wanted, str) else wanted
    return None if found is None else found.expected


def _import_built_in() -> None:
    for module in BUILT_IN:
        importlib.import_module(module)


def _named(name: str) -> Mixture | Task | None:
    for items in (MixtureRegistry, TaskRegistry):
        if name in items:
            return items.get(name)
    return None


def _no_such_name(name: str) -> str:
    return (
        f"no mixture or task is named {name!r}{validation.nearest(name, all_names())}; mixtures "
        f"are {', '.join(MixtureRegistry.names())}, and tasks are listed in docs/data.md"
    )


def _found(
    wanted: str | Mixture | Task, *, data_root: str | None, split: str, read: bool
) -> Mixture | Task:
    """The mixture, or the task with its kind and converter."""
    from tulu_jax.data import own_rows  # it reads files of tasks

    found = _named(wanted) if isinstance(wanted, str) else wanted
    if not read:
        if found is None and ("/" in wanted or file_sets.suffix(wanted)):
            return Task(name=wanted, sources={"train": wanted})
        if found is not None:
            return found
    if found is None:
        try:
            found = own_rows.task_of_file(wanted, data_root=data_root, split=split)
        except OSError as error:
            raise ValueError(f"{_no_such_name(wanted)}; and {error}") from error
    if isinstance(found, Task) and found.convert is None:
        found = own_rows.resolved(found, data_root=data_root)
    return found


def _flat(wanted, amount, seed, find: Callable, problems: list[str]) -> list[Component]:
    try:
        found = find(wanted)
    except (OSError, ValueError) as error:
        problems.append(str(error))
        return []
    if isinstance(found, Task):
        return [Component(task=found, amount=amount, seed=found.seed if seed is None else seed)]
    if isinstance(amount, int):
        problems.append(
            f"{amount} rows of the mixture {found.name!r} are asked for; of a mixture inside a "
            "mixture, take None (all) or a fraction, or name its tasks one by one"
        )
    parts = []
    for name, inner in found.tasks.items():
        if isinstance(amount, float):
            inner = amount if inner is None else type(inner)(inner * amount)
        parts += _flat(name, inner, found.seed, find, problems)
    return parts


def _is_amount(amount) -> bool:
    if amount is None:
        return True
    if isinstance(amount, float):
        return 0.0 < amount <= 1.0
    return amount > 0
