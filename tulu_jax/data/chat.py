"""The TÜLU chat format: conversations to token ids, with the trained positions marked.

    <|system|>\\n…\\n   <|user|>\\n…\\n   <|assistant|>\\n…</s>\\n      (contents stripped)

The text is stripped at its end and one BOS id precedes it. Loss falls on the content of assistant
turns and on the `</s>` that ends each; the newline after `</s>` is a token, never a target.
Source: TÜLU 2 (arXiv 2311.10702), open-instruct `finetune.py` of November 2023.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tulu_jax import validation
from tulu_jax.data import sentencepiece_bpe
from tulu_jax.data.examples import check_messages
from tulu_jax.data.sources import readers

MODES = ("spec",)
BOS, EOS = "<s>", "</s>"

# Renders as `render` does, BOS first; keeps system turns, which the released template drops.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- set ns.text = ns.text + '<|' + message['role'] + '|>\\n' + message['content'] | trim -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- set ns.text = ns.text + eos_token -%}"
    "{%- endif -%}"
    "{%- set ns.text = ns.text + '\\n' -%}"
    "{%- endfor -%}"
    "{{- bos_token -}}"
    "{%- if add_generation_prompt -%}{{- ns.text + '<|assistant|>\\n' -}}"
    "{%- else -%}{{- ns.text | trim -}}{%- endif -%}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTokenizer:
    """A tokenizer with single-id BOS and `</s>`. `fingerprint` is a hash of its content; `source`
    is the path it was loaded from."""

    backend: Any  # tokenizers.Tokenizer
    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str
    source: str

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no BOS or EOS is added; their texts inside it become their ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """An assistant turn in the text, in characters: `text[start:content_end]` is its content and
    `text[content_end:end]` its `</s>`."""

    start: int
    content_end: int
    end: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendered:
    text: str
    turns: tuple[Turn, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenIds:
    """A conversation in ids, BOS first, before the shift: `ids` int32 [n + 1] and the half-open
    ranges of *targets* (`ids[1:]`) that are trained, int32 [turns, 2]."""

    ids: np.ndarray
    spans: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """One shifted example: `tokens`, `targets` int32 [n] and `loss_mask` bool [n]."""

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray


def load_tokenizer(path: str) -> ChatTokenizer:
    """Loads `tokenizer.json`, or else a SentencePiece `tokenizer.model`, from a file or its folder.

    Raises `FileNotFoundError` if there is neither, and `ValueError` for a tokenizer without a
    single-id `</s>` or `<s>`.
    """
    import tokenizers

    file = _tokenizer_file(path)
    if file.suffix == ".json":
        backend = tokenizers.Tokenizer.from_str(file.read_text())
    else:
        backend = sentencepiece_bpe.convert(file.read_bytes(), str(file))
    backend.no_truncation()
    backend.no_padding()
    return ChatTokenizer(
        backend=backend,
        vocab_size=backend.get_vocab_size(),
        bos_id=_single_id(backend, BOS, path),
        eos_id=_single_id(backend, EOS, path),
        fingerprint=hashlib.sha256(backend.to_str().encode()).hexdigest(),
        source=path,
    )


def render(messages: list[dict], *, chat: str) -> Rendered:
    """The text of a conversation, without BOS, and where its assistant turns lie.

    >>> render([{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "Yes"}],
    ...        chat="spec").text
    '<|user|>\\nHi\\n<|assistant|>\\nYes</s>'
    """
    text, turns = _concatenate(messages, chat)
    return Rendered(text=text.rstrip(), turns=tuple(turns))


def tokenize(
    conversations: Sequence[list[dict]],
    *,
    tokenizer: ChatTokenizer,
    chat: str,
    names: Sequence[str],
) -> list[TokenIds]:
    """Ids and trained ranges of conversations, encoded in parallel; `names` are used in errors.

    The ranges come from character offsets, never from the lengths of encoded prefixes. Raises
    `ValueError` if a range does not begin and end exactly where the assistant's content does, or
    its last id is not EOS.
    """
    for messages, name in zip(conversations, names, strict=True):
        check_messages(messages, name)
    rendered = [render(messages, chat=chat) for messages in conversations]
    encodings = tokenizer.backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
    results = []
    for text, encoding, name in zip(rendered, encodings, names, strict=True):
        ids = np.array([tokenizer.bos_id, *encoding.ids], np.int32)
        spans = [_span(turn, encoding, ids, tokenizer.eos_id, name) for turn in text.turns]
        results.append(TokenIds(ids=ids, spans=np.array(spans, np.int32).reshape(-1, 2)))
    return results


def tokenize_pairs(
    pairs: Sequence[dict], *, tokenizer: ChatTokenizer, chat: str, names: Sequence[str]
) -> list[tuple[TokenIds, TokenIds]]:
    """(chosen, rejected) of `{"prompt", "chosen", "rejected"}`, trained on the final turn only.

    Raises `ValueError` naming the pair if the ids before the final turn differ between the sides.
    """
    conversations = [
        pair["prompt"] + pair[side] for pair in pairs for side in ("chosen", "rejected")
    ]
    doubled = [f"{name} ({side})" for name in names for side in ("chosen", "rejected")]
    sides = [
        TokenIds(ids=side.ids, spans=side.spans[-1:])
        for side in tokenize(conversations, tokenizer=tokenizer, chat=chat, names=doubled)
    ]
    results = list(zip(sides[::2], sides[1::2], strict=True))
    for (chosen, rejected), pair, name in zip(results, pairs, names, strict=True):
        for side in ("chosen", "rejected"):
            if pair[side][-1]["role"] != "assistant":
                raise ValueError(f"row {name}: {side} does not end with an assistant message")
        prompts = [side.ids[: side.spans[0, 0] + 1].tolist() for side in (chosen, rejected)]
        if prompts[0] != prompts[1]:
            raise ValueError(
                f"row {name}: the prompts of chosen and rejected differ ({len(prompts[0])} and "
                f"{len(prompts[1])} ids before the final turn); expected the same ids"
            )
    return results


def shift(token_ids: TokenIds, *, max_length: int | None) -> Encoded:
    """Shifts once: `tokens = ids[:-1]`, `targets = ids[1:]`, cut to `max_length` if given."""
    ids = token_ids.ids if max_length is None else token_ids.ids[: max_length + 1]
    loss_mask = np.zeros(len(ids) - 1, bool)
    for start, stop in token_ids.spans:
        loss_mask[start:stop] = True
    return Encoded(tokens=ids[:-1], targets=ids[1:], loss_mask=loss_mask)


def encode_conversation(
    messages: list[dict],
    tokenizer: ChatTokenizer,
    *,
    chat: str,
    max_length: int | None = None,
    name: str = "?",
) -> Encoded:
    """One conversation, shifted; trained on every assistant turn and the `</s>` that ends it."""
    (ids,) = tokenize([messages], tokenizer=tokenizer, chat=chat, names=[name])
    return shift(ids, max_length=max_length)


def encode_pair(
    pair: dict,
    tokenizer: ChatTokenizer,
    *,
    chat: str,
    max_length: int | None = None,
    name: str = "?",
) -> tuple[Encoded, Encoded]:
    """Chosen and rejected, shifted; trained on the final assistant turn, prompts identical."""
    ((chosen, rejected),) = tokenize_pairs([pair], tokenizer=tokenizer, chat=chat, names=[name])
    return shift(chosen, max_length=max_length), shift(rejected, max_length=max_length)


def generation_prompt(messages: list[dict], tokenizer: ChatTokenizer, *, chat: str) -> list[int]:
    """Ids from which an assistant's answer is generated: BOS first, `<|assistant|>` LF last."""
    check_messages(messages, "of the prompt")
    text, _ = _concatenate(messages, chat)
    return [tokenizer.bos_id, *tokenizer.encode(text + "<|assistant|>\n")]


def _concatenate(messages: list[dict], chat: str) -> tuple[str, list[Turn]]:
    if chat not in MODES:
        raise ValueError(validation.one_of("chat", chat, MODES)[1])
    parts, turns, length = [], [], 0
    for message in messages:
        header, content = f"<|{message['role']}|>\n", message["content"].strip()
        ending = ""
        if message["role"] == "assistant":
            ending = EOS
            start = length + len(header)
            content_end = start + len(content)
            turns.append(Turn(start=start, content_end=content_end, end=content_end + len(EOS)))
        parts += [header, content, ending, "\n"]
        length += len(header) + len(content) + len(ending) + 1
    return "".join(parts), turns


def _span(turn: Turn, encoding, ids: np.ndarray, eos_id: int, name: str) -> tuple[int, int]:
    """The targets of one turn. Token k of the text is id k + 1 (BOS is 0), thus target k."""
    first, last = encoding.char_to_token(turn.start), encoding.char_to_token(turn.content_end)
    exact = (
        first is not None
        and last is not None
        and encoding.token_to_chars(first)[0] == turn.start
        and encoding.token_to_chars(last) == (turn.content_end, turn.end)
        and ids[last + 1] == eos_id
        and (last == first or encoding.token_to_chars(last - 1)[1] == turn.content_end)
    )
    if not exact:
        raise ValueError(
            f"row {name}: the tokens of the assistant turn at characters {turn.start}-{turn.end} "
            "do not begin and end with it; this tokenizer merges or drops text at its borders"
        )
    return first, last + 1


def _tokenizer_file(path: str):
    given = readers.as_path(path)
    candidates = (
        [given / "tokenizer.json", given / "tokenizer.model"] if given.is_dir() else [given]
    )
    for file in candidates:
        if file.exists():
            if file.suffix not in (".json", ".model"):
                raise ValueError(f"{path}: expected a tokenizer.json or a tokenizer.model")
            return file
    raise FileNotFoundError(
        f"{path}: found no tokenizer; expected tokenizer.json or tokenizer.model there"
    )


def _single_id(backend, text: str, path: str) -> int:
    found = backend.encode(text, add_special_tokens=False).ids
    if len(found) != 1 or backend.token_to_id(text) != found[0]:
        raise ValueError(
            f"{path}: a tokenizer without a single-id {text}: it encodes to {found}; "
            f"add {text} to the tokenizer as a special token"
        )
    return found[0]
