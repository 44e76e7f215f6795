"""A tokenizer as a Hugging Face folder, with the TÜLU chat format as its Jinja template.

The templates and the special tokens are those of `data/chat.py`, one template for each mode.
"""

import json
import os
import pathlib
import shutil
import tempfile

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

_RENDER = (
    "{%- set ns = namespace(text='', content='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- set ns.content = '' -%}"
    "{%- if message['content'] is string -%}{%- set ns.content = message['content'] -%}"
    "{%- elif message['content'] is mapping or not message['content'] -%}"
    "{{- raise_exception('content of a message is no text') -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part is not mapping or part['type'] != 'text' or part['text'] is not string -%}"
    "{{- raise_exception('content of a message has a part that is no text') -}}"
    "{%- endif -%}"
    "{%- set ns.content = ns.content + part['text'] -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- set ns.text = ns.text + '<|' + message['role'] + '|>\\n' + ns.content | trim -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- set ns.text = ns.text + eos_token -%}"
    "{%- endif -%}"
    "{%- set ns.text = ns.text + '\\n' -%}"
    "{%- endfor -%}"
)
_TIGHTEN = (
    "{%- for special in ['<s>', '</s>', '<unk>'] -%}"
    "{%- set pieces = ns.text.split(special) -%}"
    "{%- set ns.text = pieces[0].rstrip() if pieces | length > 1 else pieces[0] -%}"
    "{%- for piece in pieces[1:] -%}"
    "{%- set ns.text = ns.text + special + (piece.lstrip() if loop.last else piece.strip()) -%}"
    "{%- endfor -%}"
    "{%- endfor -%}"
)
_EMIT = (
    "{{- bos_token -}}"
    "{%- if add_generation_prompt -%}{{- ns.text + '<|assistant|>\\n' -}}"
    "{%- else -%}{{- ns.text | trim -}}{%- endif -%}"
)
# Each renders as its mode does, BOS first, and keeps system turns, which the released one drops.
# Content may also come as a list of parts, `{"type": "text", "text": …}`: their texts are joined.
TEMPLATES = {
    "spec": _RENDER + _EMIT,
    "paper": _RENDER + _TIGHTEN + _EMIT,
    "open_instruct": _RENDER + _EMIT,
}


def save(backend, directory: str, *, max_length: int | None, mode: str) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, atomically.

    `backend` is a `tokenizers.Tokenizer`. `transformers.AutoTokenizer` opens the folder; its chat
    template gives the ids of `chat.py` in `mode`.
    """
    config = {
        **SPECIAL,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATES[mode],
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    target = pathlib.Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    staging = pathlib.Path(tempfile.mkdtemp(prefix=".tokenizer-", dir=target))
    try:
        backend.save(str(staging / "tokenizer.json"))
        (staging / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
        (staging / "special_tokens_map.json").write_text(json.dumps(SPECIAL, indent=2))
        for file in sorted(staging.iterdir(), key=lambda f: f.name == "tokenizer.json"):
            os.replace(file, target / file.name)  # tokenizer.json last: it marks the whole
    finally:
        shutil.rmtree(staging, ignore_errors=True)
