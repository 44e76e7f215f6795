"""From a task's raw rows to checked examples, with every row counted: kept, or dropped and why."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import random
from collections.abc import Iterator

from tulu_jax.data import code_identity, registry, task_files
from tulu_jax.data.sources import file_sets, readers

ROLES = ("system", "user", "assistant")
KEYS = {"sft": ("messages",), "preference": ("prompt", "chosen", "rejected")}
BAD_ROWS_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """Which examples of a task are taken.

    With no `validation` source, every `holdout_every`-th raw row is the validation split and is
    absent from the train split; None holds nothing out. Of the train split `amount` are drawn with
    `seed` (None: all, an int: examples, a float: a fraction). Paths are relative to `data_root`.
    """

    split: str
    amount: int | float | None
    seed: int
    holdout_every: int | None
    data_root: str | None

    def __post_init__(self):
        registry.check_split(self.split)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskExamples:
    """Checked examples of one task and split; `ids[i]`, "task/rownumber" or, of a row that gives
    several, "task/rownumber.part", is that of `examples[i]`.

    `raw_rows + added_parts == len(examples) + sum(dropped.values()) + not_drawn`, where
    `added_parts` counts what rows gave beyond one example each. `found` is what a task's `expected`
    is compared with; a row held out counts as one example. `repeated_ids` counts the examples that
    have the id upstream gave an earlier one, `about["id"]`: they are kept, for ids tell nothing of
    the content. `aside` has a dict of id, reason and, where there is one, example for each of the
    dropped.
    """

    ids: list[str]
    examples: list[dict]
    raw_rows: int
    added_parts: int
    dropped: dict[str, int]
    not_drawn: int
    found: int
    repeated_ids: int
    aside: list[dict]


def load_examples(task: registry.Task, drawing: Drawing) -> TaskExamples:
    """Reads, converts, checks, filters and draws one task's split.

    Raises `ValueError` that counts the malformed rows and names the first of them, or if fewer
    examples remain than `drawing.amount` asks for.
    """
    split = drawing.split
    prefix = task.name if split not in task.sources or split == "train" else f"{task.name}.{split}"
    numbered = list(enumerate(_placed_rows(task, split, drawing.data_root)))
    taken = _of_split(task, drawing, numbered)
    dropped, aside, bad = collections.Counter(), [], []
    ids, examples, parts, seen = [], [], 0, set()
    for number, (place, raw) in taken:
        row_id = f"{prefix}/{number}"
        try:
            converted = _converted(task, raw, row_id, place)
        except ValueError as error:
            bad.append(str(error))
            continue
        parts += len(converted)
        for part_id, part in converted:
            reason = _reason_to_drop(task, part, seen)
            if reason is None:
                ids.append(part_id)
                examples.append(part)
                continue
            dropped[reason] += 1
            kept_aside = {} if isinstance(part, registry.Dropped) else {"example": part}
            aside.append({"id": part_id, "reason": reason, **kept_aside})
    if bad:
        shown = "\n".join(f"  {text}" for text in bad[:BAD_ROWS_SHOWN])
        more = f"\n  and {len(bad) - BAD_ROWS_SHOWN} more" if len(bad) > BAD_ROWS_SHOWN else ""
        raise ValueError(
            f"task {task.name!r}: {len(bad)} of {len(taken)} rows are malformed:\n{shown}{more}"
        )
    added = parts - len(taken)
    unread = 0 if task.sample is not None and split == "train" else len(numbered) - len(taken)
    unconverted = sum("example" not in entry for entry in aside) if task.kind == "sft" else 0
    ids, examples = _draw(task, drawing, ids, examples)
    upstream = [e["about"]["id"] for e in examples if "id" in e.get("about", ())]
    return TaskExamples(
        ids=ids,
        examples=examples,
        raw_rows=len(numbered),
        added_parts=added,
        dropped=dict(dropped),
        not_drawn=len(numbered) + added - len(examples) - sum(dropped.values()),
        found=parts - unconverted + unread,
        repeated_ids=len(upstream) - len(set(upstream)),
        aside=aside,
    )


def check_first_row(task: registry.Task, *, split: str, data_root: str | None) -> None:
    """Reads and converts one raw row. Raises as `load_examples` would for it, or for no rows."""
    for place, raw in _placed_rows(task, split, data_root):
        _converted(task, raw, f"{task.name}/0", place)
        return
    raise ValueError(f"task {task.name!r} has no rows")


def has_validation(task: registry.Task, *, holdout_every: int | None) -> bool:
    """Whether the task has a validation split: of its own, or held out of its train rows."""
    return "validation" in task.sources or holdout_every is not None


def num_rows_up_to(task: registry.Task, count: int, *, data_root: str | None) -> int:
    """The number of raw train rows, or `count` if there are more; no more are read."""
    return sum(1 for _ in itertools.islice(raw_rows(task, "train", data_root), count))


def source_digest(task: registry.Task, drawing: Drawing) -> str:
    """Hex digest of all that decides `load_examples`: raw content, code, rules and seeds.

    What the split is not drawn by is left out, so that it changes nothing.
    """
    split = drawing.split
    own = "validation" in task.sources
    sampled = [task.sample, task.seed] if split == "train" and task.sample is not None else None
    amount = drawing.amount if split == "train" else None
    drawn = None if amount is None else [repr(amount), drawing.seed]
    rules = [task.name, task.kind, split, own, _holdout(task, drawing), sampled, drawn]
    identity = functools.partial(code_identity.identity, with_code=task.version is None)
    code = [task.version, identity(task.convert)]
    code += [[f.name, identity(f.keep)] for f in task.filters]
    digest = hashlib.sha256(json.dumps([rules, code]).encode())
    source = task.source(split)
    if callable(source):
        for row in source():
            digest.update(json.dumps(row, default=repr).encode() + b"\n")
        return digest.hexdigest()
    files = task_files.of(source)
    paths, hub = task_files.located(task, files, drawing.data_root), None
    if not paths:  # a part of a hub split is read from the files of the whole
        hub = [files.hub, files.hub_split, files.hub_revision]
        wanted = task_files.wanted(files, drawing.data_root)
        paths = [file["filename"] for file in readers.hub_set(files, wanted=wanted).cache_files]
    contents = [
        [file_sets.suffix(path), _content_digest(path, task_files.stamp(path))] for path in paths
    ]
    digest.update(json.dumps([sorted(files.where.items()), hub, contents]).encode())
    return digest.hexdigest()


def files_of(task: registry.Task, split: str, data_root: str | None) -> list[tuple]:
    """(path, rows of it that are read) of the files that the source of `split` is read from."""
    source = task.source(split)
    if callable(source):
        return []
    files = task_files.of(source)
    where = tuple(sorted(files.where.items()))
    paths = task_files.located(task, files, data_root)
    return [(path if "://" in path else os.path.realpath(path), where) for path in paths]


def raw_rows(task: registry.Task, split: str, data_root: str | None) -> Iterator[dict]:
    """The raw rows of the source of `split`, in order.

    Raises `FileNotFoundError` that says what to download and where to put it if there is no file
    and no hub, and `ValueError` as `readers.read_placed` and `task_files.located`.
    """
    return (row for _, row in _placed_rows(task, split, data_root))


def _placed_rows(
    task: registry.Task, split: str, data_root: str | None
) -> Iterator[tuple[str, dict]]:
    """(file and line, row) of the raw rows; "" for those that are in no file."""
    source = task.source(split)
    if callable(source):
        for row in source():
            yield "", row
        return
    files = task_files.of(source)
    paths = task_files.located(task, files, data_root)
    for path in paths:
        for place, row in readers.read_placed(path, files.where):
            yield f"{path}, {place}", row
    if not paths:
        for row in readers.hub_set(files, wanted=task_files.wanted(files, data_root)):
            if all(row.get(column) == value for column, value in files.where.items()):
                yield "", row


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


@functools.lru_cache(maxsize=256)
def _content_digest(path: str, stamp: tuple) -> str:
    """Hash of a file's content; `stamp` makes a new file at an old path a new one."""
    digest = hashlib.sha256()
    with readers.reaching(path), readers.as_path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _holdout(task: registry.Task, drawing: Drawing) -> int | None:
    """`holdout_every` as it applies: rows of a task with a validation source are not held out."""
    return None if "validation" in task.sources else drawing.holdout_every


def _of_split(task: registry.Task, drawing: Drawing, numbered: list) -> list:
    every = _holdout(task, drawing)
    if drawing.split == "validation":
        if "validation" in task.sources:
            return numbered
        return [] if every is None else numbered[every - 1 :: every]
    kept = [row for row in numbered if every is None or row[0] % every != every - 1]
    return kept if task.sample is None else _sample(task, kept)


def _sample(task: registry.Task, rows: list) -> list:
    if task.sample > len(rows):
        raise ValueError(
            f"task {task.name!r} samples {task.sample} rows, but its source has {len(rows)}"
        )
    drawn = random.Random(task.seed).sample(range(len(rows)), task.sample)
    return [rows[i] for i in sorted(drawn)]


def _draw(task, drawing: Drawing, ids: list[str], examples: list[dict]):
    amount = drawing.amount
    if amount is None or drawing.split != "train":
        return ids, examples
    if isinstance(amount, float):
        amount = round(amount * len(examples))
    if amount > len(examples):
        raise ValueError(
            f"task {task.name!r}: {amount} rows are asked for, but the train split has "
            f"{len(examples)}; ask for fewer, or None for all"
        )
    rng = random.Random(f"{drawing.seed}/{task.name}")
    kept = sorted(rng.sample(range(len(examples)), amount))
    return [ids[i] for i in kept], [examples[i] for i in kept]


def _converted(
    task: registry.Task, raw: dict, row_id: str, place: str
) -> list[tuple[str, registry.Part]]:
    """(id, part) of each part of a raw row; an example among them is checked.

    Raises `ValueError` naming the row and, where it is in a file, its `place`.
    """
    try:
        return _parts(task, raw, row_id)
    except ValueError as error:
        raise ValueError(f"{error} ({place})" if place else str(error)) from error


def _parts(task: registry.Task, raw: dict, row_id: str) -> list[tuple[str, registry.Part]]:
    try:
        converted = task.convert(raw)
    except ValueError as error:
        raise ValueError(f"row {row_id}: {error}") from error
    if not isinstance(converted, list):
        parts = [(row_id, converted)]
    elif converted:
        parts = [(f"{row_id}.{index}", part) for index, part in enumerate(converted)]
    else:
        raise ValueError(f"row {row_id}: converted to nothing; expected an example or a reason")
    for part_id, part in parts:
        if not isinstance(part, registry.Dropped):
            _check_example(task, part, part_id)
    return parts


def _check_example(task: registry.Task, example, row_id: str) -> None:
    keys = KEYS[task.kind]
    if not isinstance(example, dict) or set(example) - {"about"} != set(keys):
        found = sorted(example) if isinstance(example, dict) else type(example).__name__
        raise ValueError(f"row {row_id}: converted to {found}; expected {sorted(keys)}")
    for key in keys:
        check_messages(example[key], row_id)
    about = example.get("about", {})
    if not isinstance(about, dict) or not all(
        isinstance(v, str | int | float) for v in about.values()
    ):
        raise ValueError(f"row {row_id}: about is {about!r}; expected texts and numbers by name")
    if task.kind == "sft":
        return
    for side in ("chosen", "rejected"):
        if example[side][-1]["role"] != "assistant":
            raise ValueError(
                f"row {row_id}: {side} ends with role {example[side][-1]['role']!r}; "
                "expected 'assistant'"
            )
    if example["chosen"][:-1] != example["rejected"][:-1]:
        raise ValueError(f"row {row_id}: the sides differ before their last message")


def _reason_to_drop(task: registry.Task, part: registry.Part, seen: set) -> str | None:
    if isinstance(part, registry.Dropped):
        return part.reason
    reason = next((f.name for f in task.filters if not f.keep(part)), None)
    if reason is None and task.kind == "preference":
        reason = _pair_reason(part, seen)
    return reason


def _pair_reason(pair: dict, seen: set) -> str | None:
    """Pairs that say nothing new: an empty side, sides equal up to outer whitespace, and a pair
    (prompt, chosen and rejected) that the task has had before. `seen` gets the pair's hash."""
    chosen, rejected = (pair[side][-1]["content"].strip() for side in ("chosen", "rejected"))
    if not chosen or not rejected:
        return "empty side"
    if chosen == rejected:
        return "identical sides"
    content = json.dumps([pair[side] for side in KEYS["preference"]], sort_keys=True)
    key = hashlib.sha256(content.encode()).digest()
    if key in seen:
        return "duplicate pair"
    seen.add(key)
    return None
