"""Digests that tell whether bytes are still those that were written: xxh3, 64 bits.

They find what chance damages; they are no defence against somebody who means to deceive.
"""

import os

import xxhash
from etils import epath

CHUNK = 1 << 22  # bytes in memory at a time


def of_bytes(content) -> str:
    """The digest of `content`, bytes or any contiguous buffer, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(content)


def of_file(path: str | os.PathLike) -> str:
    """The digest of a file, local or in a bucket, as 16 hexadecimal digits. It is streamed.

    Raises what opening and reading it raises, such as `FileNotFoundError`.
    """
    digest = xxhash.xxh3_64()
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
