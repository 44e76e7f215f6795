"""Reference log-probabilities of DPO: computed once, before training, and kept by the pair's id.

A folder holds `key.json`, the fingerprints of all that the numbers depend on, and shards
`00000.npz`, `00001.npz`...: `ids` and float32 `logps` [n, 2]. A shard is there whole or not at all,
so a killed pass goes on after the last one.
"""

import json
import uuid
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from tulu_jax import validation

KEY = "key.json"
SHOWN = 5  # ids named in a message


class Cache:
    """The shards in `folder`; process 0 writes them.

    `key` tells by name what the numbers depend on. Raises `UsageError` for a folder that was made
    with another: nothing is computed over it.
    """

    def __init__(self, folder: epath.Path, key: dict[str, str]):
        self.folder, self._rows = folder, {}
        self._logps = np.zeros((0, 2), np.float32)
        if (folder / KEY).exists():
            _require_same(folder, json.loads((folder / KEY).read_text()), key)
        elif jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / KEY, lambda file: file.write(json.dumps(key, indent=2).encode()))
        found = folder.iterdir() if folder.exists() else ()
        files = sorted(f for f in found if f.suffix == ".npz" and not f.name.startswith("."))
        self._num_shards = len(files)
        for path in files:
            with path.open("rb") as file:
                shard = np.load(file)
                self._remember(shard["ids"].tolist(), shard["logps"])

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
            content = {"ids": np.array(ids), "logps": logps.astype(np.float32)}
            path = self.folder / f"{self._num_shards:05d}.npz"
            _write(path, lambda file: np.savez(file, **content))
        self._num_shards += 1
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


def _write(path: epath.Path, write) -> None:
    """Writes `path` under a temporary name, which no other run has, then renames it."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    with temporary.open("wb") as file:
        write(file)
    temporary.replace(path)
