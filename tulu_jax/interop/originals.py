"""Weights as those who trained them left them, by Hugging Face's names and in its form.

Meta's `consolidated.NN.pth` beside `params.json` are cut over tensor-parallel ranks; EasyLM's
`StreamingCheckpointer` wrote one msgpack file of (path, array) pairs with kernels [in, out]. Both
rotate pairs of neighbours, where Hugging Face rotates halves: rows of q and k change places.
"""

import math
from collections.abc import Mapping

import numpy as np
from etils import epath

from tulu_jax.interop import config_file, torch_files, weight_files
from tulu_jax.interop.layout import turned
from tulu_jax.interop.weight_files import Header
from tulu_jax.models.config import LlamaConfig

PARAMS = "params.json"
_ROTATED = ("q_proj", "k_proj")
# Hugging Face's name in a layer, Meta's, EasyLM's, and the axis along which Meta cuts (None: whole)
_OF_LAYER = (
    ("self_attn.q_proj", "attention.wq", "attention/wq/kernel", 0),
    ("self_attn.k_proj", "attention.wk", "attention/wk/kernel", 0),
    ("self_attn.v_proj", "attention.wv", "attention/wv/kernel", 0),
    ("self_attn.o_proj", "attention.wo", "attention/wo/kernel", 1),
    ("mlp.gate_proj", "feed_forward.w1", "feed_forward/w1/kernel", 0),
    ("mlp.down_proj", "feed_forward.w2", "feed_forward/w2/kernel", 1),
    ("mlp.up_proj", "feed_forward.w3", "feed_forward/w3/kernel", 0),
    ("input_layernorm", "attention_norm", "attention_norm/kernel", None),
    ("post_attention_layernorm", "ffn_norm", "ffn_norm/kernel", None),
)
_OF_MODEL = (
    ("model.embed_tokens.weight", "tok_embeddings.weight", "transformer/wte/embedding", 1),
    ("model.norm.weight", "norm.weight", "transformer/ln_f/kernel", None),
    ("lm_head.weight", "output.weight", "lm_head/kernel", 0),
)


def _names(layers: int):
    """(Hugging Face's name, Meta's, EasyLM's, axis) of every weight."""
    yield from _OF_MODEL
    for layer in range(layers):
        for ours, meta, easylm, axis in _OF_LAYER:
            yield (
                f"model.layers.{layer}.{ours}.weight",
                f"layers.{layer}.{meta}.weight",
                f"transformer/h/{layer}/{easylm}",
                axis,
            )


def _halves(weight: np.ndarray, name: str, config: LlamaConfig) -> np.ndarray:
    """A weight whose rotary pairs are neighbours, with them a half of the head apart."""
    if name.split(".")[-2] not in _ROTATED:
        return weight
    rows, columns = weight.shape
    pairs = weight.reshape(rows // config.head_dim, config.head_dim // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


class MetaFiles:
    """`headers`, `problems` and `rows` of a folder of Meta's, as `weight_files.WeightFiles`."""

    def __init__(self, path: epath.Path, config: LlamaConfig):
        self._path, self._config = path, config
        self.problems: list[str] = _params_problems(path / PARAMS, config)
        self.headers: dict[str, Header] = {}
        self.files = sorted(file.name for file in path.glob("consolidated.*.pth"))
        self.unread: list[str] = []
        if not self.files:
            self.problems.append(f"{path} has {PARAMS} and no consolidated.*.pth")
        ranks = [self._tensors(file) for file in self.files]
        self._parts: dict[str, list[Header]] = {}
        self._axes: dict[str, int | None] = {}
        known = {meta: (ours, axis) for ours, meta, _, axis in _names(config.num_layers)}
        for name in ranks[0] if ranks else ():
            if name == "rope.freqs":  # a constant
                continue
            ours, axis = known.get(name, (name, None))
            here = [
                _header(file, rank.get(name)) for file, rank in zip(self.files, ranks, strict=True)
            ]
            if None in here:
                self.problems.append(f"{name} is in {self.files[0]} and not in all of {self.files}")
                continue
            shape = list(here[0].shape)
            if axis is not None:
                shape[axis] = sum(header.shape[axis] for header in here)
            self.headers[ours] = Header(
                file=self.files[0], dtype=here[0].dtype, shape=tuple(shape), start=here[0].start
            )
            self._parts[ours], self._axes[ours] = here, axis

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows of a weight; all of it is in memory."""
        parts, axis = self._parts[name], self._axes[name]
        read = [
            weight_files.read_rows(self._path / header.file, header, slice(None))
            for header in (parts if axis is not None else parts[:1])
        ]
        whole = read[0] if len(read) == 1 else np.concatenate(read, axis=axis)
        return _halves(whole, name, self._config)[rows]

    def _tensors(self, file: str) -> Mapping[str, torch_files.Tensor]:
        try:
            return torch_files.tensors(self._path / file)
        except ValueError as error:
            self.problems.append(f"{self._path / file}: {error}")
            return {}


def _header(file: str, tensor: torch_files.Tensor | None) -> Header | None:
    if tensor is None:
        return None
    return Header(file=file, dtype=tensor.dtype, shape=tensor.shape, start=tensor.start)


def _params_problems(file: epath.Path, config: LlamaConfig) -> list[str]:
    """How Meta's params.json describes another function than `config`, one line a field."""
    try:
        fields = config_file.read_object(file)
    except ValueError as error:
        return [str(error)]
    expected = {
        "dim": config.embed_dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }
    found = {"n_kv_heads": fields.get("n_heads"), "rope_theta": config_file.DEFAULT_ROPE_THETA}
    found |= fields
    problems = [
        f"{file} says {name} = {found.get(name)}; the run's model has {value}. Take the model of "
        "that value in the gin file"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if fields.get("use_scaled_rope"):
        problems.append(f"{file} says use_scaled_rope = true; expected rotary angles as they are")
    return problems


class EasyLMFile:
    """`headers`, `problems` and `rows` of a streamed msgpack file, as `weight_files.WeightFiles`.

    Of a whole train state the parameters are read.
    """

    def __init__(self, path: epath.Path, config: LlamaConfig):
        self._path, self._config = path, config
        self.files, self.unread, self.problems = [path.name], [], []
        self.headers: dict[str, Header] = {}
        self._stored: dict[str, Header] = {}
        self._turns: set[str] = set()
        known = {easylm: ours for ours, _, easylm, _ in _names(config.num_layers)}
        try:
            entries = easylm_entries(path)
        except ValueError as error:
            self.problems.append(f"{path}: {error}")
            return
        for key, (dtype, shape, start) in entries.items():
            name = known.get(key, key)
            turns = key.endswith("/kernel") and len(shape) == 2
            if turns:
                self._turns.add(name)
            self._stored[name] = Header(file=path.name, dtype=dtype, shape=shape, start=start)
            self.headers[name] = Header(
                file=path.name, dtype=dtype, shape=shape[::-1] if turns else shape, start=start
            )

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows of a weight; all of it is in memory."""
        stored = self._stored[name]
        weight = weight_files.read_rows(self._path, stored, slice(None))
        if name in self._turns:
            weight = turned(weight, weight.dtype)
        return _halves(weight, name, self._config)[rows]


_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int32": "I32"}
_NDARRAY = 1  # the extension type of flax.serialization


def easylm_entries(path: epath.Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """{path of an array: (dtype, shape, place of its first byte)} of the parameters in a file that
    `StreamingCheckpointer` wrote. The arrays are passed over, not read. Raises `ValueError`."""
    found: dict[str, tuple[str, tuple[int, ...], int]] = {}
    size = path.stat().length
    with path.open("rb") as file:
        while file.tell() < size:
            reader = _Msgpack(file, size)
            if reader.array() != 2:
                raise ValueError(f"found no pair of path and array at byte {file.tell()}")
            keys = [reader.text() for _ in range(reader.array())]
            end = reader.binary() + file.tell()
            if keys and keys[-1].startswith("chunk_"):
                raise ValueError(f"{'/'.join(keys)} is cut in chunks, which no Llama 2 needs")
            if "opt_state" not in keys[:1] and keys != ["step"]:
                name = "/".join(keys)
                while name.startswith("params/"):
                    name = name.removeprefix("params/")
                found[name] = reader.ndarray()
            file.seek(end)
    if not found:
        raise ValueError("it holds no parameters")
    return found


class _Msgpack:
    """The few forms of msgpack that such a file has, read from where the file stands."""

    def __init__(self, file, size: int):
        self._file, self._size = file, size

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError("it ends in the middle of an array; copy it again")
        return data

    def _head(self, expected: str, fixed: tuple[int, int] | None, forms: Mapping[int, int]) -> int:
        """The length that stands before an object: in the first byte, or in the bytes after it."""
        (first,) = self._take(1)
        if fixed and fixed[0] <= first < fixed[0] + fixed[1]:
            return first - fixed[0]
        if first not in forms:
            raise ValueError(
                f"found 0x{first:02x} at byte {self._file.tell() - 1}; expected {expected} of a "
                "streamed msgpack checkpoint of EasyLM"
            )
        return int.from_bytes(self._take(forms[first]), "big")

    def array(self) -> int:
        return self._head("an array", (0x90, 16), {0xDC: 2, 0xDD: 4})

    def text(self) -> str:
        length = self._head("a text", (0xA0, 32), {0xD9: 1, 0xDA: 2})
        return self._take(length).decode(errors="replace")

    def binary(self) -> int:
        length = self._head("bytes", None, {0xC4: 1, 0xC5: 2, 0xC6: 4})
        if self._file.tell() + length > self._size:
            raise ValueError("it ends in the middle of an array; copy it again")
        return length

    def _integer(self) -> int:
        return self._head("a size", (0x00, 128), {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8})

    def ndarray(self) -> tuple[str, tuple[int, ...], int]:
        self._head("an array of numbers", None, {0xC7: 1, 0xC8: 2, 0xC9: 4})
        (kind,) = self._take(1)
        if kind != _NDARRAY or self.array() != 3:
            raise ValueError(f"found the extension type {kind}; expected an array of numbers")
        shape = tuple(self._integer() for _ in range(self.array()))
        dtype = self.text()
        if dtype not in _DTYPES:
            raise ValueError(f"found an array of {dtype}; expected one of {sorted(_DTYPES)}")
        length = self.binary()
        if length != math.prod(shape) * int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8:
            raise ValueError(f"an array of shape {shape} and {dtype} has {length} bytes")
        return _DTYPES[dtype], shape, self._file.tell()
