"""Weights in 4 bits as bitsandbytes and transformers write them: read and written bit for bit."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hf_models import assert_equal_trees, one_device, random_llama

from tulu_jax import validation
from tulu_jax.interop import bnb, hf
from tulu_jax.interop import layout as layout_lib
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding as sharding_lib
from tulu_jax.quant import nf4

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
SHAPE = (70, 64 * 43)
decode = jax.jit(
    lambda kernel, dtype: nf4.dequantise(kernel, nf4.scales(kernel), dtype).astype(jnp.float32),
    static_argnums=1,
)
quantise = jax.jit(nf4.quantise, static_argnums=1)


def theirs(weight, *, double: bool) -> dict[str, np.ndarray]:
    """What bitsandbytes saves of the weight [out, in]."""
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    saved = {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {key: value.numpy() for key, value in ({NAME: packed} | saved).items()}


def decoded(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The weight [in, out] as bitsandbytes reads the tensors."""
    torched = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    packed = torched.pop(NAME)
    state = functional.QuantState.from_dict(torched, device=torch.device("cpu"))
    return functional.dequantize_4bit(packed, state).float().numpy().T


def ours(kernel: dict, dtype: str):
    """The weight [in, out] as we decode it."""
    return decode(jax.tree.map(jnp.asarray, kernel), jnp.dtype(dtype))


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.fixture(params=["float32", "bfloat16"])
def weight(request):
    torch.manual_seed(0)
    return (0.02 * torch.randn(SHAPE)).to(getattr(torch, request.param))


@pytest.mark.parametrize("double", [True, False])
def test_there_and_back(weight, double):
    saved = theirs(weight, double=double)
    kernel = bnb.from_bnb(saved, NAME, shape=SHAPE)
    dtype = str(weight.dtype).removeprefix("torch.")
    np.testing.assert_array_equal(ours(kernel, dtype), decoded(saved))
    assert_same(bnb.to_bnb(kernel, NAME, dtype=dtype), saved)
    assert set(bnb.names(NAME, double=double)) == set(saved)


@pytest.mark.parametrize("double", [True, False])
def test_what_we_quantise_opens_in_bitsandbytes(weight, double):
    dtype = str(weight.dtype).removeprefix("torch.")
    config = nf4.QuantConfig(double=double)
    kernel = quantise(weight.float().numpy().T.astype(jnp.dtype(dtype)), config)
    expected = ours(kernel, dtype)
    written = bnb.to_bnb(kernel, NAME, dtype=dtype)
    np.testing.assert_array_equal(decoded(written), expected)
    again = bnb.from_bnb(written, NAME, shape=SHAPE)
    jax.tree.map(np.testing.assert_array_equal, again, dict(kernel))


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    """A folder that transformers saved after `load_in_4bit` on a CPU, and the model in it."""
    import transformers

    folder = tmp_path_factory.mktemp("llama")
    random_llama(hidden_size=128, intermediate_size=128).save_pretrained(folder / "whole")
    quant = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "whole", quantization_config=quant, device_map="cpu", dtype=torch.bfloat16
    )
    model.save_pretrained(folder / "four")
    return folder / "four", model


def test_a_folder_that_transformers_saves(four_bits):
    folder, model = four_bits
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    config = hf.read_config(folder)
    quant = nf4.QuantConfig()
    assert hf.config_problems(folder, config) + hf.check_weights(folder, config, quant) == []
    params = hf.load(folder, config, shardings=one_device(), dtype="bfloat16", quant=quant)
    modules, found = dict(model.named_modules()), 0
    for layout in jax.tree.leaves(layout_lib.layouts(config)):
        if not nf4.LINEAR.fullmatch(layout.path):
            continue
        *path, last = layout.path.split("/")
        stack = functools.reduce(lambda tree, key: tree[key], path, params)[last]
        for layer, name in enumerate(layout.names):
            weight = modules[name.removesuffix(".weight")].weight
            expected = functional.dequantize_4bit(weight.data, weight.quant_state)
            kernel = jax.tree.map(lambda leaf: leaf[layer], stack)  # noqa: B023 -- used at once
            np.testing.assert_array_equal(ours(kernel, "bfloat16"), expected.float().numpy().T)
            saved = {key: tensors[key] for key in bnb.names(name, double=True)}
            assert_same(bnb.to_bnb(kernel, name, dtype="bfloat16"), saved)
            found += 1
    assert found == 3 * 7
    embedding = params["model"]["embed_tokens"]["embedding"].astype(jnp.float32)
    np.testing.assert_array_equal(
        embedding, modules["model.embed_tokens"].weight.detach().float().numpy()
    )


def test_a_folder_in_4_bits_lies_on_a_mesh_as_on_one_device(four_bits):
    folder, _ = four_bits
    config, quant = hf.read_config(folder), nf4.QuantConfig()
    expected = hf.load(folder, config, shardings=one_device(), dtype="bfloat16", quant=quant)
    mesh = mesh_lib.make(mesh_lib.MeshConfig(data=4, fsdp=1, tensor=2))
    shardings = sharding_lib.param_shardings(mesh, expected)
    found = hf.load(folder, config, shardings=shardings, dtype="bfloat16", quant=quant)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings
    assert_equal_trees(found, expected)


def test_a_folder_in_4_bits_is_a_base_of_its_own_kind_alone(four_bits, tmp_path):
    folder, _ = four_bits
    config = hf.read_config(folder)
    for quant, found in (
        (None, "none"),
        (nf4.QuantConfig(kind="int8"), "kind = 'int8'"),
        (nf4.QuantConfig(double=False), "kind = 'nf4' and double = False"),
    ):
        (problem,) = hf.check_weights(folder, config, quant)
        assert "in 4 bits, for a frozen base with kind = 'nf4' and double = True" in problem
        assert f"the run's quant has {found}" in problem
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    missing = "model.layers.1.mlp.up_proj.weight.nested_absmax"
    del tensors[missing]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (problem,) = hf.check_weights(tmp_path, config, nf4.QuantConfig())
    assert problem.startswith(f"{missing} is missing")


def test_bytes_may_be_stored_as_another_dtype(weight):
    saved = theirs(weight, double=True)
    kernel = bnb.from_bnb(saved, NAME, shape=SHAPE)
    saved[NAME] = saved[NAME].reshape(-1).view(np.float32)
    jax.tree.map(np.testing.assert_array_equal, bnb.from_bnb(saved, NAME, shape=SHAPE), kernel)


def changed(saved, **fields):
    state = json.loads(saved[STATE].tobytes()) | fields
    return saved | {STATE: np.frombuffer(json.dumps(state).encode(), np.uint8)}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(blocksize=128), r"blocksize = 128; expected 64: quantise the base anew"),
        (dict(nested_blocksize=64), r"nested_blocksize = 64; expected 256"),
        (dict(quant_type="fp4"), r"quant_type = 'fp4'; expected 'nf4'"),
        (dict(nested_dtype="float16"), r"nested_dtype = 'float16'; expected 'float32'"),
        (dict(nested_offset=None), r"nested_offset = None; expected 'a number'"),
        (dict(shape=[70, 64 * 44]), r"shape = \[70, 2816\]; expected \[70, 2752\]"),
        (dict(shape=None), r"shape = None; expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_quantisation_is_refused(fields, said):
    saved = theirs(torch.randn(SHAPE), double=True)
    with pytest.raises(validation.UsageError, match=rf"{NAME} is quantised with {said}"):
        bnb.from_bnb(changed(saved, **fields), NAME, shape=SHAPE)


def test_what_is_missing_or_damaged_is_named():
    saved = theirs(torch.randn(SHAPE), double=True)
    for name in bnb.names(NAME, double=True)[1:]:
        rest = {key: value for key, value in saved.items() if key != name}
        with pytest.raises(validation.UsageError) as said:
            bnb.from_bnb(rest, NAME, shape=SHAPE)
        assert name in str(said.value) or "quant_type = None" in str(said.value)
    fp4 = {key.replace("__nf4", "__fp4"): value for key, value in saved.items()}
    with pytest.raises(validation.UsageError, match="quant_type = 'fp4'; expected 'nf4'"):
        bnb.from_bnb(fp4, NAME, shape=SHAPE)
    with pytest.raises(validation.UsageError, match=r"bitsandbytes__nf4 is no JSON object"):
        bnb.from_bnb(saved | {STATE: np.zeros(3, np.uint8)}, NAME, shape=SHAPE)
    for table in ("quant_map", "nested_quant_map"):
        other = {f"{NAME}.{table}": saved[f"{NAME}.{table}"] * 2}
        with pytest.raises(validation.UsageError, match=rf"with {table} = '\d+ other values'"):
            bnb.from_bnb(saved | other, NAME, shape=SHAPE)
