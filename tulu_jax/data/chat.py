"""The TÜLU chat format: conversations to token ids, with the trained positions marked.

    <|system|>\\n…\\n   <|user|>\\n…\\n   <|assistant|>\\n…</s>\\n      (contents stripped)

The text is stripped at its end and one BOS id precedes it. Loss falls on the content of assistant
turns and on the `</s>` that ends each. Three modes, named after what they reproduce:

| mode | the newline after an inner `</s>` |
|---|---|
| `spec` | a token, as the template is documented; not trained |
| `paper` | swallowed, as all white space around `<s>`, `</s>`, `<unk>`: the JAX trainer's |
| `open_instruct` | a token, and trained, as in `finetune.py` of November 2023 |

Both originals mask user and system turns, each with the header of the assistant's turn after it,
and train the rest: so also `<|assistant|>` LF where the assistant begins, or goes on after itself.
They count the ids to mask on the text up to there. Where `paper` swallows the newline after that
header, as the answer is empty or begins with a special token, that token is masked instead.
They cut to `max_seq_length` ids before the shift; we cut to `max_length` targets, one more.

Source: TÜLU 2 (arXiv 2311.10702); EasyLM and open-instruct of November 2023. The tokenizers of
that time (transformers 4.31) stripped the text on both sides of a special token.
"""

import bisect
import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tulu_jax import validation
from tulu_jax.data import tokenizer_files
from tulu_jax.data.examples import check_messages

MODES = ("spec", "paper", "open_instruct")
BOS, EOS, UNK = SPECIAL = tokenizer_files.SPECIAL
_AROUND_SPECIAL = re.compile(rf"\s*({'|'.join(SPECIAL)})\s*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTokenizer:
    """A tokenizer with single-id BOS and `</s>`. `newline_id` is the last id of a newline alone,
    `fingerprint` a hash of its content; `source` is the path it was loaded from."""

    backend: Any  # tokenizers.Tokenizer
    vocab_size: int
    bos_id: int
    eos_id: int
    newline_id: int
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
    `text[content_end:end]` its `</s>`; the next message begins at `behind`, which is `end` for the
    last one. `before` is the role of the message before it, None if it is the first."""

    start: int
    content_end: int
    end: int
    behind: int
    before: str | None


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
    """Loads `tokenizer.json`, or else a SentencePiece `tokenizer.model`, from a file or its folder,
    with the tokens that the files beside it add.

    Raises what `tokenizer_files.load` does, and `ValueError` for a tokenizer without a single-id
    `</s>` or `<s>`.
    """
    backend = tokenizer_files.load(path)
    return ChatTokenizer(
        backend=backend,
        vocab_size=backend.get_vocab_size(),
        bos_id=_single_id(backend, BOS, path),
        eos_id=_single_id(backend, EOS, path),
        newline_id=backend.encode("\n", add_special_tokens=False).ids[-1],
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

    The ranges come from where the assistant's turns lie in the text, in characters. Raises
    `ValueError` if a range does not begin and end exactly where the assistant's content does, or
    its last id is not EOS.
    """
    rendered, borders = _borders(conversations, tokenizer, chat, names)
    return [
        TokenIds(ids=ids, spans=_trained(text, at, chat))
        for text, (ids, at) in zip(rendered, borders, strict=True)
    ]


def tokenize_pairs(
    pairs: Sequence[dict], *, tokenizer: ChatTokenizer, chat: str, names: Sequence[str]
) -> list[tuple[TokenIds, TokenIds]]:
    """(chosen, rejected) of `{"prompt", "chosen", "rejected"}`, trained on the final turn only.

    The ids before it are the same on both sides, unless an answer that begins with the text of a
    special token swallows the white space before it: `same_prompt` tells.
    """
    halves = [(pair, side) for pair in pairs for side in ("chosen", "rejected")]
    conversations = [pair["prompt"] + pair[side] for pair, side in halves]
    doubled = [f"{name} ({side})" for name in names for side in ("chosen", "rejected")]
    for (pair, side), name in zip(halves, doubled, strict=True):
        if not pair[side] or pair[side][-1]["role"] != "assistant":
            raise ValueError(f"row {name}: does not end with an assistant message")
    rendered, borders = _borders(conversations, tokenizer, chat, doubled)
    sides = []
    for text, (ids, at) in zip(rendered, borders, strict=True):
        last = dataclasses.replace(text, turns=text.turns[-1:])
        sides.append(TokenIds(ids=ids, spans=_trained(last, at[-1:], chat, final_only=True)))
    return list(zip(sides[::2], sides[1::2], strict=True))


def _borders(
    conversations: Sequence[list[dict]], tokenizer: ChatTokenizer, chat: str, names: Sequence[str]
) -> tuple[list[Rendered], list[tuple[np.ndarray, np.ndarray]]]:
    """Of each conversation its text, and (ids, BOS first; int32 [turns, 3] in targets): where the
    content of an assistant's turn begins, where its `</s>` ends, where the next message begins."""
    for messages, name in zip(conversations, names, strict=True):
        check_messages(messages, name)
    rendered = [render(messages, chat=chat) for messages in conversations]
    whole = dict(add_special_tokens=False)
    encodings = tokenizer.backend.encode_batch_fast([r.text for r in rendered], **whole)
    results = []
    for text, encoding, name in zip(rendered, encodings, names, strict=True):
        ids = np.array([tokenizer.bos_id, *encoding.ids], np.int32)
        at = _counted_borders(text, ids, tokenizer)
        if at is None:
            encoding = tokenizer.backend.encode(text.text, **whole)
            at = [_turn_borders(turn, encoding, ids, tokenizer.eos_id, name) for turn in text.turns]
        results.append((ids, np.array(at, np.int32).reshape(-1, 3)))
    return rendered, results


def _counted_borders(rendered: Rendered, ids: np.ndarray, tokenizer: ChatTokenizer):
    """The borders of each turn by the newlines and `</s>` before them, which takes half of what
    places in the text take; None unless each of these has an id of its own and comes before."""
    text, found = rendered.text, []
    newlines = np.flatnonzero(ids == tokenizer.newline_id)
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    if len(newlines) != text.count("\n") or len(ends) != text.count(EOS):
        return None
    lines = ended = at = 0  # newlines and ends before `at`
    for turn in rendered.turns:
        is_swallowed = turn.behind == turn.end
        if text[turn.start - 1] != "\n" or not (is_swallowed or text[turn.behind - 1] == "\n"):
            return None
        lines += text.count("\n", at, turn.start)
        ended += text.count(EOS, at, turn.content_end)
        first, end = newlines[lines - 1], ends[ended]
        at, ended = turn.behind, ended + 1
        lines += text.count("\n", turn.start, at)
        found.append((first, end, end if is_swallowed else newlines[lines - 1]))
    return found


def _trained(
    rendered: Rendered, borders: np.ndarray, chat: str, *, final_only: bool = False
) -> np.ndarray:
    """The trained targets of each turn, int32 [turns, 2]; see the head of this file.

    With `final_only`, the one turn of `rendered` is the last, and all before it is masked.
    """
    if chat == "spec":
        return borders[:, :2]
    spans = borders[:, [0, 2]].copy()
    for index, turn in enumerate(rendered.turns):
        if turn.before is None:
            spans[index, 0] = 0
        elif turn.before == "assistant" and not final_only:
            spans[index, 0] = spans[index - 1, 1]
        elif rendered.text[turn.start - 1] != "\n":  # swallowed
            spans[index, 0] += 1
    return spans


def same_prompt(chosen: TokenIds, rejected: TokenIds) -> bool:
    """Whether both sides of a pair have the same ids before their final turn."""
    prompts = [side.ids[: side.spans[0, 0] + 1] for side in (chosen, rejected)]
    return np.array_equal(*prompts)


def shift(token_ids: TokenIds) -> Encoded:
    """Shifts once: `tokens = ids[:-1]`, `targets = ids[1:]`."""
    ids = token_ids.ids
    loss_mask = np.zeros(len(ids) - 1, bool)
    for start, stop in token_ids.spans:
        loss_mask[start:stop] = True
    return Encoded(tokens=ids[:-1], targets=ids[1:], loss_mask=loss_mask)


def generation_prompt(
    messages: list[dict],
    tokenizer: ChatTokenizer,
    *,
    chat: str,
    prefix: str = "",
    strips: bool = True,
) -> list[int]:
    """Ids from which an assistant's answer is generated: BOS first, `<|assistant|>` LF last, and
    after that what the answer is to begin with. Contents are stripped as in training, or, as in the
    paper's evaluations, not."""
    check_messages(messages, "of the prompt")
    text, _ = _concatenate(messages, chat, strips=strips)
    return [tokenizer.bos_id, *tokenizer.encode(f"{text}<|assistant|>\n{prefix}")]


def _concatenate(messages: list[dict], chat: str, *, strips: bool = True) -> tuple[str, list[Turn]]:
    if chat not in MODES:
        raise ValueError(validation.one_of("chat", chat, MODES)[1])
    parts, turns, length = [], [], 0
    for index, message in enumerate(messages):
        header, content = f"<|{message['role']}|>\n", message["content"]
        content = content.strip() if strips else content
        is_assistant = message["role"] == "assistant"
        parts += [header, content, EOS if is_assistant else "", "\n"]
        start = length + len(header)
        length = start + len(content) + len(EOS) * is_assistant + 1
        if is_assistant:
            turn = Turn(
                start=start,
                content_end=start + len(content),
                end=length - 1,
                behind=length - (index + 1 == len(messages)),
                before=messages[index - 1]["role"] if index else None,
            )
            turns.append(turn)
    text = "".join(parts)
    return _tightened(text, turns) if chat == "paper" else (text, turns)


def _tightened(text: str, turns: list[Turn]) -> tuple[str, list[Turn]]:
    """The text without white space around special tokens, and its turns moved accordingly."""
    starts, gone = [0], [0]  # where a removed stretch starts, and what is gone up to its end
    stops = [0]
    for match in _AROUND_SPECIAL.finditer(text):
        for start, stop in ((match.start(), match.start(1)), (match.end(1), match.end())):
            starts.append(start)
            stops.append(stop)
            gone.append(gone[-1] + stop - start)

    def moved(at: int) -> int:
        last = bisect.bisect_left(starts, at, lo=1) - 1
        return at - gone[last] + max(stops[last] - at, 0)

    places = ("start", "content_end", "end", "behind")
    return _AROUND_SPECIAL.sub(r"\1", text), [
        dataclasses.replace(turn, **{name: moved(getattr(turn, name)) for name in places})
        for turn in turns
    ]


def _turn_borders(turn: Turn, encoding, ids: np.ndarray, eos_id: int, name: str):
    """The borders of one turn. Token k of the text is id k + 1 (BOS is 0), thus target k."""
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
    is_swallowed = turn.behind == turn.end
    return first, last + 1, last + 1 if is_swallowed else encoding.char_to_token(turn.behind)


def _single_id(backend, text: str, path: str) -> int:
    try:
        found = backend.encode(text, add_special_tokens=False).ids
    except Exception as error:  # a model without an unknown token; the library raises nothing else
        raise ValueError(f"{path}: the tokenizer cannot encode {text!r} ({error})") from error
    if len(found) != 1 or backend.token_to_id(text) != found[0]:
        raise ValueError(
            f"{path}: a tokenizer without a single-id {text}: it encodes to {found}; "
            f"add {text} to the tokenizer as a special token"
        )
    return found[0]
