"""Weights that travel as int8: what they decode to, what a model computes with them, and gradients
that go to the weights behind them."""

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tulu_jax import preflight, validation
from tulu_jax.models import layers, llama, paged_attention
from tulu_jax.models.config import ExecutionConfig
from tulu_jax.models.lora import LoRAConfig
from tulu_jax.objectives import ppo
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding
from tulu_jax.parallel.mesh import MeshConfig
from tulu_jax.quant import in_transit, nf4

MODEL = builders.replace(builders.MODEL, num_layers=1, embed_dim=128)
MESHES = [
    MeshConfig(fsdp=4, context=1, tensor=2),
    MeshConfig(fsdp=2, context=2, tensor=2),
]
encode = jax.jit(in_transit.encode)
decode = jax.jit(in_transit.decode, static_argnums=2)


def name(mesh):
    return f"fsdp {mesh.fsdp} context {mesh.context} tensor {mesh.tensor}"


def config_of(tmp_path, **changes):
    return builders.train_config(tmp_path, model=MODEL, **changes)


def rounded(params, tensor):
    """`params` with every linear kernel as it decodes where `tensor` devices divide it: what a run
    multiplies with."""

    def leaf(path, x):
        name = sharding.path_name(path)
        if not nf4.LINEAR.fullmatch(name):
            return x
        axes = sharding.param_axes(name)[1:]
        divided = next(n for n, axis in enumerate(axes) if axis in layers.DIVIDED)

        def of_device(x):
            codes = encode(jnp.moveaxis(x, axes.index("embed"), 0))
            return jnp.moveaxis(decode(*codes, x.dtype), 0, axes.index("embed"))

        of_layers = [
            jnp.concatenate(
                [of_device(part) for part in jnp.split(layer, tensor, divided)], divided
            )
            for layer in x
        ]
        return jnp.stack(of_layers)

    return jax.tree.map_with_path(leaf, params)


def loss_and_gradients(config, params, mesh):
    """Those of a fixed weighing of the hidden states, whole; the program's text beside them."""
    batch = builders.sft_batch(8, 32)
    forward = llama.forward(config.model, config.execution)

    def loss(params, batch):
        hidden = forward(params, batch).astype(jnp.float32)
        return jnp.sum(jnp.sin(jnp.arange(hidden.size)).reshape(hidden.shape) * hidden)

    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.param_shardings(mesh, params))
        batch = builders.placed(mesh, config.objective, batch)
        lowered = jax.jit(jax.value_and_grad(loss)).lower(params, batch)
        return jax.device_get(lowered.compile()(params, batch)), lowered.as_text()


def params_of(config):
    return jax.jit(lambda: llama.init_params(config.model, jax.random.key(0)))()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_weight_is_off_by_half_a_scale_at_most(dtype):
    size = jnp.exp(3 * jax.random.normal(jax.random.key(1), (64, 1, 1)))
    weight = (jax.random.normal(jax.random.key(0), (64, 24, 8)) * size).astype(dtype)
    codes, scales = encode(weight)
    assert codes.dtype == jnp.int8 and codes.shape == weight.shape
    assert scales.dtype == jnp.bfloat16 and scales.shape == (64,)
    half = np.float32(scales)[:, None, None] / 2
    found = decode(codes, scales, jnp.float32)
    # In float32 the quotient and the product are off by a rounding each.
    assert np.all(np.abs(found - np.float32(weight)) <= half * (1 + 1e-5))
    assert np.all(np.abs(np.int32(codes)).max((1, 2)) >= 126)
    exact = decode(codes, scales, jnp.bfloat16)
    np.testing.assert_array_equal(exact, found.astype(jnp.bfloat16))


def test_integers_times_a_scale_are_exact_and_what_is_not_finite_shows():
    rng = np.random.default_rng(0)
    size = np.float32([1, 2.0**-9, 0.75, 3 * 2.0**20, 0])
    weight = rng.integers(-127, 128, (5, 90)) * size[:, None]
    weight[:, 7] = 127 * size
    np.testing.assert_array_equal(decode(*encode(weight), jnp.float32), weight)
    weight[1, 40], weight[2, 70] = np.nan, np.inf
    lost = np.isnan(decode(*encode(weight), jnp.float32))
    np.testing.assert_array_equal(lost.all(1), [False, True, True, False, False])
    np.testing.assert_array_equal(lost.any(1), lost.all(1))


@pytest.mark.parametrize("mesh", MESHES, ids=name)
def test_codes_compute_what_decoded_weights_do_and_gradients_pass_straight(tmp_path, mesh):
    """With codes, loss and gradients are those of the plain form at the weights that codes stand
    for, to float32 rounding, and so those of weights that are such numbers already."""
    plain = builders.replace(config_of(tmp_path), execution__remat=True)
    coded = builders.replace(plain, execution__gather_dtype="int8")
    params, mesh = params_of(plain), mesh_lib.make(mesh)
    (loss, grads), program = loss_and_gradients(coded, params, mesh)
    (exact, of_exact), _ = loss_and_gradients(plain, rounded(params, mesh.shape["tensor"]), mesh)
    assert "all_gather" in program and "xi8>" in program
    np.testing.assert_allclose(loss, exact, rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4), grads, of_exact
    )


def test_without_it_no_code_is_in_the_program(tmp_path):
    config = config_of(tmp_path)
    assert config.execution.gather_dtype is None
    _, program = loss_and_gradients(config, params_of(config), mesh_lib.make(MESHES[0]))
    assert "xi8>" not in program


def test_a_mesh_that_divides_no_weight_is_refused(tmp_path):
    config = builders.replace(config_of(tmp_path), execution__gather_dtype="int8")
    found = list(preflight.mesh_problems(config, 8))
    assert len(found) == 1 and "fsdp x context = 1, over which no weight is gathered" in found[0]
    for mesh in MESHES:
        assert not list(preflight.mesh_problems(builders.replace(config, mesh=mesh), 8))


def test_what_does_not_go_with_codes_is_refused(tmp_path):
    config = builders.replace(config_of(tmp_path), execution__gather_dtype="int8")
    quantised = dict(adapter=LoRAConfig(rank=4), quant=nf4.QuantConfig(kind="int8"))
    with pytest.raises(validation.UsageError, match="and quant is set: quantised weights"):
        builders.replace(config, **quantised)
    with pytest.raises(validation.UsageError, match="other weights than the one that drew"):
        builders.replace(config, objective=ppo.PPOConfig(reward_from="unused"))
    with pytest.raises(validation.UsageError, match="gather_dtype = 'int4': expected one of"):
        ExecutionConfig(gather_dtype="int4")


def test_prompts_are_computed_with_the_weights_of_a_decoding_step():
    assert paged_attention.for_prompts(ExecutionConfig(gather_dtype="int8")).gather_dtype is None
