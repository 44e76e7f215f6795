"""The TÜLU chat format as the Jinja templates that a tokenizer carries, one for each mode."""

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
