"""Converters of instruction rows (Stanford, GPT-4 and Code Alpaca, Dolly): two turns each.

The instruction is laid out by one of fourteen templates, drawn with fixed weights; rows with an
input have fourteen of their own. The draw is seeded by the row itself, so a row always gets the
same template, whatever is read before it; upstream drew from one stream over all its files.
Source: open-instruct `instruction_encode_templates.py` of November 2023, layouts verbatim.
"""

import random

from tulu_jax.data.sources import messages

WITH_INPUT = (  # user turn, assistant turn, weight
    ("{instruction}\n\n{input}\n\n", "{output}", 0.2),
    ("{instruction}\n{input}\n\n", "{output}", 0.1),
    ("{instruction}\n{input}\n", "{output}", 0.1),
    ("{instruction}\n\nInput: {input}\n\nOutput:", "{output}", 0.05),
    ("{instruction}\nInput: {input}\nOutput:", "{output}", 0.05),
    ("{instruction}\n{input}\n\nResponse:", "{output}", 0.05),
    ("{instruction}\n\nAdditional Context:\n{input}\n\nAnswer:", "{output}", 0.05),
    ("Task: {instruction}\nInput: {input}\nOutput:", "{output}", 0.05),
    ("Task: {instruction}\n\n{input}\n\n", "{output}", 0.05),
    ("Task: {instruction}\n\n{input}\n\nAnswer:", "{output}", 0.05),
    (
        "You need to complete the following task:\n\n{instruction}\n\n{input}\n\nAnswer:",
        "{output}",
        0.05,
    ),
    (
        "{instruction}\n\nNow complete the following instance -\nInput: {input}\nOutput:",
        "{output}",
        0.05,
    ),
    ("Instruction:{instruction}\n\nInput: {input}\n\n", "{output}", 0.05),
    (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
        "{output}",
        0.1,
    ),
)
WITHOUT_INPUT = (  # user turn, assistant turn, weight
    ("{instruction}\n\n", "{output}", 0.2),
    ("{instruction}\n", "{output}", 0.1),
    ("{instruction}", "\n{output}", 0.1),
    ("{instruction} Output:", "{output}", 0.05),
    ("{instruction}\nResponse:", "{output}", 0.05),
    ("{instruction}\n\nAnswer:", "{output}", 0.05),
    ("Task: {instruction}\n\n", "{output}", 0.05),
    ("Instruction: {instruction}\n", "{output}", 0.05),
    ("Instruction: {instruction}\nOutput:", "{output}", 0.05),
    ("You need to complete the following task:\n\n{instruction}\n\n", "{output}", 0.05),
    ("Can you help with this?\n\n{instruction}\n", "{output}", 0.05),
    ("Plase answer the following request: {instruction}\nAnswer:", "{output}", 0.05),
    (
        "Tell me how would you respond to the following request.\n{instruction}\n",
        "{output}",
        0.05,
    ),
    (
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:",
        "{output}",
        0.1,
    ),
)


def alpaca(row: dict, *, seed: int) -> dict:
    """`instruction`, `input` (possibly blank), `output`."""
    instruction, context, output = messages.texts(row, "instruction", "input", "output")
    said = encode(instruction, context, output, seed=seed)
    return messages.conversation(said, messages.noted(row, "category"))


def dolly(row: dict, *, seed: int) -> dict:
    """`instruction`, `context` (possibly blank), `response`: Dolly's own columns."""
    instruction, context, output = messages.texts(row, "instruction", "context", "response")
    said = encode(instruction, context, output, seed=seed)
    return messages.conversation(said, messages.noted(row, "category"))


def encode(instruction: str, context: str, output: str, *, seed: int) -> list[dict]:
    """The two messages of an instruction row; all three texts are stripped first."""
    instruction, context, output = instruction.strip(), context.strip(), output.strip()
    rng = random.Random(f"{seed}/{instruction}/{context}")
    layouts = WITH_INPUT if context else WITHOUT_INPUT
    ((user, assistant, _),) = rng.choices(layouts, [weight for _, _, weight in layouts])
    return messages.dialogue(
        [
            user.format(instruction=instruction, input=context),
            assistant.format(output=output),
        ]
    )
