"""Weights between a run and the Hugging Face form, one at a time, on one host and without a mesh.

Neither the rows of a run are asked for nor its devices; its base only to go inward, or where the
objective keeps it frozen. Then, and for other objectives that add parameters of their own, the
whole model is in memory, as a run has it.
"""

import functools
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from etils import epath

from tulu_jax import (
    adapted,
    atomic,
    digests,
    model_card,
    trained,
    trainer,
    validation,
    verification,
)
from tulu_jax import base as base_lib
from tulu_jax import step as step_lib
from tulu_jax.data import chat as chat_lib
from tulu_jax.data import tokenizer_files
from tulu_jax.interop import folder as folder_lib
from tulu_jax.interop import hf, peft, sources, tokenizer_export
from tulu_jax.interop import layout as layout_lib
from tulu_jax.models import llama, lora
from tulu_jax.models.config import SCORE
from tulu_jax.parallel import sharding
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import agreement, checkpoint_digests, optim
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import lease as lease_lib
from tulu_jax.training import state as state_lib
from tulu_jax.training.checkpoint_arrays import StoredArray, Streamed
from tulu_jax.training.state import TrainState

COMPARED = ("objective", "tokenizer")  # of what a run must agree with; the model has its own rules


def export(
    config: TrainConfig,
    out: str,
    *,
    step: int | None,
    dtype: str | None,
    overwrite: bool,
    merge: str | None = None,
    max_shard_bytes: int = hf.MAX_SHARD_BYTES,
) -> None:
    """Writes the checkpoint of `step` (default: the latest) as the Hugging Face folder `out`.

    Of a run with an adapter that is the adapter alone, for PEFT, or with `merge`, one of
    `adapted.MERGES`, the whole model.

    The folder has the tokenizer with a chat template that makes exactly the training ids, the
    generation config of what the run began from, and a model card. `dtype` None is that of the
    base, where it is float32, else bfloat16. Raises `UsageError`, before a weight is read, if there
    is no such checkpoint, if it is of another model, objective or tokenizer than `config`, or if
    `out` cannot be written; and `DamagedError`, with nothing written, if the weights that were read
    are not those that were saved.
    """
    checkpoints = checkpoint_lib.Checkpoints(config.workdir)
    step = checkpoints.require(step)
    about = checkpoints.about(step)
    dtype = dtype or _dtype_of_base(config, about)
    model, scored = config.trained_model, config.objective.head == SCORE
    if scored and config.adapter is not None and merge is None:
        raise validation.UsageError(
            "a PEFT folder of ours has no score head, which trained beside the adapter; expected "
            "--merge=dequantised or --merge=full, which write the whole model"
        )
    problems = hf.target_problems(out, model, dtype=dtype, overwrite=overwrite)
    if problems:
        raise validation.UsageError("\n".join(problems))
    validation.raise_if(_disagreements(config, about, checkpoints.folder / str(step)))
    with validation.reading():
        path = trained.tokenizer_path(config)
        tokenizer = chat_lib.load_tokenizer(path)
        backend = tokenizer_files.for_plain_text(tokenizer.backend, path)
        generation = about.get("generation_config")  # checkpoints of before have none
        if generation is None:
            generation = base_lib.generation_config(config)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        if scored:  # transformers reads the score before the padding, which must not be `</s>`
            unknown = tokenizer.backend.token_to_id("<unk>")
            ids["pad_token_id"] = tokenizer.bos_id if unknown is None else unknown
    write = functools.partial(
        hf.save,
        out,
        config=model,
        dtype=dtype,
        generation_config=generation | ids,
        overwrite=overwrite,
        write_tokenizer=lambda folder: tokenizer_export.save(
            backend,
            str(folder),
            max_length=config.data.max_length,
            mode=config.data.chat,
        ),
        card=model_card.text(config, about, step=step, dtype=dtype),
        max_shard_bytes=max_shard_bytes,
    )
    if about.get("frozen"):
        mesh, params = trained.load(config, step=step)
        with jax.set_mesh(mesh):
            if config.adapter is not None and merge is None:
                _write_adapter(config, params, out, base_lib.fingerprint(about))
                return
            if config.adapter is not None:
                params = adapted.merged(config, params, merge, mesh)
            write(params=params)
        return
    source = StoredSource(config, checkpoints, step)
    try:
        write(params=source.params, source=source)
    except checkpoint_lib.OnItsWayError as error:
        logging.warning("Once more: %s", error)
        source = StoredSource(config, checkpoints, step)
        write(params=source.params, source=source)


def _write_adapter(config: TrainConfig, params: llama.Params, out: str, weights: str) -> None:
    """The adapter among `params`, of a base with the fingerprint `weights`, as a PEFT folder."""
    with folder_lib.finished(folder_lib.located(out)) as partial:
        peft.save(partial, lora.only(params), config.adapter, base=config.base, weights=weights)


class StoredSource:
    """The parameters of a checkpoint, read from its chunks: an `hf.Source`."""

    def __init__(self, config: TrainConfig, checkpoints: checkpoint_lib.Checkpoints, step: int):
        folder = checkpoints.folder / str(step)
        abstract = llama.abstract_params(config.trained_model, config.param_dtype)
        trains = step_lib.abstract_split(config)[0]
        found = agreement.model_problems(checkpoints.about(step), folder, config.model, trains)
        validation.raise_if(found)
        self._checkpoints, self._step = checkpoints, step
        self._arrays: dict[str, StoredArray] = checkpoints.stored_params(step, _by_path(abstract))
        self.params = jax.tree.map_with_path(
            lambda path, _: self._arrays[sharding.path_name(path)], abstract
        )
        file = folder / checkpoint_digests.FILE
        saved = digests.of_file(file) if file.exists() else "without digests"
        self.made_of = f"step {step} of {checkpoints.folder}, {saved}"

    def learnt(self) -> dict[str, Any]:
        return {path: dict(array.sums) for path, array in self._arrays.items()}

    def know(self, learnt: dict[str, Any]) -> None:
        for path, sums in learnt.items():
            self._arrays[path].sums |= {int(layer): pair for layer, pair in sums.items()}

    def check(self) -> None:
        self._checkpoints.check_stored(self._step, self._arrays)


def write_first_step(config: TrainConfig, config_text: str) -> None:
    """Writes the checkpoint of step 0: the parameters of `base` and a new optimizer state.

    One layer of a parameter is in memory at a time. `train` goes on from it. After a kill it goes
    on behind the layers that were written, if the base and the dtype are the same and the workdir
    is on a disk. Raises `UsageError` if the base does not fit the model, or has weights that are
    not finite.
    """
    validation.raise_if(trained.base_problems(config))
    trains, frozen = step_lib.abstract_split(config)
    if jax.tree.leaves(frozen.base) or agreement.param_shapes(trains) != _shapes(config):
        trainer.Run(config, config_text).save_initial()
        return
    with lease_lib.held(config.workdir), validation.reading():
        of_base, tokenizer = base_lib.about(config), None
        if config.objective.head == SCORE:
            tokenizer = trained.tokenizer_digest(config.data.tokenizer)
        num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trains))
        with tqdm.tqdm(total=num_bytes, unit="B", unit_scale=True, desc="read") as bar:
            params, check, made_of = _streamed_base(config, trains, bar)
            state = TrainState(
                step=Streamed.filled((), np.zeros((), np.int32), stacked=False),
                params=params,
                opt_state=_new_optimizer_state(config, trains),
            )

            def about() -> dict[str, Any]:
                check()
                sums = jax.tree.map(lambda leaf: tuple(map(np.uint32, leaf.weights)), params)
                weights = state_lib.fingerprint_of(sums)
                return trainer.about(
                    *(config, trains, frozen),
                    weights=weights,
                    of_base=of_base,
                    tokenizer=tokenizer,
                )

            before = made_of and checkpoint_lib.left_of_first_step(config.workdir, made_of)
            checkpoints = checkpoint_lib.Checkpoints(config.workdir, config.checkpoint)
            try:
                checkpoints.save_streamed(0, state, about, before)
            except checkpoint_lib.CheckpointError as error:
                raise _usage_error(error) or error from None
            finally:
                checkpoints.close()


def verify(
    config: TrainConfig, published: str, *, step: int | None, merge: str | None = None
) -> None:
    """Compares the logits of a checkpoint with those that `transformers` computes of the weights
    `published`, an export of it, made with `merge`, or the base it began with. Raises `UsageError`
    if they differ."""
    checkpoints = checkpoint_lib.Checkpoints(config.workdir)
    step = checkpoints.require(step)
    validation.raise_if(hf.config_problems(published, config.trained_model))
    dtype = hf.weights_dtype(published, config.model)
    if checkpoints.about(step).get("frozen"):
        mesh, params = trained.load(config, step=step)
        with jax.set_mesh(mesh):
            if merge is not None:
                params = adapted.merged(config, params, merge, mesh)
            params = jax.tree.map(np.asarray, params)
    else:
        params = StoredSource(config, checkpoints, step).params
    verification.check(params, published, config.trained_model, dtype=dtype)


def _usage_error(error: BaseException) -> validation.UsageError | None:
    """The refusal among the causes of `error`."""
    cause = error
    while cause is not None and not isinstance(cause, validation.UsageError):
        cause = cause.__cause__
    return cause


def _streamed_base(config: TrainConfig, trains: llama.Params, bar):
    """The parameters of the base as `Streamed` arrays, what raises if they were damaged, and what
    they are made of; None of a run, whose digests tell of what is read in one go."""
    if not sources.is_published(config.base):
        other = checkpoint_lib.Checkpoints(config.base)
        step = other.require(None)
        stored = other.stored_params(step, _by_path(trains))

        def of_run(layout, layer):
            array = stored[layout.path]
            return array[layer] if layout.stacked else np.asarray(array)

        params = _streamed(config, trains, of_run, None, bar)
        return params, lambda: other.check_stored(step, stored), None
    files = hf.opened(config.base, config.model)

    def of_files(layout, layer):
        weight = files.rows(layout.names[layer], slice(None))
        return layout.host_to_ours(weight, np.dtype(config.param_dtype))

    place = epath.Path(config.base).expanduser()
    paths = [place] if sources.is_easylm(place) else [place / name for name in files.files]
    known = {str(path): atomic.file_system(path).ukey(str(path)) for path in paths}
    made_of = f"{known}, {config.param_dtype}"
    return _streamed(config, trains, of_files, files, bar), lambda: None, made_of


def _streamed(config: TrainConfig, trains: llama.Params, read, files, bar) -> llama.Params:
    dtype, lock = np.dtype(config.param_dtype), threading.Lock()

    def done(num_bytes: int) -> None:
        with lock:
            bar.update(num_bytes)

    def streamed(layout: layout_lib.Layout, abstract) -> Streamed:
        def make(layer: int) -> np.ndarray:
            return read(layout, layer).astype(dtype, copy=False)

        def pieces() -> Iterator:
            for layer in range(len(layout.names)):
                yield (layer,) if layout.stacked else (), functools.partial(make, layer)

        def named(index: tuple[int, ...]) -> str:
            weight = layout.names[index[0] if index else 0]
            where = f"{weight} in {files.headers[weight].file}" if files else layout.path
            return f"base = {config.base!r}: {where}"

        return Streamed.of(abstract.shape, dtype, pieces, named, done)

    return jax.tree.map(streamed, layout_lib.layouts(config.model), trains)


def _new_optimizer_state(config: TrainConfig, trains: llama.Params) -> Any:
    """The state that the optimizer begins with, of which every array has one value throughout."""
    optimizer = optim.make(config.optimizer, num_steps=1)
    small = jax.tree.map(lambda leaf: jax.numpy.zeros((1,) * leaf.ndim, leaf.dtype), trains)
    values, shapes = optimizer.init(small), jax.eval_shape(optimizer.init, trains)

    def filled(path, value, abstract):
        stacked = state_lib.STACKED in sharding.path_name(path)
        return Streamed.filled(abstract.shape, np.asarray(value).reshape(()), stacked=stacked)

    return jax.tree.map_with_path(filled, values, shapes)


def _shapes(config: TrainConfig) -> dict[str, list[int]]:
    return agreement.param_shapes(llama.abstract_params(config.model, config.param_dtype))


def _by_path(params: llama.Params) -> dict[str, jax.ShapeDtypeStruct]:
    return {sharding.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def _disagreements(config: TrainConfig, about: dict, folder: epath.Path) -> Iterator[str]:
    """What of the config is not what the checkpoint was made with, one line each."""
    recorded = {name: about["must_match"].get(name) for name in COMPARED}
    recorded = {name: value for name, value in recorded.items() if value is not None}
    now = {"objective": config.objective.identity()}
    for name, before, value in agreement.differences(recorded, now):
        yield (
            f"the checkpoint in {folder} was made with {name} = {before}; this config has {value}. "
            "Give the gin file of that run, or its config.gin"
        )
    if "tokenizer" not in recorded:
        return
    kept = trained.tokenizer_path(config)
    for path in dict.fromkeys((kept, config.data.tokenizer)):
        if path != kept and not epath.Path(path).exists():
            continue  # that of the config may be gone: the workdir has it
        with validation.reading():
            found = trained.tokenizer_digest(path)
        if found != recorded["tokenizer"]:
            yield (
                f"the tokenizer {path} has the digest {found}; the checkpoint in {folder} was made "
                f"with {recorded['tokenizer']}: other texts have these ids. Restore it, or give "
                f"that of the run: '--gin.TOKENIZER=\"{kept}\"'"
            )


def _dtype_of_base(config: TrainConfig, about: dict) -> str:
    base = about.get("base_dtype", config.param_dtype)
    dtype = base if base in hf.DTYPES else "bfloat16"  # float16 is read, never written
    logging.info(
        "Weights are written in %s: what the run began from is %s, the parameters are %s; "
        "--dtype chooses",
        *(dtype, base, config.param_dtype),
    )
    return dtype
