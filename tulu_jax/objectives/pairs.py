"""What objectives on pairs have in common, packed into rows or in two rows each.

Packed rows are [B, T] with `branches`: a segment is a prompt (0), its chosen (1) and its rejected
answer (2); the pair of segment s is `example[:, s - 1]`, of [B, P]. Plain rows are [B, 2, T], the
prompt before each answer, and `example` is [B]. Below, `*pairs` is the shape of `example`, which is
−1 where there is no pair. A pair lies in one row, or in neighbours along the batch, so it stays on
one device.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tulu_jax.data import fields as fields_lib
from tulu_jax.models import llama
from tulu_jax.objectives import objective
from tulu_jax.objectives.preference_losses import CHOSEN, REJECTED


class OnPairs:
    """The functions of `objective.Objective` that are alike for all pairs, of a config dataclass.
    Of its `metrics` those of `LENGTHS` are the same for all."""

    LENGTHS: ClassVar[tuple[str, ...]] = ("lengths/chosen", "lengths/rejected", "truncated")

    kind: ClassVar[str] = "preference"
    stage: ClassVar[str] = "dpo"
    watched: ClassVar[tuple[str, ...]] = ("rewards/margins",)
    param_axes: ClassVar[tuple] = ()
    row_multiple: ClassVar[int] = 1
    reward_from: ClassVar[None] = None

    def first_pass(self, config, mesh) -> None:
        return None

    def identity(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def fields(self, *, rows: int, length: int, packing: str, places: int) -> fields_lib.Fields:
        """Those of `fields.pairs`, and bool `truncated` [*pairs], whether the pair was cut."""
        packed = packing != "none"
        found = fields_lib.pairs(rows=rows, length=length, packed=packed, places=places)
        return {**found, "truncated": fields_lib.of_examples(found, "bool")}

    def weigh(self, batch: objective.Batch) -> objective.Batch:
        """`batch` with float32 `weights` [*pairs]: 1 / pairs of the update, 0 where there is
        none."""
        real = (batch["example"] >= 0).astype(jnp.float32)
        return {**batch, "weights": real / jnp.maximum(real.sum(), 1.0)}

    def counts(self, batch: objective.Batch) -> objective.Arrays:
        return {"pairs": self.measured(batch)} | objective.position_counts(batch)

    def measured(self, batch: objective.Batch) -> jax.Array:
        return jnp.sum(batch["example"] >= 0, dtype=jnp.float32)

    def evaluating(self):
        return self


def rows(batch: objective.Batch) -> objective.Batch:
    """The rows of a batch as the model takes them, [rows, T] each, a plain pair's one after the
    other."""
    length = batch["tokens"].shape[-1]
    found = {
        name: batch[name].reshape(-1, length)
        for name in (*fields_lib.BY_POSITION, *fields_lib.BRANCHES)
        if name in batch
    }
    if llama.NOISE in batch:
        found[llama.NOISE] = batch[llama.NOISE].reshape(-1, batch[llama.NOISE].shape[-1])
    return found


def response_sums(
    values: Float[Array, "B *two T"], batch: objective.Batch
) -> Float[Array, "*pairs 2"]:
    """Sums of `values` over the trained tokens of each response; others get no gradient."""
    values = jnp.where(batch["loss_mask"], values, 0.0)
    if "branches" not in batch:
        return values.sum(axis=-1)
    pairs = batch["example"].shape[1]
    response = 2 * (batch["segment_ids"] - 1) + batch["branches"] - 1
    response = jnp.where(batch["loss_mask"], response, 2 * pairs)

    def row(values, response):
        return jax.ops.segment_sum(values, response, num_segments=2 * pairs + 1)[:-1]

    return jax.vmap(row)(values, response).reshape(-1, pairs, 2)


def lengths(batch: objective.Batch) -> Float[Array, "*pairs 2"]:
    """The trained tokens of each response."""
    return response_sums(jnp.ones(batch["loss_mask"].shape), batch)


def rewards(values: Float[Array, "*pairs 2"]) -> objective.Arrays:
    """What is reported of the rewards of both answers: with them their margin, and whether it is
    positive (a tie is not a win)."""
    margins = values[..., CHOSEN] - values[..., REJECTED]
    return {
        "rewards/chosen": values[..., CHOSEN],
        "rewards/rejected": values[..., REJECTED],
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).astype(jnp.float32),
    }


def loss(values: objective.Arrays, batch: objective.Batch) -> objective.Loss:
    """The mean of the losses of the pairs; `values` has "loss" and what else is reported, pair by
    pair [*pairs], and gets `OnPairs.LENGTHS`."""
    its = lengths(batch)
    values = values | {
        "lengths/chosen": its[..., CHOSEN],
        "lengths/rejected": its[..., REJECTED],
        "truncated": batch["truncated"].astype(jnp.float32),
    }
    shares = {name: jnp.sum(batch["weights"] * value) for name, value in values.items()}
    examples = jax.lax.stop_gradient(values) | {"example": batch["example"]}
    return objective.Loss(value=shares["loss"], metrics=shares, examples=examples)
