"""Direct preference optimisation, and its relatives; `*pairs` is the shape of `example`, as in
`pairs`."""

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
from tulu_jax.objectives import dpo_feed, losses, objective, pairs, preference_losses
from tulu_jax.objectives.preference_losses import CHOSEN, REJECTED
from tulu_jax.training.state import Frozen

REFERENCES = ("cached", "resident")
SAFE = -1.0  # the log-probability of places without a pair: finite in every loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(pairs.OnPairs):
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

    head: ClassVar[str] = LM_HEAD
    metrics: ClassVar[tuple[str, ...]] = (
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected", "kl", *pairs.OnPairs.LENGTHS),
    )

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

    def fields(self, **shape):
        """Those of all pairs, and with a cached reference its float32 `ref_logps` [*pairs, 2]."""
        found = super().fields(**shape)
        if not self.caches_reference:
            return found
        return {**found, "ref_logps": fields_lib.of_examples(found, "float32", 2)}

    def split(self, params, key):
        del key
        resident = self.needs_reference and self.reference == "resident"
        return params, Frozen(reference=params) if resident else Frozen()

    def compute(self, forward, params, frozen, batch):
        """The mean of the pairs' losses; in `examples` each metric pair by pair, [*pairs]."""
        logps = self.response_logps(forward, params, batch)
        real = batch["example"] >= 0
        lengths = pairs.lengths(batch)
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
        }
        return pairs.loss(values, batch)

    def response_logps(
        self, forward: objective.Forward, params: llama.Params, batch: objective.Batch
    ) -> Float[Array, "*pairs 2"]:
        """Summed float32 log-probability of both responses of each pair, [CHOSEN, REJECTED]; 0
        where there is no pair."""
        rows = pairs.rows(batch)
        paper = self.log_softmax_dtype == "bfloat16"
        token_logps = losses.bfloat16_token_logps if paper else losses.token_logps
        hidden, unembedding = forward(params, rows), llama.unembedding(params)
        logps = token_logps(hidden, unembedding, rows["targets"], self.vocab_chunk)
        return pairs.response_sums(logps.reshape(batch["tokens"].shape), batch)

    def feed(self, run):
        return dpo_feed.PairFeed(self, run)

    def _ref_logps(self, forward, frozen, batch):
        if self.caches_reference:
            return batch["ref_logps"]
        reference = frozen.base if frozen.reference is None else frozen.reference
        quiet = {name: value for name, value in batch.items() if name != llama.NOISE}
        return jax.lax.stop_gradient(self.response_logps(forward, reference, quiet))

    def _rewards(self, ratios, lengths) -> objective.Arrays:
        """Implicit rewards β(log π − log π_ref), and the mean of log π − log π_ref over both
        answers: an estimate, on the data's answers instead of the policy's own, of the KL
        divergence from the reference in nats an answer.

        Without a reference the rewards are β times the mean log π of a token, as in SimPO and ORPO.
        """
        if not self.needs_reference:
            ratios = ratios / jnp.maximum(lengths, 1.0)
        kl = ratios.mean(axis=-1) if self.needs_reference else jnp.zeros(ratios.shape[:-1])
        return pairs.rewards(self.beta * ratios) | {"kl": kl}
