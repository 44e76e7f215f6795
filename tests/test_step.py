"""One update: accumulation, the paper's loss scale, meshes, golden values, and that it learns."""

import contextlib
import functools
import pathlib

import builders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tulu_jax import step as step_lib
from tulu_jax.models import llama
from tulu_jax.objectives import sft
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding
from tulu_jax.parallel.mesh import MeshConfig
from tulu_jax.training import optim
from tulu_jax.training import state as state_lib
from tulu_jax.training.state import Frozen, TrainState

STEPS = 10
BATCHES = {
    "sft": lambda: builders.sft_batch(8, 32),
    "dpo": lambda: builders.dpo_batch(8, 32),
    "packed": lambda: builders.packed_dpo_batch(12, 8, 48),
}


@functools.cache
def initial_params(model):
    params = jax.jit(lambda: llama.init_params(model, jax.random.key(0)))()
    # larger than the usual initialisation, so that gradients are far from rounding noise
    return jax.tree.map(lambda p: 5 * p if p.ndim > 2 else p, params)


def initial_state(config):
    params = jax.tree.map(jnp.copy, initial_params(config.model))  # some tests donate the state
    opt_state = optim.make(config.optimizer, STEPS).init(params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)


def losses_and_state(config, batch, *, steps=3, mesh=None):
    """Losses and gradient norms of `steps` updates on one batch, and the last state."""
    step = jax.jit(step_lib.make_train_step(config, STEPS))
    state, history = initial_state(config), []
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        if mesh:
            abstract, _ = step_lib.abstract_state(config, mesh)
            state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
            batch = builders.placed(mesh, config.objective, batch)
        for _ in range(steps):
            state, measured = step(state, Frozen(), batch)
            history.append(loss_and_norm(measured))
    return history, state


def loss_and_norm(measured):
    return tuple(float(measured.scalars[name]) for name in ("loss", "grad_norm"))


@functools.cache
def one_device(stage, attention):
    """What `losses_and_state` of `make(stage)` gives on one device, computed once."""
    config, batch = make(pathlib.Path("unused"), stage)
    return losses_and_state(builders.replace(config, execution__attention=attention), batch)


def assert_same_params(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a.params, b.params)


def make(tmp_path, stage, **changes):
    config = builders.train_config(tmp_path, dpo_stage=stage != "sft", **changes)
    return config, BATCHES[stage]()


@pytest.mark.parametrize(
    ("stage", "micro"),
    [*((stage, micro) for stage in ("sft", "dpo") for micro in (1, 2, 4)), ("packed", 2)],
)
def test_accumulation_equals_the_undivided_batch(tmp_path, stage, micro):
    """Unequal token counts per micro-batch: a mean of means would be off by tens of percent."""
    config, batch = make(tmp_path, stage)
    whole, whole_state = one_device(stage, "xla")
    pieces, pieces_state = losses_and_state(builders.replace(config, micro_batch_size=micro), batch)
    np.testing.assert_allclose(pieces, whole, rtol=2e-5)
    # Adam divides by sqrt(v): a rounding difference of a near-zero gradient moves a parameter by up
    # to the learning rate, 1e-3; typical differences are far below
    assert_same_params(pieces_state, whole_state, atol=2e-4)


def mean_nll(config, params, batch):
    logits = llama.logits(
        config.model,
        config.execution,
        params,
        tokens=batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
    )
    logps = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(logps, batch["targets"][..., None], axis=-1)[..., 0]
    return jnp.sum(nll * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])


@pytest.mark.parametrize("micro", [8, 2])
def test_paper_norm_averages_the_gradients_of_row_groups(tmp_path, micro):
    """EasyLM's MultiSteps: a plain mean of the gradients of groups, whatever our micro-batches."""
    config, batch = make(tmp_path, "sft", micro_batch_size=micro)
    config = builders.replace(
        config,
        data__packing="none",
        objective=sft.SFTConfig(loss_norm="paper", loss_norm_rows=4, vocab_chunk=32),
    )
    params = initial_state(config).params
    groups = [{name: value[i : i + 4] for name, value in batch.items()} for i in (0, 4)]
    grad = jax.jit(jax.value_and_grad(functools.partial(mean_nll, config)))
    (loss_a, grad_a), (loss_b, grad_b) = (grad(params, group) for group in groups)
    expected = jax.tree.map(lambda a, b: (a + b) / 2, grad_a, grad_b)
    history, _ = losses_and_state(config, batch, steps=1)
    norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(expected)))
    np.testing.assert_allclose(history[0], ((loss_a + loss_b) / 2, norm), rtol=1e-5)
    token = builders.replace(config, objective=sft.SFTConfig(vocab_chunk=32))
    assert abs(losses_and_state(token, batch, steps=1)[0][0][0] - history[0][0]) > 1e-4


def original_dpo_loss(config, params, batch):
    """The mean over the pairs of a micro-batch, from full logits of both sides
    (EasyLM's `llama_train_dpo.py`, November 2023)."""
    flat = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in BY_POSITION}
    logits = llama.logits(
        config.model,
        config.execution,
        params,
        tokens=flat["tokens"],
        segment_ids=flat["segment_ids"],
        positions=flat["positions"],
    )
    logps = jax.nn.log_softmax(logits)
    logps = jnp.take_along_axis(logps, flat["targets"][..., None], axis=-1)[..., 0]
    logps = jnp.where(flat["loss_mask"], logps, 0.0).sum(axis=-1).reshape(-1, 2)
    ratios = logps - batch["ref_logps"]
    return -jax.nn.log_sigmoid(config.objective.beta * (ratios[:, 0] - ratios[:, 1])).mean()


BY_POSITION = ("tokens", "targets", "loss_mask", "segment_ids", "positions")


def test_pairs_weigh_what_they_weigh_in_multi_steps(tmp_path):
    """The original: four micro-batches, as many pairs in each, through optax's MultiSteps. Its mean
    of group means is the mean over the pairs of the update, in our two micro-batches as well."""
    config, _ = make(tmp_path, "dpo", batch_size=16, micro_batch_size=8)
    batch, steps = builders.dpo_batch(16, 32), 3
    history, state = losses_and_state(config, batch, steps=steps)
    optimizer = optax.MultiSteps(optim.make(config.optimizer, STEPS), every_k_schedule=4)
    params = initial_state(config).params
    opt_state = optimizer.init(params)
    grad = jax.jit(jax.value_and_grad(functools.partial(original_dpo_loss, config)))
    update = jax.jit(optimizer.update)
    for loss, _ in history:
        losses = []
        for i in range(0, 16, 4):
            value, grads = grad(params, {name: x[i : i + 4] for name, x in batch.items()})
            updates, opt_state = update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            losses.append(float(value))
        np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    assert int(state.step) == int(opt_state.gradient_step) == steps  # the schedule counts updates
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), state.params, params)


MESHES = [
    MeshConfig(data=8, fsdp=1),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=2, fsdp=2, context=2),
    MeshConfig(data=1, fsdp=2, context=2, tensor=2),
    MeshConfig(data=2, fsdp=1, context=1, tensor=4),
    MeshConfig(data=1, fsdp=1, context=8),
]


@pytest.mark.parametrize("stage", ["sft", "dpo", "packed"])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m.data}-{m.fsdp}-{m.context}-{m.tensor}")
@pytest.mark.parametrize("attention", ["triangular", "blockwise"])
def test_eight_devices_give_the_losses_of_one(tmp_path, stage, mesh, attention):
    if stage != "sft" and attention == "blockwise":
        pytest.skip("one attention is enough for the second objective")
    if stage == "packed" and mesh not in (MESHES[0], MESHES[3]):
        pytest.skip("rows, and sequence with heads, are enough for the second layout")
    config, batch = make(tmp_path, stage)
    config = builders.replace(config, execution__attention=attention)
    one, one_state = one_device(stage, attention)
    eight, eight_state = losses_and_state(config, batch, mesh=mesh_lib.make(mesh))
    np.testing.assert_allclose(eight, one, rtol=5e-5)
    assert_same_params(eight_state, one_state, atol=2e-4)


def test_long_rows_go_through_a_layer_in_two_parts(tmp_path):
    config, _ = make(tmp_path, "sft", batch_size=2)
    length = 256
    config = builders.replace(
        config, data__max_length=length, execution__remat=True, execution__remat_policy="save_gate"
    )
    config = builders.replace(config, execution__row_parts=2)
    batch = builders.sft_batch(2, length)
    one, one_state = losses_and_state(config, batch)
    mesh = mesh_lib.make(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    four, four_state = losses_and_state(config, batch, mesh=mesh)
    np.testing.assert_allclose(four, one, rtol=5e-5)
    assert_same_params(four_state, one_state, atol=2e-4)


@pytest.mark.parametrize("policy", ["save_projections", "save_gathered"])
def test_rows_gathered_between_pairs_first_are_the_same_rows(tmp_path, policy):
    config, _ = make(tmp_path, "sft", batch_size=2)
    config = builders.replace(
        config,
        execution__remat=True,
        execution__row_parts=2,
        execution__remat_policy=policy,
        mesh=MeshConfig(data=1, fsdp=2, tensor=4, pairs_first=True),
    )
    assert config.execution.pairs_first  # the mesh of a run says it
    plain = builders.replace(config, mesh=MeshConfig(data=1, fsdp=2, tensor=4))
    batch, found = builders.sft_batch(2, 64), []
    for run in (config, plain):
        found.append(losses_and_state(run, batch, mesh=mesh_lib.make(run.mesh)))
    (pairs, pairs_state), (whole, whole_state) = found
    assert pairs == whole  # bit by bit: only the way of what moves differs
    jax.tree.map(np.testing.assert_array_equal, pairs_state.params, whole_state.params)


def test_what_was_gathered_is_kept_and_not_gathered_again(tmp_path):
    config, _ = make(tmp_path, "sft", batch_size=2)
    config = builders.replace(config, execution__remat=True, execution__row_parts=2)
    batch = builders.sft_batch(2, 64)
    mesh = mesh_lib.make(MeshConfig(data=1, fsdp=2, tensor=4))
    placed, params = builders.placed(mesh, config.objective, batch), initial_state(config).params
    found, gathers = {}, {}
    for policy in ("save_projections", "save_gathered"):
        run = builders.replace(config, execution__remat_policy=policy)
        forward = llama.forward(run.model, run.execution)

        def loss(params, forward=forward):
            hidden = forward(params, placed)
            return jnp.sum(jnp.sin(jnp.arange(hidden.size)).reshape(hidden.shape) * hidden)

        with jax.set_mesh(mesh):
            lowered = jax.jit(jax.value_and_grad(loss)).lower(params)
            found[policy] = lowered.compile()(params)
        gathers[policy] = lowered.as_text().count('"stablehlo.all_gather"')
    assert gathers["save_projections"] - gathers["save_gathered"] == 4  # two before each half
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *found.values())


def test_accumulation_on_a_mesh(tmp_path):
    config, batch = make(tmp_path, "sft", micro_batch_size=4)
    one, _ = one_device("sft", "xla")
    mesh = mesh_lib.make(MeshConfig(data=2, fsdp=2, tensor=2))
    eight, _ = losses_and_state(config, batch, mesh=mesh)
    np.testing.assert_allclose(eight, one, rtol=5e-5)


def test_fingerprint_is_of_the_values_and_not_of_the_mesh(tmp_path):
    config, _ = make(tmp_path, "sft")
    params = initial_state(config).params
    prints = {state_lib.fingerprint(params)}
    for mesh in map(mesh_lib.make, MESHES[:4]):
        shardings = sharding.param_shardings(mesh, params)
        prints.add(state_lib.fingerprint(jax.device_put(params, shardings)))
    assert len(prints) == 1
    changed = jax.tree.map(lambda p: p, params)
    changed["lm_head"]["kernel"] = changed["lm_head"]["kernel"].at[3, 5].multiply(1.0001)
    assert state_lib.fingerprint(changed) not in prints


def test_golden_sft_step(tmp_path):
    """Three updates on fixed inputs, against a plain optax and full-logits implementation."""
    config, batch = make(tmp_path, "sft")
    history, state = losses_and_state(config, batch)
    optimizer = optim.make(config.optimizer, STEPS)
    params = initial_state(config).params
    opt_state = optimizer.init(params)
    grad = jax.jit(jax.value_and_grad(functools.partial(mean_nll, config)))
    for loss, _ in history:
        value, grads = grad(params, batch)
        np.testing.assert_allclose(loss, value, rtol=1e-5)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), state.params, params)


def overfit(tmp_path, stage, rate):
    config, batch = make(tmp_path, stage)
    config = builders.replace(
        config, optimizer__learning_rate=rate, optimizer__warmup_ratio=0.0, num_steps=60
    )
    step = jax.jit(step_lib.make_train_step(config, 60), donate_argnums=0)
    state = initial_state(config)
    if stage == "dpo":
        forward = llama.forward(config.model, config.execution)
        batch["ref_logps"] = jax.jit(config.objective.response_logps, static_argnums=0)(
            forward, state.params, batch
        )
    history = []
    for _ in range(60):
        state, measured = step(state, Frozen(), batch)
        history.append({name: float(value) for name, value in measured.scalars.items()})
    return history


def test_a_resident_reference_gives_the_losses_of_the_cached_one(tmp_path):
    """Three updates, in one piece and in four: the copy stays, the policy moves."""
    config, batch = make(tmp_path, "packed")
    copy = initial_state(config).params
    forward = llama.forward(config.model, config.execution)
    score = functools.partial(config.objective.response_logps, forward)
    batch["ref_logps"] = jax.jit(score)(copy, batch)
    cached, _ = losses_and_state(config, batch)
    del batch["ref_logps"]
    for micro in (8, 2):
        pieces = builders.replace(config, micro_batch_size=micro, objective__reference="resident")
        step = jax.jit(step_lib.make_train_step(pieces, STEPS))
        state, history = initial_state(config), []
        for _ in range(3):
            state, measured = step(state, Frozen(reference=copy), batch)
            history.append(loss_and_norm(measured))
        assert history[0][0] == pytest.approx(np.log(2), abs=1e-6)
        np.testing.assert_allclose(history, cached, rtol=2e-5)


def test_sft_overfits_eight_rows(tmp_path):
    history = overfit(tmp_path, "sft", 1e-2)
    assert history[0]["loss"] > 6 and history[-1]["loss"] < 0.3


def test_dpo_starts_at_log_two_and_reaches_accuracy_one(tmp_path):
    history = overfit(tmp_path, "dpo", 1e-3)
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert history[-1]["rewards/accuracies"] == pytest.approx(1)
    assert history[-1]["rewards/margins"] > 1


def test_learning_rate_counts_updates():
    """EasyLM's `llama_train.py`: 5,096 updates warm up over 153, 5,808 over 581; the end is 0."""
    for total, ratio, warmup in ((5096, 0.03, 153), (5808, 0.1, 581)):
        config = optim.OptimizerConfig(learning_rate=2e-5, warmup_ratio=ratio)
        rate = optim.schedule(config, total)
        assert float(rate(0)) == 0
        assert float(rate(warmup)) == pytest.approx(2e-5)
        assert float(rate(warmup - 1)) < 2e-5 > float(rate(warmup + 1))
        assert float(rate(total)) == 0


def test_bfloat16_compute_keeps_float32_masters(tmp_path):
    config, batch = make(tmp_path, "sft")
    config = builders.replace(config, execution__compute_dtype="bfloat16")
    exact, _ = losses_and_state(builders.replace(config, execution__compute_dtype="float32"), batch)
    history, state = losses_and_state(config, batch)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state)} == {"float32", "int32"}
    # 8 bits of mantissa; the loss is a mean over ~100 tokens
    np.testing.assert_allclose([h[0] for h in history], [h[0] for h in exact], rtol=2e-2)
