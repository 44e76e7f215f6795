"""The chat template of a Hugging Face folder: whether it is one of ours, and what it writes."""

import os

from etils import epath

from tulu_jax import strict_json, validation
from tulu_jax.interop import tokenizer_export

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"


def read(folder: str) -> str | None:
    """The template in a folder; None where there is none, or several by name. Raises `UsageError`
    for a file that cannot be read."""
    with validation.reading():
        if (file := epath.Path(folder) / FILE).exists():
            return file.read_text()
        file = epath.Path(folder) / CONFIG
        found = strict_json.loads(file.read_bytes()) if file.exists() else {}
    template = found.get("chat_template") if isinstance(found, dict) else None
    return template if isinstance(template, str) else None


def modes(template: str) -> list[str]:
    """The modes of `data/chat.py` whose template, as we write it, this is."""
    return [mode for mode, text in tokenizer_export.TEMPLATES.items() if text == template]


def written(folder: str, messages: list[dict[str, str]]) -> str:
    """The text that the template in a local folder makes of `messages`. Raises `UsageError` if it
    makes none."""
    import transformers

    if "://" in os.fspath(folder):
        raise validation.UsageError("its chat template is tried in a local folder; copy it to one")
    with validation.reading():
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    try:
        return theirs.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template raises whatever jinja does
        raise validation.UsageError(f"its chat template fails ({error})") from error
