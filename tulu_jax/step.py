"""One update and one evaluation as pure functions, and the shapes of the state they act on.

`train` jits these on a mesh of devices; a dry run compiles the same functions for a named topology.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from tulu_jax.models import llama
from tulu_jax.objectives import dpo, sft
from tulu_jax.parallel import sharding
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import metrics as metrics_lib
from tulu_jax.training import optim
from tulu_jax.training.state import TrainState

OBJECTIVES = {sft.SFTConfig: sft, dpo.DPOConfig: dpo}
PAIR_MARGINS = "pair_margins"


def make_train_step(config: TrainConfig, num_steps: int) -> Callable:
    """The pure function (state, batch) -> (state, metrics) of one update, to be jitted.

    A third argument, the parameters of a resident reference, stands in for `batch["ref_logps"]`.
    The metrics are scalars, but for the margin of every pair, `PAIR_MARGINS` [*pairs].
    """
    objective = OBJECTIVES[type(config.objective)]
    optimizer = optim.make(config.optimizer, num_steps)
    learning_rate = optim.schedule(config.optimizer, num_steps)

    def loss(params, batch, reference):
        if reference is not None:
            batch = _with_reference(batch, reference, config)
        return objective.loss(
            params,
            batch,
            config=config.objective,
            model=config.model,
            execution=config.execution,
        )

    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def train_step(state: TrainState, batch: dict, reference=None) -> tuple[TrainState, dict]:
        # Weights are those of the whole update, so the shares of its pieces add up exactly.
        batch = objective.add_weights(batch, config.objective)
        if config.micro_batches == 1:
            (_, (metrics, values)), grads = value_and_grad(state.params, batch, reference)
        else:
            metrics, values, grads = _accumulate(
                lambda params, piece: value_and_grad(params, piece, reference),
                state.params,
                batch,
                config.micro_batches,
            )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            **metrics,
            "grad_norm": optax.global_norm(grads),
            "learning_rate": learning_rate(state.step),
            **metrics_lib.batch_counts(batch),
        }
        if objective is dpo:
            metrics[PAIR_MARGINS] = sharding.replicate(values["rewards/margins"])
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def _accumulate(value_and_grad, params, batch, micro_batches):
    """Sums metrics and float32 gradients over pieces of the batch, and joins what is row by row;
    row r goes to piece r mod A, so that rows stay on their devices."""

    def split(x):
        return x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)

    def joined(x):
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def piece(total, micro_batch):
        (_, (metrics, values)), grads = value_and_grad(params, micro_batch)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return jax.tree.map(jnp.add, total, (metrics, grads)), values

    pieces = jax.tree.map(split, batch)
    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], pieces))
    (_, (metrics, _)), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    (metrics, grads), values = jax.lax.scan(piece, (metrics, grads), pieces)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    return metrics, jax.tree.map(joined, values), grads


def _with_reference(batch: dict, reference: llama.Params, config: TrainConfig) -> dict:
    logps = dpo.response_logps(
        reference,
        batch,
        config=config.objective,
        model=config.model,
        execution=config.execution,
    )
    return {**batch, "ref_logps": jax.lax.stop_gradient(logps)}


def make_eval_step(config: TrainConfig) -> Callable:
    """(params, batch) -> metric sums, their count, and metrics pair by pair ({} for SFT).

    Counted are trained tokens (SFT) or pairs (DPO). A third argument is as in `make_train_step`.
    """
    objective, settings = OBJECTIVES[type(config.objective)], config.objective
    if isinstance(settings, sft.SFTConfig):
        settings = dataclasses.replace(settings, loss_norm="token")

    def eval_step(params, batch, reference=None):
        if reference is not None:
            batch = _with_reference(batch, reference, config)
        batch = objective.add_weights(batch, settings)
        _, (metrics, values) = objective.loss(
            params, batch, config=settings, model=config.model, execution=config.execution
        )
        counted = batch["loss_mask"] if objective is sft else batch["example"] >= 0
        count = jnp.sum(counted, dtype=jnp.float32)
        sums = {name: value * count for name, value in metrics.items()}
        if objective is dpo:
            values = {**values, "example": batch["example"]}
        return sums, count, jax.tree.map(sharding.replicate, values)

    return eval_step


def abstract_state(config: TrainConfig, mesh: jax.sharding.Mesh, num_steps: int) -> TrainState:
    """Shapes, dtypes and shardings of the whole training state; nothing is allocated."""
    params = llama.abstract_params(config.model, config.param_dtype)
    opt_state = jax.eval_shape(optim.make(config.optimizer, num_steps).init, params)
    state = TrainState(step=jax.ShapeDtypeStruct((), jnp.int32), params=params, opt_state=opt_state)
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        state,
        sharding.state_shardings(mesh, state),
    )
