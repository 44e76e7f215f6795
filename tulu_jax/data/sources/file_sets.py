"""What is wrong with the files that one source is read from: a row that is there twice, or missing.

A glob matches more than was meant: another form of a file, a copy, an unfinished download. Which of
them is right, only the user knows.
"""

import collections
import fnmatch
import os
import re
from collections.abc import Iterator, Mapping, Sequence

READABLE = (".jsonl.gz", ".json", ".jsonl", ".tsv", ".parquet")
UNFINISHED = (".crdownload", ".part", ".partial", ".download", ".incomplete", ".tmp", ".aria2")
MAC_FORK = "._"  # what a Mac's archive has beside each file

_COPY = re.compile(r"( - copy| copy( \d+)?|_copy|)( ?\((\d+|[^()]*copy[^()]*)\))?", re.IGNORECASE)
_SHARD = re.compile(r"(?:(.*?)[-_.])?(\d+)[-_]of[-_](\d+)(?:-[0-9a-f]{8,})?")


def is_glob(pattern: str) -> bool:
    return any(sign in pattern.rpartition("/")[2] for sign in "*?[")


def suffix(path: str) -> str:
    """The readable suffix of `path`, ".jsonl.gz" rather than ".gz", or ""."""
    return next((known for known in READABLE if path.endswith(known)), "")


def finished(name: str) -> str:
    """The name that an unfinished download will have."""
    return name.removesuffix(next((end for end in UNFINISHED if name.endswith(end)), ""))


def matched(pattern: str, names: Sequence[str]) -> list[str]:
    """The paths that `pattern`, whose last part is a glob, takes of its folder's `names`, sorted.

    Hidden files are passed over unless the glob asks for them, as a shell does. Raises `ValueError`
    that names both for a Mac's `._` file beside one that is taken, and for an unfinished download
    of what would be taken.
    """
    folder, slash, glob = pattern.rpartition("/")
    taken = {
        name
        for name in names
        if fnmatch.fnmatchcase(name, glob) and (glob[0] == "." or name[0] != ".")
    }
    for name in names:
        rest = name.removeprefix(MAC_FORK)
        if rest != name and rest in taken:
            raise ValueError(
                f"{folder}{slash}{rest} and {name}: a Mac's archive leaves the second beside the "
                f"first, and it holds no rows; remove {name}"
            )
        rest = finished(name)
        if rest != name and name[0] != "." and fnmatch.fnmatchcase(rest, glob):
            raise ValueError(
                f"{folder}{slash}{name} is an unfinished download of {rest}; let it finish, or "
                "remove it"
            )
    return [f"{folder}{slash}{name}" for name in sorted(taken)]


def problems(found: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Why the files of one source, by the pattern that found them, are not read: one line each."""
    paths = [path for files in found.values() for path in files]
    yield from _unreadable(paths)
    yield from _same(paths)
    globbed = {path for pattern, files in found.items() if is_glob(pattern) for path in files}
    groups = collections.defaultdict(list)
    for path in dict.fromkeys(paths):
        form = _form(path)
        if form is not None:
            groups[form.stem].append((path, form))
    for members in groups.values():
        yield from _group_problems(members, whole=all(path in globbed for path, _ in members))


_Form = collections.namedtuple("_Form", "stem suffix number total")


def _form(path: str) -> _Form | None:
    """What `path` is a form of, and which: `number` of `total` shards, or None of None."""
    ending = suffix(path)
    if not ending:
        return None
    folder, _, name = path.removesuffix(ending).rpartition("/")
    name = re.sub("^copy of ", "", name, flags=re.IGNORECASE)
    ends = next(m for at in range(len(name) + 1) if (m := _COPY.fullmatch(name, at)))
    name = name[: ends.start()] or name
    shard = _SHARD.fullmatch(name)
    if shard is None:
        return _Form((folder, name), ending, None, None)
    return _Form((folder, shard[1] or ""), ending, int(shard[2]), int(shard[3]))


def _unreadable(paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        if not path.endswith(READABLE):
            yield f"{path}: cannot read this kind of file; expected one of {READABLE}"
        elif "://" not in path and os.path.isdir(path):
            yield f"{path}: a folder; expected files: name those in it, as {path}/*"


def _same(paths: Sequence[str]) -> Iterator[str]:
    """One file under two names, or named twice."""
    seen = {}
    for path in paths:
        key = path
        if "://" not in path and os.path.exists(path):
            stat = os.stat(path)
            key = (stat.st_dev, stat.st_ino)
        if key in seen:
            yield f"{seen[key]} and {path} are the same file; expected each file once"
        seen.setdefault(key, path)


def _group_problems(members: list[tuple[str, _Form]], *, whole: bool) -> Iterator[str]:
    kinds = {(form.suffix, form.total is None): path for path, form in reversed(members)}
    if len(kinds) > 1:
        first, second, *_ = sorted(kinds.values())
        yield f"{first} and {second} are two forms of one file; keep one of them"
        return
    by_place = {}
    for path, form in members:
        if form.number in by_place:
            yield (
                f"{by_place[form.number]} and {path} look like copies of one file; keep one of "
                "them, or rename one"
            )
        by_place.setdefault(form.number, path)
    totals = {form.total: path for path, form in members}
    if len(totals) > 1:
        first, second, *_ = sorted(totals.values())
        yield f"{first} and {second} are shards of different sets; keep one set"
    elif None not in totals and whole:
        ((total, example),) = totals.items()
        first = 0 if 0 in by_place or total not in by_place else 1
        missing = sorted(set(range(first, first + total)) - by_place.keys())
        if missing:
            shown = ", ".join(map(str, missing[:5])) + ", …" * (len(missing) > 5)
            yield (
                f"{example}: {len(missing)} of its {total} shards are missing (number {shown}); "
                "fetch them, or name the files that you want one by one"
            )
