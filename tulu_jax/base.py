"""The parameters that a run begins with: random, of a Hugging Face folder, or of another run."""

import dataclasses
import functools
import re

import jax
from absl import logging
from etils import epath

from tulu_jax import step as step_lib
from tulu_jax import validation
from tulu_jax.interop import hf, layout, peft, sources
from tulu_jax.models import llama
from tulu_jax.models.config import SCORE, LlamaConfig
from tulu_jax.parallel import sharding
from tulu_jax.quant import nf4
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import agreement
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import state as state_lib
from tulu_jax.training.state import REWARD

SHOWN = 8  # weights named in a message
OF_POLICY = "policy_weights"  # in what a checkpoint says of its base, where a reward model is too


def abstract_params(config: TrainConfig, mesh: jax.sharding.Mesh) -> llama.Params:
    """Shapes, dtypes and shardings of the base of a run; nothing is allocated."""
    return _placed(step_lib.abstract_base(_headed(config)), mesh)


def _headed(config: TrainConfig) -> TrainConfig:
    """`config` with the model that lies in its base: where a score head trains, that may have one
    already."""
    if config.objective.head != SCORE or not has_score(config):
        return config
    return dataclasses.replace(config, model=config.trained_model)


def has_score(config: TrainConfig) -> bool:
    """Whether the base of `config` is a reward model."""
    base = config.base
    if base is None or not epath.Path(base).exists():
        return False  # which `problems` tells
    if sources.is_published(base):
        with validation.reading():
            return hf.is_scored(base)
    checkpoints = checkpoint_lib.Checkpoints(base)
    step = checkpoints.latest_step()
    return step is not None and f"{SCORE}/kernel" in checkpoints.about(step)["params"]


def _placed(params: llama.Params, mesh: jax.sharding.Mesh) -> llama.Params:
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        params,
        sharding.param_shardings(mesh, params),
    )


def initial_params(config: TrainConfig, mesh: jax.sharding.Mesh) -> llama.Params:
    """Parameters of `config.base` on `mesh`, or random ones from `config.seed`; beside them those
    of the reward model, if the objective has one."""
    params = policy_params(config, mesh)
    if (folder := config.objective.reward_from) is None:
        return params
    return {**params, REWARD: reward_params(config, folder, mesh)}


def reward_params(config: TrainConfig, folder: str, mesh: jax.sharding.Mesh) -> llama.Params:
    """Parameters of the reward model in `folder`, of the policy's shape, on `mesh`; quantised as
    the base is."""
    scored = dataclasses.replace(config, model=config.model.with_head(SCORE), base=folder)
    return _loaded(scored, _placed(step_lib.abstract_base(scored), mesh), mesh)


def policy_params(config: TrainConfig, mesh: jax.sharding.Mesh) -> llama.Params:
    """Parameters of `config.base` on `mesh`, or random ones from `config.seed`."""
    config = _headed(config)
    abstract = abstract_params(config, mesh)
    if config.base is not None:
        return _loaded(config, abstract, mesh)
    logging.info("Random parameters from seed %d", config.seed)

    def init(key):
        params = llama.init_params(config.model, key)
        params = jax.tree.map(lambda p: p.astype(config.param_dtype), params)
        return params if config.quant is None else nf4.quantise_params(params, config.quant)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))


def initial_adapters(config: TrainConfig, weights: str) -> dict | None:
    """The adapters of `config.adapter_from`, numpy arrays; None where new ones are drawn. `weights`
    is the fingerprint of the base. Raises `UsageError` if they are of another base or shape."""
    if config.adapter_from is None:
        return None
    folder = epath.Path(config.adapter_from)
    found = peft.of_base(folder)
    if found not in (None, weights):
        raise validation.UsageError(
            f"adapter_from = {config.adapter_from!r} is of a base with weights {found}; base = "
            f"{config.base!r} has {weights}. Give the base that it was trained on, and the same "
            "quant and param_dtype"
        )
    return peft.load(folder, config.adapter, config.model)


def fingerprint(about: dict) -> str:
    """That of the base of a checkpoint that says `about` of itself, without the reward model's."""
    return about.get(OF_POLICY, about["weights"])


def require_same(config: TrainConfig, found: str, expected: str) -> None:
    """Raises `UsageError` unless the base, and the reward model where there is one, have the
    weights that the run began with."""
    reward = config.objective.reward_from
    named = f"base = {config.base!r}" + (f" with reward_from = {reward!r}" if reward else "")
    if found != expected:
        raise validation.UsageError(
            f"{named} has weights {found}; this run began with {expected}, and what "
            "is frozen or cached of them is needed again. Restore that base, or start anew in "
            "another --workdir"
        )


def adapter_problems(config: TrainConfig) -> list[str]:
    """Why the run cannot begin from `adapter_from`, one line each."""
    if config.adapter_from is None:
        return []
    try:
        found = peft.read_config(epath.Path(config.adapter_from))
    except validation.UsageError as error:
        return [f"adapter_from = {config.adapter_from!r}: {error}"]
    return [
        f"adapter_from = {config.adapter_from!r} has {name} = {theirs}; the run has {ours}. Set "
        f"lora.LoRAConfig.{name} to that"
        for name, theirs, ours in (
            ("rank", found.rank, config.adapter.rank),
            ("alpha", found.alpha, config.adapter.alpha),
            ("rank_stabilised", found.rank_stabilised, config.adapter.rank_stabilised),
            ("targets", sorted(found.names), sorted(config.adapter.names)),
        )
        if theirs != ours
    ]


def problems(config: TrainConfig) -> list[str]:
    """Why the run cannot begin from its base, one line each, from headers and JSON alone."""
    return adapter_problems(config) + _problems(_headed(config))


def _problems(config: TrainConfig) -> list[str]:
    if config.base is None:
        return []
    found = source_problems(config.base, config.model, config.param_dtype, config.quant)
    return [f"base = {config.base!r}: {problem}" for problem in found]


def source_problems(
    folder: str, model: LlamaConfig, dtype: str, quant: nf4.QuantConfig | None = None
) -> list[str]:
    """Why parameters of `model` cannot be loaded from `folder`, one line each."""
    if not epath.Path(folder).exists():
        return ["it does not exist; expected published weights or a run's workdir"]
    if sources.is_published(folder):
        return hf.config_problems(folder, model) + hf.check_weights(folder, model, quant)
    checkpoints = checkpoint_lib.Checkpoints(folder)
    step = checkpoints.latest_step()
    if step is None:
        return ["it has neither config.json nor params.json nor a checkpoint"]
    params = llama.abstract_params(model, dtype)
    about, path = checkpoints.about(step), checkpoints.folder / str(step)
    return agreement.model_problems(about, path, model, params)


def first_step_problems(config: TrainConfig) -> list[str]:
    """Why the base cannot become the checkpoint of step 0 of the run, one line each."""
    found = []
    if config.base is None:
        found.append("base = None: the run begins with random parameters; set BASE to a folder")
    checkpoints = checkpoint_lib.Checkpoints(config.workdir)
    if steps := checkpoints.steps():
        found.append(f"{checkpoints.folder} has steps {steps} already; choose another --workdir")
    return found


def about(config: TrainConfig, params: llama.Params | None = None) -> dict:
    """What exports need to know of the base, kept with each checkpoint: `base_dtype`, that of the
    weights where they were published or made, and its `generation_config`; of a frozen base with a
    reward model beside it, both in `params`, the fingerprint of the base alone."""
    found = _about(config)
    if config.adapter is not None and config.objective.reward_from is not None:
        found[OF_POLICY] = state_lib.fingerprint(llama.own(params))
    return found


def _about(config: TrainConfig) -> dict:
    if config.base is None or sources.is_published(config.base):
        return {
            "base_dtype": _weights_dtype(config),
            "generation_config": generation_config(config),
        }
    checkpoints = checkpoint_lib.Checkpoints(config.base)
    found = checkpoints.about(checkpoints.require(None))
    return {
        "base_dtype": found.get("base_dtype", config.param_dtype),
        "generation_config": found.get("generation_config", {}),
    }


def generation_config(config: TrainConfig) -> dict:
    """The generation config of a published base; {} where there is none."""
    with validation.reading():
        return hf.read_generation_config(config.base) if config.base else {}


def _weights_dtype(config: TrainConfig) -> str:
    with validation.reading():
        return hf.weights_dtype(config.base, config.model) if config.base else config.param_dtype


def _loaded(config: TrainConfig, abstract, mesh) -> llama.Params:
    """The base, in few bits if the run has it so. A published one is quantised weight by weight as
    it is read; that of a run lies on the devices whole, and is quantised stack by stack."""
    if config.quant is None or sources.is_published(config.base):
        return load(config.base, config.model, abstract, config.quant)
    whole = llama.abstract_params(config.model, config.param_dtype)
    params = load(config.base, config.model, _placed(whole, mesh))

    def quantise(path, leaf):
        name = sharding.path_name(path)
        if not nf4.LINEAR.fullmatch(name):
            return leaf
        placed = jax.tree.map(lambda leaf: leaf.sharding, _at(abstract, path))
        run = functools.partial(nf4.quantise_stack, name, config=config.quant)
        found = jax.block_until_ready(jax.jit(run, out_shardings=placed)(leaf))
        leaf.delete()
        return found

    return jax.tree.map_with_path(quantise, params)


def _at(tree, path):
    return functools.reduce(lambda found, step: found[step.key], path, tree)


def load(
    folder: str, model: LlamaConfig, abstract_params: dict, quant: nf4.QuantConfig | None = None
) -> dict:
    """Parameters from a Hugging Face folder, quantised by `quant` as they are read, or from the
    latest checkpoint of a run's workdir.

    Raises `UsageError` if they do not fit the model, cannot be read, or are not all finite.
    """
    published = sources.is_published(folder)
    if published:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params)
        dtype = jax.tree.leaves(abstract_params)[0].dtype
        with validation.reading():
            params = hf.load(folder, model, shardings=shardings, dtype=dtype.name, quant=quant)
    else:
        params = checkpoint_lib.load_params(folder, model, abstract_params)
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
    """The weights of a Hugging Face folder, "name in file", that parameters and their
    layers are read from."""
    names = {found.path: found.names for found in jax.tree.leaves(layout.layouts(model))}
    headers = sources.opened(folder, model).headers
    weights = {  # once each: of a quantised kernel several arrays may be bad
        names[re.sub("(?<=/kernel)/.*", "", path)][layer]: None
        for path, layers in bad.items()
        for layer in layers or [0]
    }
    return [f"{weight} in {headers[weight].file}" for weight in weights]
