"""The parameters that a run begins with: random, of a Hugging Face folder, or of another run."""

import jax
from absl import logging
from etils import epath

from tulu_jax import validation
from tulu_jax.interop import hf, layout
from tulu_jax.interop.weight_files import WeightFiles
from tulu_jax.models import llama
from tulu_jax.models.config import LlamaConfig
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import state as state_lib

SHOWN = 8  # weights named in a message


def initial_params(config: TrainConfig, abstract_params: dict) -> dict:
    """Parameters of `config.base`, or random ones from `config.seed`, as `abstract_params` says."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params)
    if config.base is None:
        logging.info("Random parameters from seed %d", config.seed)

        def init(key):
            params = llama.init_params(config.model, key)
            return jax.tree.map(lambda p: p.astype(config.param_dtype), params)

        return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))
    return load(config.base, config.model, abstract_params)


def load(folder: str, model: LlamaConfig, abstract_params: dict) -> dict:
    """Parameters from a Hugging Face folder or from the latest checkpoint of a run's workdir.

    Raises `UsageError` if they do not fit the model, cannot be read, or are not all finite.
    """
    published = (epath.Path(folder) / "config.json").exists()
    if published:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params)
        dtype = jax.tree.leaves(abstract_params)[0].dtype
        with validation.reading():
            params = hf.load(folder, model, shardings=shardings, dtype=dtype.name)
    else:
        params = checkpoint_lib.load_params(folder, abstract_params)
    bad = state_lib.not_finite(params)
    if published:
        named = _weights_in_files(folder, model, bad)
    else:
        named = [f"{path}{f' (layers {layers})' if layers else ''}" for path, layers in bad.items()]
    if named:
        more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
        raise validation.UsageError(
            f"base = {folder!r} has weights that are not finite: {', '.join(named[:SHOWN])}{more}; "
            "expected numbers. Get these files again, or choose another base"
        )
    return params


def _weights_in_files(folder: str, model: LlamaConfig, bad: dict[str, list[int]]) -> list[str]:
    """The weights of a Hugging Face folder, "name in file", behind parameters and their layers."""
    names = {found.path: found.names for found in jax.tree.leaves(layout.layouts(model))}
    headers = WeightFiles(epath.Path(folder)).headers
    weights = [names[path][layer] for path, layers in bad.items() for layer in layers or [0]]
    return [f"{weight} in {headers[weight].file}" for weight in weights]
