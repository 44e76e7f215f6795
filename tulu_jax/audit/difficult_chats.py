"""Conversations made to be difficult for a chat template and a tokenizer, by what is in them."""

from collections.abc import Mapping, Sequence

from tulu_jax.data import tokenizer_files

CONTENTS = {
    "plain": "Hello, world.",
    "empty": "",
    "spaces and tabs only": " \t  ",
    "newlines only": "\n\n\n",
    "white space outside": "\n  a \t\n",
    "white space inside": "a  b   c\t\td\n\n\ne",
    "CR LF": "a\r\nb\r\n\r\nc\r",
    "control characters": "a\x00b\x07c\x1b[31md\x7fe\x80f",
    "separators that strip() removes": "\x1c\x1da\x1eb\x1f\x85",
    "unusual spaces": "\u00a0a\u2003b\u3000c\u2028d\u2029e\u200bf\ufeff",
    "accents": "é e\u0301 ñ n\u0303 ﬁ Å \u212b",
    "scripts": "東京 한국어 русский العربية עברית हिन्दी ไทย ქართული አማርኛ",
    "emoji": "💡 👨\u200d👩\u200d👧 🏳️\u200d🌈 👍🏽 🇫🇷 ☃️",
    "right to left, joiners": "a\u202eb\u202c می\u200cخواهم \u2066x\u2069",
    "private use, last characters": "\ue000\ufffd\uffff\U0010ffff",
    "the space of SentencePiece": "\u2581a\u2581\u2581b \u2581",
    "numbers": "3.14159 1,234,567 0x7f ½ ٣ ⅷ 1e-5",
    "</s> alone": "</s>",
    "</s> inside": "a</s>b </s> c\n</s>\nd",
    "<s> and <unk>": "<s>a<unk>b <s> c <unk>",
    "special tokens in a row": "</s></s><s> </s>\n\n<unk>",
    "almost special": "</s <s/> < s> <</s>> [INST] <<SYS>> <pad> </S>",
    "tags of the template": "<|assistant|>\nYes.</s>\n<|user|>\n<|system|> <|tool|>",
    "Jinja": "{{ bos_token }}{% for m in messages %}{{ m }}{% endfor %}{# no #}{%- raw -%}",
    "formatting": "%s %(x)s {0} {} \\n \\u0041 $x ${y} `z`",
    "HTML": "<script>alert('&amp;')</script><!-- --><b>\"x\"</b>",
    "code": "```python\n\tif x:\n        return  y  # z\n```",
    "a very long word": "ab" * 5_000,
    "a very long message": "The quick brown fox jumps over 13 lazy dogs. 東京💡\n" * 1_000,
}


def all_of_them(own_pieces: Mapping[str, Sequence[str]]) -> dict[str, list[dict]]:
    """Each of the contents in every place of a conversation, and conversations of odd shapes.

    `own_pieces` are texts that a tokenizer treats as one, by kind: each kind is one more content.
    """
    own = {
        f"its own {kind} pieces": " ".join(tokenizer_files.probes(texts))
        for kind, texts in own_pieces.items()
        if texts
    }
    found = {
        name: _chat("system", "user", "assistant", "user", "assistant", content=content)
        for name, content in (CONTENTS | own).items()
    }
    shapes = {
        "no system turn": ("user", "assistant"),
        "two system turns": ("system", "system", "user", "assistant"),
        "a system turn in the middle": ("user", "assistant", "system", "user", "assistant"),
        "the assistant first": ("assistant", "user", "assistant"),
        "the assistant alone": ("assistant",),
        "the assistant twice": ("user", "assistant", "assistant"),
        "the user last": ("user", "assistant", "user"),
        "the user alone": ("user",),
        "a system turn alone": ("system",),
        "many turns": ("user", "assistant") * 300,
    }
    return found | {name: _chat(*roles, content="So it is.") for name, roles in shapes.items()}


def _chat(*roles: str, content: str) -> list[dict]:
    return [{"role": role, "content": content} for role in roles]
