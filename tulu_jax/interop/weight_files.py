"""Reading rows of weights from safetensors files or torch archives, local or in a bucket.

Of a folder's files, those are read that `transformers` opens; a folder that could mean two sets of
weights is refused. Only whole rows of a weight are read, which are contiguous in the file: one read
of a file, or ranged requests of which two must agree. The safetensors library opens neither `gs://`
nor lets go of what it mapped, so the header (8 bytes of length, then JSON) is read here.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import ml_dtypes  # noqa: F401 -- gives numpy its bfloat16
import numpy as np
from etils import epath

from tulu_jax import strict_json, validation
from tulu_jax.interop import torch_files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"  # without safetensors
ADAPTER = "adapter_config.json"

MOST_HEADER = 100_000_000  # bytes; the safetensors library takes no more
MOST_READS = 4  # of a part of an object, until two agree
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of weights
_STORED = DTYPES | {"U8": "uint8"}  # of weights in few bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """Where a weight is and what it is; `dtype` is safetensors' name of it, such as 'BF16'."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its first byte in the file


class WeightFiles:
    """The safetensors files of one folder: `headers`, `problems` met in them, and `rows`.

    `files` are those that are read, `unread` other files of weights that lie beside them.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        self.headers: dict[str, Header] = {}
        self.problems: list[str] = []
        self.files = self._chosen()
        self.unread = self._others()
        for file in self.files:
            self._read_headers(file)

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows `rows` (over axis 0) of weight `name`, in the dtype of the file."""
        header = self.headers[name]
        return read_rows(self._path / header.file, header, rows)

    def _chosen(self) -> list[str]:
        """Names of the files to read; none where an entry in `problems` says why."""
        if not self._path.is_dir():
            self.problems.append(
                f"{self._path} is not a folder; expected a Hugging Face checkpoint"
            )
            return []
        if (self._path / ADAPTER).exists():
            self.problems.append(
                f"{self._path / ADAPTER} makes the folder a PEFT adapter, to be read on top of "
                "another model; give the folder of the whole model (merge_and_unload() and "
                f"save_pretrained make one), or remove {ADAPTER} if the weights are whole"
            )
            return []
        single, index = self._path / SINGLE, self._path / INDEX
        if not single.exists():
            return self._of_index(INDEX) if index.exists() else self._of_torch()
        shards = self._of_index(INDEX, quietly=True) if index.exists() else []
        if shards and shards != [SINGLE] and all((self._path / name).exists() for name in shards):
            self.problems.append(
                f"{single} and the {len(shards)} files of {index} are both whole, and one may be "
                f"older than the other (transformers reads {SINGLE}); remove the one that is not "
                f"meant: {SINGLE}, or {INDEX} with {', '.join(shards)}"
            )
            return []
        return [SINGLE]

    def _of_torch(self) -> list[str]:
        if (self._path / TORCH).exists():
            return [TORCH]
        if (self._path / TORCH_INDEX).exists():
            return self._of_index(TORCH_INDEX)
        found = sorted(file.name for file in self._path.iterdir())
        self.problems.append(
            f"{self._path} has neither {SINGLE} nor {INDEX}, nor {TORCH}; found "
            f"{found or 'nothing'}"
        )
        return []

    def _of_index(self, name: str, *, quietly: bool = False) -> list[str]:
        """Names of the files in the index; none for a broken one, a problem unless `quietly`.

        A name is of a file of the folder. That may be a link to another place, which only who may
        write here can have made; a path in the index comes with a download.
        """
        index = self._path / name
        try:
            if found := validation.unreadable(index):
                raise ValueError(found)
            if found := validation.stand_in(text := index.read_bytes()):
                raise ValueError(found)
            weight_map = strict_json.loads(text)["weight_map"]
            names = sorted(set(weight_map.values()))
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError("its weight_map names no files")
            outside = [name for name in names if re.search(r"[/\\\0]", name) or name in ("", "..")]
            if outside:
                raise ValueError(
                    f"found the path {outside[0]!r}; expected names of files in its own folder; "
                    "put the files there, or make links to them"
                )
            return names
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if not quietly:
                self.problems.append(f"{index} is not a weight index: {error!r}")
            return []

    def _others(self) -> list[str]:
        if not self.files:
            return []
        return sorted(
            file.name
            for file in self._path.iterdir()
            if file.name not in self.files
            and (
                file.name.endswith((".safetensors", ".pth", ".bin.index.json"))
                or (file.name == INDEX and self.files == [SINGLE])
                or (file.name.startswith("pytorch_model") and file.name.endswith(".bin"))
            )
        )

    def _read_headers(self, file: str) -> None:
        path = self._path / file
        if not path.exists():
            self.problems.append(f"{path} is missing, although the index names it")
            return
        if found := validation.unreadable(path):
            self.problems.append(f"{path}: {found}")
            return
        with path.open("rb") as start:
            if found := validation.stand_in(start.read(validation.HEAD)):
                self.problems.append(f"{path}: {found}")
                return
        try:
            headers = _of_archive(path) if path.suffix == ".bin" else _headers(path)
        except ValueError as error:
            kind = "torch archive" if path.suffix == ".bin" else "safetensors file"
            self.problems.append(f"{path} is not a complete {kind}: {error}")
            return
        for name in headers:
            if name in self.headers:
                self.problems.append(f"{name} is in {self.headers[name].file} and in {file}")
        self.headers |= headers


def is_remote(path: epath.Path) -> bool:
    """Whether the path is an address (`gs://…`) rather than a file of this machine."""
    return "://" in str(path)


def _agreed(path: epath.Path, start: int, count: int) -> bytes:
    """`count` bytes of an object from byte `start` on. A part of an object has no checksum, so it
    is read until two reads agree. Raises `ValueError` if none do."""
    reads = []
    for _ in range(MOST_READS):
        with path.open("rb") as file:
            file.seek(start)
            reads.append(file.read(count))
        if len(reads) > 1 and reads[-1] == reads[-2]:
            return reads[-1]
    raise ValueError(
        f"{path}: bytes {start} to {start + count} differ at each of {MOST_READS} reads; expected "
        "the same. Look at the network between this host and the bucket, or copy the folder to a "
        "disk"
    )


def read_rows(path: epath.Path, header: Header, rows: slice) -> np.ndarray:
    """Rows `rows` of the weight of which `header` tells, in the file `path`. Raises `ValueError` if
    the file ends before."""
    start, stop, _ = rows.indices(header.shape[0])
    dtype = np.dtype(_STORED[header.dtype])
    found = np.empty((stop - start, *header.shape[1:]), dtype)
    place = header.start + start * math.prod(header.shape[1:]) * dtype.itemsize
    if is_remote(path):
        content = _agreed(path, place, found.nbytes)
        if len(content) < found.nbytes:
            raise ValueError(f"{path} ends before the weight that begins at {header.start}")
        return np.frombuffer(content, dtype).reshape(found.shape)
    left = found.reshape(-1).view(np.uint8).data
    with open(path, "rb", buffering=0) as file:
        file.seek(place)
        while left:
            count = file.readinto(left)
            if not count:
                raise ValueError(f"{path} ends before the weight that begins at {header.start}")
            left = left[count:]
    return found


def _beginning(path: epath.Path, start: int, count: int) -> bytes:
    if is_remote(path):
        return _agreed(path, start, count)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(count)


def _of_archive(path: epath.Path) -> Mapping[str, Header]:
    return {
        name: Header(file=path.name, dtype=tensor.dtype, shape=tensor.shape, start=tensor.start)
        for name, tensor in torch_files.tensors(path).items()
    }


def _headers(path: epath.Path) -> Mapping[str, Header]:
    size = path.stat().length
    length = int.from_bytes(_beginning(path, 0, 8), "little") if size > 8 else 0
    if not 0 < length <= min(size - 8, MOST_HEADER):
        raise ValueError(f"its header would be {length} bytes in a file of {size}")
    entries = strict_json.loads(_beginning(path, 8, length))
    try:
        entries.pop("__metadata__", None)
        headers = {name: _entry(path.name, 8 + length, entry) for name, entry in entries.items()}
        end = 8 + length
        for start, stop in sorted(entry["data_offsets"] for entry in entries.values()):
            if not 8 + length + start == end <= 8 + length + stop:
                raise ValueError(f"its weights leave holes or overlap at byte {start}")
            end = 8 + length + stop
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"its header is of another form ({error!r})") from error
    if end != size:
        raise ValueError(f"it has {size} bytes; its header describes {end}")
    return headers


def _entry(file: str, data: int, entry: Mapping) -> Header:
    """What a header says of one weight; the weights begin at byte `data`."""
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"found the shape {shape} at {[start, stop]}; expected whole numbers")
    if dtype in _STORED and stop - start != math.prod(shape) * np.dtype(_STORED[dtype]).itemsize:
        raise ValueError(f"{dtype} of shape {shape} does not fill the bytes {start} to {stop}")
    return Header(file=file, dtype=dtype, shape=shape, start=data + start)
