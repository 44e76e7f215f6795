"""Llama configurations: the published sizes by name, and how a model is executed."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from tulu_jax import validation
from tulu_jax.models.lora import LoRAConfig

ATTENTION = ("auto", "xla", "triangular", "blockwise", "pallas", "pallas_interpret")
ATTENTION_BLOCKS = (128, 256, 512, 1024)
_OF_ATTENTION = ("attention_q", "attention_k", "attention_v", "attention_out", "attention_lse")
# What each keeps of a layer for the backward pass, by the names that the layer gives (`Block` and
# `attention`), the most first; the last three are jax's own, of which the first keeps nothing.
# Where memory is spare and the interconnect binds, the first three keep what was gathered: the
# activations that products took, over `tensor`, and the weights.
GATHERED, KERNEL = "gathered", "kernel"
REMAT_POLICIES = {
    "save_all_gathered": (*_OF_ATTENTION, "residual", "gate", "up", GATHERED, KERNEL),
    "save_kernels": (*_OF_ATTENTION, "residual", "gate", "up", KERNEL),
    "save_gathered": (*_OF_ATTENTION, "residual", "gate", "up", GATHERED),
    "save_projections": (*_OF_ATTENTION, "residual", "gate", "up"),
    "save_gate": (*_OF_ATTENTION, "residual", "gate"),
    "save_attention": (*_OF_ATTENTION, "residual"),
    "nothing_saveable": (),
    "dots_with_no_batch_dims_saveable": None,
    "dots_saveable": None,
}
KEEP_NOTHING = "nothing_saveable"
# Twice to twenty times the largest Llama, of 405B: 126 layers, 16,384 wide. What is larger is an
# error, and would fill the memory before it says so.
MOST = {
    "vocab_size": 2**20,
    "num_layers": 1000,
    "embed_dim": 2**16,
    "mlp_dim": 2**18,
    "num_heads": 1024,
    "num_kv_heads": 1024,
    "head_dim": 1024,
}
DTYPES = ("float32", "bfloat16")
GATHER_DTYPES = ("int8",)  # besides that of the computation
LM_HEAD, SCORE = "lm_head", "score"  # what a Llama may have above its trunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a Llama.

    D `embed_dim`, F `mlp_dim`, N `num_heads`, K `num_kv_heads`, H `head_dim`, V `vocab_size`.
    `max_positions` is recorded in exports; nothing in the model depends on it, because rotary
    angles are computed from the positions of each batch. `head` is what is above the trunk: here
    the output projection.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    max_positions: int

    head: ClassVar[str] = LM_HEAD

    def __post_init__(self):
        validation.check(self, self._rules)

    def _rules(self):
        for field in dataclasses.fields(self):
            if field.name != "tie_embeddings":
                value = getattr(self, field.name)
                yield value > 0, f"{field.name} = {value}: expected a positive number"
        for name, most in MOST.items():
            yield validation.at_most(name, getattr(self, name), most)
        yield (
            self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
            f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}",
        )
        yield self.head_dim % 2 == 0, f"head_dim = {self.head_dim}: rotary needs an even number"

    def with_head(self, head: str) -> "LlamaConfig":
        """The same trunk below `head`, 'lm_head' or 'score'."""
        made = ScoredLlamaConfig if head == SCORE else LlamaConfig
        return made(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    def computed_otherwise(self, other: "LlamaConfig") -> list[str]:
        """The fields by which `other` computes another function of the same weights.

        Numbers are compared as the float32 that the model computes with: some converters write
        9.999999747378752e-06 for 1e-5.
        """
        return [
            field.name
            for field in dataclasses.fields(self)
            if field.name != "max_positions"
            and _in_float32(getattr(self, field.name)) != _in_float32(getattr(other, field.name))
        ]

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The sizes that a mesh divides, by logical axis (`parallel/sharding.py`)."""
        return {
            "embed": self.embed_dim,
            "mlp": self.mlp_dim,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "vocab": self.vocab_size,
        }

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer by its path in a layer, with heads flattened."""
        D, F, H = self.embed_dim, self.mlp_dim, self.head_dim
        heads, kv_heads = self.num_heads * H, self.num_kv_heads * H
        return {
            "self_attn/q_proj": (D, heads),
            "self_attn/k_proj": (D, kv_heads),
            "self_attn/v_proj": (D, kv_heads),
            "self_attn/o_proj": (heads, D),
            "mlp/gate_proj": (D, F),
            "mlp/up_proj": (D, F),
            "mlp/down_proj": (F, D),
        }

    @property
    def num_params(self) -> int:
        """Exact number of parameters: 2VD + L(2D² + 2DKH + 3DF + 2D) + D where N·H = D; with a
        score head VD fewer and D more."""
        attention = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.embed_dim * self.mlp_dim + 2 * self.embed_dim
        scored = self.head == SCORE
        tables = 1 if self.tie_embeddings or scored else 2
        vectors = 2 if scored else 1
        in_tables = tables * self.vocab_size * self.embed_dim
        return in_tables + self.num_layers * layer + vectors * self.embed_dim

    def flops_per_token(self, length: int) -> float:
        """Model FLOPs of one trained position: forward and backward, attention over `length`.

        6 per matrix-multiply weight, plus 6·L·N·H·length for the two attention products over the
        lower triangle (Chowdhery et al. 2022, appendix B, with the causal half). The embedding
        lookup is free; rematerialisation is not counted.
        """
        attention = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        weights = self.num_layers * (attention + 3 * self.embed_dim * self.mlp_dim)
        weights += (1 if self.head == SCORE else self.vocab_size) * self.embed_dim
        return 6.0 * weights + 6.0 * self.num_layers * self.num_heads * self.head_dim * length


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredLlamaConfig(LlamaConfig):
    """A Llama with a score head in place of the output projection, a number for each position: a
    reward model. Its fields are those of the Llama."""

    head: ClassVar[str] = SCORE


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How the model runs; none of it changes what is computed beyond rounding, which `gather_dtype`
    makes coarse.

    `attention` is 'xla' (dense, the reference), 'triangular' (short rows on a CPU), 'blockwise'
    (memory-bounded), 'pallas' (TPU v3 and later), 'pallas_interpret' (the same run slowly anywhere,
    for tests), or 'auto', which `attention.choose` explains. `attention_block` is the queries and
    keys of a block of the kernel: None takes what was tuned for the chip. `remat` recomputes each
    layer in the backward pass, keeping what `remat_policy` says, one of REMAT_POLICIES: None takes
    what the slice of the run says (`parallel/slices.py`), and without one keeps nothing.
    `row_parts` is in how many parts a layer takes its rows where `tensor` divides them
    (`layers.Block`): None takes what the slice says, and without one 1. `products_apart` keeps what
    is computed element by element out of the products of a TPU (`products.apart`): None takes what
    the slice says, and without one does not. `balanced` gives each
    device along `context` two chunks of a row instead of one equal run (`parallel/balance.py`):
    None does so in a run whose rows hold one example each. `gather_dtype` 'int8' gathers the
    weights of linear layers over `fsdp` and `context` in codes, about half the bytes of bfloat16,
    and so multiplies with rounded weights (`quant/in_transit.py`); gradients go to the weights
    that are not, in the compute dtype. None gathers in the compute dtype. `adapter` is that of the
    run (`recipe.TrainConfig.adapter`), which sets it here, as it does `pairs_first`, that of its
    mesh (`mesh.MeshConfig`).
    """

    compute_dtype: str = "bfloat16"
    attention: str = "auto"
    attention_block: int | None = None
    remat: bool = True
    remat_policy: str | None = None
    row_parts: int | None = None
    products_apart: bool | None = None
    balanced: bool | None = None
    gather_dtype: str | None = None
    adapter: LoRAConfig | None = None
    pairs_first: bool = dataclasses.field(default=False, init=False)

    def __post_init__(self):
        validation.check(self, self._rules)

    def _rules(self):
        yield validation.one_of("compute_dtype", self.compute_dtype, DTYPES)
        yield validation.one_of("attention", self.attention, ATTENTION)
        yield (
            self.attention_block in (None, *ATTENTION_BLOCKS),
            f"attention_block = {self.attention_block}: expected None or one of {ATTENTION_BLOCKS}",
        )
        parts = self.row_parts
        yield parts is None or parts > 0, f"row_parts = {parts}: expected None or a positive number"
        if self.gather_dtype is not None:
            yield validation.one_of("gather_dtype", self.gather_dtype, GATHER_DTYPES)
        if self.remat_policy is not None:
            yield validation.one_of("remat_policy", self.remat_policy, REMAT_POLICIES)


_LLAMA2 = dict(
    vocab_size=32000, head_dim=128, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False,
    max_positions=4096,
)  # fmt: skip
_CODE = dict(
    vocab_size=32016, head_dim=128, rope_theta=1e6, norm_eps=1e-5, tie_embeddings=False,
    max_positions=16384,
)  # fmt: skip
_7B = dict(num_layers=32, embed_dim=4096, mlp_dim=11008, num_heads=32, num_kv_heads=32)
_13B = dict(num_layers=40, embed_dim=5120, mlp_dim=13824, num_heads=40, num_kv_heads=40)
_34B = dict(num_layers=48, embed_dim=8192, mlp_dim=22016, num_heads=64, num_kv_heads=8)
_70B = dict(num_layers=80, embed_dim=8192, mlp_dim=28672, num_heads=64, num_kv_heads=8)

NAMED = {
    "llama2_7b": LlamaConfig(**_LLAMA2, **_7B),
    "llama2_13b": LlamaConfig(**_LLAMA2, **_13B),
    "llama2_70b": LlamaConfig(**_LLAMA2, **_70B),
    "codellama_7b": LlamaConfig(**_CODE, **_7B),
    "codellama_13b": LlamaConfig(**_CODE, **_13B),
    "codellama_34b": LlamaConfig(**(_CODE | {"vocab_size": 32000}), **_34B),
}


def _in_float32(value: Any) -> Any:
    return np.float32(value) if isinstance(value, float) else value


def named(name: str) -> LlamaConfig:
    """The published model `name`, e.g. 'llama2_7b'. Raises `UsageError` for an unknown name."""
    if name not in NAMED:
        raise validation.UsageError(
            f"model {name!r} is unknown; expected one of {sorted(NAMED)}"
            f"{validation.nearest(name, NAMED)}"
        )
    return NAMED[name]
