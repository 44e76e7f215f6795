"""NF4 and int8 held against bitsandbytes and numpy, bit for bit."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from tulu_jax import validation
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.quant import nf4
from tulu_jax.training import state

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")

NEAREST, CPU = nf4.QuantConfig(), nf4.QuantConfig(mode="bnb_cpu")
PLAIN, INT8 = nf4.QuantConfig(double=False), nf4.QuantConfig(kind="int8")
quantise = jax.jit(nf4.quantise, static_argnums=1)
scales = jax.jit(nf4.scales, static_argnames="blocks_per_output")
dequantise = jax.jit(nf4.dequantise, static_argnums=2)


def normal(rows: int, outputs: int, seed: int = 0) -> np.ndarray:
    """Weights [in, out] whose outputs differ in size, as trained ones do."""
    rng = np.random.default_rng(seed)
    size = 0.02 * np.exp(rng.normal(size=outputs))
    return (rng.normal(size=(rows, outputs)) * size).astype(np.float32)


def special() -> np.ndarray:
    """A zero block, a block of one value, ties between codes, and sizes far apart."""
    weight = normal(256, 8)
    weight[64:128, 3] = 0
    weight[:64, 1] = -0.5
    weight[:64, 0] = 0
    weight[0, 0], weight[1:16, 0] = 1, (nf4.CODEBOOK[:-1] + nf4.CODEBOOK[1:]) / 2
    weight[:64, 5] *= 1e-20
    weight[64:128, 5] *= 1e20
    return weight


SHAPES = {
    "one_block": (64, 1),
    "43_blocks": (64 * 43, 70),  # 256 is no multiple, as of the 172 blocks of 11,008
    "full_groups": (4096, 64),
    "few_outputs": (64 * 300, 3),  # one output is more than one group
    "wide": (64, 700),
}
WEIGHTS = {name: normal(*shape) for name, shape in SHAPES.items()} | {"special": special()}


@pytest.fixture(params=WEIGHTS)
def weight(request):
    return WEIGHTS[request.param]


@pytest.fixture
def trained(shared_data):
    """The [in, out] matrices of a trained model, cut to whole blocks; those of as many inputs side
    by side."""
    file = shared_data / "models" / "stories260K-hf" / "model.safetensors"
    found = safetensors.numpy.load_file(file)
    matrices = [w.T[: w.shape[1] // 64 * 64] for n, w in found.items() if n.endswith("proj.weight")]
    sizes = sorted({len(matrix) for matrix in matrices})
    return [np.concatenate([m for m in matrices if len(m) == size], 1) for size in sizes]


def to_torch(weight):
    """[in, out] as bitsandbytes has it, [out, in]."""
    rows = torch.from_numpy(np.ascontiguousarray(weight.astype(np.float32).T))
    return rows.to(torch.bfloat16) if weight.dtype == ml_dtypes.bfloat16 else rows


def codes_of(kernel) -> np.ndarray:
    """The code of every weight [in, out]: layout P undone word by word."""
    words = np.asarray(kernel["codes"]).view(np.uint32)
    codes = np.zeros((8 * len(words), words.shape[1]), np.uint8)
    for h in (0, 1):
        for q in range(4):
            for r in range(8):
                codes[16 * q + 2 * r + h :: 64] = words[r::8] >> (16 * h + 4 * q) & 15
    return codes


def by_block(absmax):
    """[K/64, N] in bitsandbytes' order of blocks."""
    return np.asarray(absmax).T.reshape(-1)


def equal(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def assert_as_bitsandbytes(weight):
    """Everything of `bnb_cpu`, with the offset that is ours: torch's mean of float32 values moves
    by its number of threads."""
    rows = to_torch(weight)
    packed, plain = bnb.quantize_4bit(rows, blocksize=64, quant_type="nf4")
    kernel = quantise(weight, CPU)
    theirs = packed.numpy().reshape(-1)
    theirs = np.stack([theirs >> 4, theirs & 15], 1).reshape(rows.shape).T
    equal(codes_of(kernel), theirs)
    equal(by_block(quantise(weight, PLAIN)["absmax"]), plain.absmax.numpy())
    for dtype in ("float32", "bfloat16"):
        plain.dtype = getattr(torch, dtype)
        ours = quantise(weight, PLAIN)
        found = dequantise(ours, scales(ours), jnp.dtype(dtype)).astype(jnp.float32)
        equal(found, bnb.dequantize_4bit(packed, plain).float().numpy().T)

    absmax = plain.absmax.numpy()
    equal(kernel["offset"], absmax.astype(np.float64).mean().astype(np.float32))
    offset = torch.tensor(float(kernel["offset"]))
    nested, state2 = bnb.quantize_blockwise(plain.absmax - offset, blocksize=256)
    equal(by_block(kernel["absmax"]), nested.numpy())
    equal(kernel["absmax2"], state2.absmax.numpy())
    whole = bnb.QuantState(
        absmax=nested, shape=rows.shape, code=plain.code, blocksize=64, quant_type="nf4",
        dtype=None, offset=offset, state2=state2,
    )  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        whole.dtype = getattr(torch, dtype)
        found = dequantise(kernel, scales(kernel), jnp.dtype(dtype)).astype(jnp.float32)
        equal(found, bnb.dequantize_4bit(packed, whole).float().numpy().T)


def assert_nearest(weight):
    """Codes and nested codes by numpy: the nearest value, downward from a tie."""
    kernel, weight = quantise(weight, NEAREST), weight.astype(np.float32)
    blocks = weight.reshape(-1, 64, weight.shape[1])
    absmax = np.abs(blocks).max(1)
    scaled = blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-30)))[:, None]
    middles = (nf4.CODEBOOK[:-1] + nf4.CODEBOOK[1:]) / 2
    equal(codes_of(kernel), np.searchsorted(middles, scaled).reshape(weight.shape).astype(np.uint8))
    rest = by_block(absmax) - np.asarray(kernel["offset"])
    rest = np.pad(rest, (0, -rest.size % 256)).reshape(-1, 256)
    absmax2 = np.abs(rest).max(1)
    equal(kernel["absmax2"], absmax2)
    scaled = rest * (np.float32(1) / np.maximum(absmax2, np.float32(1e-30)))[:, None]
    table = bnb.create_dynamic_map().numpy()
    nested = np.searchsorted((table[:-1] + table[1:]) / 2, scaled.clip(-1, 1)).astype(np.uint8)
    equal(by_block(kernel["absmax"]), nested.reshape(-1)[: absmax.size])
    decoded = (table[nested] * absmax2[:, None]).reshape(-1)[: absmax.size] + kernel["offset"]
    equal(by_block(scales(kernel)), decoded)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_all_is_as_bitsandbytes_has_it(weight, dtype):
    assert_as_bitsandbytes(weight.astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_nearest_is_as_numpy_has_it(weight, dtype):
    assert_nearest(weight.astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_trained_weights(trained, dtype):
    assert [len(weight) for weight in trained] == [64, 128]
    for weight in trained:
        assert_as_bitsandbytes(weight.astype(dtype))
        assert_nearest(weight.astype(dtype))


def test_the_whole_of_quantize_4bit():
    """Where torch's mean is the exact one its own state is ours too; else it is a last bit away."""
    same = 0
    for seed in range(8):
        weight = normal(512, 40, seed)
        _, theirs = bnb.quantize_4bit(to_torch(weight), compress_statistics=True, quant_type="nf4")
        kernel = quantise(weight, CPU)
        found, expected = float(kernel["offset"]), theirs.offset.item()
        assert abs(found - expected) <= np.spacing(np.float32(expected))
        if found == expected:
            same += 1
            equal(by_block(kernel["absmax"]), theirs.absmax.numpy())
            equal(kernel["absmax2"], theirs.state2.absmax.numpy())
    assert same


def test_values_of_scale_codes():
    equal(nf4.dynamic_map(), bnb.create_dynamic_map().numpy())
    equal(nf4.CODEBOOK, bnb.get_4bit_type("nf4", device="cpu").numpy())


def test_reciprocals_are_correctly_rounded():
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(-80, 80, 200_000)).astype(np.float32)
    x = np.concatenate([x, np.float32(2.0) ** np.arange(-118, 126, dtype=np.float32)])
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))])
    equal(jax.jit(nf4._reciprocal)(x), np.float32(1) / x)


def test_the_mean_is_that_of_float64():
    rng = np.random.default_rng(0)
    for size in (1, 2, 255, 70_001, 1 << 22):
        x = np.abs(rng.standard_cauchy((1, size))).astype(np.float32)
        equal(jax.jit(nf4._mean)(x), x.astype(np.float64).mean().astype(np.float32))


@pytest.mark.parametrize("config", [NEAREST, CPU, PLAIN, INT8], ids=str)
def test_the_same_bits_on_a_mesh(config):
    """As one device makes them, whole or compiled for shards that cut groups."""
    mesh = mesh_lib.make(mesh_lib.MeshConfig(fsdp=4, tensor=2))
    weight = normal(64 * 44, 70)
    expected = quantise(weight, config)
    cut = PartitionSpec("fsdp", "tensor")
    specs = {
        "codes": cut,
        "absmax": cut,
        "outmax": PartitionSpec(None, "tensor"),
        "absmax2": PartitionSpec(),
        "offset": PartitionSpec(),
    }
    shardings = {name: NamedSharding(mesh, specs[name]) for name in expected}
    sharded = jax.device_put(weight, NamedSharding(mesh, cut))
    made = jax.jit(lambda w: nf4.quantise(w, config), out_shardings=shardings)(sharded)
    jax.tree.map(equal, made, expected)

    def of_shard(kernel):
        rows = jax.lax.axis_index("fsdp") * 11
        cols = jax.lax.axis_index("tensor") * 35
        found = nf4.scales(kernel, rows=rows, cols=cols, blocks_per_output=44)
        return nf4.dequantise(kernel, found, jnp.float32)

    specs = {name: specs[name] for name in made}
    decoded = jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=(specs,), out_specs=cut))(made)
    equal(decoded, dequantise(expected, scales(expected), jnp.float32))


def test_nothing_is_fused_around_the_rounding():
    """Decoded, cast and used in one program it has the bits that it has step by step."""
    kernel = quantise(normal(256, 40), NEAREST)

    def decoded(kernel, dtype):
        return nf4.dequantise(kernel, nf4.scales(kernel), dtype)

    expected = np.asarray(decoded(kernel, jnp.float32)).astype(ml_dtypes.bfloat16)
    found = jax.jit(lambda kernel: decoded(kernel, jnp.bfloat16).astype(jnp.float32))(kernel)
    equal(found, expected.astype(np.float32))


def test_int8_is_as_bitsandbytes_has_it(weight):
    for dtype in (np.float32, ml_dtypes.bfloat16):
        rows = to_torch(weight.astype(dtype))
        kernel = quantise(weight.astype(dtype), INT8)
        codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(rows, 0.0)
        used = absmax.numpy() > 0  # torch divides by 0 for others
        equal(kernel["codes"].T[used], codes.numpy()[used])
        equal(kernel["outmax"][0], absmax.numpy())
        error = np.abs(dequantise(kernel, scales(kernel), jnp.float32) - weight.astype(dtype))
        assert (error <= 0.51 * np.asarray(kernel["outmax"]) / 127).all()


def test_an_output_of_zeros():
    weight = np.zeros((128, 2), np.float32)
    for config in (NEAREST, CPU, PLAIN, INT8):
        kernel = quantise(weight, config)
        equal(dequantise(kernel, scales(kernel), jnp.float32), weight)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("config", [NEAREST, CPU, PLAIN, INT8], ids=str)
def test_what_is_not_finite_can_be_told(value, config):
    weight = np.stack([normal(256, 384, layer) for layer in range(3)]).reshape(3, 256, 12, 32)
    weight[1, 70, 2, 3] = value
    params = {"model": {"layers": {"self_attn": {"q_proj": {"kernel": jnp.asarray(weight)}}}}}
    found = state.not_finite(nf4.quantise_params(params, config))
    name = "outmax" if config.kind == "int8" else "offset" if config.double else "absmax"
    assert found[f"model/layers/self_attn/q_proj/kernel/{name}"] == [1]
    assert all(layers == [1] for layers in found.values())


def test_a_block_that_would_be_cut_is_refused():
    message = "a weight of 100 inputs x 8 outputs cannot be cut into blocks of 64 inputs; expected"
    with pytest.raises(validation.UsageError, match=message):
        nf4.quantise(jnp.zeros((100, 8)), NEAREST)
    nf4.quantise(jnp.zeros((100, 8)), INT8)


def test_unknown_settings_are_refused():
    with pytest.raises(validation.UsageError) as said:
        nf4.QuantConfig(kind="nf5", mode="nearst")
    assert re.search(r"kind = 'nf5': expected one of \['int8', 'nf4'\]", str(said.value))
    assert re.search(r"mode = 'nearst': .*did you mean 'nearest'", str(said.value))
