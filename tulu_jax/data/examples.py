"""From a task's raw rows to checked examples, with every row counted: kept, or dropped and why."""

import collections
import dataclasses
import hashlib
import inspect
import json
import os
import random
import sys
from collections.abc import Iterable

from tulu_jax.data import registry
from tulu_jax.data.sources import readers

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskExamples:
    """Checked examples of one task and split; `ids[i]` is "task/rownumber" of `examples[i]`.

    `raw_rows == len(examples) + sum(dropped.values()) + not_drawn`.
    """

    ids: list[str]
    examples: list[dict]
    raw_rows: int
    dropped: dict[str, int]
    not_drawn: int


def load_examples(
    task: registry.Task, *, split: str, rows: int | None, seed: int, data_root: str | None
) -> TaskExamples:
    """Reads, converts, checks and filters one task's split; `rows` of the train split are drawn.

    Raises `ValueError` naming the row for a malformed row, and if fewer than `rows` remain.
    """
    prefix = task.name if split not in task.sources or split == "train" else f"{task.name}.{split}"
    numbered = list(enumerate(_raw_rows(task, split, data_root)))
    drawn = _of_split(task, split, numbered)
    dropped = collections.Counter()
    ids, examples = [], []
    for number, raw in drawn:
        row_id = f"{prefix}/{number}"
        example = _convert(task, raw, row_id)
        reason = example.reason if isinstance(example, registry.Dropped) else None
        reason = reason or next((f.name for f in task.filters if not f.keep(example)), None)
        if reason is not None:
            dropped[reason] += 1
            continue
        ids.append(row_id)
        examples.append(example)
    if rows is not None and split == "train":
        if rows > len(examples):
            raise ValueError(
                f"task {task.name!r}: {rows} rows are asked for, but the {split} split has "
                f"{len(examples)}; ask for fewer, or None for all"
            )
        kept = sorted(random.Random(f"{seed}/{task.name}").sample(range(len(examples)), rows))
        ids, examples = [ids[i] for i in kept], [examples[i] for i in kept]
    return TaskExamples(
        ids=ids,
        examples=examples,
        raw_rows=len(numbered),
        dropped=dict(dropped),
        not_drawn=len(numbered) - len(examples) - sum(dropped.values()),
    )


def check_first_row(task: registry.Task, *, split: str, data_root: str | None) -> None:
    """Reads and converts one raw row. Raises as `load_examples` would for it, or for no rows."""
    for raw in _raw_rows(task, split, data_root):
        _convert(task, raw, f"{task.name}/0")
        return
    raise ValueError(f"task {task.name!r} has no rows")


def source_digest(
    task: registry.Task, *, split: str, rows: int | None, seed: int, data_root: str | None
) -> str:
    """Hex digest of all that decides `load_examples`: raw content, code, rules and seeds."""
    digest = hashlib.sha256()
    rules = [task.name, task.kind, split, task.sample, task.seed, task.holdout_every, rows, seed]
    code = [_code(task.convert)] + [(f.name, _code(f.keep)) for f in task.filters]
    digest.update(json.dumps([rules, code]).encode())
    source = task.sources.get(split, task.sources["train"])
    if isinstance(source, str):
        with readers.as_path(_located(task, source, data_root)).open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    else:
        for row in source():
            digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def check_messages(messages, row_id: str) -> None:
    """Raises `ValueError` naming the row unless `messages` is a non-empty list of chat messages."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"row {row_id}: found messages {messages!r}; expected a non-empty list")
    for index, message in enumerate(messages):
        where = f"row {row_id}, message {index}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where}: found {message!r}; expected 'role' and 'content'")
        if message["role"] not in ROLES:
            raise ValueError(f"{where}: unknown role {message['role']!r}; expected one of {ROLES}")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise ValueError(f"{where}: content is a {kind}; expected a string")
        if not message["content"].isascii():
            try:
                message["content"].encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{where}: content is not valid Unicode ({error})") from error


def _raw_rows(task: registry.Task, split: str, data_root: str | None) -> Iterable[dict]:
    source = task.sources.get(split, task.sources["train"])
    return (
        readers.read_rows(_located(task, source, data_root))
        if isinstance(source, str)
        else source()
    )


def _located(task: registry.Task, path: str, data_root: str | None) -> str:
    if os.path.isabs(path) or "://" in path:
        return path
    if data_root is None:
        raise ValueError(
            f"task {task.name!r} reads {path!r} below the data root, and none is given; "
            "set data_root to the folder (or gs:// prefix) that holds it"
        )
    return f"{data_root.rstrip('/')}/{path}"


def _of_split(task: registry.Task, split: str, numbered: list) -> list:
    if "validation" in task.sources:
        held_out = numbered if split == "validation" else []
        kept = [] if split == "validation" else numbered
    else:
        every = task.holdout_every
        held_out = [] if every is None else numbered[every - 1 :: every]
        kept = [row for row in numbered if every is None or row[0] % every != every - 1]
    if split == "validation":
        return held_out
    if task.sample is None:
        return kept
    if task.sample > len(kept):
        raise ValueError(
            f"task {task.name!r} samples {task.sample} rows, but its source has {len(kept)}"
        )
    drawn = random.Random(task.seed).sample(range(len(kept)), task.sample)
    return [kept[i] for i in sorted(drawn)]


def _convert(task: registry.Task, raw: dict, row_id: str) -> dict | registry.Dropped:
    try:
        example = task.convert(raw)
    except ValueError as error:
        raise ValueError(f"row {row_id}: {error}") from error
    if isinstance(example, registry.Dropped):
        return example
    if task.kind == "sft":
        _check_keys(example, {"messages"}, row_id)
        check_messages(example["messages"], row_id)
        return example
    _check_keys(example, {"prompt", "chosen", "rejected"}, row_id)
    for side in ("prompt", "chosen", "rejected"):
        check_messages(example[side], row_id)
    return _pair_rules(example, row_id)


def _pair_rules(example: dict, row_id: str) -> dict | registry.Dropped:
    """Drops pairs that say nothing: an empty side, or two sides equal up to outer whitespace."""
    sides = [example[side] for side in ("chosen", "rejected")]
    for side in sides:
        if side[-1]["role"] != "assistant":
            raise ValueError(
                f"row {row_id}: a side ends with role {side[-1]['role']!r}; expected 'assistant'"
            )
    if sides[0][:-1] != sides[1][:-1]:
        raise ValueError(f"row {row_id}: the sides differ before their last message")
    chosen, rejected = (side[-1]["content"].strip() for side in sides)
    if not chosen or not rejected:
        return registry.Dropped("empty side")
    if chosen == rejected:
        return registry.Dropped("identical sides")
    return example


def _check_keys(example, expected: set[str], row_id: str) -> None:
    if not isinstance(example, dict) or set(example) != expected:
        found = sorted(example) if isinstance(example, dict) else type(example).__name__
        raise ValueError(f"row {row_id}: converted to {found}; expected {sorted(expected)}")


def _code(function) -> list:
    """What identifies a function's behaviour: its module's source, its name, its bound values."""
    bound = [repr(a) for a in getattr(function, "args", ())]
    bound += [f"{k}={v!r}" for k, v in sorted(getattr(function, "keywords", {}).items())]
    function = getattr(function, "func", function)  # functools.partial
    function = inspect.unwrap(function)  # the type checker of the tests
    for cell in function.__closure__ or ():
        value = cell.cell_contents
        bound.append(_code(value) if callable(value) else repr(value))
    try:
        source = inspect.getsource(sys.modules[function.__module__])
    except (OSError, TypeError):  # defined at a prompt
        source = repr((function.__code__.co_code, function.__code__.co_consts))
    return [function.__qualname__, hashlib.sha256(source.encode()).hexdigest(), bound]
