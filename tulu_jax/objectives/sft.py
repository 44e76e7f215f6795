"""Supervised fine-tuning: the mean negative log-likelihood of the assistant's tokens."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tulu_jax import validation
from tulu_jax.data import fields as fields_lib
from tulu_jax.models import llama
from tulu_jax.models.config import LM_HEAD
from tulu_jax.objectives import loader_feed, losses, objective
from tulu_jax.training.state import Frozen


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """`loss_norm` is 'token' (one token-weighted mean per update) or 'paper' (the mean of the means
    of `loss_norm_rows`-row groups, as the original trainer accumulated micro-batches of 32).

    `vocab_chunk` is the number of positions of a row whose logits exist at once. The functions are
    those of `objective.Objective`.
    """

    loss_norm: str = "token"
    loss_norm_rows: int = 32
    vocab_chunk: int = 512

    kind: ClassVar[str] = "sft"
    stage: ClassVar[str] = "sft"
    head: ClassVar[str] = LM_HEAD
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    watched: ClassVar[tuple[str, ...]] = ()
    param_axes: ClassVar[tuple] = ()
    reward_from: ClassVar[None] = None

    def __post_init__(self):
        validation.check(
            self,
            lambda: [
                validation.one_of("loss_norm", self.loss_norm, ("token", "paper")),
                (self.loss_norm_rows > 0, f"loss_norm_rows = {self.loss_norm_rows}: not positive"),
                (self.vocab_chunk > 0, f"vocab_chunk = {self.vocab_chunk}: not positive"),
            ],
        )

    @property
    def row_multiple(self) -> int:
        return self.loss_norm_rows if self.loss_norm == "paper" else 1

    def problems(self, config):
        yield (
            config.batch_size % self.row_multiple == 0,
            f"loss_norm = 'paper' averages groups of {self.row_multiple} rows; batch_size = "
            f"{config.batch_size} is not a multiple",
        )
        yield (
            self.loss_norm != "paper" or config.data.packing == "none",
            "loss_norm = 'paper' is defined for one conversation a row; set packing = 'none'",
        )
        yield (
            config.reference_dir is None,
            f"reference_dir = {config.reference_dir!r} is for DPO with reference = 'cached'; this "
            "run caches no reference",
        )

    def first_pass(self, config, mesh):
        return None

    def saves_memory(self):
        return []

    def identity(self):
        return dataclasses.asdict(self)

    def fields(self, *, rows, length, packing, places):
        del packing, places
        return fields_lib.conversations(rows=rows, length=length)

    def split(self, params, key):
        del key
        return params, Frozen()

    def weigh(self, batch):
        """`batch` with float32 `weights` [B, T], which sum to 1 over the update."""
        weights = token_weights(batch["loss_mask"], norm=self.loss_norm, rows=self.loss_norm_rows)
        return {**batch, "weights": weights}

    def counts(self, batch):
        first = (batch["segment_ids"] > 0) & (batch["positions"] == 0)
        conversations = {"conversations": jnp.sum(first, dtype=jnp.float32)}
        return conversations | objective.position_counts(batch)

    def measured(self, batch):
        return jnp.sum(batch["loss_mask"], dtype=jnp.float32)

    def compute(self, forward, params, frozen, batch):
        """Σ weight × −log p over the rows; no value for each example."""
        del frozen
        hidden, unembedding = forward(params, batch), llama.unembedding(params)
        value = losses.weighted_nll(
            hidden, unembedding, batch["targets"], batch["weights"], self.vocab_chunk
        )
        return objective.Loss(value=value, metrics={"loss": value}, examples={})

    def evaluating(self):
        return dataclasses.replace(self, loss_norm="token")

    def feed(self, run):
        return loader_feed.LoaderFeed(run)


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
