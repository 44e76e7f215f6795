"""The encode cache: each task's split is tokenized once and kept as Arrow.

It is keyed by all that its content depends on: raw rows, code, tokenizer, template, length, rule.

`cache_dir/<fingerprint>/` holds `examples.arrow` (every converted row with its outcome; the rows
that are left out have no ids) and `counts.json`, and appears by a rename when it is whole. A task
that is done stays done when a later one fails.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np
from absl import logging

from tulu_jax.data import chat as chat_lib
from tulu_jax.data import examples as examples_lib
from tulu_jax.data import registry

FORMAT = 1  # of the cached files; raised when their meaning changes
TRUNCATIONS = ("cut", "drop")
WHOLE, CUT, TOO_LONG, UNTRAINED = range(4)
REASONS = {TOO_LONG: "longer than max_length", UNTRAINED: "no trained token"}
SIDES = {"sft": ("ids",), "preference": ("chosen", "rejected")}
BATCH_ROWS = 1000
NOTHING = chat_lib.TokenIds(ids=np.zeros(0, np.int32), spans=np.zeros((0, 2), np.int32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """How rows become ids. `max_length` is in tokens after the shift; longer rows are cut on the
    right (`truncation = "cut"`) or left out (`"drop"`)."""

    tokenizer: chat_lib.ChatTokenizer
    chat: str
    max_length: int
    truncation: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskCounts:
    """Where the rows of one task and split went:
    `raw_rows == examples + not_drawn + sum(dropped.values())`. `cut` of the examples were cut.

    Tokens are counted after the shift and the cut; of a pair, both sides. `expected` is the number
    of raw rows of the published source.
    """

    task: str
    raw_rows: int
    not_drawn: int
    dropped: dict[str, int]
    cut: int
    examples: int
    tokens: int
    trained_tokens: int
    expected: int | None


def encode_task(
    task: registry.Task,
    *,
    split: str,
    rows: int | None,
    seed: int,
    data_root: str | None,
    encoding: Encoding,
    cache_dir: str,
) -> tuple[pathlib.Path, TaskCounts]:
    """The cached folder of one task and split, encoded now unless it is there, and its counts."""
    drawing = {"split": split, "rows": rows, "seed": seed, "data_root": data_root}
    fingerprint = _fingerprint(examples_lib.source_digest(task, **drawing), encoding)
    folder = pathlib.Path(cache_dir) / fingerprint
    if not folder.exists():
        loaded = examples_lib.load_examples(task, **drawing)
        _write(task, loaded, encoding, folder, label=f"{task.name} {split}")
    else:
        logging.info("%s %s: encoded before, in %s", task.name, split, folder)
    counts = json.loads((folder / "counts.json").read_text())
    expected = task.expected if split == "train" else None
    return folder, TaskCounts(**counts, expected=expected)


def _fingerprint(source_digest: str, encoding: Encoding) -> str:
    parts = [
        FORMAT,
        source_digest,
        encoding.tokenizer.fingerprint,
        encoding.chat,
        encoding.max_length,
        encoding.truncation,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _write(
    task: registry.Task,
    loaded: examples_lib.TaskExamples,
    encoding: Encoding,
    folder: pathlib.Path,
    *,
    label: str,
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        columns = _encode_to_arrow(task, loaded, encoding, staging / "examples.arrow", label=label)
        counts = _counts(task, loaded, columns)
        (staging / "counts.json").write_text(json.dumps(counts, indent=2))
        try:
            os.rename(staging, folder)
        except OSError:
            if not folder.exists():  # else another process encoded the same rows first
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _encode_to_arrow(task, loaded, encoding, path: pathlib.Path, *, label: str) -> dict:
    """Writes the rows and returns, per row, its outcome, tokens and trained tokens."""
    import datasets

    if not loaded.examples:
        return {"outcome": [], "tokens": [], "trained_tokens": []}
    width = "uint16" if encoding.tokenizer.vocab_size <= 1 << 16 else "int32"
    features = {"id": datasets.Value("string"), "outcome": datasets.Value("uint8")}
    features |= {name: datasets.Value("int32") for name in ("tokens", "trained_tokens")}
    for side in SIDES[task.kind]:
        features[side] = datasets.List(datasets.Value(width))
        features[f"{side}_spans"] = datasets.List(datasets.Value("int32"))

    def encode_batch(indices):
        return _encode_rows(task, loaded, encoding, indices["index"], np.dtype(width))

    encoded = datasets.Dataset.from_dict({"index": range(len(loaded.examples))}).map(
        encode_batch,
        batched=True,
        batch_size=BATCH_ROWS,
        remove_columns=["index"],
        features=datasets.Features(features),
        cache_file_name=str(path),
        load_from_cache_file=False,
        new_fingerprint=path.parent.name,
        desc=f"encoding {label}",
    )
    return {name: encoded[name][:] for name in ("outcome", "tokens", "trained_tokens")}


def _encode_rows(task, loaded, encoding, indices: list[int], width: np.dtype) -> dict[str, list]:
    rows = [loaded.examples[i] for i in indices]
    names = [loaded.ids[i] for i in indices]
    options = {"tokenizer": encoding.tokenizer, "chat": encoding.chat, "names": names}
    if task.kind == "sft":
        whole = [(ids,) for ids in chat_lib.tokenize([r["messages"] for r in rows], **options)]
    else:
        whole = chat_lib.tokenize_pairs(rows, **options)
    sides = SIDES[task.kind]
    columns = {name: [] for name in ("outcome", "tokens", "trained_tokens")}
    columns |= {f"{side}{suffix}": [] for side in sides for suffix in ("", "_spans")}
    for parts in whole:
        outcome, parts = _fit(parts, encoding)
        columns["outcome"].append(outcome)
        columns["tokens"].append(sum(len(p.ids) - 1 for p in parts))
        columns["trained_tokens"].append(sum(_trained(p) for p in parts))
        for side, part in zip(sides, parts or [NOTHING] * len(sides), strict=True):
            columns[side].append(part.ids.astype(width))
            columns[f"{side}_spans"].append(part.spans.reshape(-1))
    return {"id": names, **columns}


def _fit(parts, encoding: Encoding) -> tuple[int, list[chat_lib.TokenIds]]:
    """Applies the truncation rule to the one or two sides of an example; `[]` if it is left out."""
    limit = encoding.max_length
    outcome = WHOLE
    if any(len(part.ids) - 1 > limit for part in parts):
        if encoding.truncation == "drop":
            return TOO_LONG, []
        outcome = CUT
    parts = [
        chat_lib.TokenIds(
            ids=part.ids[: limit + 1],
            spans=np.minimum(part.spans[part.spans[:, 0] < limit], limit),
        )
        for part in parts
    ]
    if not all(_trained(part) for part in parts):
        return UNTRAINED, []
    return outcome, parts


def _trained(part: chat_lib.TokenIds) -> int:
    return int((part.spans[:, 1] - part.spans[:, 0]).sum())


def _counts(task, loaded, columns: dict) -> dict:
    outcomes = np.array(columns["outcome"], np.int64)
    dropped = dict(loaded.dropped)
    for code, reason in REASONS.items():
        if (outcomes == code).any():
            dropped[reason] = int((outcomes == code).sum())
    return {
        "task": task.name,
        "raw_rows": loaded.raw_rows,
        "not_drawn": loaded.not_drawn,
        "dropped": dropped,
        "cut": int((outcomes == CUT).sum()),
        "examples": int((outcomes <= CUT).sum()),
        "tokens": int(np.sum(columns["tokens"])),
        "trained_tokens": int(np.sum(columns["trained_tokens"])),
    }
