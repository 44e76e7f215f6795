"""Where published weights lie: which form a path has, and what reads it."""

import os
from typing import Protocol, runtime_checkable

import numpy as np
from etils import epath

from tulu_jax.interop import config_file, originals, weight_files
from tulu_jax.interop.weight_files import Header
from tulu_jax.models.config import LlamaConfig


@runtime_checkable
class Weights(Protocol):
    """Weights by Hugging Face's names. `headers` tell of each, `problems` what is wrong with the
    files, `files` are those that are read, `unread` others beside them."""

    headers: dict[str, Header]
    problems: list[str]
    files: list[str]
    unread: list[str]

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows of a weight, in the dtype of its file."""


def is_published(path: str | os.PathLike[str]) -> bool:
    """Whether a path that exists holds published weights, and is no workdir of a run: a folder with
    `config.json`, one of Meta's, or a file, which is one of EasyLM's."""
    place = epath.Path(path).expanduser()
    names = (config_file.NAME, originals.PARAMS)
    return not place.is_dir() or any((place / name).exists() for name in names)


def opened(path: str | os.PathLike[str], config: LlamaConfig) -> Weights:
    """The weights at `path`, of which those of a `config` are wanted."""
    place = epath.Path(path).expanduser()
    if is_meta(place):
        return originals.MetaFiles(place, config)
    if is_easylm(place):
        return originals.EasyLMFile(place, config)
    return weight_files.WeightFiles(place)


def is_meta(place: epath.Path) -> bool:
    """Whether a folder is one of Meta's, with `params.json`."""
    return not (place / config_file.NAME).exists() and (place / originals.PARAMS).exists()


def is_easylm(place: epath.Path) -> bool:
    """Whether a path is a file, which only EasyLM's weights are."""
    return place.exists() and not place.is_dir()
