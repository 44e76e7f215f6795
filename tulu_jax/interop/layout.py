"""Hugging Face's name, shape and axis order of every parameter.

A parameter path is Hugging Face's name without the layer number; what differs is the axis order
(`nn.Linear` keeps [out, in]) and that heads are flattened there into one axis.
"""

import dataclasses
import math
import re

import jax

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
}


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


def layouts(config: LlamaConfig) -> dict:
    """A `Layout` for every parameter, in the structure of the parameters."""
    return jax.tree.map_with_path(
        lambda path, _: _layout(config, path_name(path)), llama.abstract_params(config, "float32")
    )


def expected_weights(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name and shape of every weight, in the order they are written."""
    order = re.compile(r"(model\.(embed_tokens|layers|norm)|lm_head)(?:\.(\d+))?")

    def key(item):
        name = order.match(item[0])
        kinds = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")
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
