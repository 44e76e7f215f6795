"""All result tables of the paper as data, with the cells that contradict the rest of it marked.

The numbers are in `paper_tables.json`: tables 1 to 6 and 8 of arXiv 2311.10702, and what others
said of the same models later. ToxiGen is in percent toxic, and enters an average as 100 - x.
"""

import dataclasses
import functools
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence

from tulu_jax import validation

FILE = "paper_tables.json"
# The columns of an average: TruthfulQA is left out where a model learnt from UltraFeedback.
SEVEN = ("mmlu", "gsm8k", "bbh", "tydiqa", "codex_eval", "alpaca_eval", "toxigen")
AVERAGES = {"average_7": SEVEN, "average_8": (*SEVEN, "truthfulqa")}
LOWER_IS_BETTER = ("toxigen",)
OF_A_MODEL = ("1", "2", "5", "6", "4")  # tables of scores; 3 has differences, 8 has categories

_OF_FILE = {  # a gin file or a released model, without its size
    "sft": "Tulu 2", "dpo": "Tulu 2+DPO", "qlora": "Tulu 2 QLoRA", "sftcode": "Code Tulu 2",
    "sftv1": "Tulu V1 mix", "sftsharegpt": "ShareGPT", "tulu2": "Tulu 2", "tulu2dpo": "Tulu 2+DPO",
    "codetulu2": "Code Tulu 2", "llama2": "Llama-2", "llama2hf": "Llama-2",
    "llama2chat": "Llama-2-Chat", "llama2chathf": "Llama-2-Chat", "codellama": "Code Llama",
    "codellamahf": "Code Llama", "codellamainstruct": "Code Llama Instruct",
    "codellamainstructhf": "Code Llama Instruct", "zephyrbeta": "Zephyr-Beta",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table: names of its columns, and the numbers of each model, None where there is none."""

    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inconsistent:
    """A printed number that another number contradicts; `expected` is what should stand there, None
    where that is not known, and `why` says from what."""

    table: str
    model: str
    column: str
    printed: float
    expected: float | None
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A printed number, where it stands, and whether something contradicts it."""

    value: float
    table: str
    inconsistent: Inconsistent | None


@functools.cache
def _data() -> dict:
    return json.loads(importlib.resources.files("tulu_jax.evals").joinpath(FILE).read_text())


@functools.cache
def tables() -> dict[str, Table]:
    """The tables by their numbers in the paper; those of others by their source."""
    return {
        name: Table(
            title=found["title"],
            columns=tuple(found["columns"]),
            rows={model: tuple(values) for model, values in found["rows"].items()},
        )
        for name, found in _data()["tables"].items()
    }


@functools.cache
def inconsistent() -> tuple[Inconsistent, ...]:
    """All cells that are contradicted."""
    return tuple(Inconsistent(**found) for found in _data()["inconsistent"])


def notes() -> list[str]:
    """What else of the paper does not fit together, in words."""
    return list(_data()["notes"])


def cell(table: str, model: str, column: str) -> Cell | None:
    """One number; None if the table has none for it. Raises `KeyError` for an unknown table."""
    found = tables()[table]
    if model not in found.rows or column not in found.columns:
        return None
    value = found.rows[model][found.columns.index(column)]
    if value is None:
        return None
    marks = [m for m in inconsistent() if (m.table, m.model, m.column) == (table, model, column)]
    return Cell(value=value, table=table, inconsistent=marks[0] if marks else None)


def scores(model: str) -> dict[str, Cell]:
    """The scores of a model by column. Where several tables have one, the first that nothing
    contradicts. Raises `UsageError` for a model that the paper does not have."""
    require(model)
    found: dict[str, Cell] = {}
    for table in OF_A_MODEL:
        for column in tables()[table].columns:
            there = cell(table, model, column)
            if there and (column not in found or (found[column].inconsistent and
                                                  not there.inconsistent)):  # fmt: skip
                found[column] = there
    return found


def later(model: str) -> dict[str, dict[str, float]]:
    """What others said of a model after the paper: by their source, and then by column."""
    others = [name for name in tables() if not name.isdigit()]
    found = {
        name: {c: there.value for c in tables()[name].columns if (there := cell(name, model, c))}
        for name in others
    }
    return {name: values for name, values in found.items() if values}


def models() -> list[str]:
    """The names of all models that have scores."""
    return list(dict.fromkeys(model for name in OF_A_MODEL for model in tables()[name].rows))


def require(model: str) -> str:
    """`model`. Raises `UsageError` with what there is if the paper has no such row."""
    if model not in models():
        raise validation.UsageError(
            f"the paper has no row {model!r}; expected one of {', '.join(map(repr, models()))}"
            f"{validation.nearest(model, models())}"
        )
    return model


def model_of(name: str) -> str | None:
    """The row of a gin file or a released model by its name, such as `dpo_7b.gin` or
    `tulu-2-dpo-7b`; None if the name says nothing.

    >>> model_of("tulu-2-dpo-7b")
    'Tulu 2+DPO 7B'
    """
    name = name.rstrip("/").rpartition("/")[2].removesuffix(".gin").lower()
    size = re.search(r"(?<![0-9a-z])(7|13|34|70)b(?![0-9a-z])", name)
    if size is None:
        return None
    family = re.sub(r"[^0-9a-z]", "", name[: size.start()] + name[size.end() :])
    model = f"{_OF_FILE.get(family)} {size[1]}B"
    return model if model in models() else None


def average(values: Mapping[str, float], columns: Sequence[str]) -> float:
    """The paper's average, in percent: the plain mean of the columns, ToxiGen as 100 - x."""
    entered = [100 - values[c] if c in LOWER_IS_BETTER else values[c] for c in columns]
    return sum(entered) / len(entered)
