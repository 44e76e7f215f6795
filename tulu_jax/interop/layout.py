"""Hugging Face's name, shape and axis order of every parameter.

A parameter path is Hugging Face's name without the layer number; what differs is the axis order
(`nn.Linear` keeps [out, in]) and that heads are flattened there into one axis.
"""

import dataclasses
import math
import re

import jax
import numpy as np

from tulu_jax.models import llama
from tulu_jax.models.config import LlamaConfig
from tulu_jax.parallel.sharding import path_name

# Module name -> Hugging Face's axes (a bracket is flattened into one) and ours, layers apart.
_RULES = {
    "embed_tokens": "V D -> V D",
    "input_layernorm": "D -> D",
    "q_proj": "(N H) D -> D N H",
    "k_proj": "(K H) D -> D K H",
    "v_proj": "(K H) D -> D K H",
    "o_proj": "D (N H) -> N H D",
    "post_attention_layernorm": "D -> D",
    "gate_proj": "F D -> D F",
    "up_proj": "F D -> D F",
    "down_proj": "D F -> F D",
    "norm": "D -> D",
    "lm_head": "V D -> D V",
    "score": "O D -> D O",  # O labels: one
}


_TILE = (128, 1024)  # rows and columns that are transposed at a time, in the caches of a core


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One parameter: its names there, in layer order, and the shape and axis order of each.

    `split` is `hf_shape` with the heads axis split off, `permutation` brings it into our order.
    """

    path: str
    names: tuple[str, ...]
    stacked: bool
    hf_shape: tuple[int, ...]
    split: tuple[int, ...]
    permutation: tuple[int, ...]

    def to_ours(self, x):
        """One Hugging Face weight in our axis order."""
        return x.reshape(self.split).transpose(self.permutation)

    def to_hf(self, x):
        """One layer of ours in Hugging Face's axis order."""
        inverse = sorted(range(len(self.permutation)), key=self.permutation.__getitem__)
        return x.transpose(inverse).reshape(self.hf_shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one layer of ours."""
        return tuple(self.split[axis] for axis in self.permutation)

    def host_to_ours(self, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """`to_ours` of an array on the host, contiguous and in `dtype`."""
        return self._on_host(x.reshape(self.hf_shape), dtype).reshape(self.shape)

    def host_to_hf(self, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """`to_hf` of an array on the host, contiguous and in `dtype`."""
        rows = self.hf_shape[::-1] if self._turned else self.hf_shape
        return self._on_host(x.reshape(rows), dtype)

    @property
    def _turned(self) -> bool:
        """Whether a matrix is transposed, which is all that a rule does; heads stay together."""
        return self.permutation != tuple(range(len(self.permutation)))

    def _on_host(self, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return (
            turned(x, dtype) if self._turned else np.ascontiguousarray(x.astype(dtype, copy=False))
        )


def layouts(config: LlamaConfig) -> dict:
    """A `Layout` for every parameter, in the structure of the parameters."""
    return jax.tree.map_with_path(
        lambda path, _: _layout(config, path_name(path)), llama.abstract_params(config, "float32")
    )


def expected_weights(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name and shape of every weight, in the order they are written."""
    order = re.compile(r"(model\.(embed_tokens|layers|norm)|lm_head|score)(?:\.(\d+))?")

    def key(item):
        name = order.match(item[0])
        kinds = ("model.embed_tokens", "model.layers", "model.norm", "lm_head", "score")
        return kinds.index(name[1]), int(name[3] or 0)

    found = jax.tree.leaves(layouts(config))
    weights = [(name, layout.hf_shape) for layout in found for name in layout.names]
    return dict(sorted(weights, key=key))


def _layout(config: LlamaConfig, path: str) -> Layout:
    sizes = {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "F": config.mlp_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "O": 1,
    }
    *modules, _ = path.split("/")
    theirs, ours = _RULES[modules[-1]].split(" -> ")
    groups = [group.strip("()").split() for group in re.findall(r"\(.*?\)|\w", theirs)]
    flat = [axis for group in groups for axis in group]
    name = ".".join(modules) + ".weight"
    stacked = path.startswith("model/layers/")
    names = tuple(
        name.replace("layers.", f"layers.{layer}.", 1) for layer in range(config.num_layers)
    )
    return Layout(
        path=path,
        names=names if stacked else (name,),
        stacked=stacked,
        hf_shape=tuple(math.prod(sizes[axis] for axis in group) for group in groups),
        split=tuple(sizes[axis] for axis in flat),
        permutation=tuple(flat.index(axis) for axis in ours.split()),
    )


def turned(matrix: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The transposed matrix in `dtype`, tile by tile: 5 times as fast as numpy's copy of a view."""
    bits = np.dtype(f"u{dtype.itemsize}")  # numpy copies a bfloat16 one by one
    found = np.empty(matrix.shape[::-1], bits)
    rows, columns = _TILE
    for row in range(0, matrix.shape[0], rows):
        block = np.ascontiguousarray(matrix[row : row + rows].astype(dtype, copy=False)).view(bits)
        for column in range(0, matrix.shape[1], columns):
            tile = block[:, column : column + columns]
            found[column : column + columns, row : row + rows] = tile.T
    return found.view(dtype)
