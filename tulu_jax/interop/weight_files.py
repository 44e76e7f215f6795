"""Reading rows of weights from safetensors files, local or in a bucket.

Only whole rows of a weight are read, which are contiguous in the file: one memory-mapped copy, or
one ranged request. Local files go through the safetensors library; it cannot open `gs://`, so there
the header (8 bytes of length, then JSON) is read here.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from tulu_jax import validation

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """Where a weight is and what it is; `dtype` is safetensors' name of it, such as 'BF16'."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int | None  # of its first byte, for files read by range


class WeightFiles:
    """The safetensors files of one folder: `headers`, `problems` met in them, and `rows`."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._open: dict[str, safetensors.safe_open] = {}
        self.headers: dict[str, Header] = {}
        self.problems: list[str] = []
        for file in self._files():
            self._read_headers(file)

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows `rows` (over axis 0) of weight `name`, in the dtype of the file."""
        header = self.headers[name]
        start, stop, _ = rows.indices(header.shape[0])
        if header.start is None:
            return self._open[header.file].get_slice(name)[start:stop]
        dtype = np.dtype(_DTYPES[header.dtype])
        row_bytes = math.prod(header.shape[1:]) * dtype.itemsize
        with (self._path / header.file).open("rb") as file:
            file.seek(header.start + start * row_bytes)
            data = file.read((stop - start) * row_bytes)
        return np.frombuffer(data, dtype).reshape(stop - start, *header.shape[1:])

    def _files(self) -> list[str]:
        """Names of the files, after the index where there is one; else an entry in `problems`."""
        if not self._path.is_dir():
            self.problems.append(
                f"{self._path} is not a folder; expected a Hugging Face checkpoint"
            )
            return []
        if (self._path / INDEX).exists():
            try:
                weight_map = json.loads((self._path / INDEX).read_text())["weight_map"]
                return sorted(set(weight_map.values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self.problems.append(f"{self._path / INDEX} is not a weight index: {error!r}")
                return []
        if (self._path / SINGLE).exists():
            return [SINGLE]
        found = sorted(file.name for file in self._path.iterdir())
        if any(name.startswith("pytorch_model") for name in found):
            self.problems.append(
                f"{self._path} holds only pytorch_model*.bin, which is not read (unpickling runs "
                f"code); convert it once where torch is installed: AutoModelForCausalLM"
                f".from_pretrained({str(self._path)!r}).save_pretrained(new_folder)"
            )
        else:
            self.problems.append(
                f"{self._path} has neither {SINGLE} nor {INDEX}; found {found or 'nothing'}"
            )
        return []

    def _read_headers(self, file: str) -> None:
        path = self._path / file
        if not path.exists():
            self.problems.append(f"{path} is missing, although {INDEX} names it")
            return
        with path.open("rb") as start:
            if found := validation.stand_in(start.read(validation.HEAD)):
                self.problems.append(f"{path}: {found}")
                return
        try:
            headers = _remote_headers(path) if is_remote(path) else self._local_headers(file)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            self.problems.append(f"{path} is not a complete safetensors file: {error}")
            return
        for name in headers:
            if name in self.headers:
                self.problems.append(f"{name} is in {self.headers[name].file} and in {file}")
        self.headers |= headers

    def _local_headers(self, file: str) -> Mapping[str, Header]:
        handle = safetensors.safe_open(str(self._path / file), framework="numpy")
        self._open[file] = handle
        headers = {}
        for name in handle.keys():  # noqa: SIM118 -- not a mapping
            weight = handle.get_slice(name)
            headers[name] = Header(
                file=file, dtype=weight.get_dtype(), shape=tuple(weight.get_shape()), start=None
            )
        return headers


def is_remote(path: epath.Path) -> bool:
    """Whether the path is an address (`gs://…`) rather than a file of this machine."""
    return "://" in str(path)


def readable(dtype: str) -> bool:
    """Whether weights of this safetensors dtype are read."""
    return dtype in _DTYPES


def _remote_headers(path: epath.Path) -> Mapping[str, Header]:
    size = path.stat().length
    with contextlib.closing(path.open("rb")) as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"its header would be {length} bytes in a file of {size}")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end != size:
        raise ValueError(f"it has {size} bytes; its header describes {end}")
    return {
        name: Header(
            file=path.name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=8 + length + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    }
