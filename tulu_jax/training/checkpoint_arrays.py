"""Arrays of a checkpoint a layer at a time, on one host and without devices: read, and written.

They lie as Orbax lays them: zarr arrays in one OCDBT store. Whoever reads a layer gets its part of
the digest that was saved with the array, so what is read whole is known to be what was saved.
"""

import asyncio
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from tulu_jax import validation
from tulu_jax.parallel import sharding
from tulu_jax.training import checkpoint_digests, host_sums, state, unfinished

BLOCKS = 4_000_000_000  # bytes of layers that are kept where chunks reach over many of them
CHUNK = 64 << 20  # bytes of a chunk that is written, at most
_AT_A_TIME = 2  # pieces that are made and written
_READS = {"file_io_concurrency": {"limit": 16}, "cache_pool": {"total_bytes_limit": 0}}


class StoredArray:
    """An array of a checkpoint: `array[layer]` of a stacked one, `numpy.asarray(array)` of another.

    `sums` has, by layer, the part of the array's digest of what was read (0 for one that is not
    stacked); `depth` layers are read at a time. Threads may read.
    """

    def __init__(self, store, *, depth: int):
        self._store, self._depth = store, depth
        self.shape, self.dtype = tuple(store.shape), store.dtype.numpy_dtype
        self.sums: dict[int, list[int]] = {}
        self._first, self._block, self._lock = 0, None, threading.Lock()

    def __getitem__(self, layer: int) -> np.ndarray:
        if self._depth == 1:
            found = _content(self._store[layer])
        else:
            with self._lock:
                first = layer - layer % self._depth
                if self._block is None or self._first != first:
                    self._block = None  # before the next one is there
                    last = min(first + self._depth, self.shape[0])
                    self._first, self._block = first, _content(self._store[first:last])
                found = self._block[layer - first]
        self.sums[layer] = list(host_sums.of(found, layer).digest)
        return found

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        found = _content(self._store)
        self.sums[0] = list(host_sums.of(found).digest)
        return found if dtype is None else found.astype(dtype)

    def text(self) -> str:
        """The digest of what was read, such as 'float32 0123456789abcdef'."""
        total = [sum(part) % 2**32 for part in zip(*self.sums.values(), strict=True)]
        return checkpoint_digests.text(self.dtype.name, total)


def _content(store) -> np.ndarray:
    """What a TensorStore holds. In a bucket it may have been damaged on its way."""
    try:
        return store.read().result()
    except ValueError as error:
        logging.warning("Read again: %s", str(error)[:200])
        return store.read().result()


def stored(folder: epath.Path, params: Collection[str]) -> dict[str, Any]:
    """{path: `StoredArray`} of the parameters at these paths of the checkpoint in `folder`. What
    cannot be opened raises `ValueError`, or what TensorStore says."""
    import tensorstore as ts

    context = ts.Context(_READS)
    opened = {
        path: ts.open(_spec(folder / "state", f"params.{path.replace('/', '.')}/"), context=context)
        for path in params
    }
    stores = {path: future.result() for path, future in opened.items()}
    of_a_layer = sum(
        store.size * store.dtype.numpy_dtype.itemsize // store.shape[0]
        for path, store in stores.items()
        if path.startswith(state.STACKED)
    )

    def depth(path, store) -> int:
        if not path.startswith(state.STACKED):
            return 1
        return max(1, min(store.chunk_layout.read_chunk.shape[0], BLOCKS // of_a_layer))

    return {path: StoredArray(store, depth=depth(path, store)) for path, store in stores.items()}


def read(arrays: Mapping[str, StoredArray]) -> None:
    """Reads all of `stored`, a layer at a time, so that their digests are known."""
    for path, array in arrays.items():
        if path.startswith(state.STACKED):
            for layer in range(array.shape[0]):
                array[layer]
        else:
            np.asarray(array)


def _spec(folder: epath.Path, path: str) -> dict[str, Any]:
    where = str(folder)
    if "://" in where:
        bucket, _, inside = where.partition("://")[2].partition("/")
        base = {"driver": "gcs", "bucket": bucket, "path": f"{inside}/"}
    else:
        base = {"driver": "file", "path": f"{where}/"}
    return {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": path},
        "fill_missing_data_reads": False,  # a chunk that is gone is no zeros
    }


class Streamed(np.ndarray):
    """Stands in a tree that is saved for an array that is made while it is written.

    `pieces` gives the index of each piece and a function that makes it: layers of a stacked array,
    or all of it under the index (); `named` tells what a piece is, in a refusal, and `done` is told
    how many bytes are. `sums` add up, and `weights`, as those of `checkpoint_digests.sums` and
    `state.leaf_sums`.
    """

    pieces: Callable[[], Iterator[tuple[tuple[int, ...], Callable[[], np.ndarray]]]]

    @staticmethod
    def of(shape: Sequence[int], dtype, pieces, named, done=lambda num_bytes: None) -> "Streamed":
        array = np.broadcast_to(np.zeros((), dtype), shape).view(Streamed)
        array.pieces, array.named, array.done, array.constant = pieces, named, done, False
        array.sums, array.weights = [0, 0], [0, 0]
        return array

    @staticmethod
    def filled(shape: Sequence[int], value: np.ndarray, *, stacked: bool) -> "Streamed":
        """An array of one value everywhere; it is finite."""
        piece = np.broadcast_to(value, shape[1:] if stacked else shape)
        indices = [(layer,) for layer in range(shape[0])] if stacked else [()]
        pieces = [(index, lambda: piece) for index in indices]
        array = Streamed.of(shape, value.dtype, lambda: pieces, str)
        array.constant = True
        return array

    def note(
        self, index: tuple[int, ...], piece: np.ndarray, digest: Sequence[int] | None = None
    ) -> tuple[int, int] | None:
        """Adds a piece to the sums, and returns its digest. One that does not have `digest`, where
        that is given, is not added. Raises `UsageError` for one that is not finite."""
        layer = index[0] if index else 0
        if self.constant:
            value = piece[(0,) * piece.ndim].item()
            found = host_sums.of_constant(piece.dtype, value, piece.size, layer)
        else:
            found = host_sums.of(piece, layer)
        if digest is not None and found.digest != tuple(digest):
            return None
        if not found.finite:
            raise validation.UsageError(
                f"{self.named(index)} is not finite; expected numbers. Get these files again, or "
                "choose another base"
            )
        for total, part in ((self.sums, found.digest), (self.weights, found.weights)):
            total[:] = [(a + b) % 2**32 for a, b in zip(total, part, strict=True)]
        self.done(piece.nbytes)
        return found.digest


def of_streamed(tree: Any) -> dict[str, tuple[str, list[int]]]:
    """{path: (dtype, sums)} of `Streamed` arrays, as `checkpoint_digests.of_arrays` has them; the
    sums are there when the arrays are written."""
    return {
        sharding.path_name(path): (leaf.dtype.name, leaf.sums)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def storage(ocp, tree: Any) -> Any:
    """How Orbax cuts the arrays of a state: a chunk reaches over one layer of a stacked array, so
    that a layer is read without the others; of `Streamed` ones, over `CHUNK` bytes at most."""

    def cut(path, leaf):
        stacked = state.STACKED in sharding.path_name(path)
        size = CHUNK if isinstance(leaf, Streamed) else None
        return ocp.SaveArgs(shard_axes=(0,) if stacked else (), chunk_byte_size=size)

    return jax.tree.map_with_path(cut, tree)


async def _fill(store, value: np.ndarray) -> None:
    """Gives every chunk of a new zarr array one content, which is compressed once."""
    chunk = store.chunk_layout.write_chunk.shape or ()  # of a scalar it is None
    grid = [length // size for length, size in zip(store.shape, chunk, strict=True)]
    first = tuple(slice(0, size) for size in chunk)
    await store[first].write(np.broadcast_to(value.reshape(()), chunk))

    def key(place: Sequence[int]) -> str:
        return ".".join(map(str, place)) or "0"

    content = (await store.kvstore.read(key([0] * len(grid)))).value
    await asyncio.gather(*(store.kvstore.write(key(at), content) for at in np.ndindex(*grid)))


def opens(arrays: epath.Path) -> bool:
    """Whether there are arrays in this folder of Orbax's whose index can be read; a host that lost
    its power may have lost it."""
    import tensorstore as ts

    if not arrays.exists():
        return False
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{arrays}/"}}
    try:
        return bool(ts.KvStore.open(store).result().list().result())
    except ValueError as error:
        logging.warning("%s cannot be read, and is written again: %s", arrays, error)
        return False


def write_streamed(ocp, before: unfinished.Unfinished | None) -> None:
    """Makes Orbax write `Streamed` arrays piece by piece, of which few are in memory at a time, and
    none that was written `before`.

    Weights are written as they are: zstd would take off a fifth, in three times the time.
    """

    class Handler(ocp.type_handlers.NumpyHandler):
        def __init__(self):
            super().__init__(deepcopy_host_arrays=False)
            self._slots: asyncio.Semaphore | None = None

        async def _background_serialize(self, values, infos, args=None):
            self._slots = asyncio.Semaphore(_AT_A_TIME)  # of the event loop of this save
            if before is not None:
                await infos[0].await_path_creation()
                before.put_back(infos[0].parent_dir)
            await super()._background_serialize(values, infos, args)

        async def _open_and_write(self, value, tspec, ts_context):
            if not isinstance(value, Streamed):
                return await super()._open_and_write(value, tspec, ts_context)
            import tensorstore as ts

            if not value.constant:
                tspec["metadata"]["compressor"] = None
            # What a conversion writes it can write again: nobody waits for the disk.
            context = ts.Context({"file_io_sync": False}, parent=ts_context)
            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=context)
            if value.constant:
                async with self._slots:
                    for index, make in value.pieces():
                        await asyncio.to_thread(value.note, index, make())
                    await _fill(store, make().reshape(-1)[:1])
                return
            name = tspec["kvstore"]["path"]
            for index, make in value.pieces():
                async with self._slots:
                    if not await self._is_there(store, value, name, index):
                        await self._write(store, value, name, index, make)

        async def _is_there(self, store, value, name, index) -> bool:
            digest = before and before.digest(name, *index or (0,))
            if digest is None:
                return False
            try:
                piece = await store[index].read()
            except ValueError:  # it is damaged
                return False
            return await asyncio.to_thread(value.note, index, piece, digest) is not None

        async def _write(self, store, value, name, index, make) -> None:
            piece = await asyncio.to_thread(make)
            digest = await asyncio.to_thread(value.note, index, piece)
            await store[index].write(piece, can_reference_source_data_indefinitely=True)
            if before is not None:
                before.add(name, *index or (0,), digest)

    ocp.type_handlers.register_type_handler(np.ndarray, Handler(), override=True)
