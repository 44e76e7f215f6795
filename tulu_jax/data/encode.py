"""The encode cache: each task's split is tokenized once and kept as Arrow.

It is keyed by all that its content depends on: raw rows, code, tokenizer, template, length, rule.

`cache_dir/<fingerprint>/` holds the files of `cache_files`: shards of every converted row with its
outcome (the rows that are left out have no ids), what was dropped, and why, and, written last, the
manifest: a folder without it is unfinished. Shards appear whole, so a killed encoding goes on with
those that are missing. `cache_dir` may be a bucket.
"""

import concurrent.futures
import contextlib
import dataclasses
import gc
import hashlib
import json

import numpy as np
from absl import logging

from tulu_jax import strict_json, validation
from tulu_jax.data import cache_files, registry, truncation
from tulu_jax.data import chat as chat_lib
from tulu_jax.data import examples as examples_lib
from tulu_jax.data.sources import readers

FORMAT = 5  # of the cached files; raised when their meaning changes
SIDES = {"sft": ("ids",), "preference": ("chosen", "rejected")}
SHARD_ROWS = 4096
NOTHING = chat_lib.TokenIds(ids=np.zeros(0, np.int32), spans=np.zeros((0, 2), np.int32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """How rows become ids: tokenizer, template, and the rule of `truncation` for those of more than
    `max_length` tokens after the shift. With `one_row`, both sides of a pair with their prompt once
    must fit in `max_length`."""

    tokenizer: chat_lib.ChatTokenizer
    chat: str
    max_length: int
    truncation: str
    one_row: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskCounts:
    """Where the rows of one task and split went:
    `raw_rows + added_parts == examples + not_drawn + sum(dropped.values())`. `cut` of the examples
    were cut; `added_parts` counts what rows gave beyond one example each.

    Tokens are counted after the shift and the cut; of a pair, both sides. `found` examples before
    any was dropped stand against `expected`. `repeated_ids` as in `TaskExamples`.
    """

    task: str
    raw_rows: int
    added_parts: int
    not_drawn: int
    dropped: dict[str, int]
    cut: int
    examples: int
    tokens: int
    trained_tokens: int
    found: int
    repeated_ids: int
    expected: int | None


@contextlib.contextmanager
def _without_collector():
    """Rows and ids have no cycles, and make the collector search all that is loaded: a fifth of the
    time of encoding."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_without_collector()
def encode_task(
    task: registry.Task, drawing: examples_lib.Drawing, *, encoding: Encoding, cache_dir: str
):
    """The cached folder of one task and split, encoded now unless it is there, and its counts.

    The folder is a `pathlib.Path`, or an `epath.Path` in a bucket. Raises `OSError` that says how
    to go on if the disk fills, or if the bucket cannot be written; what was written is kept. And
    `UsageError` for a folder that is not as it was written, and for a row with an id that is not
    below the tokenizer's `vocab_size`.
    """
    label = f"{task.name} {drawing.split}"
    fingerprint = _fingerprint(examples_lib.source_digest(task, drawing), encoding)
    folder = readers.as_path(cache_dir) / fingerprint
    if not cache_files.is_finished(folder):
        _say_why(task, drawing, folder, encoding)
        loaded = examples_lib.load_examples(task, drawing)
        try:
            if "://" not in cache_dir:  # it would make a bucket where there is none of that name
                folder.mkdir(parents=True, exist_ok=True)
            shards, columns = _encode(task, loaded, encoding, folder, label=label)
            aside = loaded.aside + columns.pop("aside")
            lines = "".join(strict_json.dumps(entry) + "\n" for entry in aside)
            counts = _counts(task, loaded, columns)
            cache_files.finish(folder, shards, aside=lines.encode(), counts=counts)
        except OSError as error:
            raise OSError(
                f"{label}: could not be written to {folder} ({error}). What is whole there is "
                "kept: free some space, or set cache_dir to a larger disk, and start again"
            ) from error
    else:
        logging.info("%s: encoded before, in %s", label, folder)
    listing = cache_files.listing(folder)
    expected = task.expected if drawing.split == "train" else None
    return folder, TaskCounts(**listing.counts, expected=expected)


def _fingerprint(source_digest: str, encoding: Encoding) -> str:
    rules = [encoding.chat, encoding.max_length, encoding.truncation, encoding.one_row, SHARD_ROWS]
    parts = [FORMAT, source_digest, encoding.tokenizer.fingerprint, rules]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _encode(task, loaded, encoding, folder, *, label: str):
    """Writes the missing shards; all of them, and over all rows outcome and numbers of tokens."""
    import tqdm

    total = len(loaded.examples)
    starts = range(0, total, SHARD_ROWS)
    columns = {"outcome": [], "tokens": [], "trained_tokens": [], "aside": []}
    there, shards = cache_files.written(folder), []

    def shard(start: int):
        number = start // SHARD_ROWS
        for file in there.get(f"{number:05d}", ()):
            if found := cache_files.reopened(file):
                return found
            logging.warning("%s is damaged; its rows are encoded again", file)
        indices = range(start, min(start + SHARD_ROWS, total))
        table = _encode_rows(task, loaded, encoding, indices)
        return cache_files.write_shard(folder, number, table), table

    # Two threads: ids of one shard are laid out while those of the next are made, without the GIL.
    bar = tqdm.tqdm(total=total, desc=f"encoding {label}", unit="row", disable=not total)
    with bar, concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(shard, start) for start in starts]
        try:
            for future in futures:
                written, table = future.result()
                shards.append(written)
                for name in ("outcome", "tokens", "trained_tokens"):
                    columns[name].append(table[name].to_numpy())
                columns["aside"] += _left_out(table)
                bar.update(min(SHARD_ROWS, total - bar.n))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return shards, columns


def _left_out(table) -> list[dict]:
    outcomes = table["outcome"].to_numpy()
    ids = table["id"]
    return [
        {"id": ids[int(row)].as_py(), "reason": truncation.REASONS[int(outcomes[row])]}
        for row in np.flatnonzero(outcomes > truncation.CUT)
    ]


def _encode_rows(task, loaded, encoding: Encoding, indices: range):
    """The Arrow table of these examples: id, outcome, tokens, trained_tokens, about, and for each
    side its ids and the trained ranges of its targets."""
    import pyarrow as pa

    rows = [loaded.examples[i] for i in indices]
    names = [loaded.ids[i] for i in indices]
    options = {"tokenizer": encoding.tokenizer, "chat": encoding.chat}
    if task.kind == "sft":
        whole = [
            (ids,)
            for ids in chat_lib.tokenize([r["messages"] for r in rows], names=names, **options)
        ]
        if encoding.truncation == "split":
            rows, names, whole = split(rows, names, whole, encoding.max_length, options)
    else:
        whole = chat_lib.tokenize_pairs(rows, names=names, **options)
    fitted = [
        truncation.fit(
            parts,
            max_length=encoding.max_length,
            rule=encoding.truncation,
            one_row=encoding.one_row,
        )
        for parts in whole
    ]
    sides = SIDES[task.kind]
    kept = [parts or [NOTHING] * len(sides) for _, parts in fitted]
    _require_known(names, kept, encoding.tokenizer)
    width = np.uint16 if encoding.tokenizer.vocab_size <= 1 << 16 else np.int32
    counted = {
        "tokens": [sum(max(len(p.ids) - 1, 0) for p in parts) for parts in kept],
        "trained_tokens": [sum(truncation.trained(p) for p in parts) for parts in kept],
    }
    columns = {
        "id": pa.array(names, pa.string()),
        "outcome": pa.array([outcome for outcome, _ in fitted], pa.uint8()),
        "about": pa.array([json.dumps(row.get("about", {})) for row in rows], pa.string()),
    }
    columns |= {name: pa.array(values, pa.int32()) for name, values in counted.items()}
    for number, side in enumerate(sides):
        columns[side] = _lists([parts[number].ids.astype(width) for parts in kept])
        columns[f"{side}_spans"] = _lists([parts[number].spans.reshape(-1) for parts in kept])
    return pa.table(columns)


def _require_known(names, kept, tokenizer: chat_lib.ChatTokenizer) -> None:
    """Raises `UsageError` that names the first row with an id beyond the vocabulary."""
    every = [part.ids for parts in kept for part in parts]
    if np.concatenate(every).max(initial=-1) < tokenizer.vocab_size:
        return
    for name, parts in zip(names, kept, strict=True):
        largest = max(int(part.ids.max(initial=-1)) for part in parts)
        if largest >= tokenizer.vocab_size:
            raise validation.UsageError(
                f"row {name}: found the token id {largest}, expected ids below "
                f"{tokenizer.vocab_size}, the size of the tokenizer {tokenizer.source}; mend the "
                "ids of its added tokens"
            )


def split(rows, names, whole, max_length: int, options: dict):
    """(rows, names, sides) with each conversation that is too long split between its exchanges.

    Exchanges go together while they fit; one that is too long by itself is cut on the right.
    """
    result = []
    for row, name, (ids,) in zip(rows, names, whole, strict=True):
        if len(ids.ids) - 1 <= max_length:
            result.append((row, name, (ids,)))
            continue
        exchanges = truncation.exchanges(row["messages"])
        if len(exchanges) == 1:
            result.append((row, f"{name}.0", (ids,)))
            continue
        alone = chat_lib.tokenize(exchanges, names=[name] * len(exchanges), **options)
        chunks, room = [], -1
        for exchange, encoded in zip(exchanges, alone, strict=True):
            room -= len(encoded.ids)  # with its BOS, thus never less than within the chunk
            if room < 0:
                chunks.append([])
                room = max_length - len(encoded.ids)
            chunks[-1] += exchange
        encoded = chat_lib.tokenize(chunks, names=[name] * len(chunks), **options)
        result += [
            ({**row, "messages": chunk}, f"{name}.{index}", (ids,))
            for index, (chunk, ids) in enumerate(zip(chunks, encoded, strict=True))
        ]
    return tuple(map(list, zip(*result, strict=True)))


def _lists(arrays: list[np.ndarray]):
    import pyarrow as pa

    offsets = np.cumsum([0] + [len(array) for array in arrays])
    return pa.LargeListArray.from_arrays(offsets.astype(np.int64), np.concatenate(arrays))


def _say_why(task, drawing, folder, encoding: Encoding) -> None:
    """Logs, where this task was encoded before under other conditions, that it is done again."""
    if folder.exists():
        logging.info("%s %s: going on in %s", task.name, drawing.split, folder)
    else:
        logging.info(
            "%s %s: no cache for these rows with tokenizer %s, chat %r, max_length %d; encoding",
            *(task.name, drawing.split, encoding.tokenizer.source, encoding.chat),
            encoding.max_length,
        )


def _counts(task, loaded, columns: dict) -> dict:
    outcomes, tokens, trained = (
        np.concatenate([np.zeros(0, np.int64), *columns[name]])
        for name in ("outcome", "tokens", "trained_tokens")
    )
    dropped = dict(loaded.dropped)
    for code, reason in truncation.REASONS.items():
        if (outcomes == code).any():
            dropped[reason] = int((outcomes == code).sum())
    return {
        "task": task.name,
        "raw_rows": loaded.raw_rows,
        "added_parts": loaded.added_parts + len(outcomes) - len(loaded.examples),
        "not_drawn": loaded.not_drawn,
        "dropped": dropped,
        "cut": int((outcomes == truncation.CUT).sum()),
        "examples": int((outcomes <= truncation.CUT).sum()),
        "tokens": int(tokens.sum()),
        "trained_tokens": int(trained.sum()),
        "found": loaded.found,
        "repeated_ids": loaded.repeated_ids,
    }
