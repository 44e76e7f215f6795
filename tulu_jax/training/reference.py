"""Reference log-probabilities of DPO: computed once, before training, and kept by the pair's id.

A folder holds `key.json`, the fingerprints of all that the numbers depend on, and shards
`NNNNN-DIGEST.npz`: `ids`, float32 `logps` [n, 2], and the digest of the `key` they belong to. A
shard is there whole or not at all, so a killed pass goes on after the last one. All are verified
when the folder is opened, and read into memory. Runs that fill one folder side by side write no
file twice with other content, for its name has the digest.
"""

import io
import json
import re
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from tulu_jax import atomic, digests, strict_json, validation

KEY = "key.json"
NAME = re.compile(r"(\d{5,})-([0-9a-f]{16})\.npz")
SHOWN = 5  # ids named in a message


class Cache:
    """The shards in `folder`; process 0 writes them.

    `key` tells by name what the numbers depend on. Raises `UsageError` for a folder that was made
    with another, as nothing is computed over it, and for a file that is not as it was written.
    """

    def __init__(self, folder: epath.Path, key: dict[str, str]):
        self.folder, self._rows = folder, {}
        self._logps = np.zeros((0, 2), np.float32)
        self._key = digests.of_bytes(json.dumps(key, sort_keys=True).encode())
        found = folder.iterdir() if folder.exists() else ()
        files = sorted(f for f in found if f.suffix == ".npz" and not f.name.startswith("."))
        if (folder / KEY).exists():
            _require_same(folder, _read_key(folder / KEY), key)
        elif files:
            raise _damaged(folder / KEY, "no such file", "that of its shards", remove=folder)
        elif jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(folder / KEY, json.dumps(key, indent=2).encode())
        self._next_shard = 0
        for file in files:
            number, ids, logps = _read(file, self._key)
            self._next_shard = number + 1
            self._remember(ids, logps)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def add(self, ids: Sequence[str], logps: np.ndarray) -> None:
        """Keeps float32 `logps` [n, 2] of the pairs `ids` as one more shard.

        Raises `UsageError`, and keeps nothing, if one of them is not finite.
        """
        bad = [ids[i] for i in np.flatnonzero(~np.isfinite(logps).all(axis=1))]
        if bad:
            raise validation.UsageError(
                f"the reference's log-probabilities of {_named(bad)} are not finite; the base has "
                "weights that overflow, or compute_dtype is too small for them"
            )
        if jax.process_index() == 0:
            stream = io.BytesIO()
            logps = logps.astype(np.float32)
            np.savez(stream, ids=np.array(ids), logps=logps, key=np.array(self._key))
            content = stream.getvalue()
            name = f"{self._next_shard:05d}-{digests.of_bytes(content)}.npz"
            atomic.write_bytes(self.folder / name, content)
        self._next_shard += 1
        self._remember(ids, logps)

    def gather(self, ids: Sequence[str]) -> np.ndarray:
        """float32 [n, 2] of the pairs `ids`, in their order. Raises `UsageError` that names missing
        ones."""
        missing = [name for name in ids if name not in self]
        if missing:
            raise validation.UsageError(
                f"{self.folder} has no reference log-probabilities of {_named(missing)}, of "
                f"{len(ids)} in the data; remove the folder, and they are computed anew"
            )
        return self._logps[[self._rows[name] for name in ids]]

    def _remember(self, ids: Sequence[str], logps: np.ndarray) -> None:
        start = len(self._logps)
        self._rows |= {name: start + i for i, name in enumerate(ids)}
        self._logps = np.concatenate([self._logps, logps.astype(np.float32)])


def _require_same(folder: epath.Path, theirs: dict[str, str], ours: dict[str, str]) -> None:
    different = [
        f"{name} was {theirs.get(name)!r} and is {ours[name]!r}"
        for name in ours
        if theirs.get(name) != ours[name]
    ]
    if different:
        raise validation.UsageError(
            f"{folder} holds the reference log-probabilities of another run: "
            f"{'; '.join(different)}. Restore that, choose another --workdir, or remove the folder "
            "to compute them anew"
        )


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    noun = "pair" if len(ids) == 1 else "pairs"
    return f"{len(ids)} {noun} ({', '.join(ids[:SHOWN])}{more})"


def _read_key(path: epath.Path) -> dict[str, str]:
    try:
        return dict(strict_json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise _damaged(path, "no JSON object", "one", remove=path.parent) from None


def _read(path: epath.Path, key: str) -> tuple[int, list[str], np.ndarray]:
    """(number, ids, float32 logps [n, 2]) of a shard."""
    content = path.read_bytes()
    found, named = digests.of_bytes(content), NAME.fullmatch(path.name)
    if named is None or named[2] != found:
        expected = named[2] if named else "a name that ends in it"
        raise _damaged(path, f"digest {found}", expected, remove=path)
    shard = np.load(io.BytesIO(content))
    if str(shard["key"]) != key:
        expected = f"{key}, of {KEY} beside it"
        raise _damaged(path, f"numbers for the key {shard['key']}", expected, remove=path)
    return int(named[1]), shard["ids"].tolist(), shard["logps"]


def _damaged(path: epath.Path, found: str, expected: str, *, remove) -> validation.UsageError:
    return validation.UsageError(
        f"{path}: found {found}, expected {expected}; remove {remove}, and what it held is "
        "computed anew"
    )
