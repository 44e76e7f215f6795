"""What a run is trained for: the protocol of `TrainConfig.objective`.

An objective is a frozen config dataclass with the functions below; gin picks it
(`recipe.TrainConfig.objective = @dpo.DPOConfig()`), and nothing outside this folder knows which one
it is. `sft.SFTConfig` is the shortest to read.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from tulu_jax.data.fields import Fields
from tulu_jax.models.llama import Params
from tulu_jax.training.state import Frozen
from tulu_jax.validation import Rule

Batch = dict[str, Any]
Arrays = dict[str, jax.Array]
# (params, batch) -> hidden states of its rows: `llama.forward` of the run's model.
Forward = Callable[[Params, Batch], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """The share of an update's loss that some rows carry, and what is reported of them.

    `value` is a float32 scalar, what is differentiated. `metrics` are float32 scalars, shares as
    well: those of the pieces of an update add up. `examples` are arrays with a value for each
    example of the batch, [*examples].
    """

    value: Any
    metrics: dict[str, Any]
    examples: dict[str, Any]


@runtime_checkable
class Feed(Protocol):
    """Where the batches of a run come from. It may look at the policy (rollouts), or not, and from
    `begin` on at what is frozen, `run.frozen`."""

    rows: Any  # the planned rows of the train split, a `loader.Rows`

    def begin(self, initial: Callable[[], Params], weights: str) -> None:
        """Before the first batch, on every start: makes what depends on the parameters that the run
        began with, of which `weights` is the fingerprint. `initial` loads them if they are gone."""

    def __call__(self, step: int, params: Params) -> Batch:
        """This process's rows of the batch of update `step`, counted from 1; `params` are those
        before it."""

    def evaluation(self) -> Iterator[Batch] | None:
        """This process's rows of one pass over the validation split; None if there is none."""

    def groups(self, examples: list[Mapping[str, Any]]) -> dict[str, float]:
        """Means over groups of the examples of an evaluation, from `Loss.examples` of its batches
        as numpy arrays."""


@runtime_checkable
class Objective(Protocol):
    """`kind` is that of the tasks it trains on (`registry.KINDS`), `stage` that of the layouts it
    takes on a slice (`parallel/slices.py`), `head` what its model has above the trunk, 'lm_head' or
    'score' (then rows are unshifted, `DataConfig.to_ends`), `metrics` the names in
    `Loss.metrics`, of which "loss" is one, and `watched` the names in `Loss.examples` that every
    update reads, to tell which examples are not finite. `reward_from` is where a reward model comes
    from, which `split` gets as `state.REWARD` of the base; None without one."""

    kind: str
    stage: str
    head: str
    metrics: tuple[str, ...]
    watched: tuple[str, ...]
    reward_from: str | None

    @property
    def row_multiple(self) -> int:
        """The rows of an update are a multiple of this."""

    def first_pass(self, config, mesh: jax.sharding.Mesh) -> tuple[Callable, int] | None:
        """Of a forward pass over the data before the first update of a `TrainConfig`: the pure
        function (params, batch) that the feed jits, and the rows of a batch on `mesh`. None if
        there is no such pass."""

    def saves_memory(self) -> list[str]:
        """Settings of this objective that need fewer bytes of a device."""

    def problems(self, config) -> Iterator[Rule]:
        """What of a `TrainConfig` does not go with this objective: (holds, message if not)."""

    def identity(self) -> dict[str, Any]:
        """What a resumed run must agree with, JSON-serialisable."""

    def fields(self, *, rows: int, length: int, packing: str, places: int) -> Fields:
        """The fields of a batch as the feed gives it, for `rows` rows of `length` positions that
        hold up to `places` examples."""

    def split(self, params: Params, key: jax.Array) -> tuple[Params, Frozen]:
        """Of the parameters of the base, (what trains, what is frozen). What is new is drawn with
        the typed `key`. The axes of leaves that the model does not have are in `param_axes`."""

    @property
    def param_axes(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(pattern of a path, logical axes) of leaves that `sharding.PARAM_AXES` does not have."""

    def weigh(self, batch: Batch) -> Batch:
        """`batch` with the weights of its parts over a whole update, before it is cut in pieces."""

    def counts(self, batch: Batch) -> Arrays:
        """float32 counts of an update: those of `position_counts`, and of its examples by their
        name, such as "pairs"."""

    def measured(self, batch: Batch) -> jax.Array:
        """float32: over how many tokens or examples of `batch` the metrics are means."""

    def compute(self, forward: Forward, params: Params, frozen: Frozen, batch: Batch) -> Loss:
        """The loss of rows of a weighed batch. `params` are the whole policy's, `frozen.base` among
        them; gradients are taken of the part that trains."""

    def evaluating(self) -> "Objective":
        """The objective that evaluations measure."""

    def feed(self, run) -> Feed:
        """Opens the data of a `trainer.Run`, encoding what is not yet encoded."""


def position_counts(batch: Batch) -> Arrays:
    """float32 `positions`, `nonpadding` and `trained` tokens of a batch."""
    return {
        "positions": jnp.float32(batch["tokens"].size),
        "nonpadding": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
        "trained": jnp.sum(batch["loss_mask"], dtype=jnp.float32),
    }
