"""What is wrong with a run as a whole, found before device work and reported all at once."""

import contextlib
import math
import operator
import os
import pathlib
import shutil
import socket
from collections.abc import Iterable, Iterator

import jax
from etils import epath

from tulu_jax import atomic, trained, validation
from tulu_jax import base as base_lib
from tulu_jax import step as step_lib
from tulu_jax.data import data_checks, loader
from tulu_jax.data.sources import readers
from tulu_jax.parallel import sharding
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import checkpoint as checkpoint_lib
from tulu_jax.training import optim

_NO_BUCKET = "gs://YOUR-BUCKET"  # what the complete files of configs/ say


def to_train(config: TrainConfig, num_devices: int) -> list[str]:
    """What keeps `config` from training on `num_devices` devices, one line each; reads only
    headers and first rows."""
    found = [*mesh_problems(config, num_devices)]
    away = _away(
        config, "workdir", "data.cache_dir", "base", "data.data_root", "objective.reward_from"
    )
    if away:
        return found + away  # what lies there cannot be looked at
    if config.num_steps is not None:
        found += optim.problems(config.optimizer, config.num_steps)
    parts = (not_writable, _data, base_lib.problems, trained.reward_problems, _disk)
    return found + _all(config, *parts)


def to_start(config: TrainConfig, num_devices: int) -> list[str]:
    """What keeps the base of `config` from becoming the checkpoint of step 0; no rows are asked
    for."""
    del num_devices
    away = _away(config, "workdir", "base")
    return away or _all(
        config,
        *(not_writable, base_lib.first_step_problems, base_lib.problems, trained.base_problems),
        _disk,
    )


def to_read(config: TrainConfig, num_devices: int) -> list[str]:
    """What keeps the checkpoints of `config` from being read; neither its rows, nor its base, nor
    its mesh is asked for."""
    del num_devices
    return _away(config, "workdir") or [*_no_folder(config)]


def _all(config: TrainConfig, *parts) -> list[str]:
    found = []
    for part in parts:
        try:
            found += part(config)
        except validation.UsageError as error:
            found.append(str(error))
    return found


def _away(config: TrainConfig, *names: str) -> list[str]:
    """Paths that lie where nothing can be looked at."""
    paths = {name: operator.attrgetter(name)(config) or "" for name in names}
    return [*_unnamed(paths.values())] or [*_out_of_reach(paths)]


def not_writable(config: TrainConfig) -> Iterator[str]:
    """Local folders that the run writes to, and that cannot be made or written."""
    written = {"workdir": config.workdir, "data.cache_dir": config.data.cache_dir}
    if config.reference_dir is not None:
        written["reference_dir"] = config.reference_dir
    for name, path in written.items():
        if "://" in path:
            continue
        there = _existing(path)
        if not there.is_dir():
            yield f"{name} = {path!r}: {there} is a file; expected a folder, or a path to make one"
        elif not os.access(there, os.W_OK | os.X_OK):
            yield f"{name} = {path!r}: {there} cannot be written to; choose another folder"


def _no_folder(config: TrainConfig) -> Iterator[str]:
    there = _existing(config.workdir)
    if "://" not in config.workdir and not there.is_dir():
        yield f"workdir = {config.workdir!r}: {there} is a file; expected a folder"


def _existing(path: str) -> pathlib.Path:
    """The part of a local path that exists."""
    there = pathlib.Path(path).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    return there


def mesh_problems(config: TrainConfig, num_devices: int) -> Iterator[str]:
    """What of `config` does not divide over the devices, and what would; reads nothing."""
    try:
        sizes = config.mesh_on(num_devices).sizes(num_devices)
    except ValueError as error:
        yield str(error)
        return
    rows = sizes["data"] * sizes["fsdp"]
    micro = config.micro_batch_size or config.batch_size
    if micro % rows:
        yield (
            f"micro_batch_size = {micro} rows cannot be divided over data x fsdp = {rows}; "
            f"choose a multiple of {rows}, or data x fsdp of which "
            f"{sharding.what_divides(micro, sizes)}"
        )
    shards = sizes["context"] * sizes["tensor"]  # of the positions between blocks
    if config.data.max_length % shards:
        yield (
            f"max_length = {config.data.max_length} cannot be divided over context x tensor = "
            f"{shards}; {sharding.what_divides(config.data.max_length, sizes)}"
        )
    names, divisor = sharding.shards("embed", sizes)
    if config.execution.gather_dtype is not None and divisor == 1:
        yield (
            f"execution.gather_dtype = {config.execution.gather_dtype!r}, and mesh axes "
            f"{' x '.join(names)} = 1, over which no weight is gathered; choose a mesh that "
            "divides weights, or remove gather_dtype"
        )
    yield from sharding.divisibility_problems(sizes, step_lib.abstract_base(config))


def _out_of_reach(paths: dict[str, str]) -> Iterator[str]:
    """Buckets that cannot be reached; workdir and cache_dir must be writable from every host."""
    for name, path in paths.items():
        if "://" not in path:
            continue
        probe = epath.Path(path) / atomic.temporary_name("probe")
        try:
            with readers.reaching(path):
                if name in ("workdir", "data.cache_dir"):
                    probe.write_bytes(b"")
                    probe.unlink()
                else:  # `exists` is False where nothing can be reached
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                        next(iter(epath.Path(path).iterdir()), None)
        except (OSError, ValueError) as error:
            said = " ".join(str(error).split())[:400]
            yield f"{name} = {path!r} on {socket.gethostname()}: {said or type(error).__name__}"


def _unnamed(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        if _NO_BUCKET in path:
            yield (
                f"{path} is in no bucket yet; name yours: '--gin.BUCKET=\"gs://my-bucket/tulu\"', "
                "or a local folder with the same contents"
            )
            return


def _data(config: TrainConfig) -> Iterator[str]:
    yield from data_checks.problems(config.data, kind=config.objective.kind)
    best = config.checkpoint.best
    if best and not loader.split_components(config.data, "validation"):
        yield (
            f"checkpoint.best = {best!r} needs a validation split, and {config.data.train!r} has "
            "none; set holdout_every, or name a mixture as validation"
        )
    known = [f"eval/{name}" for name in config.objective.metrics]
    if best and best not in known and not best.startswith(("eval/by_source/", "eval/by_length/")):
        yield (
            f"checkpoint.best = {best!r} is no metric of an evaluation; expected one of {known}"
            f"{validation.nearest(best, known)}"
        )
    size = data_checks.vocab_size(config.data)
    if size is not None and size > config.model.vocab_size:
        yield (
            f"the tokenizer {config.data.tokenizer} has {size} ids; the model's vocabulary has "
            f"{config.model.vocab_size}"
        )


def _disk(config: TrainConfig) -> Iterator[str]:
    if "://" in config.workdir:
        return
    folder = epath.Path(config.workdir).absolute()
    while not folder.exists():
        folder = folder.parent
    trains, _ = step_lib.abstract_split(config)
    state_bytes = sum(
        math.prod(leaf.shape) * (leaf.dtype.itemsize * 2 + 4) for leaf in jax.tree.leaves(trains)
    )
    checkpoint = config.checkpoint
    there = checkpoint_lib.Checkpoints(config.workdir).steps()
    if there and config.num_steps is not None and there[-1] >= config.num_steps:
        return  # nothing is left to be written
    copies = checkpoint.keep + bool(checkpoint.best)
    if checkpoint.keep_every and config.num_steps:
        copies += config.num_steps // checkpoint.keep_every
    new = max(0, copies - len(there)) + 1
    free = shutil.disk_usage(folder).free
    if free < new * state_bytes:
        yield (
            f"{folder} has {free / 1e9:.1f} GB free; {new} more checkpoints of "
            f"{state_bytes / 1e9:.1f} GB need {new * state_bytes / 1e9:.1f} GB "
            f"({copies} are kept, keep = {checkpoint.keep}, keep_every = {checkpoint.keep_every}, "
            f"of which {len(there)} are there, and one is being written); "
            "free some space, or choose another --workdir"
        )
