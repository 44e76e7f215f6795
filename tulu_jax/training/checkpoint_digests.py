"""Whether a checkpoint is still what was saved: a digest of every array, and of every file.

They lie in `digests.json` of its folder, written before the folder gets its name. Each kind finds
what the other cannot:

- An array's digest is of its values on the devices: taken when they are saved, compared with those
  that were restored. So it covers the whole way, onto any mesh. It is two sums modulo 2**32 of
  mixed bits; sums do not depend on how an array is cut or in which order its parts are added. As
  the mixing is one to one, every change within one element is found; a change of several escapes
  once in 2**64.
- A file's digest is of its bytes on disk. It finds every flipped bit, of what is not restored too,
  and names the file. Files in a bucket have their size alone, but for the JSON of the run: process
  0 would download what was just written, and the digests of the arrays find what is damaged.
"""

import concurrent.futures
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from tulu_jax import digests, strict_json
from tulu_jax.parallel import sharding

Sums = tuple[jax.Array, jax.Array]
FILE = "digests.json"
VERSION = 1
NAMED = 4  # arrays and files in a message
SAID = 400  # bytes of what one process found
_READERS = 4  # files read at a time


@jax.jit
def sums(array: jax.Array) -> Sums:
    """The sum of mix(bits ^ place · 0x9E3779B1), and that weighted by odd numbers of the place;
    `mix` is the finalizer of MurmurHash3, `place` the index in the array laid flat. So the sums of
    layers that know their places add up to those of the whole (`host_sums`)."""
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{array.dtype.itemsize * 8}"))
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        place = place * jnp.uint32(size % 2**32) + along
    mixed = bits.astype(jnp.uint32) ^ (place * jnp.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> 16)
    zero, axes = jnp.uint32(0), tuple(range(array.ndim))

    def add(x, y):  # both sums in one pass, 5 times as fast as two on a CPU
        return x[0] + y[0], x[1] + y[1]

    return jax.lax.reduce((mixed, mixed * (2 * place + 1)), (zero, zero), add, axes)


def of_arrays(tree: Any) -> dict[str, tuple[str, Sums]]:
    """{path: (dtype, sums)} of every array. The sums, two uint32 scalars, are still on the devices,
    and nobody waits for them. All processes call this together.

    They come from one program: of several, a CPU runs the collectives in any order, and two
    processes that do so in different ones wait for each other for ever.
    """
    leaves = jax.tree.leaves_with_path(tree)
    found = _all_sums([leaf for _, leaf in leaves])
    return {
        sharding.path_name(path): (leaf.dtype.name, digest)
        for (path, leaf), digest in zip(leaves, found, strict=True)
    }


@jax.jit
def _all_sums(arrays: list[jax.Array]) -> list[Sums]:
    return [sums(array) for array in arrays]


def text(dtype: str, found: Sums | Sequence[int]) -> str:
    """Such as 'float32 0123456789abcdef'."""
    return f"{dtype} {''.join(f'{int(value):08x}' for value in jax.device_get(found))}"


def write(folder: epath.Path, arrays: Mapping[str, tuple[str, Sums | Sequence[int]]]) -> None:
    """Writes `digests.json` of the checkpoint whose items lie, complete, in `folder`."""
    local, found = "://" not in str(folder), files(folder)

    def entry(name: str) -> list:
        file, hashed = found[name], local or _is_small(name)
        return [file.stat().length, digests.of_file(file) if hashed else None]

    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        written = dict(zip(found, readers.map(entry, found), strict=True))
    texts = {name: text(*found) for name, found in arrays.items()}
    content = {"version": VERSION, "arrays": texts, "files": written}
    (folder / FILE).write_text(json.dumps(content, indent=1))


def _is_small(name: str) -> bool:
    """Whether a file of this name is JSON of a few pages, as what the run says of itself."""
    return name.startswith("about/")


def files(folder: epath.Path) -> dict[str, epath.Path]:
    """The files below the folders of `folder`; those beside them are Orbax's and ours."""
    found = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.is_dir():
            found |= {f"{path.name}/{name}": file for name, file in files(path).items()}
            found |= {
                f"{path.name}/{file.name}": file for file in path.iterdir() if not file.is_dir()
            }
    return found


def load(folder: epath.Path) -> dict[str, Any] | None:
    """What `write` wrote; None of a checkpoint of before. Raises `ValueError` for what is not that,
    or of a later version."""
    try:
        found = strict_json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise ValueError(
            f"{FILE} is not of version {VERSION}; restore it, or read it with the tulu_jax that "
            "wrote it"
        )
    arrays, written = found.get("arrays"), found.get("files")
    if not (
        isinstance(arrays, dict)
        and isinstance(written, dict)
        and all(isinstance(text, str) and text for text in arrays.values())
        and all(isinstance(entry, list) and len(entry) == 2 for entry in written.values())
        and not any(".." in epath.Path(name).parts or name[:1] == "/" for name in written)
    ):
        raise ValueError(f"{FILE} does not list arrays and files as it was written to; restore it")
    return found


def load_or_warn(folder: epath.Path) -> dict[str, Any] | None:
    """`load`, with a word in the log for a checkpoint that nobody can verify."""
    recorded = load(folder)
    if recorded is None:
        logging.warning("%s cannot be verified: it was saved without digests", folder)
    return recorded


def as_saved(recorded: Mapping[str, Any], tree: Any) -> Any:
    """`tree` of abstract arrays with the dtypes that were saved, so that bits can be compared."""

    def leaf(path, abstract):
        dtype = recorded["arrays"].get(sharding.path_name(path), abstract.dtype.name).split()[0]
        return jax.ShapeDtypeStruct(abstract.shape, jnp.dtype(dtype), sharding=abstract.sharding)

    return jax.tree.map_with_path(leaf, tree)


def array_problems(recorded: Mapping[str, Any], tree: Any) -> list[str]:
    """The restored arrays of `tree` that are not those that were saved, one text each."""
    found = {name: text(*sums_) for name, sums_ in of_arrays(tree).items()}
    return differences(recorded, found)


def differences(recorded: Mapping[str, Any], found: Mapping[str, str]) -> list[str]:
    """The arrays whose digest `found`, by name, is not the one that was saved, one text each."""
    saved = recorded["arrays"]
    return [
        f"array {name} is {digest}, was saved as {saved.get(name, 'none')}"
        for name, digest in found.items()
        if digest != saved.get(name)
    ]


def file_problems(
    recorded: Mapping[str, Any], folder: epath.Path, *, below: str = "", sizes_only: bool = False
) -> list[str]:
    """The files that are not those that were written, one text each; of those whose name begins
    with `below`."""

    def problem(name: str) -> str | None:
        (size, digest), file = recorded["files"][name], folder / name
        if not file.exists():
            return f"file {name} is gone"
        found = file.stat().length
        if found != size:
            return f"file {name} has {found} bytes, was written with {size}"
        if digest is None or sizes_only:
            return None
        if (found := digests.of_file(file)) != digest:
            return f"file {name} has digest {found}, was written with {digest}"
        return None

    names = sorted(name for name in recorded["files"] if name.startswith(below))
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        return [found for found in readers.map(problem, names) if found]


def file_problems_together(recorded: Mapping[str, Any], folder: epath.Path) -> list[str]:
    """`file_problems`, each process reading its share of the files; all get the same."""
    count, mine = jax.process_count(), jax.process_index()
    if count == 1:
        return file_problems(recorded, folder)
    share = dict(sorted(recorded["files"].items())[mine::count])
    said = named(file_problems({"files": share}, folder)).encode()[:SAID]
    padded = np.frombuffer(said.ljust(SAID), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(padded)).reshape(count, SAID)
    texts = [bytes(row.tobytes()).decode(errors="replace").strip() for row in gathered]
    return [text for text in texts if text]


def verified(folder: epath.Path, like: Any, read: Callable[[Any], Any]) -> Any:
    """`read(like)`, the arrays that `like` describes, of the checkpoint in `folder`.

    Raises `ValueError` if its files, or these arrays, are not those that were saved; of a
    checkpoint of before it says that nobody can tell.
    """
    recorded = load_or_warn(folder)
    if recorded is None:
        return read(like)
    problems = file_problems_together(recorded, folder)
    if not problems or jax.process_count() == 1:  # then the arrays in damaged files are named too
        try:
            restored = read(as_saved(recorded, like))
            problems += array_problems(recorded, restored)
        except Exception as error:
            if not problems:
                raise
            problems.append(" ".join(str(error).split()))
    if problems:
        raise ValueError(named(problems))

    def cast(leaf, like):
        return leaf if leaf.dtype == like.dtype else leaf.astype(like.dtype)

    return jax.tree.map(cast, restored, like)


def named(problems: list[str]) -> str:
    """The first problems on one line, and how many more there are."""
    more = [f"{len(problems) - NAMED} more"] if len(problems) > NAMED else []
    return "; ".join([*problems[:NAMED], *more])
