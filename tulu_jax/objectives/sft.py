"""Supervised fine-tuning: the mean negative log-likelihood of the assistant's tokens."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tulu_jax import validation
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.objectives import losses

KIND = "sft"
METRICS = ("loss",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """`loss_norm` is 'token' (one token-weighted mean per update) or 'paper' (the mean of the means
    of `loss_norm_rows`-row groups, as the original trainer accumulated micro-batches of 32).

    `vocab_chunk` is the number of positions of a row whose logits exist at once.
    """

    loss_norm: str = "token"
    loss_norm_rows: int = 32
    vocab_chunk: int = 512

    def __post_init__(self):
        validation.check(
            self,
            lambda: [
                validation.one_of("loss_norm", self.loss_norm, ("token", "paper")),
                (self.loss_norm_rows > 0, f"loss_norm_rows = {self.loss_norm_rows}: not positive"),
                (self.vocab_chunk > 0, f"vocab_chunk = {self.vocab_chunk}: not positive"),
            ],
        )


def token_weights(loss_mask: Bool[Array, "B T"], *, norm: str, rows: int) -> Float[Array, "B T"]:
    """The weight of each token in the loss of one update of B rows; over all tokens they sum to 1.

    'token': 1 / trained tokens of the update. 'paper': 1 / (groups × trained tokens of the token's
    group), groups of `rows` consecutive rows; a group with no trained token does not count.
    """
    mask = loss_mask.astype(jnp.float32)
    groups = 1 if norm == "token" else mask.shape[0] // rows
    grouped = mask.reshape(groups, -1)
    counts = grouped.sum(axis=1, keepdims=True)
    used = jnp.maximum((counts > 0).sum(), 1)
    return (grouped / (jnp.maximum(counts, 1.0) * used)).reshape(mask.shape)


def add_weights(batch: dict, config: SFTConfig) -> dict:
    """`batch` with float32 `weights` [B, T] over the whole update, before it is cut into pieces."""
    weights = token_weights(batch["loss_mask"], norm=config.loss_norm, rows=config.loss_norm_rows)
    return {**batch, "weights": weights}


def loss(
    params: llama.Params,
    batch: dict,
    *,
    config: SFTConfig,
    model: LlamaConfig,
    execution: ExecutionConfig,
) -> tuple[Float[Array, ""], tuple[losses.Metrics, losses.Metrics]]:
    """The share of the update's loss that these rows carry: Σ weight × −log p. Shares add up.

    With it the metrics as shares, and no metric row by row.
    """
    hidden = llama.hidden_states(
        model,
        execution,
        params,
        tokens=batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
    )
    value = losses.weighted_nll(
        hidden, llama.unembedding(params), batch["targets"], batch["weights"], config.vocab_chunk
    )
    return value, ({"loss": value}, {})
