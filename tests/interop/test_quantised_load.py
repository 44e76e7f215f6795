"""Weights that are quantised while they are read: the same as quantising what was loaded, on one
device and on meshes, and never whole in memory."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hf_models import assert_equal_trees, one_device, random_params

from tulu_jax import base
from tulu_jax.interop import hf
from tulu_jax.models import llama
from tulu_jax.models.config import LlamaConfig
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding as sharding_lib
from tulu_jax.quant import nf4
from tulu_jax.quant.nf4 import QuantConfig
from tulu_jax.training import state

CONFIG = LlamaConfig(
    vocab_size=48, num_layers=2, embed_dim=256, mlp_dim=384, num_heads=8, num_kv_heads=4,
    head_dim=32, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, max_positions=64,
)  # fmt: skip
QUANTS = (QuantConfig(), QuantConfig(mode="bnb_cpu"), QuantConfig(double=False))
INT8 = QuantConfig(kind="int8")


def save(path, config=CONFIG, dtype="float32"):
    params = random_params(config)
    hf.save(path, params, config, dtype=dtype, generation_config={}, write_tokenizer=None)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("hf") / "model")


def abstract(quant, config=CONFIG):
    params = llama.abstract_params(config, "float32")
    return jax.eval_shape(lambda params: nf4.quantise_params(params, quant), params)


def quantised(checkpoint, quant, dtype):
    """What is loaded, quantised layer by layer; one program for all weights of a shape."""
    whole = hf.load(checkpoint, CONFIG, shardings=one_device(), dtype=dtype)
    quantise = jax.jit(nf4.quantise, static_argnums=1)

    def leaf(path, stack):
        name = sharding_lib.path_name(path)
        if not nf4.LINEAR.fullmatch(name):
            return stack
        layers = [quantise(nf4.matrix(name, layer), quant) for layer in stack]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    return jax.tree.map_with_path(leaf, whole)


@pytest.mark.parametrize(
    ("quant", "dtype"), [*((q, "float32") for q in (*QUANTS, INT8)), (QUANTS[0], "bfloat16")]
)
def test_loading_quantised_is_quantising_what_is_loaded(checkpoint, quant, dtype):
    found = hf.load(checkpoint, CONFIG, shardings=one_device(), dtype=dtype, quant=quant)
    assert_equal_trees(found, quantised(checkpoint, quant, dtype))
    shapes = jax.tree.map(lambda leaf: leaf.shape, found)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, abstract(quant))
    kernels = found["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert isinstance(kernels, dict) and isinstance(found["lm_head"]["kernel"], jax.Array)


def test_the_whole_tree_in_one_program(checkpoint):
    whole = hf.load(checkpoint, CONFIG, shardings=one_device(), dtype="float32")
    found = jax.jit(lambda params: nf4.quantise_params(params, QUANTS[0]))(whole)
    assert_equal_trees(found, quantised(checkpoint, QUANTS[0], "float32"))


@pytest.mark.parametrize("quant", [QUANTS[0], INT8], ids=str)
@pytest.mark.parametrize(
    "axes", [dict(fsdp=4, tensor=2), dict(fsdp=2, context=2, tensor=2), dict(data=4, fsdp=2)],
    ids=lambda axes: "-".join(f"{name}{size}" for name, size in axes.items()),
)  # fmt: skip
def test_on_a_mesh_each_device_keeps_its_shard_of_the_same_bits(checkpoint, quant, axes):
    mesh = mesh_lib.make(mesh_lib.MeshConfig(**dict(fsdp=1) | axes))
    shardings = sharding_lib.param_shardings(mesh, abstract(quant))
    found = hf.load(checkpoint, CONFIG, shardings=shardings, dtype="float32", quant=quant)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings
    assert_equal_trees(found, quantised(checkpoint, quant, "float32"))
    codes = found["model"]["layers"]["mlp"]["up_proj"]["kernel"]["codes"]
    parts = axes.get("fsdp", 1) * axes.get("context", 1) * axes.get("tensor", 1)
    assert codes.addressable_shards[0].data.nbytes == codes.nbytes // parts


def test_a_mesh_that_would_cut_a_block_is_named():
    sizes = dict(data=1, fsdp=8, context=1, tensor=1)
    assert sharding_lib.divisibility_problems(sizes, abstract(QUANTS[0])) == [
        "embed of 4 blocks of 64 (model/layers/mlp/gate_proj/kernel/absmax) cannot be divided over "
        "mesh axes fsdp x context = 8; 1, 2 or 4 would"
    ]
    assert sharding_lib.divisibility_problems(sizes, abstract(INT8)) == []


def test_a_model_whose_blocks_would_be_cut_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, mlp_dim=100, num_layers=1)
    with pytest.raises(ValueError, match="100 inputs x 256 outputs cannot be cut into blocks"):
        hf.load(
            save(tmp_path / "m", config), config,
            shardings=one_device(), dtype="float32", quant=QUANTS[0],
        )  # fmt: skip


@pytest.mark.parametrize("quant", [*QUANTS, INT8], ids=str)
def test_a_weight_that_is_not_finite_is_named(checkpoint, tmp_path, quant):
    weights = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][5, 200] = np.nan
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    params = hf.load(tmp_path, CONFIG, shardings=one_device(), dtype="float32", quant=quant)
    bad = state.not_finite(params)
    assert base._weights_in_files(str(tmp_path), CONFIG, bad) == [f"{name} in model.safetensors"]


def test_every_linear_layer_and_nothing_else_is_quantised():
    found = jax.tree.leaves_with_path(abstract(QUANTS[0]))
    names = {sharding_lib.path_name(path) for path, leaf in found if leaf.dtype == jnp.int32}
    attention = {f"model/layers/self_attn/{x}_proj/kernel/codes" for x in "qkvo"}
    mlp = {f"model/layers/mlp/{x}_proj/kernel/codes" for x in ("gate", "up", "down")}
    assert names == attention | mlp


def test_two_bits_and_a_little_more_than_half_a_byte():
    """At 7B the stored trunk takes at most 0.52 bytes a weight."""
    config = dataclasses.replace(
        CONFIG, embed_dim=4096, mlp_dim=11008, num_layers=32, num_heads=32, num_kv_heads=32,
        head_dim=128, vocab_size=32000,
    )  # fmt: skip
    leaves = jax.tree.leaves_with_path(abstract(QUANTS[0], config))
    stored = sum(x.size * x.dtype.itemsize for path, x in leaves if "_proj" in str(path))
    assert stored / (32 * (4 * 4096**2 + 3 * 4096 * 11008)) < 0.52


PEAK = """
import re, sys, threading
import jax
from tulu_jax.interop import hf
from tulu_jax.quant.nf4 import QuantConfig
from tulu_jax.training import state

def anonymous():  # bytes of this process, without the pages of files that are mapped
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

folder, quant = sys.argv[1], QuantConfig() if sys.argv[2] == "nf4" else None
config = hf.read_config(folder)
everywhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])

def load():
    params = hf.load(folder, config, shardings=everywhere, dtype="float32", quant=quant)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(jax.block_until_ready(params)))

size, done, seen = load(), threading.Event(), []  # everything is compiled now
before = anonymous()
def watch():
    while not done.wait(0.001):
        seen.append(anonymous())
threading.Thread(target=watch).start()
load()
done.set()
print(max(seen) - before, size, len(seen))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_the_model_is_never_whole_in_memory(tmp_path):
    """Of 12 layers, 199 MB in all, what a process takes while it loads them; malloc gives back at
    once what is freed."""
    config = dataclasses.replace(
        CONFIG, num_layers=12, embed_dim=768, mlp_dim=768, num_heads=12, num_kv_heads=12,
        head_dim=64,
    )  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in hf.layout_lib.expected_weights(config).items()
    }
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf.write_config(config)))
    whole = sum(weight.nbytes for weight in weights.values())
    largest = max(weight.nbytes for weight in weights.values())

    def peak(kind):
        told = subprocess.run(
            [sys.executable, "-c", PEAK, str(folder), kind],
            env=os.environ | {"XLA_FLAGS": "", "MALLOC_MMAP_THRESHOLD_": "65536"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return map(int, told.stdout.split())

    plain, size, _ = peak("none")
    taken, stored, samples = peak("nf4")
    print(f"{whole=:,} {largest=:,} {plain=:,} {taken=:,} {stored=:,} {samples=}")
    assert size == whole and plain > 0.9 * whole
    assert stored < 0.14 * whole
    assert taken < stored + 20 * largest < 0.5 * whole
