"""Losses of preference pairs over summed log-probabilities, each named by its paper.

`ratios` float32 [..., 2] are log π(y|x) − log π_ref(y|x) of the answers [CHOSEN, REJECTED]; the
losses of `REFERENCE_FREE` take log π(y|x) itself. `lengths` [..., 2] count the answers' tokens.
Every loss is [...], one value a pair.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

CHOSEN, REJECTED = 0, 1
LOSSES = ("sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "kto_pair", "orpo", "simpo")
REFERENCE_FREE = ("orpo", "simpo")
SMOOTHED = ("sigmoid", "robust", "simpo")  # those that take label smoothing
PER_TOKEN = ("sigmoid_norm", "simpo")  # those whose beta scales means over tokens

Ratios = Float[Array, "*pairs 2"]
Losses = Float[Array, "*pairs"]


def pair_losses(
    loss: str,
    ratios: Ratios,
    lengths: Float[Array, "*pairs 2"],
    *,
    real: Bool[Array, "*pairs"],
    beta: float,
    label_smoothing: float,
    target_margin: float,
) -> Losses:
    """The loss named `loss`; `real` is False for places that hold no pair."""
    means = ratios / jnp.maximum(lengths, 1.0)
    match loss:
        case "sigmoid":
            return sigmoid(beta * _difference(ratios), label_smoothing=label_smoothing)
        case "sigmoid_norm":
            return sigmoid(beta * _difference(means), label_smoothing=0.0)
        case "ipo":
            return ipo(means, beta=beta)
        case "hinge":
            return hinge(ratios, beta=beta)
        case "robust":
            return robust(ratios, beta=beta, label_smoothing=label_smoothing)
        case "kto_pair":
            return kto_pair(ratios, real, beta=beta)
        case "orpo":
            return orpo(means, beta=beta)
        case "simpo":
            margins = beta * _difference(means) - target_margin
            return sigmoid(margins, label_smoothing=label_smoothing)
    raise ValueError(f"loss = {loss!r}: expected one of {LOSSES}")


def sigmoid(margins: Losses, *, label_smoothing: float) -> Losses:
    """−(1 − ε) log σ(m) − ε log σ(−m).

    m = β · difference of the sums is DPO (Rafailov et al. 2023, eq. 7), with ε > 0 conservative DPO
    (Mitchell 2023, eq. 3); of the means, length-normalised DPO (Lambert et al. 2024, eq. 6); with
    log π in place of ratios and γ subtracted, SimPO (Meng et al. 2024, eq. 6).
    """
    kept = -(1 - label_smoothing) * jax.nn.log_sigmoid(margins)
    return kept - label_smoothing * jax.nn.log_sigmoid(-margins)


def ipo(means: Ratios, *, beta: float) -> Losses:
    """(difference − 1 / 2β)² (Azar et al. 2023, eq. 17), of means over tokens as its authors do."""
    return (_difference(means) - 1 / (2 * beta)) ** 2


def hinge(ratios: Ratios, *, beta: float) -> Losses:
    """max(0, 1 − β · difference): SLiC (Zhao et al. 2023) on ratios (RSO, Liu et al. 2023)."""
    return jax.nn.relu(1 - beta * _difference(ratios))


def robust(ratios: Ratios, *, beta: float, label_smoothing: float) -> Losses:
    """Unbiased under labels flipped with probability ε (Chowdhury et al. 2024, eq. 12)."""
    margins = beta * _difference(ratios)
    kept = (1 - label_smoothing) * jax.nn.log_sigmoid(margins)
    flipped = label_smoothing * jax.nn.log_sigmoid(-margins)
    return (flipped - kept) / (1 - 2 * label_smoothing)


def kto_pair(ratios: Ratios, real: Bool[Array, "*pairs"], *, beta: float) -> Losses:
    """KTO on pairs (Ethayarajh et al. 2024, eq. 7): each side against z, the other side's KL.

    z is the mean ratio of the other side over the pairs of this forward, at least 0, a constant to
    the gradient: the loss depends on which pairs share a forward.
    """
    share = real[..., None] / jnp.maximum(real.sum(), 1)
    z = jnp.sum(share * ratios, axis=tuple(range(ratios.ndim - 1)))
    z = jax.lax.stop_gradient(jnp.maximum(z, 0.0))
    chosen = 1 - jax.nn.sigmoid(beta * (ratios[..., CHOSEN] - z[REJECTED]))
    rejected = 1 - jax.nn.sigmoid(beta * (z[CHOSEN] - ratios[..., REJECTED]))
    return (chosen + rejected) / 2


def orpo(means: Ratios, *, beta: float) -> Losses:
    """−log P(chosen) − β log σ(log odds ratio), log P over tokens (Hong et al. 2024, eq. 6)."""
    log_odds = means - jnp.log(-jnp.expm1(means))
    return -means[..., CHOSEN] - beta * jax.nn.log_sigmoid(_difference(log_odds))


def _difference(values: Ratios) -> Losses:
    return values[..., CHOSEN] - values[..., REJECTED]
