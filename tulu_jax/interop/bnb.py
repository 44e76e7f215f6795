"""One weight as bitsandbytes lays it out in a Hugging Face folder of 4 bits, in and out.

Beside `NAME` (uint8 [n/2, 1]: two codes a byte, the first above, of the row-major [out, in] weight)
lie `NAME.absmax`, `NAME.quant_map` and, with nested scales, `NAME.nested_absmax` and
`NAME.nested_quant_map`; `NAME.quant_state.bitsandbytes__nf4` is JSON as bytes. That is
`QuantState.as_dict(packed=True)` of bitsandbytes 0.50.2. Our side is in `quant/nf4.py`.
"""

import json
from collections.abc import Mapping

import numpy as np

from tulu_jax import strict_json, validation
from tulu_jax.quant import nf4

STATE = "quant_state.bitsandbytes__"  # and the type of the codes, before it the weight's name
_SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{STATE}nf4")


def names(weight: str, *, double: bool) -> list[str]:
    """The tensors that make the weight called `weight`, with nested scales or without."""
    nested = ("nested_absmax", "nested_quant_map")
    return [weight, *(f"{weight}.{s}" for s in _SUFFIXES if double or s not in nested)]


def from_bnb(
    tensors: Mapping[str, np.ndarray], name: str, *, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The arrays of the weight called `name`, `shape` [out, in], as `nf4.quantise` makes them.

    The bytes of `name` may be stored as any dtype (`bnb_4bit_quant_storage`). Raises `UsageError`
    for another shape, and for what is not NF4 in blocks of 64 inputs, with scales as float32 or
    nested in groups of 256.
    """
    fields = _state(tensors, name)
    double = "nested_blocksize" in fields or f"{name}.nested_absmax" in tensors
    for other in names(name, double=double):
        if other not in tensors:
            raise validation.UsageError(
                f"{other} is missing; expected it beside {name}: get the folder's files again"
            )
    _require(name, "quant_type", fields.get("quant_type"), "nf4")
    _require(name, "blocksize", fields.get("blocksize"), nf4.BLOCK)
    _require(name, "shape", fields.get("shape"), list(shape))
    outputs, inputs = shape
    if inputs % nf4.BLOCK:
        raise _refused(name, "inputs", inputs, f"a multiple of {nf4.BLOCK}")
    blocks = outputs * inputs // nf4.BLOCK
    packed = np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8)
    absmax = tensors[f"{name}.absmax"]
    _require(name, "number of bytes", packed.size, outputs * inputs // 2)
    _require(name, "number of scales", absmax.size, blocks)
    _require_table(name, "quant_map", tensors, nf4.CODEBOOK)
    _require(name, "dtype of absmax", absmax.dtype.name, "uint8" if double else "float32")
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(outputs, inputs).T
    kernel = {
        "codes": nf4.pack(codes.astype(np.int32)),
        "absmax": np.ascontiguousarray(absmax.reshape(outputs, -1).T),
    }
    if not double:
        return kernel
    _require(name, "nested_blocksize", fields.get("nested_blocksize"), nf4.GROUP)
    _require(name, "nested_dtype", fields.get("nested_dtype"), "float32")
    _require_table(name, "nested_quant_map", tensors, nf4.dynamic_map())
    absmax2, offset = tensors[f"{name}.nested_absmax"], fields.get("nested_offset")
    _require(name, "number of nested scales", absmax2.size, -(-blocks // nf4.GROUP))
    if not isinstance(offset, float):
        raise _refused(name, "nested_offset", offset, "a number")
    return kernel | {"absmax2": absmax2.reshape(-1), "offset": np.asarray(offset, np.float32)}


def to_bnb(kernel: Mapping, name: str, *, dtype: str) -> dict[str, np.ndarray]:
    """The tensors of one layer's NF4 `kernel` as the weight called `name`, which bitsandbytes
    decodes to `dtype`."""
    kernel = {part: np.asarray(leaf) for part, leaf in kernel.items()}
    codes = nf4.unpack(kernel["codes"]).T.astype(np.uint8)
    pairs = codes.reshape(-1, 2)
    tensors = {
        "absmax": np.ascontiguousarray(kernel["absmax"].T).reshape(-1),
        "quant_map": nf4.CODEBOOK,
    }
    fields = {
        "quant_type": "nf4",
        "blocksize": nf4.BLOCK,
        "dtype": dtype,
        "shape": codes.shape,
    }
    if "offset" in kernel:
        tensors |= {"nested_absmax": kernel["absmax2"], "nested_quant_map": nf4.dynamic_map()}
        fields |= {
            "nested_blocksize": nf4.GROUP,
            "nested_dtype": "float32",
            "nested_offset": float(kernel["offset"]),
        }
    tensors[f"{STATE}nf4"] = np.frombuffer(json.dumps(fields).encode(), np.uint8)
    packed = (pairs[:, :1] << 4) | pairs[:, 1:]
    return {name: packed} | {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def _state(tensors: Mapping[str, np.ndarray], name: str) -> dict:
    """The JSON of a weight's quantisation."""
    found = [other for other in tensors if other.startswith(f"{name}.{STATE}")]
    if found != [f"{name}.{STATE}nf4"]:
        kinds = [other.removeprefix(f"{name}.{STATE}") for other in found] or None
        raise _refused(name, "quant_type", kinds[0] if kinds else None, "nf4")
    try:
        fields = strict_json.loads(tensors[found[0]].tobytes())
        if not isinstance(fields, dict):
            raise ValueError(f"it is a {type(fields).__name__}")
    except ValueError as error:
        raise validation.UsageError(
            f"{found[0]} is no JSON object ({error}); get the folder's files again"
        ) from error
    return fields


def _require(name: str, what: str, found, expected) -> None:
    if found != expected:
        raise _refused(name, what, found, expected)


def _require_table(name: str, what: str, tensors, expected: np.ndarray) -> None:
    found = tensors[f"{name}.{what}"]
    if not np.array_equal(found, expected):
        raise _refused(name, what, f"{np.size(found)} other values", "those of bitsandbytes 0.50.2")


def _refused(name: str, what: str, found, expected) -> validation.UsageError:
    return validation.UsageError(
        f"{name} is quantised with {what} = {found!r}; expected {expected!r}: quantise the base "
        "anew with load_in_4bit, bnb_4bit_quant_type='nf4' and blocks of 64, or give the folder of "
        "its full-precision weights"
    )
