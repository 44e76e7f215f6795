"""The tasks behind a mixture: by name, or by the file of own rows that stands in its place."""

import dataclasses
import functools
from collections.abc import Callable

from tulu_jax.data import own_rows, registry
from tulu_jax.data.registry import Mixture, Task
from tulu_jax.data.sources import file_sets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """A task of a mixture: `amount` of its train examples (None: all, an int: rows, a float: a
    fraction), drawn with `seed`."""

    task: Task
    amount: int | float | None
    seed: int


def of(
    wanted: str | Mixture | Task,
    *,
    data_root: str | None = None,
    split: str = "train",
    read: bool = True,
) -> list[Component]:
    """The tasks behind a mixture or task, its name, or the path of a file of own rows.

    Such a file is looked for in the working directory and below `data_root`, and its first row
    tells the kind of the task; all its rows are the source of `split`, too. Without `read` such a
    file need not be there, and the kind of its task is None. Raises `ValueError` for
    unknown names and splits, a task that is named twice, a number of rows of a mixture, and a
    mixture of supervised and preference tasks; all of them at once.
    """
    registry.check_split(split)
    problems: list[str] = []
    find = functools.partial(_found, data_root=data_root, split=split, read=read)
    found = _flat(wanted, None, None, find, problems)
    names = [component.task.name for component in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        problems.append(f"mixture {registry.name_of(wanted)!r} has tasks more than once: {twice}")
    kinds = {c.task.name: c.task.kind for c in found if c.task.kind is not None}
    if len(set(kinds.values())) > 1:
        problems.append(
            f"mixture {registry.name_of(wanted)!r} has tasks of different kinds: {kinds}"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return found


def kind_of(wanted: str | Mixture | Task, *, data_root: str | None = None) -> str:
    """`"sft"` or `"preference"`, for what `of` takes."""
    return of(wanted, data_root=data_root)[0].task.kind


def _found(
    wanted: str | Mixture | Task, *, data_root: str | None, split: str, read: bool
) -> Mixture | Task:
    """The mixture, or the task with its kind and converter."""
    found = registry.named(wanted) if isinstance(wanted, str) else wanted
    if not read:
        if found is None and ("/" in wanted or file_sets.suffix(wanted)):
            return Task(name=wanted, sources={"train": wanted})
        if found is not None:
            return found
    if found is None:
        try:
            found = own_rows.task_of_file(wanted, data_root=data_root, split=split)
        except OSError as error:
            raise ValueError(f"{registry.no_such_name(wanted)}; and {error}") from error
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
