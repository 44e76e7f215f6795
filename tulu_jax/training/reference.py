"""Reference log-probabilities of DPO: computed once, before training, and kept by example."""

import json
from collections.abc import Callable, Iterable

import jax
import numpy as np
from absl import logging
from etils import epath


def cached(
    path: epath.Path, *, key: dict[str, str], compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """float32 [examples, 2] from `path` if it was made with exactly `key`, else computed and kept.

    `key` holds the fingerprints of the weights, the data and the objective. Written under a
    temporary name and renamed.
    """
    if path.exists():
        with path.open("rb") as file:
            stored = np.load(file)
            if json.loads(str(stored["key"])) == key:
                logging.info("Reference log-probabilities read from %s", path)
                return stored["logps"]
        logging.info("%s was made with other weights or data; computing again", path)
    logps = compute()
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.tmp"
        with temporary.open("wb") as file:
            np.savez(file, key=json.dumps(key), logps=logps)
        temporary.replace(path)
    return logps


def gather(num_examples: int, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """float32 [num_examples, 2] from (example [B], logps [B, 2]) pairs; example −1 is padding.

    Raises `ValueError` if an example is missing or not finite.
    """
    logps = np.full((num_examples, 2), np.nan, np.float32)
    for example, values in parts:
        logps[example[example >= 0]] = values[example >= 0]
    bad = np.flatnonzero(~np.isfinite(logps).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{bad.size} of {num_examples} pairs have no finite reference log-probability; the "
            f"first are examples {bad[:5].tolist()}"
        )
    return logps
