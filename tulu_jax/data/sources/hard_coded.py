"""Converter of the hard-coded identity prompts: every row ten times.

The fourteen rows AI2 used are a spreadsheet, `hard_coded_examples.xlsx`; whoever has it, or writes
other prompts, saves them as JSON lines with that sheet's columns.
"""

from tulu_jax.data.sources import messages


def hard_coded(row: dict, *, repeat: int) -> list[dict]:
    """`Prompt`, `Output`."""
    prompt, output = messages.texts(row, "Prompt", "Output")
    return [{"messages": messages.dialogue([prompt, output])} for _ in range(repeat)]
