"""The studies by name."""

import importlib

from tulu_jax import validation
from tulu_jax.studies.declared import Study

# Each is the file `<name>.py` beside this one, and the object STUDY in it.
NAMES = (
    "table_1_suite",
    "table_2_mixtures",
    "table_3_dpo",
    "table_4_chat",
    "table_5_qlora",
    "table_6_code",
    "figure_1_lengths",
    "small_model",
    "dpo_stability",
    "dpo_vs_ppo",
    "qlora_rank",
    "leave_one_out",
    "multilingual",
    "ultrafeedback_audit",
)

ALL = "all"


def get(name: str | None) -> Study:
    """The study of that name. Raises `UsageError` with those that there are."""
    if name not in NAMES:
        near = validation.nearest(name or "", NAMES)
        raise validation.UsageError(
            f"--study={name}: there is no such study; expected one of {', '.join(NAMES)}, "
            f"or {ALL}{near}"
        )
    return importlib.import_module(f"tulu_jax.studies.{name}").STUDY
