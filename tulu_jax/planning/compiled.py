"""What the TPU compiler made of a program, kept where the environment variable says.

jax's own cache writes programs for devices that are not there but cannot load them again. Planning
loads none: it reads texts and sizes. With TULU_JAX_COMPILED=FOLDER these lie in FOLDER, one file a
program, and are read instead of compiling again. Files are written whole or not at all and may be
deleted at any time. Names of source lines in a kept text are those of the day it was made.
"""

import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from tulu_jax import atomic

FOLDER = "TULU_JAX_COMPILED"
_PACKAGES = ("jax", "jaxlib", "libtpu")
_READ = ("JAX_", "LIBTPU_", "TPU_", "XLA_")  # variables that the compiler may look at
_PLACES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_")  # but not at these


def kept(
    make: Callable[[], dict[str, Any]], lowered: Any, *, place: str, options: dict[str, str]
) -> dict[str, Any]:
    """`make()`, a dict of JSON values that is what the compiler makes of `lowered`, or the same of
    an earlier call.

    `lowered` is what `jax.jit(...).lower(...)` gives, `place` names the devices in their order, and
    `options` are those that `make` gives the compiler. An exception of `make` is not kept.
    """
    if not os.environ.get(FOLDER):
        return make()
    depends = {
        "program": lowered.as_text(),
        "place": place,
        "options": options,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "environment": _environment(),
    }
    name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    path = pathlib.Path(os.environ[FOLDER], f"{name}.json.gz")
    if path.exists():
        return json.loads(gzip.decompress(path.read_bytes()))
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(path, gzip.compress(json.dumps(found).encode(), compresslevel=1))
    return found


def _environment() -> dict[str, str]:
    read = {
        k: v for k, v in os.environ.items() if k.startswith(_READ) and not k.startswith(_PLACES)
    }
    # Where the compiler's dumps lie is not what it makes.
    return {k: re.sub(r"--xla_jf_dump_to=\S*", "", v) for k, v in read.items()}
