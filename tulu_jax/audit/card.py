"""The mixture card: what a prepared run trains on, in numbers, with audits of pairs and overlaps.

`build` counts, `card_markdown` writes the page, `card_plots` the pictures.
"""

import collections
import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np

from tulu_jax import atomic, strict_json
from tulu_jax.audit import (
    benchmarks,
    card_markdown,
    card_plots,
    contamination,
    preference_audit,
)
from tulu_jax.data import (
    cache_files,
    components,
    encode,
    examples,
    loader,
    packing,
    registry,
    store,
    truncation,
)
from tulu_jax.data import chat as chat_lib
from tulu_jax.data.sources import name_filter, readers

# TÜLU 2 (arXiv 2311.10702) §2 and figure 1; tokens of a row of the V2 mixture.
PAPER_LENGTHS = {"25 %": 230, "75 %": 1_464, "mean": 1_097, "rows": 326_154, "over_2048": 63_900}
PAPER_ROW = 8_192
EXAMPLES_AN_UPDATE = {"sft": 128, "preference": 32}  # of the paper, appendix B
BINS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """`numbers` is `card.json`; `matches` the lines of `contamination.jsonl`, None if not asked."""

    numbers: dict
    matches: list[dict] | None


def build(
    config: loader.DataConfig,
    splits: Mapping[str, "loader.Rows"],
    *,
    batch_size: int,
    prompts: Sequence[benchmarks.Prompt] | None,
) -> Card:
    """The card of prepared splits, "train" among them, and where `prompts` are in its rows.

    Texts are read and converted again where a part of the card needs them: of pairs, for overlaps,
    and of tasks with rows that were cut or were too long.
    """
    rows = splits["train"]
    index = None if prompts is None else contamination.Index(prompts)
    tokenizer = chat_lib.load_tokenizer(config.tokenizer)
    tasks, found, kept, seconds = [], [], [], 0.0
    for split, prepared in splits.items():
        for number, component in enumerate(loader.split_components(config, split)):
            counts, folder = prepared.stats.tasks[number], prepared.folders[number]
            shortened, left_out = _shortened(folder), cache_files.aside(folder)
            needed = shortened or (split == "train" and (index or config.kind == "preference"))
            texts = _texts(config, component, split) if needed else {}
            tasks.append(
                {
                    "split": split,
                    **dataclasses.asdict(counts),
                    **_removed(texts, shortened, left_out, tokenizer, config),
                    "licence": component.task.licence,
                    "origin": component.task.origin,
                    "aside": str(folder / cache_files.ASIDE),
                }
            )
            if split != "train" or not texts:
                continue
            named = [(name, texts[name]) for name in _kept(prepared, number) if name in texts]
            kept += named if config.kind == "preference" else []
            if index:
                start = time.perf_counter()
                found += index.matches(_with_bar(named, component.task.name))
                seconds += time.perf_counter() - start
    numbers = {
        "mixture": registry.name_of(config.train),
        "kind": config.kind,
        "settings": {
            **{name: getattr(config, name) for name in ("tokenizer", "chat", "max_length")},
            **{name: getattr(config, name) for name in ("truncation", "packing", "seed")},
            "batch_size": batch_size,
            "fingerprint": rows.fingerprint,
        },
        "tasks": tasks,
        "lengths": _lengths(rows),
        "packings": _packings(rows),
        "updates": _updates(rows, batch_size),
        "name_filter": _names_found(rows),
        "audit": _audit(rows, kept) if config.kind == "preference" else None,
        "contamination": _overlaps(rows, index, found, seconds) if index else None,
    }
    return Card(numbers=numbers, matches=contamination.listed(index, found) if index else None)


def write(card: Card, folder) -> str:
    """Writes `card.md`, `card.json`, the pictures and `contamination.jsonl`; gives back the page.

    `folder` is a path or a bucket.
    """
    folder = readers.as_path(str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    pictures = card_plots.draw(card.numbers)
    for name, content in pictures.items():
        atomic.write_bytes(folder / name, content)
    page = card_markdown.render(card.numbers, card.matches, pictures=list(pictures))
    atomic.write_text(folder / "card.md", page)
    atomic.write_text(folder / "card.json", strict_json.dumps(card.numbers, indent=2))
    if card.matches is not None:
        lines = "".join(strict_json.dumps(match) + "\n" for match in card.matches)
        atomic.write_text(folder / "contamination.jsonl", lines)
    return page


def _texts(
    config: loader.DataConfig, component: components.Component, split: str
) -> dict[str, dict]:
    loaded = examples.load_examples(component.task, config.drawing(component, split))
    return dict(zip(loaded.ids, loaded.examples, strict=True))


def _with_bar(named: list, label: str):
    import tqdm

    return tqdm.tqdm(named, desc=f"benchmarks in {label}", unit="row", disable=not named)


def _kept(rows: "loader.Rows", task: int) -> list[str]:
    """The ids of the kept examples of one task, of those split into several each once."""
    names = [rows.store.name(int(i)) for i in np.flatnonzero(rows.store.task_of == task)]
    if rows.config.truncation == "split":
        # A part is named after its row, "row.part"; an id of a whole row stays as it is.
        names += [name.rpartition(".")[0] for name in names]
    return list(dict.fromkeys(names))


def _shortened(folder) -> dict[str, int]:
    """Tokens that are kept of each example that was cut, or left out for its length, by id."""
    outcomes = (truncation.CUT, truncation.TOO_LONG, truncation.NO_TURN, truncation.FILLED)
    found = {}
    for shard in cache_files.listing(folder).shards:
        table = cache_files.table(shard)
        for row in np.flatnonzero(np.isin(table["outcome"].to_numpy(), outcomes)):
            found[table["id"][int(row)].as_py()] = table["tokens"][int(row)].as_py()
    return found


def _removed(texts, shortened, left_out, tokenizer, config: loader.DataConfig) -> dict:
    """Tokens that filters took with whole examples, and that `max_length` took; rows that a
    converter left out were never an example and have none."""
    filtered = [entry["example"] for entry in left_out if "example" in entry]
    options = {"tokenizer": tokenizer, "chat": config.chat}
    if config.truncation == "split" and shortened:  # of these, parts were cut: "row.part"
        names = list(dict.fromkeys(name.rpartition(".")[0] for name in shortened))
        rows = [texts[name] for name in names]
        chats = [row["messages"] for row in rows]
        whole = [(ids,) for ids in chat_lib.tokenize(chats, names=names, **options)]
        _, parts, sides = encode.split(rows, names, whole, config.max_length, options)
        lengths = {p: len(ids.ids) - 1 for p, (ids,) in zip(parts, sides, strict=True)}
        over = sum(lengths[name] - kept for name, kept in shortened.items())
    else:
        over = _tokens([texts[name] for name in shortened], options) - sum(shortened.values())
    return {"tokens_filtered": _tokens(filtered, options), "tokens_over_length": over}


def _tokens(rows: list[dict], options: dict) -> int:
    """Tokens of examples after the shift, uncut; of a pair, both sides."""
    chats = [row["messages"] for row in rows if "messages" in row]
    for side in ("chosen", "rejected"):
        chats += [row["prompt"] + row[side] for row in rows if side in row]
    encoded = chat_lib.tokenize(chats, names=["of the card"] * len(chats), **options)
    return sum(len(ids.ids) - 1 for ids in encoded)


def _lengths(rows: "loader.Rows") -> dict:
    """Of a conversation its tokens; of a pair those of each side, thus two values a pair."""
    lengths, task_of = rows.store.lengths, rows.store.task_of
    if rows.kind == "preference":
        sides = [_side_lengths(rows, index) for index in range(len(rows.store))]
        lengths, task_of = np.array(sides).reshape(-1), np.repeat(task_of, 2)
    low, high = max(1, int(lengths.min())), int(lengths.max()) + 1
    edges = np.unique(np.geomspace(low, high, BINS + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    by_task = [
        {"task": task.task, **_quantiles(lengths[task_of == number])}
        for number, task in enumerate(rows.stats.tasks)
        if task.examples
    ]
    return {
        **_quantiles(lengths),
        "over_2048": int((lengths > 2_048).sum()),
        "paper": PAPER_LENGTHS if rows.kind == "sft" else None,
        "by_task": by_task,
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _side_lengths(rows: "loader.Rows", index: int) -> list[int]:
    return [len(ids) - 1 for ids, _ in rows.store.sides(index)]


def _quantiles(lengths: np.ndarray) -> dict:
    quartiles = np.percentile(lengths, (25, 50, 75))
    return {
        "count": len(lengths),
        "mean": float(lengths.mean()),
        **{name: float(q) for name, q in zip(("25 %", "50 %", "75 %"), quartiles, strict=True)},
        "max": int(lengths.max()),
    }


def _packings(rows: "loader.Rows") -> list[dict]:
    """Rows of an epoch and their use, packed and not, and padded as the original trainer did."""
    size = rows.config.max_length
    if rows.kind == "sft":
        lengths = rows.store.lengths
        return [
            _planned("best_fit", lengths, size),
            _planned("none", lengths, size),
            _planned("none, as the original", np.minimum(lengths, PAPER_ROW), PAPER_ROW),
        ]
    branches = store.ExampleStore(rows.folders, kind=rows.kind, one_row=True).lengths
    sides = np.array([_side_lengths(rows, index) for index in range(len(rows.store))])
    return [
        _planned("best_fit: prompt once, answers as branches", branches, size),
        _planned("none: a row for each side", sides.reshape(-1), size),
        _planned("none, as the original", np.minimum(sides.reshape(-1), PAPER_ROW), PAPER_ROW),
    ]


def _planned(name: str, lengths: np.ndarray, size: int) -> dict:
    fitting = lengths[lengths <= size]
    kind = "best_fit" if name.startswith("best_fit") else "none"
    num_rows = packing.ordered_plan(fitting, capacity=size, packing=kind).num_rows
    return {
        "packing": name,
        "row_length": size,
        "rows": num_rows,
        "used": float(fitting.sum() / (num_rows * size)) if num_rows else None,
        "too_long": len(lengths) - len(fitting),
    }


def _updates(rows: "loader.Rows", batch_size: int) -> list[dict]:
    """Examples an update over the planned updates of epoch 0: as configured, and packed with the
    number of rows that gives the paper's number of examples."""
    wanted = EXAMPLES_AN_UPDATE[rows.kind]
    packed = _sizes(rows, "best_fit", _packed_lengths(rows))
    configured = packed
    if rows.config.packing != "best_fit":
        configured = _sizes(rows, rows.config.packing, rows.store.lengths)
    enough = max(1, round(wanted / packed.mean())) if packed.size else 1
    return [
        {"packing": rows.config.packing, **_spread(configured, batch_size, "as configured")},
        {"packing": "best_fit", **_spread(packed, enough, f"for the paper's {wanted}")},
    ]


def _packed_lengths(rows: "loader.Rows") -> np.ndarray:
    """Positions of each example in a packed row; without pairs that were cut for rows of one side
    each, and do not fit."""
    lengths = rows.store.lengths
    if rows.kind == "preference" and not rows.one_row:
        lengths = store.ExampleStore(rows.folders, kind=rows.kind, one_row=True).lengths
    return lengths[lengths <= rows.config.max_length]


def _sizes(rows: "loader.Rows", how: str, lengths: np.ndarray) -> np.ndarray:
    """The number of examples in each planned row of epoch 0."""
    config = rows.config
    plan = packing.epoch_plan(
        lengths, capacity=config.max_length, packing=how, seed=config.seed, epoch=0
    )
    return np.diff(plan.starts)


def _spread(sizes: np.ndarray, rows_an_update: int, why: str) -> dict:
    updates = len(sizes) // rows_an_update
    examples_of = sizes[: updates * rows_an_update].reshape(updates, rows_an_update).sum(1)
    found = {"why": why, "rows": rows_an_update, "updates": updates}
    expected = float(sizes.mean() * rows_an_update) if sizes.size else 0.0
    if not updates:
        return found | {"expected": expected, "std": None, "min": None, "max": None, "all": []}
    return found | {
        "expected": expected,
        "std": float(examples_of.std()),
        "min": int(examples_of.min()),
        "max": int(examples_of.max()),
        "all": examples_of.tolist(),
    }


def _names_found(rows: "loader.Rows") -> dict | None:
    """Rows that the name filter took, by name found; a row counts for each name in it."""
    taken, by_name, alone = 0, collections.Counter(), collections.Counter()
    for folder in rows.folders:
        for entry in cache_files.aside(folder):
            if entry["reason"] == name_filter.NAME_FILTER.name:
                texts = [m["content"].lower() for m in entry["example"]["messages"]]
                names = [n for n in name_filter.NAMES if any(n.lower() in t for t in texts)]
                taken += 1
                by_name.update(names)
                alone.update(names if len(names) == 1 else ())
    if not taken:
        return None
    found = {name: {"rows": by_name[name], "alone": alone[name]} for name in by_name}
    return {"rows": taken, "names": dict(sorted(found.items(), key=lambda kv: -kv[1]["rows"]))}


def _audit(rows: "loader.Rows", kept: list[tuple[str, dict]]) -> dict:
    texts = dict(kept)
    trained = [
        [int((spans[:, 1] - spans[:, 0]).sum()) for _, spans in rows.store.sides(index)]
        for index in range(len(rows.store))
    ]
    ids = [rows.store.name(index) for index in range(len(rows.store))]
    chosen, rejected = np.array(trained, int).reshape(-1, 2).T
    return preference_audit.audit(
        preference_audit.Pairs(
            ids=ids,
            examples=[texts[name] for name in ids],
            chosen_tokens=chosen,
            rejected_tokens=rejected,
        )
    )


def _overlaps(rows, index: contamination.Index, found, seconds: float) -> dict:
    by_task: dict[str, dict[str, set]] = collections.defaultdict(dict)
    for match in found:
        task, benchmark = match.row.rpartition("/")[0], index.prompts[match.prompt].benchmark
        by_task[task].setdefault(benchmark, set()).add(match.row)
    return {
        "rows": len(rows.store),
        "seconds": seconds,
        "rows_with_a_match": len({match.row for match in found}),
        "benchmarks": contamination.summary(index, found),
        "by_task": {
            task: {name: len(ids) for name, ids in names.items()} for task, names in by_task.items()
        },
    }
