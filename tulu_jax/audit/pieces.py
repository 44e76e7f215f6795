"""A conversation token for token: the text that each id stands for, and whose text it was."""

import dataclasses
import unicodedata
from collections.abc import Iterator, Sequence

from tulu_jax.data import chat as chat_lib

JOINERS = "\u200c\u200d"  # invisible, but they shape letters and emoji


@dataclasses.dataclass(frozen=True, kw_only=True)
class Token:
    """An id, None for text that no token covers, and the characters that it completes.

    Of the bytes of one character the last has its text, the others "". `kind` is "tag" (of the
    template, as `<|user|>` LF), "special" (the template's own BOS and `</s>`), "typed" (the text of
    a special token inside a message, which became its id), "unknown" (text that became `<unk>`),
    "lost" (text without an id), or "text".
    """

    text: str
    id: int | None
    kind: str


def tokens(messages: list[dict], *, tokenizer: chat_lib.ChatTokenizer, chat: str) -> list[Token]:
    """BOS and the tokens of a conversation; their texts are the rendered one, each character once.

    The ids are those of `chat.tokenize`.
    """
    rendered = chat_lib.render(messages, chat=chat)
    encoding = tokenizer.backend.encode(rendered.text, add_special_tokens=False)
    special = {
        id: token.content
        for id, token in tokenizer.backend.get_added_tokens_decoder().items()
        if token.special
    }
    in_tag = _in_tag(messages, rendered.text, chat)
    placed = {turn.content_end for turn in rendered.turns}
    unknown = tokenizer.backend.token_to_id(chat_lib.UNK)
    found = [Token(text=chat_lib.BOS, id=tokenizer.bos_id, kind="special")]
    for number, start, text in _texts(rendered.text, encoding.offsets):
        id = None if number is None else encoding.ids[number]
        if id is None:
            kind = "lost"
        elif special.get(id) == text:
            kind = "special" if start in placed else "typed"
        elif id == unknown:
            kind = "unknown"
        else:
            kind = "tag" if in_tag[start] else "text"
        found.append(Token(text=text, id=id, kind=kind))
    return found


def visible(text: str) -> str:
    """Text in which what would not show, or would steer a terminal, does: ↵ before each newline,
    ⇥ for a tab, ␀ to ␡ for control characters, ⟨U+200B⟩ for others without a picture."""
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


def _visible(char: str) -> str:
    code = ord(char)
    if char == "\n":
        return "↵\n"
    if char == "\t":
        return "⇥\t"
    if code < 32 or code == 127:
        return chr(0x2421 if code == 127 else 0x2400 + code)
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cn", "Co", "Zl", "Zp")
    return f"⟨U+{code:04X}⟩" if hidden and char not in JOINERS else char


def _texts(text: str, offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int | None, int, str]]:
    """(token, where its text starts, its text) in order; token None for text between tokens."""
    done = 0
    for number, (start, stop) in enumerate(offsets):
        if start > done:
            yield None, done, text[done:start]
            done = start
        following = offsets[number + 1][0] if number + 1 < len(offsets) else stop
        upto = max(done, min(stop, following))
        yield number, done, text[done:upto]
        done = upto
    if done < len(text):
        yield None, done, text[done:]


def _in_tag(messages: list[dict], text: str, chat: str) -> bytearray:
    """For each character, and the end, whether it is part of the template's `<|role|>` LF."""
    result = bytearray(len(text) + 1)
    for number, message in enumerate(messages):
        before = chat_lib.render(messages[:number], chat=chat).text
        start = text.index("<|", len(before))
        stop = start + len(f"<|{message['role']}|>")
        stop += text[stop : stop + 1] == "\n"
        result[start:stop] = b"\x01" * (stop - start)
    return result
