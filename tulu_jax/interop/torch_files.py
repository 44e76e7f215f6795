"""Tensors in the archives that `torch.save` writes, without torch and without running a pickle.

Such an archive is a zip whose `data.pkl` says what the tensors are and whose other files are their
bytes as they are. The pickle may name the constructors of tensors and nothing else: whatever it
asks for besides is refused by that name, before it is called.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

MOST_PICKLE = 100_000_000  # bytes; that of a Llama of 70B has under a million
_STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2} | dict.fromkeys(
    ("I8", "U8", "BOOL"), 1
)


class Tensor(NamedTuple):
    """What the pickle says of one tensor; `dtype` is safetensors' name, `start` the place of its
    first byte in the archive."""

    dtype: str
    shape: tuple[int, ...]
    start: int


class _Storage(NamedTuple):
    dtype: str
    start: int
    num_bytes: int


def tensors(path: epath.Path) -> Mapping[str, Tensor]:
    """The tensors of the state dict in `path`, by name. Raises `ValueError` for a file that is no
    such archive, and for a pickle that asks for anything but tensors."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise ValueError(
                "found no zip archive; torch before 1.6 wrote a plain pickle, which is not read. "
                "Load it once with torch.load(weights_only=True) and save it again"
            )
        try:
            with zipfile.ZipFile(file) as archive:
                return _read(file, archive)
        except zipfile.BadZipFile as error:
            raise ValueError(f"it is no whole zip archive: {error}") from error


def _read(file, archive: zipfile.ZipFile) -> Mapping[str, Tensor]:
    names = [info.filename for info in archive.infolist()]
    pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise ValueError(f"found {len(pickles)} files data.pkl in it; expected one, of torch.save")
    top = pickles[0].removesuffix("data.pkl")
    if f"{top}byteorder" in names and archive.read(f"{top}byteorder") != b"little":
        raise ValueError("its bytes are big-endian; expected little-endian")
    if archive.getinfo(pickles[0]).file_size > MOST_PICKLE:
        raise ValueError(f"its data.pkl has over {MOST_PICKLE:,} bytes")
    reader = _Unpickler(io.BytesIO(archive.read(pickles[0])), file, archive, top)
    try:
        found = reader.load()
    except ValueError:
        raise
    except Exception as error:  # whatever bytes make of the machine that a pickle is
        raise ValueError(f"its data.pkl cannot be read: {error!r}") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}; expected a dict of tensors")
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


class _Unpickler(pickle.Unpickler):
    def __init__(self, content, file, archive: zipfile.ZipFile, top: str):
        super().__init__(content)
        self._file, self._archive, self._top = file, archive, top
        self._allowed = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
            ("collections", "OrderedDict"): collections.OrderedDict,
            **{("torch", name): short for name, short in _STORAGES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise ValueError(
                f"its pickle asks for {module}.{name}; expected tensors alone, and nothing of it "
                "was run. Save the state dict of the model alone, or take safetensors"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or dtype not in _BYTES or not isinstance(count, int):
            raise ValueError(f"its pickle refers to {pid!r}; expected a storage of numbers")
        info = self._archive.getinfo(f"{self._top}data/{key}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} in it is compressed; torch.save never does that")
        if not 0 <= count * _BYTES[dtype] <= info.file_size:
            raise ValueError(f"{info.filename} in it has {info.file_size} bytes, {count} numbers")
        self._file.seek(info.header_offset + 26)
        name, extra = np.frombuffer(self._file.read(4), "<u2").tolist()
        start = info.header_offset + 30 + name + extra
        return _Storage(dtype=dtype, start=start, num_bytes=count * _BYTES[dtype])


def _tensor(storage: _Storage, offset, shape, stride, *rest) -> Tensor:
    size = _BYTES[storage.dtype]
    whole = all(type(number) is int and number >= 0 for number in (offset, *shape, *stride))
    dense = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))] if whole else None
    given = [n for n, length in zip(stride, shape, strict=True) if length > 1]
    if dense is None or given != [n for n, length in zip(dense, shape, strict=True) if length > 1]:
        raise ValueError(f"a tensor of shape {tuple(shape)} has strides {tuple(stride)}; expected "
                         "its rows one behind the other: save it contiguous")  # fmt: skip
    if (offset + math.prod(shape)) * size > storage.num_bytes:
        raise ValueError(f"a tensor of shape {tuple(shape)} reaches beyond its storage")
    return Tensor(storage.dtype, tuple(shape), storage.start + offset * size)
