"""The safetensors files of an export: which weight lies where, and how they are written.

A file is written from its header to its last weight in the order of the plan, so one weight is in
memory at a time; the format is 8 bytes of length, JSON, and the weights one behind the other.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xxhash
from etils import epath

from tulu_jax import atomic, digests
from tulu_jax.interop import weight_files

PIECE = 1 << 18  # bytes that are written and hashed while they are in the caches of a core
NAMES = {name: short for short, name in weight_files.DTYPES.items()}  # as the format has them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file and the shapes of its weights, in their order."""

    file: str
    weights: Mapping[str, tuple[int, ...]]

    def num_bytes(self, dtype: np.dtype) -> int:
        """Bytes of its weights."""
        return sum(math.prod(shape) for shape in self.weights.values()) * dtype.itemsize

    def header(self, dtype: np.dtype) -> bytes:
        """What lies before the weights."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, shape in self.weights.items():
            stop = start + math.prod(shape) * dtype.itemsize
            entries[name] = {
                "dtype": NAMES[dtype.name],
                "shape": list(shape),
                "data_offsets": [start, stop],
            }
            start = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the weights begin at a multiple of 8
        return len(text).to_bytes(8, "little") + text


def plan(weights: Mapping[str, tuple[int, ...]], dtype: np.dtype, max_bytes: int) -> list[Shard]:
    """Files of at most `max_bytes`; a weight that is larger has its own."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in weights.items():
        more = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + more > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += more
    if len(groups) == 1:
        return [Shard(file=weight_files.SINGLE, weights=groups[0])]
    return [
        Shard(file=f"model-{number:05d}-of-{len(groups):05d}.safetensors", weights=group)
        for number, group in enumerate(groups, 1)
    ]


def index(shards: list[Shard], dtype: np.dtype) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    return {
        "metadata": {"total_size": sum(shard.num_bytes(dtype) for shard in shards)},
        "weight_map": {name: shard.file for shard in shards for name in shard.weights},
    }


def write(
    folder: epath.Path,
    shard: Shard,
    weights: Iterator[tuple[str, np.ndarray]],
    dtype: np.dtype,
    bar,
) -> dict[str, Any]:
    """Writes the file of `shard` from the next of `weights`; it appears when it is whole. `bar`
    is told of bytes. What the manifest says of it: the digest of the file, and of each weight."""
    whole, found = xxhash.xxh3_64(), {}
    with atomic.writing(folder / shard.file) as file:

        def put(content) -> str:
            one, content = xxhash.xxh3_64(), memoryview(content)
            for begin in range(0, len(content), PIECE):
                piece = content[begin : begin + PIECE]
                file.write(piece)
                whole.update(piece)
                one.update(piece)
            return one.hexdigest()

        put(shard.header(dtype))
        for name, shape in shard.weights.items():
            given, weight = next(weights)
            if (given, weight.shape, weight.dtype) != (name, shape, dtype):
                raise ValueError(f"found {given} {weight.shape}; expected {name} {shape}")
            found[name] = put(weight.reshape(-1).view(np.uint8).data)
            bar.update(weight.nbytes)
    return {"file": whole.hexdigest(), "weights": found}


def is_whole(folder: epath.Path, shard: Shard, said: Mapping[str, Any] | None) -> bool:
    """Whether the file is there, and is what the manifest `said` of it."""
    path = folder / shard.file
    return bool(said) and path.exists() and digests.of_file(path) == said["file"]
