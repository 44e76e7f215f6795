"""The arithmetic of PPO (Schulman et al. 2017) over the tokens of answers.

`*rows T`: a position of a row is where an answer's token is the target; `mask` marks those. On the
host in float64: rewards by token, generalised advantages (Schulman et al. 2016), whitening. On the
devices: the two clipped losses.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

EPS = 1e-6  # of a variance that is divided by, as the original's `whiten`


def token_rewards(
    kl: Float[np.ndarray, "B T"],
    scores: Float[np.ndarray, "B"],
    last: Int[np.ndarray, "B"],
    mask: Bool[np.ndarray, "B T"],
    *,
    kl_coef: float,
) -> Float[np.ndarray, "B T"]:
    """−kl_coef · kl of each token, and at the position `last` of a row its score as well."""
    rewards = np.where(mask, -kl_coef * kl.astype(np.float64), 0.0)
    rewards[np.arange(len(last)), last] += scores
    return rewards


def gae(
    rewards: Float[np.ndarray, "B T"],
    values: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[np.ndarray, "B T"], Float[np.ndarray, "B T"]]:
    """Advantages A_t = δ_t + γλ A_{t+1}, δ_t = r_t + γ V_{t+1} − V_t, with V = 0 behind an answer's
    last token; and returns A + V, which the value model is to learn. Both are 0 off the mask."""
    values = np.where(mask, values.astype(np.float64), 0.0)
    advantages = np.zeros(values.shape)
    following, value = np.zeros(len(values)), np.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * value - values[:, t]
        following = np.where(mask[:, t], delta + gamma * lam * following, 0.0)
        advantages[:, t], value = following, values[:, t]
    return advantages, advantages + values


def whitened(
    values: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]
) -> Float[np.ndarray, "B T"]:
    """`values` with mean 0 and variance 1 over the mask, 0 off it; the variance has Bessel's
    correction."""
    inside = values[mask]
    variance = np.sum((inside - inside.mean()) ** 2) / max(inside.size - 1, 1)
    return np.where(mask, (values - inside.mean()) / np.sqrt(variance + EPS), 0.0)


def explained_variance(
    returns: Float[np.ndarray, "B T"],
    values: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
) -> float:
    """1 − Var(returns − values) / Var(returns) over the mask; 0 where the returns do not vary."""
    variance = np.var(returns[mask])
    return float(1 - np.var(returns[mask] - values[mask]) / variance) if variance > 0 else 0.0


def policy_losses(
    logps: Float[Array, "B T"],
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    clip: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """max(−A ρ, −A clip(ρ, 1 ± clip)) of each token, and the ratio ρ = π / π_old."""
    ratios = jnp.exp(logps - old_logps)
    clipped = jnp.clip(ratios, 1 - clip, 1 + clip)
    return jnp.maximum(-advantages * ratios, -advantages * clipped), ratios


def value_losses(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    *,
    clip: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """½ max((V − R)², (V_clipped − R)²) of each token, V_clipped being V within ± clip of V_old;
    and 1 where the clipped one is the larger."""
    clipped = old_values + jnp.clip(values - old_values, -clip, clip)
    free, held = jnp.square(values - returns), jnp.square(clipped - returns)
    larger = jax.lax.stop_gradient(held > free).astype(jnp.float32)
    return 0.5 * jnp.maximum(free, held), larger
