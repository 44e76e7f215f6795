"""One update and one evaluation as pure functions, and the shapes of what they act on.

`train` jits these on a mesh of devices; a dry run compiles the same functions for a named topology.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tulu_jax.data.fields import Fields
from tulu_jax.models import llama, lora
from tulu_jax.models.config import SCORE
from tulu_jax.objectives.objective import Batch
from tulu_jax.parallel import sharding
from tulu_jax.quant import nf4
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import optim, watch
from tulu_jax.training.state import REWARD, VALUE, Frozen, TrainState

Bound = float | jax.Array  # float32 []
OF_VALUE = 0x76616C  # folded into the key of new adapters, for those of a value network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of a batch: `scalars` float32 [], and `examples` by their name, with a
    value for each example of the batch, [*examples], whole on every device."""

    scalars: dict[str, Any]
    examples: dict[str, Any]


def make_train_step(
    config: TrainConfig, num_steps: int
) -> Callable[..., tuple[TrainState, Measured]]:
    """The pure function of one update, to be jitted; the state may be donated.

    `Measured` are the objective's metrics and counts, and the examples' values that it watches.
    Where the run skips updates, they say with `skipped`, 0 or 1, whether this one was; `bound` is
    above which its loss is a spike.
    """
    objective = config.objective
    forward = llama.forward(config.model, config.execution)
    optimizer = optim.make(config.optimizer, num_steps)
    learning_rate = optim.schedule(config.optimizer, num_steps)
    drops = config.adapter is not None and config.adapter.dropout > 0

    def loss(params, frozen, batch):
        found = objective.compute(forward, frozen.whole(params), frozen, batch)
        return found.value, found

    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def train_step(
        state: TrainState, frozen: Frozen, batch: Batch, bound: Bound = float("inf")
    ) -> tuple[TrainState, Measured]:
        # Weights are those of the whole update, so the shares of its pieces add up exactly.
        batch = objective.weigh(batch)
        if drops:
            rows = batch["tokens"].shape[:-1]
            batch = {**batch, llama.NOISE: lora.noise(state.step, keys(config)[1], rows)}
        if config.micro_batches == 1:
            (_, found), grads = value_and_grad(state.params, frozen, batch)
            metrics, examples = found.metrics, found.examples
        else:
            metrics, examples, grads = _accumulate(
                lambda params, piece: value_and_grad(params, frozen, piece),
                state.params,
                batch,
                config.micro_batches,
            )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        scalars = {
            **metrics,
            "grad_norm": optax.global_norm(grads),
            "learning_rate": learning_rate(state.step),
            **objective.counts(batch),
        }
        watched = {name: sharding.replicate(examples[name]) for name in objective.watched}
        if config.watch.skips:
            skip = watch.to_skip(config.watch, scalars, bound)
            scalars["skipped"] = skip.astype(jnp.float32)
            before = state.params, state.opt_state
            params, opt_state = watch.kept_if(skip, before, (params, opt_state))
        state = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
        return state, Measured(scalars=scalars, examples=watched)

    return train_step


def _accumulate(value_and_grad, params, batch, micro_batches):
    """Sums metrics and float32 gradients over pieces of the batch, and joins what is row by row;
    row r goes to piece r mod A, so that rows stay on their devices."""

    def split(x):
        return x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)

    def joined(x):
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def piece(total, micro_batch):
        (_, found), grads = value_and_grad(params, micro_batch)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return jax.tree.map(jnp.add, total, (found.metrics, grads)), found.examples

    pieces = jax.tree.map(split, batch)
    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], pieces))
    (_, found), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    (metrics, grads), examples = jax.lax.scan(piece, (found.metrics, grads), pieces)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    return metrics, jax.tree.map(joined, examples), grads


def make_eval_step(
    config: TrainConfig,
) -> Callable[[llama.Params, Frozen, Batch], tuple[jax.Array, Measured]]:
    """The pure function of one batch of an evaluation, to be jitted: over how many tokens or
    examples the objective's metrics are means, and their sums."""
    objective = config.objective.evaluating()
    forward = llama.forward(config.model, config.execution)

    def eval_step(params, frozen: Frozen, batch: Batch) -> tuple[jax.Array, Measured]:
        batch = objective.weigh(batch)
        found = objective.compute(forward, frozen.whole(params), frozen, batch)
        count = objective.measured(batch)
        sums = {name: value * count for name, value in found.metrics.items()}
        examples = jax.tree.map(sharding.replicate, found.examples)
        return count, Measured(scalars=sums, examples=examples)

    return eval_step


def keys(config: TrainConfig) -> jax.Array:
    """Typed keys of a run: of what is new beside its base, and of dropout."""
    return jax.random.split(jax.random.key(config.seed))


def split(config: TrainConfig, params: llama.Params) -> tuple[llama.Params, Frozen]:
    """Of the parameters of the base, (what trains, what is frozen). With an adapter the base is
    frozen, and the reference too: it is the base without adapters. A reward model beside the base
    stays frozen; the value network that it is for gets its score head."""
    key, head = keys(config)[0], {}
    if config.adapter is None:
        return config.objective.split(params, key)
    if config.objective.head == SCORE:  # trains beside the adapter
        whole, _ = config.objective.split(params, key)
        params, head = {"model": whole["model"]}, {SCORE: whole[SCORE]}
    shapes, layers = config.model.projections, config.model.num_layers
    new, reference = functools.partial(lora.init, config.adapter, shapes, layers), None
    if REWARD in params:  # a value network with adapters of its own and its head on the same base
        reward = params[REWARD]
        reward = {**reward, SCORE: jax.tree.map(lambda x: x.astype(jnp.float32), reward[SCORE])}
        head = {VALUE: new(jax.random.fold_in(key, OF_VALUE)) | {SCORE: reward[SCORE]}}
        params, reference = llama.own(params), {REWARD: reward}
    return new(key) | head, Frozen(base=params, reference=reference)


def abstract_base(config: TrainConfig) -> llama.Params:
    """Shapes and dtypes of the parameters of the base as a run keeps them."""
    params = llama.abstract_params(config.model, config.param_dtype)
    if config.quant is None:
        return params
    return jax.eval_shape(functools.partial(nf4.quantise_params, config=config.quant), params)


def abstract_split(config: TrainConfig) -> tuple[llama.Params, Frozen]:
    """Shapes and dtypes of what trains and of what is frozen."""
    base = abstract_base(config)
    if config.objective.reward_from is not None:
        scored = config.model.with_head(SCORE)
        base[REWARD] = abstract_base(dataclasses.replace(config, model=scored))
    return jax.eval_shape(functools.partial(split, config), base)


def abstract_state(config: TrainConfig, mesh: jax.sharding.Mesh) -> tuple[TrainState, Frozen]:
    """Shapes, dtypes and shardings of all that a run keeps on its devices; nothing is allocated."""
    params, frozen = abstract_split(config)
    optimizer = optim.make(config.optimizer, num_steps=1)  # shapes do not depend on them
    opt_state = jax.eval_shape(optimizer.init, params)
    state = TrainState(step=jax.ShapeDtypeStruct((), jnp.int32), params=params, opt_state=opt_state)
    more = config.objective.param_axes
    of_params = sharding.param_shardings(mesh, params, more)
    shardings = TrainState(
        step=jax.NamedSharding(mesh, jax.P()),
        params=of_params,
        opt_state=optim.shardings(optimizer, opt_state, of_params),
    )
    of_frozen = Frozen(
        base=sharding.param_shardings(mesh, frozen.base, more),
        reference=frozen.reference and sharding.param_shardings(mesh, frozen.reference, more),
    )
    return _placed(state, shardings), _placed(frozen, of_frozen)


def abstract_batch(config: TrainConfig, mesh: jax.sharding.Mesh, *, places: int) -> Batch:
    """Shapes, dtypes and shardings of one update's batch, whose rows hold up to `places`
    examples."""
    fields = config.objective.fields(
        rows=config.batch_size,
        length=config.data.max_length,
        packing=config.data.packing,
        places=places,
    )
    return abstract_arrays(fields, mesh)


def abstract_arrays(fields: Fields, mesh: jax.sharding.Mesh) -> Batch:
    """Shapes, dtypes and shardings of the arrays of a batch of `fields`."""
    return {
        name: jax.ShapeDtypeStruct(
            field.shape, field.dtype, sharding=jax.NamedSharding(mesh, sharding.spec(*field.axes))
        )
        for name, field in fields.items()
    }


def _placed(tree, shardings):
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings
    )
