"""Direct preference optimisation against cached reference log-probabilities."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from tulu_jax import validation
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.objectives import losses

KIND = "preference"
CHOSEN, REJECTED = 0, 1
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """`beta` scales summed log-probability ratios. `vocab_chunk` as in `SFTConfig`."""

    beta: float = 0.1
    vocab_chunk: int = 512

    def __post_init__(self):
        validation.check(
            self,
            lambda: [
                (self.beta > 0, f"beta = {self.beta}: expected a positive number"),
                (self.vocab_chunk > 0, f"vocab_chunk = {self.vocab_chunk}: not positive"),
            ],
        )


def add_weights(batch: dict, config: DPOConfig) -> dict:
    """`batch` with float32 `weights` [B]: 1 / pairs of the update, 0 for padding rows."""
    real = (batch["example"] >= 0).astype(jnp.float32)
    return {**batch, "weights": real / jnp.maximum(real.sum(), 1.0)}


def response_logps(
    params: llama.Params,
    batch: dict,
    *,
    config: DPOConfig,
    model: LlamaConfig,
    execution: ExecutionConfig,
) -> Float[Array, "B 2"]:
    """Summed float32 log-probability of both responses of each pair, [CHOSEN, REJECTED].

    The two sides of a pair are neighbours along the batch, so a pair stays on one device.
    """
    pairs, _, length = batch["tokens"].shape
    flat = {
        name: batch[name].reshape(2 * pairs, length)
        for name in ("tokens", "targets", "loss_mask", "segment_ids", "positions")
    }
    hidden = llama.hidden_states(
        model,
        execution,
        params,
        tokens=flat["tokens"],
        segment_ids=flat["segment_ids"],
        positions=flat["positions"],
    )
    logps = losses.token_logps(
        hidden, llama.unembedding(params), flat["targets"], config.vocab_chunk
    )
    return losses.sum_logps(logps, flat["loss_mask"]).reshape(pairs, 2)


def loss(
    params: llama.Params,
    batch: dict,
    *,
    config: DPOConfig,
    model: LlamaConfig,
    execution: ExecutionConfig,
) -> tuple[Float[Array, ""], losses.Metrics]:
    """The share of the update's DPO loss that these pairs carry, and the same share of each metric.

    `batch["ref_logps"]` is float32 [B, 2], the reference's `response_logps`.
    """
    logps = response_logps(params, batch, config=config, model=model, execution=execution)
    pair_losses, metrics = losses.dpo_loss(
        logps[:, CHOSEN],
        logps[:, REJECTED],
        batch["ref_logps"][:, CHOSEN],
        batch["ref_logps"][:, REJECTED],
        beta=config.beta,
    )
    metrics |= {
        "loss": pair_losses,
        "logps/chosen": logps[:, CHOSEN],
        "logps/rejected": logps[:, REJECTED],
    }
    shares = {name: jnp.sum(batch["weights"] * value) for name, value in metrics.items()}
    return shares["loss"], shares
