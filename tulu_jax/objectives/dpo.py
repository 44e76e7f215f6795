"""Direct preference optimisation, and its relatives, on pairs packed into rows or in two rows each.

Packed rows are [B, T] with `branches`: a segment is a prompt (0), its chosen (1) and its rejected
answer (2); the pair of segment s is `example[:, s - 1]`, of [B, P]. Plain rows are [B, 2, T], the
prompt before each answer, and `example` is [B]. Below, `*pairs` is the shape of `example`, which is
−1 where there is no pair.
"""

import dataclasses
import warnings
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tulu_jax import validation
from tulu_jax.data import fields as fields_lib
from tulu_jax.models import llama
from tulu_jax.models.config import DTYPES, LM_HEAD
from tulu_jax.objectives import dpo_feed, losses, objective, preference_losses
from tulu_jax.objectives.preference_losses import CHOSEN, REJECTED
from tulu_jax.training.state import Frozen

REFERENCES = ("cached", "resident")
SAFE = -1.0  # the log-probability of places without a pair: finite in every loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """`loss` is one of `preference_losses.LOSSES`; `beta` scales what it compares.

    `label_smoothing` ε is the share of flipped labels that 'sigmoid' (conservative DPO), 'robust'
    and 'simpo' reckon with, `target_margin` the γ of 'simpo'. `reference`: 'cached' computes the
    reference's log-probabilities once, before training; 'resident' keeps a frozen copy of the first
    parameters instead. `log_softmax_dtype` 'bfloat16' is as the original computed it, see
    `losses.bfloat16_token_logps`. `vocab_chunk` as in `SFTConfig`. The functions are those of
    `objective.Objective`.
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    target_margin: float = 0.5
    reference: str = "cached"
    log_softmax_dtype: str = "float32"
    vocab_chunk: int = 512

    kind: ClassVar[str] = "preference"
    stage: ClassVar[str] = "dpo"
    head: ClassVar[str] = LM_HEAD
    metrics: ClassVar[tuple[str, ...]] = (
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected", "kl", "lengths/chosen", "lengths/rejected"),
        "truncated",
    )
    watched: ClassVar[tuple[str, ...]] = ("rewards/margins",)
    param_axes: ClassVar[tuple] = ()
    row_multiple: ClassVar[int] = 1
    reward_from: ClassVar[None] = None

    def __post_init__(self):
        validation.check(self, self._rules)

    def _rules(self):
        yield validation.one_of("loss", self.loss, preference_losses.LOSSES)
        yield validation.one_of("reference", self.reference, REFERENCES)
        yield validation.one_of("log_softmax_dtype", self.log_softmax_dtype, DTYPES)
        yield self.beta > 0, f"beta = {self.beta}: expected a positive number"
        smoothing = self.label_smoothing
        yield 0 <= smoothing < 0.5, f"label_smoothing = {smoothing}: expected 0 or more, below 0.5"
        yield (
            smoothing == 0 or self.loss in preference_losses.SMOOTHED,
            f"label_smoothing = {smoothing} with loss = {self.loss!r}, which does not take it; "
            f"expected one of {preference_losses.SMOOTHED}",
        )
        yield self.target_margin >= 0, f"target_margin = {self.target_margin}: expected 0 or more"
        yield self.vocab_chunk > 0, f"vocab_chunk = {self.vocab_chunk}: not positive"
        self._warn_of_scale()  # here, where every field is known to have its type

    def _warn_of_scale(self):
        said = f"DPOConfig: loss = {self.loss!r} with beta = {self.beta}: it compares "
        if self.loss in preference_losses.PER_TOKEN and self.beta < 1:
            warnings.warn(
                f"{said}means over tokens, which are smaller than sums by the length of an answer, "
                "a few hundred, so this hardly moves the model; means go with a beta of 2 to 10 "
                "(Tülu 3: 5)",
                stacklevel=2,
            )
        if self.loss in ("sigmoid", "robust", "hinge") and self.beta >= 1:
            warnings.warn(
                f"{said}sums over tokens, where 0.01 to 0.5 is usual (TÜLU 2: 0.1); a beta this "
                "large is meant for 'sigmoid_norm'",
                stacklevel=2,
            )

    @property
    def needs_reference(self) -> bool:
        return self.loss not in preference_losses.REFERENCE_FREE

    @property
    def caches_reference(self) -> bool:
        """Whether a batch brings the reference's log-probabilities."""
        return self.needs_reference and self.reference == "cached"

    def first_pass(self, config, mesh):
        if not self.caches_reference:
            return None
        return dpo_feed.make_scores(config), dpo_feed.pass_rows(config, mesh)

    def saves_memory(self):
        return ["DPOConfig.reference = 'cached'"] if self.reference == "resident" else []

    def problems(self, config):
        yield (
            config.reference_dir is None or self.caches_reference,
            f"reference_dir = {config.reference_dir!r} is for DPO with reference = 'cached'; this "
            "run caches no reference",
        )
        yield losses.rule(self.log_softmax_dtype, config.execution.compute_dtype)

    def identity(self):
        return dataclasses.asdict(self)

    def fields(self, *, rows, length, packing, places):
        """Those of `fields.pairs`, bool `truncated` [*pairs], whether the pair was cut to fit, and
        with a cached reference its float32 `ref_logps` [*pairs, 2]."""
        packed = packing != "none"
        found = fields_lib.pairs(rows=rows, length=length, packed=packed, places=places)
        added = {"truncated": fields_lib.of_examples(found, "bool")}
        if self.caches_reference:
            added["ref_logps"] = fields_lib.of_examples(found, "float32", 2)
        return {**found, **added}

    def split(self, params, key):
        del key
        resident = self.needs_reference and self.reference == "resident"
        return params, Frozen(reference=params) if resident else Frozen()

    def weigh(self, batch):
        """`batch` with float32 `weights` [*pairs]: 1 / pairs of the update, 0 where there is
        none."""
        real = (batch["example"] >= 0).astype(jnp.float32)
        return {**batch, "weights": real / jnp.maximum(real.sum(), 1.0)}

    def counts(self, batch):
        return {"pairs": self.measured(batch)} | objective.position_counts(batch)

    def measured(self, batch):
        return jnp.sum(batch["example"] >= 0, dtype=jnp.float32)

    def compute(self, forward, params, frozen, batch):
        """The mean of the pairs' losses; in `examples` each metric pair by pair, [*pairs]."""
        logps = self.response_logps(forward, params, batch)
        real = batch["example"] >= 0
        lengths = response_sums(jnp.ones(batch["loss_mask"].shape), batch)
        ratios = logps - self._ref_logps(forward, frozen, batch) if self.needs_reference else logps
        ratios = jnp.where(real[..., None], ratios, SAFE)
        values = {
            "loss": preference_losses.pair_losses(
                self.loss,
                ratios,
                lengths,
                real=real,
                beta=self.beta,
                label_smoothing=self.label_smoothing,
                target_margin=self.target_margin,
            )
        }
        values |= self._rewards(ratios, lengths) | {
            "logps/chosen": logps[..., CHOSEN],
            "logps/rejected": logps[..., REJECTED],
            "lengths/chosen": lengths[..., CHOSEN],
            "lengths/rejected": lengths[..., REJECTED],
            "truncated": batch["truncated"].astype(jnp.float32),
        }
        shares = {name: jnp.sum(batch["weights"] * value) for name, value in values.items()}
        examples = jax.lax.stop_gradient(values) | {"example": batch["example"]}
        return objective.Loss(value=shares["loss"], metrics=shares, examples=examples)

    def response_logps(
        self, forward: objective.Forward, params: llama.Params, batch: objective.Batch
    ) -> Float[Array, "*pairs 2"]:
        """Summed float32 log-probability of both responses of each pair, [CHOSEN, REJECTED]; 0
        where there is no pair.

        A pair lies in one row, or in neighbours along the batch, so it stays on one device.
        """
        length = batch["tokens"].shape[-1]
        rows = {
            name: batch[name].reshape(-1, length)
            for name in (*fields_lib.BY_POSITION, *fields_lib.BRANCHES)
            if name in batch
        }
        if llama.NOISE in batch:
            rows[llama.NOISE] = batch[llama.NOISE].reshape(-1, batch[llama.NOISE].shape[-1])
        paper = self.log_softmax_dtype == "bfloat16"
        token_logps = losses.bfloat16_token_logps if paper else losses.token_logps
        hidden, unembedding = forward(params, rows), llama.unembedding(params)
        logps = token_logps(hidden, unembedding, rows["targets"], self.vocab_chunk)
        return response_sums(logps.reshape(batch["tokens"].shape), batch)

    def evaluating(self):
        return self

    def feed(self, run):
        return dpo_feed.PairFeed(self, run)

    def _ref_logps(self, forward, frozen, batch):
        if self.caches_reference:
            return batch["ref_logps"]
        reference = frozen.base if frozen.reference is None else frozen.reference
        quiet = {name: value for name, value in batch.items() if name != llama.NOISE}
        return jax.lax.stop_gradient(self.response_logps(forward, reference, quiet))

    def _rewards(self, ratios, lengths) -> objective.Arrays:
        """Implicit rewards β(log π − log π_ref), their margin, whether it is positive (a tie is not
        a win), and the mean of log π − log π_ref over both answers: an estimate, on the data's
        answers instead of the policy's own, of the KL divergence from the reference in nats an
        answer.

        Without a reference the rewards are β times the mean log π of a token, as in SimPO and ORPO.
        """
        if not self.needs_reference:
            ratios = ratios / jnp.maximum(lengths, 1.0)
        rewards = self.beta * ratios
        margins = rewards[..., CHOSEN] - rewards[..., REJECTED]
        return {
            "rewards/chosen": rewards[..., CHOSEN],
            "rewards/rejected": rewards[..., REJECTED],
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).astype(jnp.float32),
            "kl": ratios.mean(axis=-1) if self.needs_reference else jnp.zeros(margins.shape),
        }


def response_sums(values: Float[Array, "B *two T"], batch: dict) -> Float[Array, "*pairs 2"]:
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
