"""What a user can get wrong: checks of configuration values, reported together, and how they end.

Every config dataclass calls `check` from `__post_init__`. Alone it raises one `UsageError` that
lists every problem of that object; inside `collect()` the problems of a whole tree of configs are
gathered, so a user sees all of them at once. An entry point runs inside `refusing()`.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import errno
import os
import re
import stat
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping

from absl import logging

_collected: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "collected", default=None
)

Rule = tuple[bool, str]
HEAD = 512  # bytes that `stand_in` needs
MOST = 2**31 - 1  # of a whole number in a config: jax counts steps, rows and ids in int32
MOST_FLOAT = 3.4e38  # of any other: float32 holds no more
REFUSED = 2  # exit status: the run cannot work as it is configured


class UsageError(ValueError):
    """A user can mend this: the message tells what was found, what was expected, what to change."""


class UnreachableError(UsageError, OSError):
    """The service behind a path cannot be reached at all."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# What the system says of a path that somebody named.
_OF_A_PATH = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Around an entry point: what a user can mend becomes its message and exit status 2.

    That is `UsageError`, what the system says of a path, and no room on a disk (`is_full`). All
    else keeps its traceback; `--verbosity=1` shows that of a refusal too.
    """
    try:
        yield
    except Exception as error:
        full = is_full(error) and not isinstance(error, UsageError)
        if not full and not isinstance(error, (UsageError, *_OF_A_PATH)):
            raise
        logging.debug("Refused", exc_info=True)
        said, advice = str(error), ""
        if isinstance(error, OSError) and error.filename is not None:
            said, advice = (
                f"{error.filename}: {error.strerror}",
                "; mend that path, or give another",
            )
        if full:
            advice = "; free some space or raise the quota, or write to another folder"
        said += advice
        print(said, file=sys.stderr)
        raise SystemExit(REFUSED) from error


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that there is no room: a full disk, a quota, a limit
    on the size of files. Libraries in C++ tell the system's words alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        if any(os.strerror(number) in str(error) for number in _NO_ROOM):
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Around what reads a user's files and says by `ValueError` or `OSError` what is wrong in them:
    that becomes a `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def expanded(path: str) -> str:
    """`path` with a leading `~` or `~name` as that home folder, as a shell would have it.

    Raises `UsageError` for a name that is no user's.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UsageError(f"{path}: there is no such home folder; write the whole path")
    return found


@contextlib.contextmanager
def collect() -> Iterator[list[str]]:
    """Gathers the problems of every config built inside, instead of raising at the first."""
    problems: list[str] = []
    token = _collected.set(problems)
    try:
        yield problems
    finally:
        _collected.reset(token)


def raise_if(problems: Iterable[str]) -> None:
    """Raises one `UsageError` that lists `problems`, if there are any."""
    problems = list(problems)
    if problems:
        lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
        noun = "problem" if len(problems) == 1 else "problems"
        raise UsageError(f"{len(problems)} {noun} in the configuration:\n{lines}")


def below(bucket: str | None, path: str) -> str:
    """`bucket/path`. A path that is whole (`/…`, `~/…`, `gs://…`, or `./…` and `../…` for one of
    the working directory) is itself, as is every path without a bucket.

    A leading `~` is expanded and a leading `./` dropped. Raises `UsageError` for what is no path.
    """
    for name, value in (("bucket", bucket), ("path", path)):
        if (name, value) != ("bucket", None) and not (isinstance(value, str) and value):
            raise UsageError(
                f"{name} = {value!r}: expected a path as a string; mend the macro that it is set "
                "to, such as BUCKET, DATA_ROOT or BASE"
            )
    whole = bucket is None or path.startswith(("/", "~", "./", "../")) or "://" in path
    return expanded(path.removeprefix("./") if whole else f"{bucket.rstrip('/')}/{path}")


def check(
    config,
    rules: Callable[[], Iterable[Rule]] = lambda: (),
    *,
    paths: Mapping[str, str | None] = types.MappingProxyType({}),
) -> None:
    """Checks the field types of a dataclass and then `rules`: pairs of (holds, message if not).

    The rules run only if every type is right. The fields `paths` are placed `below` their buckets.
    Raises `UsageError`, or adds to `collect()`.
    """
    problems = _type_problems(config) or _place(config, paths)
    if not problems:
        name = type(config).__name__
        problems = [f"{name}: {message}" for holds, message in rules() if not holds]
    collected = _collected.get()
    if collected is None:
        raise_if(problems)
    else:
        collected.extend(p for p in problems if p not in collected)  # of a config and its copies


def stand_in(head: bytes) -> str | None:
    """What was found, expected and to be done if a file that begins so is not the file itself but
    what a clone or a download may leave in its place: a Git LFS pointer or a web page."""
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d+)", head)
        of_size = f" of {int(size[1]):,} bytes" if size else ""
        return (
            f"found a Git LFS pointer, expected the file{of_size} that it stands for; run `git lfs "
            "pull` in its folder, or download the file itself"
        )
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html)\b", head, re.IGNORECASE):
        return (
            "found a web page, expected a file; download it by the link of its raw content, signed "
            "in where access must be granted"
        )
    return None


def at_most(name: str, value: int | float, most: int) -> Rule:
    """The rule that `value` is not absurd: `most` is more than anybody uses."""
    return value <= most, f"{name} = {value}: expected at most {most:,}"


def unreadable(path) -> str | None:
    """What was found, expected and to be done if `path` is a folder, or a pipe or device, which has
    no end. A bucket has neither. Raises `OSError` if there is nothing."""
    if "://" in str(path) or stat.S_ISREG(mode := os.stat(path).st_mode):
        return None
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
    return f"found {kind}, expected a file; put the file there, or name another"


def one_of(name: str, value: str, allowed: Iterable[str]) -> Rule:
    """The rule that `value` is among `allowed`; names the nearest allowed value."""
    allowed = sorted(allowed)
    return (
        value in allowed,
        f"{name} = {value!r}: expected one of {allowed}{nearest(value, allowed)}",
    )


def nearest(value: str, known: Iterable[str]) -> str:
    """`'; did you mean X?'` for the known name closest to `value`, or nothing."""
    matches = difflib.get_close_matches(value, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _place(config, paths: Mapping[str, str | None]) -> list[str]:
    """Places fields of a frozen dataclass below their buckets; what could not be, each once."""
    problems = {}
    for name, bucket in paths.items():
        value = getattr(config, name)
        if isinstance(value, str):
            try:
                object.__setattr__(config, name, below(bucket, value))
            except UsageError as error:
                problems.setdefault(str(error), f"{type(config).__name__}.{name}: {error}")
    return list(problems.values())


def _type_problems(config) -> list[str]:
    from beartype import BeartypeConf
    from beartype.door import is_bearable

    conf = BeartypeConf(is_pep484_tower=True)  # an int is a float
    problems = []
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        allowed = (hint, *typing.get_args(hint))
        confused = isinstance(value, bool) and bool not in allowed  # True is an int to Python
        if confused or not is_bearable(value, hint, conf=conf):
            name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            problems.append(
                f"{type(config).__name__}.{field.name} = {value!r} is a {type(value).__name__}; "
                f"expected {name}"
            )
        elif isinstance(value, float) and not abs(value) <= MOST_FLOAT:
            problems.append(
                f"{type(config).__name__}.{field.name} = {value}: expected a finite number, "
                "as float32 has it"
            )
        elif isinstance(value, int) and abs(value) > MOST:
            problems.append(
                f"{type(config).__name__}.{field.name} = {value}: expected at most "
                f"{MOST:,}, as int32 has it"
            )
    return problems
