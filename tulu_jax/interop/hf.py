"""Hugging Face Llama checkpoints in and out: `config.json`, safetensors and tokenizer files.

A file means what `transformers` reads in it: absent fields take its defaults, and what our model
does not compute is refused by name. Paths may be local or `gs://`; weights are streamed, so the
host holds a few layers of one parameter on the way in and one shard on the way out.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np
import tqdm
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from tulu_jax import validation
from tulu_jax.interop import (
    config_file,
    folder,
    placement,
    shards,
    sources,
    weight_checks,
    weight_files,
)
from tulu_jax.interop import layout as layout_lib
from tulu_jax.interop.config_file import write_config
from tulu_jax.interop.layout import Layout
from tulu_jax.models import llama
from tulu_jax.models.config import SCORE, LlamaConfig
from tulu_jax.parallel.sharding import path_name
from tulu_jax.quant import nf4
from tulu_jax.quant.nf4 import QuantConfig

Path = str | os.PathLike[str]
Params = llama.Params

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MAX_SHARD_BYTES = 5_000_000_000
READERS = 2  # weights that are brought into their form while another is written
CARD = "README.md"

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")


def read_config(path: Path, *, bucket: str | None = None) -> LlamaConfig:
    """The model described by `config.json` in the folder `path`, which lies below `bucket`.

    Raises `ValueError` that lists every field this project does not compute.
    """
    folder_ = epath.Path(validation.below(bucket, os.fspath(path)))
    fields = config_file.read(folder_)
    file = folder_ / config_file.NAME
    problems = config_file.unsupported(fields)
    if problems:
        raise ValueError(_listed(f"{file} describes a model that is not supported", problems))
    try:
        return config_file.parse(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def config_problems(path: Path, config: LlamaConfig) -> list[str]:
    """How the `config.json` in `path` describes another function than `config`, one line a field.

    `max_position_embeddings` is not compared: nothing is computed from it.
    """
    folder_ = epath.Path(path).expanduser()
    if sources.is_meta(folder_) or sources.is_easylm(folder_):
        # The former's fields are compared when it is opened, the latter has none.
        return [f"{path} is a language model, without a score head"] * (config.head == SCORE)
    try:
        fields = config_file.read(folder_)
        problems = config_file.unsupported(fields)
        if not problems:
            problems = config_file.differences(config_file.parse(fields), config)
            if (found := config_file.head(fields)) != config.head:
                found, expected = (config_file.ARCHITECTURES[h] for h in (found, config.head))
                problems.append(f"architectures = [{found!r}]; expected {expected!r}")
    except ValueError as error:
        return [str(error)]
    return [f"{folder_ / config_file.NAME} says {text}" for text in problems]


def is_scored(path: Path) -> bool:
    """Whether `path` is the folder of a Llama with a score head. Raises `ValueError` for a folder
    whose `config.json` is none of a Llama."""
    folder_ = epath.Path(path).expanduser()
    if sources.is_meta(folder_) or sources.is_easylm(folder_):
        return False
    return config_file.head(config_file.read(folder_)) == SCORE


def read_generation_config(path: Path) -> dict[str, Any]:
    """The fields of `generation_config.json` in `path`; none where there is no such file.

    Raises `ValueError` if it is no JSON object.
    """
    file = epath.Path(path).expanduser() / "generation_config.json"
    return config_file.read_object(file) if file.exists() else {}


def weights_dtype(path: Path, config: LlamaConfig) -> str:
    """What `config.json` in `path` says the dtype of the weights is; else that of the embedding."""
    folder_ = epath.Path(path).expanduser()
    if not (sources.is_meta(folder_) or sources.is_easylm(folder_)):
        fields = config_file.read(folder_)
        said = str(fields.get("dtype") or fields.get("torch_dtype")).removeprefix("torch.")
        if said in weight_files.DTYPES.values():
            return said
    return weight_files.DTYPES[sources.opened(path, config).headers[weight_checks.EMBEDDING].dtype]


def check_weights(path: Path, config: LlamaConfig, quant: QuantConfig | None = None) -> list[str]:
    """What keeps the weights in `path` from being a `config`, from the file headers alone. Those of
    a folder in 4 bits are weights for `quant`, which says whether their scales are nested."""
    return weight_checks.problems(sources.opened(path, config), config, quant)


def opened(path: Path, config: LlamaConfig, quant: QuantConfig | None = None) -> sources.Weights:
    """The weights in `path`, to be read one by one. Raises `ValueError` for what `load` does."""
    files = sources.opened(path, config)
    problems = config_problems(path, config) + weight_checks.problems(files, config, quant)
    if problems:
        raise ValueError(_listed(f"the weights in {path} do not fit the model", problems))
    logging.info("Reading %s in %s", ", ".join(files.files), path)
    if files.unread:
        logging.warning("Not read, as transformers does not: %s in %s", files.unread, path)
    if config.tie_embeddings:
        weight_checks.require_tied(files)
    return files


def load(
    path: Path, config: LlamaConfig, *, shardings, dtype: str, quant: QuantConfig | None = None
) -> Params:
    """The parameters in the safetensors files of `path`, in `dtype`, placed as `shardings` says.

    `shardings` is a `Sharding` for every parameter, in the structure of the parameters, or one for
    all. With `quant` the linear layers of the trunk (`nf4.LINEAR`) are quantised as they are read:
    one weight of `dtype` exists at a time. A folder in 4 bits is taken as it is. Raises
    `ValueError` that lists each weight that is missing, unexpected or of another shape, and each
    field of `config.json` by which the folder's model computes another function.
    """
    files, layouts = opened(path, config, quant), layout_lib.layouts(config)
    abstract = llama.abstract_params(config, dtype)
    if quant is not None:
        abstract = jax.eval_shape(lambda params: nf4.quantise_params(params, quant), abstract)
    if isinstance(shardings, Sharding):
        everywhere = shardings
        shardings = jax.tree.map(lambda _: everywhere, abstract)

    def placed(layout, sharding):
        if isinstance(sharding, Sharding):
            return placement.load(files, layout, sharding=sharding, dtype=dtype, pool=pool)
        if weight_checks.in_4_bits(files):
            return placement.load_packed(files, layout, shardings=sharding, pool=pool)
        return placement.load_quantised(
            files, layout, shardings=sharding, dtype=dtype, quant=quant, pool=pool
        )

    with concurrent.futures.ThreadPoolExecutor(placement.READ_AHEAD) as pool:
        return jax.tree.map(placed, layouts, shardings)


@runtime_checkable
class Source(Protocol):
    """Weights that are read one by one, and known when all were read to be what was saved."""

    made_of: str  # what an export depends on; one that was killed goes on if it is the same

    def learnt(self) -> dict[str, Any]:
        """What is known of the weights read so far, JSON-serialisable."""

    def know(self, learnt: dict[str, Any]) -> None:
        """Takes what a killed export had learnt."""

    def check(self) -> None:
        """Raises `UsageError` if what was read is not what was saved."""


def target_problems(path: Path, config: LlamaConfig, *, dtype: str, overwrite: bool) -> list[str]:
    """Why `save` could not write a `config` in `dtype` to `path`, one line each."""
    num_bytes = config.num_params * DTYPES[dtype].itemsize
    return folder.problems(folder.located(path), overwrite=overwrite, num_bytes=num_bytes)


def save(
    path: Path,
    params: Params,
    config: LlamaConfig,
    *,
    dtype: str,
    generation_config: dict[str, Any],
    write_tokenizer: Callable[[pathlib.Path], None] | None,
    card: str | None = None,
    source: Source | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes the folder `path` that `AutoModelForCausalLM.from_pretrained` opens, or with a score
    head `AutoModelForSequenceClassification`.

    `generation_config` becomes generation_config.json, but of a score head; its bos, eos and pad
    ids go into config.json as well. `write_tokenizer` puts the tokenizer's files, chat template
    included, into the local folder it is given; `card` is the text of README.md. The leaves of
    `params` may be anything `placement.gather` reads; with a `source` they are read by threads, an
    export that was killed goes on behind its last whole file, and nothing appears unless
    `source.check` finds no fault. The manifest has the digest of every weight. Every process of a
    multi-host run calls this; process 0 writes. The folder appears when it is complete
    (`folder.finished`). An id that is none of the vocabulary is left out with a word in the log:
    `transformers` does not open a model whose padding is not in its embedding. Raises `ValueError`
    for what `target_problems` finds, and for parameters that are not a `config`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: expected one of {sorted(DTYPES)}")
    problems = target_problems(path, config, dtype=dtype, overwrite=overwrite)
    if problems:
        raise ValueError("\n".join(problems))
    target = folder.located(path)
    _check_params(params, config)
    weights = layout_lib.expected_weights(config)
    files = shards.plan(weights, DTYPES[dtype], max_shard_bytes)
    get = _getter(params, config, DTYPES[dtype])
    if jax.process_index() != 0:
        for name in weights:
            get(name)
    else:
        generation_config = _within(generation_config, config.vocab_size)
        fields = write_config(config) | {"torch_dtype": dtype}
        fields |= {
            name: generation_config[name] for name in _TOKEN_IDS if name in generation_config
        }
        made_of = source and f"{source.made_of}, {dtype}, files of {max_shard_bytes} bytes"
        with folder.finished(target, made_of=made_of) as partial:
            _write_weights(partial, files, get, DTYPES[dtype], source)
            if len(files) > 1:
                _write_json(partial / weight_files.INDEX, shards.index(files, DTYPES[dtype]))
            if config.head != SCORE:
                _write_json(partial / "generation_config.json", generation_config)
            _write_json(partial / "config.json", fields)
            if card is not None:
                (partial / CARD).write_text(card)
            if write_tokenizer is not None:
                with folder.local_folder(partial) as local:
                    write_tokenizer(local)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("tulu_jax.interop.hf.save")


def _listed(heading: str, problems: list[str]) -> str:
    return f"{heading}:\n" + "\n".join(f"  {i}. {text}" for i, text in enumerate(problems, 1))


def _within(generation_config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """`generation_config` without the ids, one or several a field, beyond the vocabulary."""
    kept = dict(generation_config)
    for name, value in generation_config.items():
        if value is None or not (name.endswith("_token_id") or name in _SUPPRESSED):
            continue
        ids = value if isinstance(value, list) else [value]
        known = [id for id in ids if type(id) is int and 0 <= id < vocab_size]
        if known == ids:
            continue
        logging.warning(
            "%s = %s of the generation config is not written so: the vocabulary has ids 0 to %d",
            *(name, value, vocab_size - 1),
        )
        if known:
            kept[name] = known
        else:
            del kept[name]
    return kept


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


def _getter(params, config: LlamaConfig, dtype: np.dtype) -> Callable[[str], np.ndarray]:
    """What gives a weight by its Hugging Face name."""
    layouts = jax.tree.leaves(layout_lib.layouts(config))
    source: dict[str, tuple[Layout, Any, int]] = {}
    for layout, parameter in zip(layouts, jax.tree.leaves(params), strict=True):
        for layer, name in enumerate(layout.names):
            source[name] = (layout, parameter, layer)

    def get(name: str) -> np.ndarray:
        layout, parameter, layer = source[name]
        return placement.gather(parameter, layout, layer=layer, dtype=dtype)

    return get


def _write_weights(
    partial: epath.Path,
    files: list[shards.Shard],
    get: Callable[[str], np.ndarray],
    dtype: np.dtype,
    source: Source | None,
) -> None:
    """Fills one file after the other, those apart that a killed export left whole, and notes what
    was written."""
    before = folder.noted(partial).get(folder.UNFINISHED, {})
    said = dict(before.get("files", {}))
    todo = [file for file in files if not shards.is_whole(partial, file, said.get(file.file))]
    if source and before.get("learnt"):
        source.know(before["learnt"])
    total = sum(file.num_bytes(dtype) for file in files)
    left = sum(file.num_bytes(dtype) for file in todo)
    names = (name for file in todo for name in file.weights)
    with (
        tqdm.tqdm(
            total=total, initial=total - left, unit="B", unit_scale=True, desc="write"
        ) as bar,
        _ahead(names, get, READERS if source else 0) as weights,
    ):
        for file in todo:
            said[file.file] = shards.write(partial, file, weights, dtype, bar)
            if source:
                now = before | {"files": said, "learnt": source.learnt()}
                folder.note(partial, {folder.UNFINISHED: now})
    if source:
        source.check()
    digests = [said[file.file]["weights"] for file in files]
    folder.note(partial, {"weights": {name: one[name] for one in digests for name in one}})


@contextlib.contextmanager
def _ahead(
    names: Iterable[str], get: Callable[[str], np.ndarray], readers: int
) -> Iterator[Iterator[tuple[str, np.ndarray]]]:
    """(name, `get(name)`) of each, `readers` of them made by threads while another is taken; 0: one
    after the other, in this thread."""
    if not readers:
        yield ((name, get(name)) for name in names)
        return
    with concurrent.futures.ThreadPoolExecutor(readers) as pool:
        rest, queue = iter(names), collections.deque()

        def more(count: int) -> None:
            queue.extend((name, pool.submit(get, name)) for name in itertools.islice(rest, count))

        def taken() -> Iterator[tuple[str, np.ndarray]]:
            more(readers)
            while queue:
                name, future = queue.popleft()
                weight = future.result()
                del future
                more(1)
                yield name, weight

        try:
            yield taken()
        finally:
            pool.shutdown(cancel_futures=True)


def _write_json(file: epath.Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
