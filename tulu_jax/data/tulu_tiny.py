"""Registers the embedded default: `tulu_tiny` (supervised) and `tulu_tiny_preference` (pairs).

For studies there are also each family as a task (`tulu_tiny.opposite`), mixtures of families, the
prompts of a second language, programs and what they print, and pairs of the other style.
"""

import functools
import hashlib
import pathlib

from tulu_jax import validation
from tulu_jax.data import registry, tokenizer_training
from tulu_jax.data.sources import tiny_german, tiny_instructions, tiny_programs
from tulu_jax.data.sources.tiny_instructions import held_out, is_exact, style

__all__ = ["held_out", "is_exact", "style"]

VOCAB_SIZE = 512
OF_KIND = {"sft": "tulu_tiny", "preference": "tulu_tiny_preference"}
FAMILIES = tuple(tiny_instructions.family_names())
FACTS = ("opposite", "colour", "kind")  # what no prompt says, and a mixture must have taught
GERMAN = "tulu_tiny_german"
PROGRAMS = "tulu_tiny_programs"
TERSE_PREFERENCE = "tulu_tiny_preference_terse"
EVEN_PREFERENCE = "tulu_tiny_preference_even"  # half of the pairs of either style
MIXTURES = {  # families; the counterparts of the paper's V2, V1 and ShareGPT alone
    "tulu_tiny_all": FAMILIES,
    "tulu_tiny_no_facts": tuple(name for name in FAMILIES if name not in FACTS),
    "tulu_tiny_dialogue": ("remember",),
}


def _as_is(row: dict) -> dict:
    return row


for _name, _kind, _rows in (
    ("tulu_tiny", "sft", tiny_instructions.sft_rows),
    ("tulu_tiny_preference", "preference", tiny_instructions.preference_rows),
    (GERMAN, "sft", tiny_german.sft_rows),
    (PROGRAMS, "sft", tiny_programs.sft_rows),
    (
        TERSE_PREFERENCE,
        "preference",
        functools.partial(tiny_instructions.preference_rows, chosen="terse"),
    ),
    *(
        (f"tulu_tiny.{name}", "sft", functools.partial(tiny_instructions.sft_rows, family=name))
        for name in FAMILIES
    ),
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

for _name, _families in MIXTURES.items():
    registry.MixtureRegistry.add(
        registry.Mixture(name=_name, tasks={f"tulu_tiny.{family}": None for family in _families})
    )
registry.MixtureRegistry.add(
    registry.Mixture(name="tulu_tiny_two_languages", tasks={"tulu_tiny": None, GERMAN: None})
)
registry.MixtureRegistry.add(  # a twentieth programs, as much as V2 has of Code Alpaca
    registry.Mixture(name="tulu_tiny_some_programs", tasks={OF_KIND["sft"]: None, PROGRAMS: 0.2})
)
registry.MixtureRegistry.add(
    registry.Mixture(
        name=EVEN_PREFERENCE, tasks={OF_KIND["preference"]: 0.5, TERSE_PREFERENCE: 0.5}
    )
)


def is_ours(task: str) -> bool:
    """Whether a task of that name is one of these."""
    return task.partition(".")[0] in (*OF_KIND.values(), GERMAN, PROGRAMS, TERSE_PREFERENCE)


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
