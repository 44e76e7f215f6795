"""Registers the embedded default: `tulu_tiny` (supervised) and `tulu_tiny_preference` (pairs)."""

import functools
import hashlib
import pathlib

from tulu_jax import validation
from tulu_jax.data import registry, tokenizer_training
from tulu_jax.data.sources import tiny_instructions
from tulu_jax.data.sources.tiny_instructions import held_out, is_exact, style

__all__ = ["held_out", "is_exact", "style"]

VOCAB_SIZE = 512
OF_KIND = {"sft": "tulu_tiny", "preference": "tulu_tiny_preference"}


def _as_is(row: dict) -> dict:
    return row


for _name, _kind, _rows in (
    ("tulu_tiny", "sft", tiny_instructions.sft_rows),
    ("tulu_tiny_preference", "preference", tiny_instructions.preference_rows),
):
    registry.TaskRegistry.add(
        registry.Task(
            name=_name,
            kind=_kind,
            sources={split: functools.partial(_rows, split) for split in registry.SPLITS},
            convert=_as_is,
            version="1",
            licence="as this project",
            origin="written by this project",
        )
    )


def tokenizer(directory: str = "cache/tulu_tiny_tokenizer") -> str:
    """The folder of the task's BPE tokenizer (512 ids), trained on the spot if it is absent.

    The folder lies in `directory` under a hash of what writes the rows: the same rows give the same
    tokenizer, so a folder that exists is the right one.
    """
    source = pathlib.Path(tiny_instructions.__file__).read_bytes()
    folder = pathlib.Path(validation.expanded(directory)) / hashlib.sha256(source).hexdigest()[:12]
    if not (folder / "tokenizer.json").is_file():
        tokenizer_training.train_tokenizer("tulu_tiny", str(folder), vocab_size=VOCAB_SIZE)
    return str(folder)
