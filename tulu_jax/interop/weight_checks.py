"""Whether the weights of a folder are those of a model, from their headers."""

import itertools
import re

import jax
import numpy as np

from tulu_jax.interop import bnb, sources, weight_files
from tulu_jax.interop import layout as layout_lib
from tulu_jax.models.config import LlamaConfig
from tulu_jax.quant import nf4
from tulu_jax.quant.nf4 import QuantConfig

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # a constant


def in_4_bits(files: sources.Weights) -> bool:
    """Whether the linear layers are those of a folder that bitsandbytes quantised."""
    return any(f".{bnb.STATE}" in name for name in files.headers)


def _kind_problems(files: sources.Weights, quant: QuantConfig | None) -> list[str]:
    """Why weights in 4 bits are none for `quant`."""
    double = any(name.endswith(".nested_absmax") for name in files.headers)
    expected = QuantConfig(double=double)
    if quant is not None and (quant.kind, quant.double) == (expected.kind, expected.double):
        return []
    found = "none" if quant is None else f"kind = {quant.kind!r} and double = {quant.double}"
    return [
        f"its weights are in 4 bits, for a frozen base with kind = {expected.kind!r} and double = "
        f"{double}; the run's quant has {found}. Set that, or give the folder of the "
        "full-precision weights"
    ]


def problems(files: sources.Weights, config: LlamaConfig, quant: QuantConfig | None) -> list[str]:
    """What keeps `files` from being the weights of a `config`, one line for each group of layers;
    those in 4 bits must be of the kind of `quant`."""
    if not files.headers:
        return files.problems
    expected = layout_lib.expected_weights(config)
    packed: set[str] = set()
    if in_4_bits(files):
        if found := _kind_problems(files, quant):
            return files.problems + found
        for layout in jax.tree.leaves(layout_lib.layouts(config)):
            if nf4.LINEAR.fullmatch(layout.path):
                for name in layout.names:
                    packed.update(bnb.names(name, double=quant.double))
                    del expected[name]
    if config.tie_embeddings and HEAD in files.headers:  # redundant; compared when it is read
        expected[HEAD] = expected[EMBEDDING]
    grouped: dict[tuple[str, str], list[int]] = {}

    def report(name: str, text: str) -> None:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None:
            grouped[name, text] = []
            return
        template = name.replace(f"layers.{layer[1]}.", "layers.{}.", 1)
        grouped.setdefault((template, text), []).append(int(layer[1]))

    for name, shape in expected.items():
        header = files.headers.get(name)
        if header is None:
            report(name, f"is missing; expected shape {list(shape)}")
        elif header.shape != shape:
            report(name, f"has shape {list(header.shape)}; expected {list(shape)}")
        elif header.dtype not in weight_files.DTYPES:
            report(name, f"is of type {header.dtype}; expected F32, BF16 or F16")
    for name in sorted(packed - files.headers.keys()):
        report(name, "is missing; expected it of a weight in 4 bits")
    for name, header in files.headers.items():
        if name not in expected and name not in packed and not _IGNORED.fullmatch(name):
            report(name, f"of shape {list(header.shape)} is not a weight of this model")
    return files.problems + [
        f"{name.replace('{}', _ranges(layers))} {text}" for (name, text), layers in grouped.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as '0-2,5'."""
    runs = itertools.groupby(enumerate(sorted(numbers)), key=lambda item: item[1] - item[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ",".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)


def require_tied(files: sources.Weights) -> None:
    """Raises `ValueError` if the files of a tied model have a head that is not its embedding."""
    if HEAD not in files.headers:
        return
    embedding, head = (files.rows(name, slice(None)) for name in (EMBEDDING, HEAD))
    if not np.array_equal(embedding, head):
        raise ValueError(
            f"{HEAD} differs from {EMBEDDING} although the model ties them; set "
            "tie_word_embeddings to false in config.json, or remove the weight"
        )
