"""Hugging Face Llama checkpoints in and out: `config.json`, safetensors and tokenizer files.

A file means what `transformers` reads in it: absent fields take its defaults, and what our model
does not compute is refused by name. Paths may be local or `gs://`; weights are streamed, so the
host holds a few layers of one parameter on the way in and one shard on the way out.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from tulu_jax import validation
from tulu_jax.interop import folder, placement, weight_files
from tulu_jax.interop import layout as layout_lib
from tulu_jax.interop.layout import Layout
from tulu_jax.interop.weight_files import WeightFiles
from tulu_jax.models import llama
from tulu_jax.models.config import LlamaConfig
from tulu_jax.parallel.sharding import path_name

Path = str | os.PathLike[str]
Params = llama.Params

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MAX_SHARD_BYTES = 5_000_000_000

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # a constant
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_WHOLE = ("num_key_value_heads", "head_dim", "max_position_embeddings")


def read_config(path: Path) -> LlamaConfig:
    """The model described by `config.json` in the folder `path`.

    Raises `ValueError` that lists every field this project does not compute.
    """
    file = epath.Path(path).expanduser() / "config.json"
    if not file.exists():
        raise ValueError(f"{file} does not exist; expected the folder of a Hugging Face checkpoint")
    text = file.read_bytes()
    if found := validation.stand_in(text):
        raise ValueError(f"{file}: {found}")
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds a {type(fields).__name__}; expected a JSON object")
    problems = _unsupported(fields)
    if problems:
        raise ValueError(_listed(f"{file} describes a model that is not supported", problems))
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    rope = fields.get("rope_parameters") or fields
    try:
        return LlamaConfig(
            vocab_size=fields["vocab_size"],
            num_layers=fields["num_hidden_layers"],
            embed_dim=width,
            mlp_dim=fields["intermediate_size"],
            num_heads=heads,
            num_kv_heads=_or(fields.get("num_key_value_heads"), heads),
            head_dim=_or(fields.get("head_dim"), width // heads),
            rope_theta=float(_or(rope.get("rope_theta"), _or(fields.get("rope_theta"), 1e4))),
            norm_eps=float(_or(fields.get("rms_norm_eps"), 1e-6)),
            tie_embeddings=bool(fields.get("tie_word_embeddings")),
            max_positions=_or(fields.get("max_position_embeddings"), 2048),
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def write_config(config: LlamaConfig) -> dict[str, Any]:
    """The fields of a `config.json`, readable by `transformers` 4 and 5 alike."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def check_weights(path: Path, config: LlamaConfig) -> list[str]:
    """What keeps the weights in `path` from being a `config`, from the file headers alone."""
    return _weight_problems(WeightFiles(epath.Path(path).expanduser()), config)


def load(path: Path, config: LlamaConfig, *, shardings, dtype: str) -> Params:
    """The parameters in the safetensors files of `path`, in `dtype`, placed as `shardings` says.

    `shardings` is a `Sharding` for every parameter, in the structure of the parameters, or one for
    all. Raises `ValueError` that lists each weight that is missing, unexpected or of another shape.
    """
    files = WeightFiles(epath.Path(path).expanduser())
    problems = _weight_problems(files, config)
    if problems:
        raise ValueError(_listed(f"the weights in {path} do not fit the model", problems))
    layouts = layout_lib.layouts(config)
    if isinstance(shardings, Sharding):
        everywhere = shardings
        shardings = jax.tree.map(lambda _: everywhere, layouts)
    with concurrent.futures.ThreadPoolExecutor(placement.READ_AHEAD) as pool:
        if config.tie_embeddings and _HEAD in files.headers:
            _check_tied(files, layouts, shardings, pool)
        return jax.tree.map(
            lambda layout, sharding: placement.load(
                files, layout, sharding=sharding, dtype=dtype, pool=pool
            ),
            layouts,
            shardings,
        )


def save(
    path: Path,
    params: Params,
    config: LlamaConfig,
    *,
    dtype: str,
    generation_config: dict[str, Any],
    write_tokenizer: Callable[[pathlib.Path], None] | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes the folder `path` that `AutoModelForCausalLM.from_pretrained` opens.

    `generation_config` becomes generation_config.json; its bos, eos and pad ids go into config.json
    as well. `write_tokenizer` puts the tokenizer's files, chat template included, into the local
    folder it is given. The leaves of `params` may be anything `placement.gather` reads. Every
    process of a multi-host run calls this; process 0 writes. The folder has the name
    `path.partial` until it is complete. Raises `ValueError` for an existing `path`, unless
    `overwrite`, and for parameters that are not a `config`.
    """
    target = epath.Path(path).expanduser()
    folder.check_target(target, overwrite=overwrite)
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: expected one of {sorted(DTYPES)}")
    _check_params(params, config)
    shards = _shards(config, DTYPES[dtype].itemsize, max_shard_bytes)
    weights = _gathered(params, config, DTYPES[dtype])
    if jax.process_index() != 0:
        for _ in weights:
            pass
    else:
        fields = write_config(config) | {"torch_dtype": dtype}
        fields |= {
            name: generation_config[name] for name in _TOKEN_IDS if name in generation_config
        }
        with folder.finished(target) as partial:
            _write_weights(partial, shards, weights)
            _write_json(partial / "generation_config.json", generation_config)
            _write_json(partial / "config.json", fields)
            if write_tokenizer is not None:
                with folder.local_folder(partial) as local:
                    write_tokenizer(local)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("tulu_jax.interop.hf.save")


def _or(value, default):
    return default if value is None else value


def _listed(heading: str, problems: list[str]) -> str:
    return f"{heading}:\n" + "\n".join(f"  {i}. {text}" for i, text in enumerate(problems, 1))


def _unsupported(fields: dict[str, Any]) -> list[str]:
    """Fields of a `config.json` whose values this project does not compute, or that are absent."""
    problems = [f"{name} is missing" for name in _REQUIRED if fields.get(name) is None]
    kinds = dict.fromkeys(_REQUIRED + _WHOLE, (int, "a positive whole number"))
    kinds |= dict.fromkeys(("rope_theta", "rms_norm_eps"), ((int, float), "a positive number"))
    for name, (kind, meaning) in kinds.items():
        value = fields.get(name, 1)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
            problems.append(f"{name} = {value!r}: expected {meaning}")
    expected = {
        "model_type": ("llama",),
        "tie_word_embeddings": (False, True, None),
        "hidden_act": ("silu", "swish", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "pretraining_tp": (1, None),
        "partial_rotary_factor": (1, 1.0, None),
        "sliding_window": (None,),
        "quantization_config": (None,),
    }
    problems += [
        f"{name} = {fields.get(name)!r}: expected {allowed[0]!r}"
        for name, allowed in expected.items()
        if fields.get(name) not in allowed
    ]
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else rope
        if kind != "default":
            problems.append(f"{name} = {rope!r}: expected null or rope_type 'default'")
        elif rope.get("partial_rotary_factor") not in (1, 1.0, None):
            factor = rope["partial_rotary_factor"]
            problems.append(f"{name}.partial_rotary_factor = {factor!r}: expected 1")
    return problems


def _weight_problems(files: WeightFiles, config: LlamaConfig) -> list[str]:
    if not files.headers:
        return files.problems
    expected = layout_lib.expected_weights(config)
    if config.tie_embeddings and _HEAD in files.headers:  # redundant; compared when it is read
        expected[_HEAD] = expected[_EMBEDDING]
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
        elif not weight_files.readable(header.dtype):
            report(name, f"is of type {header.dtype}; expected F32, BF16 or F16")
    for name, header in files.headers.items():
        if name not in expected and not _IGNORED.fullmatch(name):
            report(name, f"of shape {list(header.shape)} is not a weight of this model")
    return files.problems + [
        f"{name.replace('{}', _ranges(layers))} {text}" for (name, text), layers in grouped.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as '0-2,5'."""
    runs = itertools.groupby(enumerate(sorted(numbers)), key=lambda item: item[1] - item[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ",".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)


def _check_tied(files: WeightFiles, layouts, shardings, pool) -> None:
    """Raises `ValueError` if a file of a tied model carries a head that is not its embedding."""
    layout = layouts["model"]["embed_tokens"]["embedding"]
    sharding = shardings["model"]["embed_tokens"]["embedding"]
    embedding, head = (
        next(placement.read(files, weight, sharding=sharding, pool=pool))
        for weight in (layout, dataclasses.replace(layout, names=(_HEAD,)))
    )
    if not jax.jit(lambda a, b: (a == b).all())(embedding, head):
        raise ValueError(
            f"{_HEAD} differs from {_EMBEDDING} although the model ties them; set "
            "tie_word_embeddings to false in config.json, or remove the weight"
        )


def _check_params(params: Params, config: LlamaConfig) -> None:
    def shapes(tree):
        leaves, _ = jax.tree.flatten_with_path(tree)
        return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}

    found, expected = shapes(params), shapes(llama.abstract_params(config, "float32"))
    problems = [
        f"{name}: found {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted(found | expected)
        if found.get(name) != expected.get(name)
    ]
    if problems:
        raise ValueError(_listed("the parameters do not fit the model", problems))


def _shards(config: LlamaConfig, itemsize: int, max_bytes: int) -> list[dict[str, int]]:
    """Weights and their bytes, file by file; a weight larger than `max_bytes` has its own file."""
    shards: list[dict[str, int]] = [{}]
    for name, shape in layout_lib.expected_weights(config).items():
        size = math.prod(shape) * itemsize
        if shards[-1] and sum(shards[-1].values()) + size > max_bytes:
            shards.append({})
        shards[-1][name] = size
    return shards


def _gathered(params, config: LlamaConfig, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight by its Hugging Face name, in the order of `expected_weights`."""
    layouts = jax.tree.leaves(layout_lib.layouts(config))
    source: dict[str, tuple[Layout, Any, int]] = {}
    for layout, parameter in zip(layouts, jax.tree.leaves(params), strict=True):
        for layer, name in enumerate(layout.names):
            source[name] = (layout, parameter, layer)
    for name in layout_lib.expected_weights(config):
        layout, parameter, layer = source[name]
        yield name, placement.gather(parameter, layout, layer=layer, dtype=dtype)


def _write_weights(target: epath.Path, shards: list[dict[str, int]], weights) -> None:
    """Fills one file after the other from `weights`, and writes the index if there are several."""
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = weight_files.SINGLE
        tensors = dict(itertools.islice(weights, len(shard)))
        weight_map |= dict.fromkeys(tensors, file)
        with folder.local_folder(target) as local:
            safetensors.numpy.save_file(tensors, local / file, metadata={"format": "pt"})
    if len(shards) > 1:
        size = sum(sum(shard.values()) for shard in shards)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(target / weight_files.INDEX, index)


def _write_json(file: epath.Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
