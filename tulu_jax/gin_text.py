"""Gin files as text: where they lie, and each with what it includes in place."""

import dataclasses
import pathlib
import re

from tulu_jax import validation
from tulu_jax.validation import UsageError

_PACKAGE = pathlib.Path(__file__).resolve().parent
_MOST_BYTES = 1 << 16  # of a file with its includes; ours have less than 4,000
_MOST_INCLUDES = 100
_GONE = {  # of files and saved configs of before
    "pods/": "slices are a table now (tulu_jax/parallel/slices.py): write SLICE = 'v5p_512' in the "
    "complete file instead",
    "recipe.under": "paths lie below recipe.TrainConfig.bucket and loader.DataConfig.bucket now: "
    "set both to %BUCKET, base, tokenizer, data_root and cache_dir to the paths, and remove the "
    "lines of recipe.under",
}


def config_folders() -> list[pathlib.Path]:
    """Where gin files are looked for: here, ./configs, and the configs this package came with."""
    folders = [pathlib.Path.cwd(), pathlib.Path.cwd() / "configs"]
    folders += [_PACKAGE / "configs", _PACKAGE.parent / "configs"]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def find(name: str | None) -> pathlib.Path:
    """The complete gin file `name`. Raises `UsageError` with the nearest known name."""
    known = {
        path.name: path for folder in config_folders()[1:] for path in sorted(folder.glob("*.gin"))
    }
    if not name:
        raise UsageError(f"--gin_file is missing; complete files are {sorted(known)}")
    for folder in config_folders():
        if (folder / validation.expanded(name)).is_file():
            return folder / validation.expanded(name)
    raise UsageError(
        f"--gin_file={name} was not found in {[str(f) for f in config_folders()]}"
        f"{validation.nearest(name, known)}; complete files are {sorted(known)}"
    )


@dataclasses.dataclass
class Line:
    text: str
    origin: str  # "sft.gin, line 3"


def _text(path: pathlib.Path, read: list[int]) -> str:
    """The text of a gin file; its bytes are added to those that were `read` before.

    Raises `UsageError` for what is no text, or too long to be somebody's.
    """
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    read.append(len(content))
    if sum(read) > _MOST_BYTES or len(read) > _MOST_INCLUDES:
        raise UsageError(
            f"found more than {_MOST_BYTES:,} bytes or {_MOST_INCLUDES} includes by {path}; "
            "expected a gin file, which is short; put long lists into a module that it imports"
        )
    try:
        text = content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UsageError(f"{path} is no text in UTF-8; expected a gin file; save it again as text")
    return text


def flatten(
    path: pathlib.Path, within: tuple[pathlib.Path, ...] = (), read: list[int] | None = None
) -> tuple[list[Line], list[str]]:
    """The lines of a file with its includes in their places, and the includes that do not exist.

    gin's own search would take a folder named `models` in the working directory for a package, and
    stop at the first problem of an included file. The file lies `within` those that include it.
    Raises `UsageError` for a file that includes itself, and as `_text`.
    """
    lines, problems, read = [], [], [] if read is None else read
    within = (*within, path.resolve())
    for number, text in enumerate(_text(path, read).split("\n"), 1):
        origin = f"{path.name}, line {number}"
        found = re.fullmatch(r"include\s+(['\"])([^'\"]+)\1\s*(#.*)?", text)
        if not found:
            lines.append(Line(text, origin))
            continue
        wanted = found.group(2)
        places = [folder / wanted for folder in [path.parent, *config_folders()]]
        included = next((place for place in places if place.is_file()), None)
        if included is None:
            known = {str(f.relative_to(d)) for d in config_folders()[1:] for f in d.rglob("*.gin")}
            hint = gone(wanted) or validation.nearest(wanted, known)
            problems.append(f"{origin}: include {wanted!r} was not found{hint}")
            continue
        if included.resolve() in within:
            names = " -> ".join([*(file.name for file in within), included.name])
            raise UsageError(f"{origin}: a file includes itself ({names}); remove this include")
        inner, missing = flatten(included, within, read)
        for line in inner:
            if line.text.startswith("from __gin__"):
                line.text = ""
        lines += inner
        problems += missing
    return lines, problems


def gone(text: str) -> str:
    """What to write instead of what files of before said; nothing for other text."""
    return next((f"; {instead}" for was, instead in _GONE.items() if was in text), "")
