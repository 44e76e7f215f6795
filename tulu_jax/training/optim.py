"""AdamW with linear warm-up and linear decay, counted in updates."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from tulu_jax import validation
from tulu_jax.parallel import sharding
from tulu_jax.training.state import VALUE


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The recipe's AdamW, without weight decay (TÜLU 2, appendix B). b2 0.95 and a global-norm clip
    of 1.0 are its trainer's defaults (EasyLM's `optimizers.py`, November 2023).

    The learning rate rises from 0 over ceil(`warmup_ratio` × updates) updates to `learning_rate`
    and falls linearly to `end_learning_rate` at the last. `mu_dtype` is the dtype of the first
    moment.
    """

    learning_rate: float
    warmup_ratio: float
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    mu_dtype: str = "float32"
    end_learning_rate: float = 0.0

    def __post_init__(self):
        validation.check(self, self._rules)

    def _rules(self):
        yield (
            np.float32(self.learning_rate) > 0,
            f"learning_rate = {self.learning_rate}: not positive in float32",
        )
        yield 0 <= self.warmup_ratio <= 1, f"warmup_ratio = {self.warmup_ratio}: not in [0, 1]"
        yield self.weight_decay >= 0, f"weight_decay = {self.weight_decay}: negative"
        yield 0 <= self.b1 < 1, f"b1 = {self.b1}: not in [0, 1)"
        yield 0 <= self.b2 < 1, f"b2 = {self.b2}: not in [0, 1)"
        yield self.clip_norm > 0, f"clip_norm = {self.clip_norm}: not positive"
        end = self.end_learning_rate
        yield (
            0 <= end <= self.learning_rate,
            f"end_learning_rate = {end}: expected 0 to learning_rate = {self.learning_rate}",
        )
        yield validation.one_of("mu_dtype", self.mu_dtype, ("float32", "bfloat16"))


def num_warmup(config: OptimizerConfig, num_steps: int) -> int:
    """Updates over which the learning rate rises."""
    return min(math.ceil(config.warmup_ratio * num_steps), num_steps)


def problems(config: OptimizerConfig, num_steps: int) -> Iterator[str]:
    """Why `num_steps` updates would never train at the learning rate: all of them warm up.

    The first warm-up update has rate 0, so of one update nothing at all would change.
    """
    warmup = num_warmup(config, num_steps)
    if 0 < warmup == num_steps:
        only = "the only update has rate 0" if num_steps == 1 else "the rate never gets there"
        yield (
            f"found {num_steps} {'update' if num_steps == 1 else 'updates'}, {warmup} of them "
            f"warm-up (warmup_ratio = {config.warmup_ratio}, rounded up), so {only}; expected at "
            f"least one update at learning_rate = {config.learning_rate}. Make more updates "
            "(NUM_STEPS, NUM_EPOCHS, more rows, or a smaller BATCH_SIZE), or lower "
            "optim.OptimizerConfig.warmup_ratio (0.0 for none)"
        )


def share_below_rounding(params: dict, rate: float) -> float:
    """The share of the parameters that a change by `rate`, up or down, rounds back to what they
    were, in their dtype. One update of AdamW moves a parameter by about its learning rate."""

    def unchanged(leaf):
        info, exact = jnp.finfo(leaf.dtype), leaf.astype(jnp.float32)
        moved = [
            jax.lax.reduce_precision(exact + change, info.nexp, info.nmant)
            for change in (jnp.float32(rate), jnp.float32(-rate))
        ]
        same = (moved[0] == exact) & (moved[1] == exact)
        # Axis by axis: a float32 sum of very many ones would stop at 2^24.
        for _ in range(same.ndim):
            same = jnp.mean(same, axis=-1, dtype=jnp.float32)
        return sharding.replicate(same)

    shares = jax.jit(lambda tree: jax.tree.map(unchanged, tree))(params)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    found = [float(share) for share in jax.tree.leaves(jax.device_get(shares))]
    return sum(size * share for size, share in zip(sizes, found, strict=True)) / sum(sizes)


def warn_of_rounding(params: dict, rate: float) -> None:
    """Warns if much of what the updates would change is below the parameters' precision."""
    dtype = jax.tree.leaves(params)[0].dtype
    if rate >= jnp.finfo(dtype).eps:
        return
    share = share_below_rounding(params, rate)
    if share > 0:
        advice = "a higher learning_rate"
        if dtype != jnp.float32:
            advice = "recipe.TrainConfig.param_dtype = 'float32'"
        logging.warning(
            "Estimate: %.2f %% of the parameters stay as they are in an update at the peak "
            "rate: learning_rate = %g, about what AdamW moves each by, is less than half of "
            "the step to the next %s. What would train them: %s",
            *(100 * share, rate, dtype.name, advice),
        )


def schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate of update i (from 0). The first update has rate 0, as in the original."""
    warmup = num_warmup(config, num_steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, warmup),
            optax.linear_schedule(
                config.learning_rate, config.end_learning_rate, max(num_steps - warmup, 1)
            ),
        ],
        [warmup],
    )


def make(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, that of a value network by its own, then AdamW on the schedule."""
    return optax.chain(
        _clip(config.clip_norm),
        optax.adamw(
            schedule(config, num_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mu_dtype=config.mu_dtype,
        ),
    )


def _clip(most: float) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(most)

    def update(updates, state, params=None):
        if VALUE not in updates:
            return clip.update(updates, state, params)
        policy = {name: part for name, part in updates.items() if name != VALUE}
        parts = [clip.update(part, state)[0] for part in (policy, {VALUE: updates[VALUE]})]
        return parts[0] | parts[1], state

    return optax.GradientTransformation(clip.init, update)


def shardings(optimizer: optax.GradientTransformation, state, params):
    """The sharding of each leaf of an optimizer's `state`, for shardings `params` of what it
    updates: moments lie as their parameters, all else whole on every device."""
    mesh = jax.tree.leaves(params)[0].mesh
    return optax.tree_utils.tree_map_params(
        functools.partial(jax.eval_shape, optimizer.init),  # a dry run has nothing to run it on
        lambda _, sharding: sharding,
        state,
        params,
        transform_non_params=lambda _: jax.NamedSharding(mesh, jax.P()),
    )
