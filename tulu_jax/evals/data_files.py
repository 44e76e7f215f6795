"""The data of benchmarks, in the layouts in which it is published, checked against what is upstream.

`upstream_files.tsv` has every file with its checksum. Of MMLU and of some parts of TyDiQA no whole
upstream copy was at hand when it was made: there only the rows are known and counted. Checksums
are of contents: that of a `.gz` is of what is in it, since packing it anew changes its bytes.
"""

import concurrent.futures
import csv
import dataclasses
import functools
import gzip
import hashlib
import importlib.resources
import io
import zlib
from collections.abc import Callable
from typing import Any

from etils import epath

from tulu_jax import strict_json, validation
from tulu_jax.data.sources import readers

READERS = 8  # files of a bucket that are read at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upstream:
    """A file as it is upstream: its path below the folder of the data, the sha256 of its content
    and its rows, each None where it is not known, and whose it is."""

    path: str
    sha256: str | None
    rows: int | None
    origin: str

    def __str__(self) -> str:
        facts = [f"sha256 {self.sha256}"] if self.sha256 else []
        facts += [f"{self.rows:,} rows"] if self.rows else []
        return f"{', '.join(facts)}: {self.origin}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """The content of each file that is there, by its path below the folder, and in a line each what
    is missing or not as upstream, for whoever shows a score."""

    content: dict[str, Any]
    notes: tuple[str, ...]


@functools.cache
def upstream(name: str) -> tuple[Upstream, ...]:
    """The files of a benchmark, or of 'tydiqa_languages', in the order of the table."""
    table = importlib.resources.files("tulu_jax.evals") / "upstream_files.tsv"
    lines = [line for line in table.read_text("utf-8").splitlines() if not line.startswith("#")]
    return tuple(
        Upstream(
            path=row["path"],
            sha256=None if row["sha256"] == "-" else row["sha256"],
            rows=None if row["rows"] == "-" else int(row["rows"]),
            origin=row["origin"],
        )
        for row in csv.DictReader(lines, delimiter="\t")
        if row["set"] == name
    )


def load(folder: epath.Path, benchmark: str, *, allow_altered: bool) -> Files:
    """What a benchmark reads, below `folder`, a local one or one in a bucket.

    TyDiQA is two files, as upstream, or one of each language, if any of these is there and the two
    are not. Raises one `UsageError` that names all files that cannot be read, are missing, or are
    not as upstream; with `allow_altered` the last two are notes, unless nothing is there.
    """
    folder = epath.Path(folder)
    wanted = upstream(benchmark)
    with validation.reading(), readers.reaching(str(folder)):
        if benchmark == "tydiqa" and not any((folder / file.path).exists() for file in wanted):
            languages = upstream("tydiqa_languages")
            if any((folder / file.path).exists() for file in languages):
                wanted = languages
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(lambda file: _read(folder, file, benchmark), wanted))
    broken = [f"{folder / f.path}: {r.broken}" for f, r in zip(wanted, found, strict=True) if r.broken]
    altered = [f"{f.path}: {r.altered}" for f, r in zip(wanted, found, strict=True) if r.altered]
    content = {f.path: r.content for f, r in zip(wanted, found, strict=True) if r.content is not None}
    if broken or (altered and not (allow_altered and content)):
        problems = broken + [f"{folder}/{line}" for line in altered]
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        advice = (
            "Place the files that are named, or give the folder that has them"
            + (", or mend them" if broken else "")
            + ("." if allow_altered else "; allow_altered takes what is there, and says so.")
        )
        noun = "problem" if len(problems) == 1 else "problems"
        raise validation.UsageError(
            f"{len(problems)} {noun} with the data of {benchmark}:\n{lines}\n{advice}"
        )
    return Files(content=content, notes=tuple(altered))


def notes(folder: epath.Path, benchmark: str) -> tuple[str, ...]:
    """What of a benchmark's data is missing or not as upstream, for the table of its scores."""
    return load(folder, benchmark, allow_altered=True).notes


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
    content: Any = None
    altered: str | None = None  # also: missing
    broken: str | None = None


def _read(folder: epath.Path, expected: Upstream, benchmark: str) -> _Found:
    path = folder / expected.path
    try:
        if said := validation.unreadable(path):
            return _Found(broken=said)
        raw = path.read_bytes()
    except FileNotFoundError:
        return _Found(altered=f"missing; expected the file with {expected}")
    if said := validation.stand_in(raw[: validation.HEAD]):
        return _Found(broken=said)
    try:
        if path.name.endswith(".gz"):
            raw = gzip.decompress(raw)
        text = _text(raw)
        content = _PARSERS[benchmark, _suffix(path.name)](text)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return _Found(broken=f"found no whole gzip file ({error}); download it again")
    except ValueError as error:
        return _Found(broken=str(error))
    digest = hashlib.sha256(raw).hexdigest()
    if expected.sha256 is not None:
        altered = f"found sha256 {digest}" if digest != expected.sha256 else None
    else:
        altered = f"found {len(content):,} rows" if len(content) != expected.rows else None
    return _Found(content=content, altered=altered and f"{altered}; expected {expected}")


def _suffix(name: str) -> str:
    return name.removesuffix(".gz").rpartition(".")[2]


def _text(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line}: found the byte {raw[error.start]:#04x}, which is not UTF-8; expected "
            "UTF-8; convert the file, or download it again"
        ) from error
    return text.replace("\r\n", "\n")


def _lines(text: str) -> list[str]:
    """As a file gives them, without the newline of each."""
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _table(text: str) -> list[tuple[int, list[str]]]:
    """(number of its last line, cells) of each row that is not empty."""
    reader, rows = csv.reader(io.StringIO(text, newline=""), strict=True), []
    try:
        rows = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: not CSV ({error}); download it again") from error
    return rows


def _questions_with_letters(text: str) -> list[list[str]]:
    """MMLU: question, four options, the right letter; no header."""
    rows = _table(text)
    for line, cells in rows:
        if len(cells) != 6 or cells[5] not in tuple("ABCD"):
            raise ValueError(
                f"line {line}: found {len(cells)} columns, the last {cells[-1][:20]!r}; expected a "
                "question, four options and a letter of A to D, without a header"
            )
    return [cells for _, cells in rows]


def _with_header(*columns: str) -> Callable[[str], list[dict]]:
    def parse(text: str) -> list[dict]:
        rows = _table(text)
        header = rows[0][1] if rows else []
        if missing := [column for column in columns if column not in header]:
            raise ValueError(f"line 1: found the columns {header}; expected {missing} too")
        for line, cells in rows[1:]:
            if len(cells) != len(header):
                raise ValueError(
                    f"line {line}: found {len(cells)} columns; expected {len(header)} as line 1"
                )
        return [dict(zip(header, cells, strict=True)) for _, cells in rows[1:]]

    return parse


def _json_lines(**fields: type) -> Callable[[str], list[dict]]:
    def parse(text: str) -> list[dict]:
        return [
            _checked(_json(line, f"line {number}: "), fields, f"line {number}")
            for number, line in enumerate(_lines(text), 1)
            if line.strip()
        ]

    return parse


def _json_list(*, inside: str | None = None, **fields: type) -> Callable[[str], list[dict]]:
    """Of a JSON list of objects, or of one that is the field `inside` of an object."""

    def parse(text: str) -> list[dict]:
        value = _json(text)
        if inside is not None:
            value = _checked(value, {inside: list}, "the file")[inside]
        if not isinstance(value, list):
            raise ValueError(f"found a JSON {type(value).__name__}; expected a list of objects")
        return [_checked(row, fields, f"row {index}") for index, row in enumerate(value)]

    return parse


def _squad(text: str) -> list[dict]:
    """`id`, `context`, `question` and the texts of `answers` of every question, in order."""
    rows = []
    for number, article in enumerate(_json_list(inside="data", paragraphs=list)(text)):
        where = f"article {number}"
        for paragraph in article["paragraphs"]:
            paragraph = _checked(paragraph, {"context": str, "qas": list}, where)
            for asked in paragraph["qas"]:
                asked = _checked(asked, {"id": str, "question": str, "answers": list}, where)
                answers = [_checked(answer, {"text": str}, where) for answer in asked["answers"]]
                if not answers:
                    raise ValueError(f"{where}: question {asked['id']} has no answer; expected one")
                rows.append(
                    {
                        "id": asked["id"],
                        "context": paragraph["context"],
                        "question": asked["question"],
                        "answers": [answer["text"] for answer in answers],
                    }
                )
    return rows


def _json(text: str, where: str = "") -> Any:
    try:
        return strict_json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}found no JSON ({error}); download the file again") from error


def _checked(row: Any, fields: dict[str, type], where: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found a JSON {type(row).__name__}; expected an object")
    for name, kind in fields.items():
        if not isinstance(row.get(name), kind):
            found = f"{name} = {str(row[name])[:40]!r}" if name in row else f"no {name!r}"
            raise ValueError(f"{where}: found {found}; expected {name!r}, a {kind.__name__}")
    return row


_PARSERS: dict[tuple[str, str], Callable[[str], Any]] = {
    ("mmlu", "csv"): _questions_with_letters,
    ("gsm8k", "jsonl"): _json_lines(question=str, answer=str),
    ("bbh", "json"): _json_list(inside="examples", input=str, target=str),
    ("bbh", "txt"): str,
    ("tydiqa", "json"): _squad,
    ("codex_eval", "jsonl"): _json_lines(task_id=str, prompt=str, test=str, entry_point=str),
    ("truthfulqa", "csv"): _with_header("Category", "Question"),
    ("toxigen", "txt"): _lines,
    ("alpaca_eval", "json"): _json_list(instruction=str, output=str),
    ("mt_bench", "jsonl"): _json_lines(),
}
