"""Planned rows as a person can read them: what a batch holds, with the text it stands for.

Ids, trained targets and positions are the row's own. The text comes from the raw rows, read and
encoded again: a row that holds other ids than they give is an error, and what they have beyond the
row is what truncation cut.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from tulu_jax.audit import pieces
from tulu_jax.data import chat as chat_lib
from tulu_jax.data import encode, loader, registry
from tulu_jax.data import examples as examples_lib

SIDES = ("chosen", "rejected")
AGAIN = "start again, and what has changed is encoded again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Text and the ids that it became, the first of them at `position`.

    `kind` is that of `pieces.Token`, or "cut" for what truncation removed. The text is "" for the
    first bytes of a character whose others were cut, and there are no ids for lost text.
    """

    text: str
    ids: tuple[int, ...]
    kind: str
    trained: bool
    position: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a row: a conversation (`name` ""), or the "prompt", "chosen" or "rejected" of a
    pair. Its `tokens` lie at positions `first` to `last`; `cut` tokens came after them."""

    name: str
    first: int
    last: int
    tokens: int
    trained: int
    cut: int
    pieces: tuple[Piece, ...]

    def __str__(self) -> str:
        words = [self.name, f"positions {self.first:,}–{self.last:,}"]
        words += [share(self.trained, self.tokens), f"{self.cut:,} tokens cut" * bool(self.cut)]
        return " · ".join(filter(None, words))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """One example of a row, by its id, "task/rownumber"."""

    number: int
    example: str
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownRow:
    """Row `index`, with `tokens` of `capacity` positions used, of both halves of a pair of rows.

    `epoch` is None for a row of the validation split, which has one order. `runs` are the positions
    in order, as (segment, branch, trained, length); segment 0 is padding.
    """

    index: int
    epoch: int | None
    capacity: int
    tokens: int
    trained: int
    segments: tuple[Segment, ...]
    runs: tuple[tuple[int, int, bool, int], ...]

    def __str__(self) -> str:
        epoch = "" if self.epoch is None else f" (epoch {self.epoch})"
        return (
            f"row {self.index:,}{epoch} · {self.tokens:,} of {self.capacity:,} positions used, "
            f"{self.capacity - self.tokens:,} padding · {share(self.trained, self.tokens)}"
        )


def share(trained: int, tokens: int) -> str:
    """`'12 of 48 trained (25.0%)'`."""
    return f"{trained:,} of {tokens:,} trained ({trained / max(tokens, 1):.1%})"


def facts(rows: loader.Rows, *, split: str) -> dict[str, str]:
    """What the rows are of, by name, for the head of a listing."""
    config, stats = rows.config, rows.stats
    wanted = config.validation if split == "validation" and config.validation else config.train
    return {
        "data": f"{registry.name_of(wanted)}, {split} split",
        "examples": f"{rows.num_examples:,} · {share(rows.num_trained_tokens, rows.num_tokens)}",
        "rows": f"{rows.rows_per_epoch:,} of {stats.positions_per_row:,} positions, "
        f"{stats.packing_efficiency:.1%} used",
        "chat": f"{config.chat}, packing {config.packing}, truncation {config.truncation}",
        "tokenizer": config.tokenizer,
    }


def problems(rows: loader.Rows | None, *, first: int, split: str) -> Iterator[str]:
    """Why rows from `first` on cannot be shown, if so."""
    if rows is None:
        yield f"there is no {split} split to show"
    elif split == "validation" and first >= rows.rows_per_epoch:
        yield f"row {first} of the {split} split; it has rows 0 to {rows.rows_per_epoch - 1}"


def shown_rows(rows: loader.Rows, *, first: int, count: int, split: str) -> Iterator[ShownRow]:
    """Yields planned rows of the train split, epoch after epoch, or rows of the fixed order of the
    validation split, to its end at most.

    Raises `ValueError` for one that does not hold what its raw rows encode to.
    """
    is_train, source = split == "train", _Source(rows.config, split)
    last = first + count if is_train else min(first + count, rows.rows_per_epoch)
    for index in range(first, last):
        yield _shown(rows, index, source, is_train=is_train)


class _Source:
    """Tokens with their texts, by example; the raw rows of a task are read when first asked for."""

    def __init__(self, config: loader.DataConfig, split: str):
        self._config, self._split = config, split
        self._options = {
            "tokenizer": chat_lib.load_tokenizer(config.tokenizer),
            "chat": config.chat,
        }
        self._components = loader.split_components(config, split)
        self._examples: dict[int, dict[str, dict]] = {}

    def sides(self, task: int, name: str) -> list[list[pieces.Token]]:
        """The tokens of a conversation, or of both sides of a pair, before any cut."""
        example = self._example(task, name)
        sides = (
            [example["messages"]]
            if "messages" in example
            else [example["prompt"] + example[side] for side in SIDES]
        )
        return [pieces.tokens(messages, **self._options) for messages in sides]

    def _example(self, task: int, name: str) -> dict:
        if task not in self._examples:
            component = self._components[task]
            drawing = self._config.drawing(component, self._split)
            loaded = examples_lib.load_examples(component.task, drawing)
            self._examples[task] = dict(zip(loaded.ids, loaded.examples, strict=True))
        known = self._examples[task]
        whole = name.rpartition(".")[0]
        if name in known:
            return known[name]
        if self._config.truncation == "split" and whole in known:
            return self._chunk(known, whole, name)
        raise ValueError(f"row {name}: its raw row is no longer there; {AGAIN}")

    def _chunk(self, known: dict[str, dict], whole: str, name: str) -> dict:
        """The part of an example that the truncation rule "split" made of it."""
        ids = chat_lib.tokenize([known[whole]["messages"]], names=[whole], **self._options)
        chunks, names, _ = encode.split(
            [known[whole]], [whole], [tuple(ids)], self._config.max_length, self._options
        )
        return chunks[names.index(name)]


def _shown(rows: loader.Rows, index: int, source: _Source, *, is_train: bool) -> ShownRow:
    row = rows.row(index) if is_train else rows.in_order(index)
    examples = rows.examples(index) if is_train else rows.examples_in_order(index)
    segments = []
    for number, example in enumerate(examples.tolist(), 1):
        name = rows.store.name(example)
        sides = source.sides(int(rows.store.task_of[example]), name)
        parts = _parts(_shifted(row) if rows.config.to_ends else row, number, sides, name)
        segments.append(Segment(number=number, example=name, parts=tuple(parts)))
    return ShownRow(
        index=index,
        epoch=index // rows.rows_per_epoch if is_train else None,
        capacity=row["tokens"].size,
        tokens=int((row["segment_ids"] > 0).sum()),
        trained=int(row["loss_mask"].sum()),
        segments=tuple(segments),
        runs=_runs(row),
    )


def _shifted(row: loader.Batch) -> loader.Batch:
    """A row of the loader's `to_ends` as what predicts: each token has the next one of its part as
    target, and an answer begins with the prompt's last token."""
    halves = [row] if row["tokens"].ndim == 1 else [_half(row, half) for half in range(2)]
    made = []
    for half in halves:
        examples, branches = half["segment_ids"], half.get("branches", 0 * half["segment_ids"])
        stretches = []
        for number in range(1, examples.max(initial=0) + 1):
            (prompt,) = np.nonzero((examples == number) & (branches == 0))
            stretches.append(prompt)
            for branch in range(1, branches.max(initial=0) + 1):
                (answer,) = np.nonzero((examples == number) & (branches == branch))
                stretches.append(np.concatenate([prompt[-1:], answer]))
        inputs = np.concatenate([places[:-1] for places in stretches])
        targets = np.concatenate([places[1:] for places in stretches])
        new = {key: half[key][inputs] for key in ("tokens", "segment_ids", "positions")}
        new |= {key: half[key][targets] for key in ("targets", "loss_mask")}
        made.append(new | ({"branches": branches[targets]} if "branches" in half else {}))
    if len(made) == 1:
        return made[0]
    size = max(len(new["tokens"]) for new in made)
    padded = [
        {key: np.pad(value, (0, size - len(value))) for key, value in new.items()} for new in made
    ]
    return {key: np.stack([new[key] for new in padded]) for key in padded[0]}


def _parts(row: loader.Batch, number: int, sides: list, name: str) -> Iterator[Part]:
    """The parts of one segment: the conversation; both sides, each after its prompt; or the
    prompt, once, and both answers."""
    if "branches" in row:
        prompt, *answers = (
            _Stretch(row, (row["segment_ids"] == number) & (row["branches"] == branch), name)
            for branch in range(3)
        )
        shared = len(prompt.targets) + 1
        for side, answer, tokens in zip(SIDES, answers, sides, strict=True):
            if answer.start != prompt.targets[-1]:
                raise ValueError(f"row {name}: {side} does not go on from the prompt's last token")
            kept = [prompt.start, *prompt.targets, *answer.targets]
            before, behind = _divided(tokens, kept, shared, name)
            if side == SIDES[0]:
                yield _part("prompt", prompt, before, [False, *prompt.trained], first=0)
            yield _part(side, answer, behind, answer.trained, first=shared)
        return
    halves = [row] if row["tokens"].ndim == 1 else [_half(row, half) for half in range(2)]
    names = ("",) if len(halves) == 1 else SIDES
    for side, half, tokens in zip(names, halves, sides, strict=True):
        stretch = _Stretch(half, half["segment_ids"] == number, name)
        _, whole = _divided(tokens, [stretch.start, *stretch.targets], 0, name)
        yield _part(side, stretch, whole, [False, *stretch.trained], first=0)


class _Stretch:
    """Positions of a row that belong together: the first token, and the targets of all.

    Raises `ValueError` unless they are one run whose tokens are the targets before them.
    """

    def __init__(self, row: loader.Batch, belongs: np.ndarray, name: str):
        (places,) = np.nonzero(belongs)
        tokens, targets, positions = (row[k][places] for k in ("tokens", "targets", "positions"))
        steps = np.diff(np.stack([places, positions]))
        if not (steps == 1).all() or not np.array_equal(tokens[1:], targets[:-1]):
            raise ValueError(f"row {name}: its tokens are not one run of a shifted conversation")
        self.start, self.targets = int(tokens[0]), targets.tolist()
        self.trained = row["loss_mask"][places].tolist()
        self.first, self.last = int(positions[0]), int(positions[-1])


def _half(row: loader.Batch, half: int) -> loader.Batch:
    return {key: value[half] for key, value in row.items() if value.ndim == 2}


def _divided(tokens: list[pieces.Token], kept: list[int], at: int, name: str):
    """The tokens up to the `at`-th id, and those from it on. Raises unless `kept` comes first."""
    places = [place for place, token in enumerate(tokens) if token.id is not None]
    whole = [tokens[place].id for place in places]
    if whole[: len(kept)] != kept:
        raise ValueError(
            f"row {name}: it holds {len(kept)} ids that are not the first of the {len(whole)} that "
            f"its raw row encodes to now; {AGAIN}"
        )
    return tokens[: places[at]], tokens[places[at] :]


def _part(name: str, stretch: _Stretch, tokens: list[pieces.Token], trained, *, first: int) -> Part:
    """The part that `tokens` make; the first of them is id `first` of its conversation, and those
    after `trained` are cut."""
    made = _pieces(tokens, trained, first)
    return Part(
        name=name,
        first=stretch.first,
        last=stretch.last,
        tokens=len(stretch.targets),
        trained=sum(stretch.trained),
        cut=sum(len(piece.ids) for piece in made if piece.kind == "cut"),
        pieces=tuple(made),
    )


def _pieces(tokens: list[pieces.Token], trained: Sequence[bool], first: int) -> list[Piece]:
    """Tokens, with those that are bytes of one character joined unless the cut parts them."""
    result, ids, number = [], [], 0
    for place, token in enumerate(tokens):
        if token.id is not None:
            ids.append(token.id)
            number += 1
        unfinished = token.text == "" and place + 1 < len(tokens) and number != len(trained)
        if unfinished:
            continue
        is_cut = number > len(trained)
        result.append(
            Piece(
                text=token.text,
                ids=tuple(ids),
                kind="cut" if is_cut else token.kind,
                trained=bool(ids) and not is_cut and trained[number - 1],
                position=first + number - len(ids),
            )
        )
        ids = []
    return result


def _runs(row: loader.Batch) -> tuple[tuple[int, int, bool, int], ...]:
    segments = row["segment_ids"].reshape(-1)
    branches = row.get("branches")
    if branches is None:  # of two rows, 0 is the chosen side and 1 the rejected one
        branches = np.indices(np.atleast_2d(row["tokens"]).shape)[0].reshape(-1)
    keys = np.stack([segments, branches * (segments > 0), row["loss_mask"].reshape(-1)])
    starts = np.flatnonzero(np.diff(keys, prepend=-1).any(axis=0))
    lengths = np.diff(starts, append=segments.size)
    return tuple(
        (int(segment), int(branch), bool(trained), int(length))
        for (segment, branch, trained), length in zip(keys[:, starts].T, lengths, strict=True)
    )
