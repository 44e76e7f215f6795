"""Weights in 4 bits as bitsandbytes and transformers write them: read and written bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hf_models import random_llama

from tulu_jax import validation
from tulu_jax.interop import bnb
from tulu_jax.quant import nf4

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
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
    kernel = jax.tree.map(jnp.asarray, kernel)
    return nf4.dequantise(kernel, nf4.scales(kernel), jnp.dtype(dtype)).astype(jnp.float32)


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.fixture(params=["float32", "bfloat16"])
def weight(request):
    torch.manual_seed(0)
    return (0.02 * torch.randn(70, 64 * 43)).to(getattr(torch, request.param))


@pytest.mark.parametrize("double", [True, False])
def test_there_and_back(weight, double):
    saved = theirs(weight, double=double)
    kernel = bnb.from_bnb(saved, NAME)
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
    again = bnb.from_bnb(written, NAME)
    jax.tree.map(np.testing.assert_array_equal, again, dict(kernel))


def test_a_folder_that_transformers_saves(tmp_path):
    """`load_in_4bit` on a CPU, then `save_pretrained`."""
    import transformers

    random_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "whole")
    quant = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=quant, device_map="cpu", dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "four")
    tensors = safetensors.numpy.load_file(tmp_path / "four" / "model.safetensors")
    found = 0
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            expected = functional.dequantize_4bit(module.weight.data, state).float().numpy().T
            kernel = bnb.from_bnb(tensors, f"{name}.weight")
            np.testing.assert_array_equal(ours(kernel, "bfloat16"), expected)
            saved = {key: tensors[key] for key in bnb.names(f"{name}.weight", double=True)}
            assert_same(bnb.to_bnb(kernel, f"{name}.weight", dtype="bfloat16"), saved)
            found += 1
    assert found == 3 * 7


def test_bytes_may_be_stored_as_another_dtype(weight):
    saved = theirs(weight, double=True)
    kernel = bnb.from_bnb(saved, NAME)
    saved[NAME] = saved[NAME].reshape(-1).view(np.float32)
    jax.tree.map(np.testing.assert_array_equal, bnb.from_bnb(saved, NAME), kernel)


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
        (dict(shape=[64, 2753]), r"shape = \[64, 2753\]; expected .*multiple of 64"),
        (dict(shape=[70, 64 * 44]), r"number of bytes = 96320; expected 98560"),
        (dict(shape=None), r"shape = None; expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_quantisation_is_refused(fields, said):
    saved = theirs(torch.randn(70, 64 * 43), double=True)
    with pytest.raises(validation.UsageError, match=rf"{NAME} is quantised with {said}"):
        bnb.from_bnb(changed(saved, **fields), NAME)


def test_what_is_missing_or_damaged_is_named():
    saved = theirs(torch.randn(8, 128), double=True)
    for name in bnb.names(NAME, double=True)[1:]:
        rest = {key: value for key, value in saved.items() if key != name}
        with pytest.raises(validation.UsageError) as said:
            bnb.from_bnb(rest, NAME)
        assert name in str(said.value) or "quant_type = None" in str(said.value)
    fp4 = {key.replace("__nf4", "__fp4"): value for key, value in saved.items()}
    with pytest.raises(validation.UsageError, match="quant_type = 'fp4'; expected 'nf4'"):
        bnb.from_bnb(fp4, NAME)
    with pytest.raises(validation.UsageError, match=r"bitsandbytes__nf4 is no JSON object"):
        bnb.from_bnb(saved | {STATE: np.zeros(3, np.uint8)}, NAME)
    for table in ("quant_map", "nested_quant_map"):
        other = {f"{NAME}.{table}": saved[f"{NAME}.{table}"] * 2}
        with pytest.raises(validation.UsageError, match=rf"with {table} = '\d+ other values'"):
            bnb.from_bnb(saved | other, NAME)
