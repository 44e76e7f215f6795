"""Our ids against those of others: `apply_chat_template` of the tokenizer that we export, and the
`sentencepiece` library; and the trained ids against the assistant's words.

Over conversations made to be difficult, and over real rows of the run's own mixture.
"""

import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tulu_jax.audit import difficult_chats
from tulu_jax.data import chat as chat_lib
from tulu_jax.data import examples as examples_lib
from tulu_jax.data import loader, tokenizer_files
from tulu_jax.interop import tokenizer_export

ROWS_PER_TASK = 64
SHOWN_BEFORE, SHOWN_BEHIND = 4, 8
SPECIAL = f"({'|'.join(chat_lib.SPECIAL)})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """What differs first in a case: `ours` and `theirs`, one entry for each id or character."""

    case: str
    what: str
    at: int
    ours: list[str]
    theirs: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A case, or the rows of a task: how many conversations and ids, and the first difference."""

    case: str
    conversations: int
    ids: int
    difference: Difference | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Conversation:
    """A conversation, or one side of a pair, which trains its last turn only."""

    name: str
    messages: list[dict]
    ids: chat_lib.TokenIds
    final_only: bool


def check(config: loader.DataConfig) -> list[Outcome]:
    """Exports the tokenizer of a run, with the template that its checkpoints get, and compares."""
    tokenizer = chat_lib.load_tokenizer(config.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_export.save(tokenizer.backend, folder, max_length=None, mode=config.chat)
        return compare(config, exported=folder)


def compare(config: loader.DataConfig, *, exported: str) -> list[Outcome]:
    """The outcome of every difficult conversation, and of the rows of every train task.

    `exported` is the folder of a tokenizer that `transformers` opens.
    """
    comparison = _Comparison(config, exported)
    outcomes = []
    for name, messages in difficult_chats.all_of_them(comparison.own_pieces()).items():
        outcomes.append(comparison.outcome(name, [("sft", name, {"messages": messages})]))
    for component in loader.split_components(config, "train"):
        task = component.task
        loaded = examples_lib.load_examples(task, config.drawing(component, "train"))
        picked = np.unique(np.linspace(0, len(loaded.ids) - 1, ROWS_PER_TASK).astype(int))
        rows = [(task.kind, loaded.ids[i], loaded.examples[i]) for i in picked.tolist()]
        outcomes.append(comparison.outcome(f"rows of {task.name}", rows))
    return outcomes


def report(outcomes: Sequence[Outcome], config: loader.DataConfig) -> str:
    """What was compared, and a table of outcomes; then the first difference, side by side."""
    model = tokenizer_files.model_file(config.tokenizer)
    head = [
        f"chat {config.chat!r}, tokenizer {config.tokenizer}",
        "against  apply_chat_template of its export (texts, ids, generation prompts)",
        "         the words of the assistant (what is trained)",
        f"         sentencepiece with {model} (ids)" if model else "         (no tokenizer.model)",
        "",
    ]
    lines = [("case", "chats", "ids", "")]
    for outcome in outcomes:
        found = outcome.difference
        said = f"{found.what} differ at {found.at}" if found else "equal"
        lines.append((outcome.case, f"{outcome.conversations:,}", f"{outcome.ids:,}", said))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    table = [
        f"{case:<{widths[0]}}  {chats:>{widths[1]}}  {ids:>{widths[2]}}  {said}".rstrip()
        for case, chats, ids, said in lines
    ]
    different = [outcome.difference for outcome in outcomes if outcome.difference]
    table = head + table
    if not different:
        return "\n".join([*table, "", f"all {len(outcomes)} cases are equal"])
    summary = f"{len(different)} of {len(outcomes)} cases differ"
    return "\n".join([*table, "", summary, *_side_by_side(different[0])])


def _side_by_side(found: Difference) -> list[str]:
    first = max(found.at - SHOWN_BEFORE, 0)
    places = range(first, min(found.at + SHOWN_BEHIND, max(len(found.ours), len(found.theirs))))
    cells = [("", "at", "ours", "theirs")] + [
        ("→" * (i == found.at), str(i), _cell(found.ours, i), _cell(found.theirs, i))
        for i in places
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return [f"{found.case}: {found.what} differ at {found.at}", *map(str.rstrip, lines)]


def _cell(side: list[str], place: int) -> str:
    return side[place] if place < len(side) else "(end)"


class _Comparison:
    """The tokenizers of a run, opened once."""

    def __init__(self, config: loader.DataConfig, exported: str):
        import transformers

        self._tokenizer = chat_lib.load_tokenizer(config.tokenizer)
        self._chat = config.chat
        self._exported = transformers.AutoTokenizer.from_pretrained(exported)
        self._library = None
        if model := tokenizer_files.model_file(config.tokenizer):
            self._library = tokenizer_files.Library(model, self._tokenizer.backend)
        self._tokens = self._tokenizer.backend.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in self._tokens.items()}

    def own_pieces(self) -> dict[str, list[str]]:
        """By kind, the pieces of this tokenizer that are found in text before any merge."""
        pieces = {"user-defined": self._library.defined if self._library else []}
        pieces["added"] = [text for text in self._added.values() if text not in chat_lib.SPECIAL]
        return pieces

    def outcome(self, case: str, rows: Sequence[tuple[str, str, dict]]) -> Outcome:
        """What comparing these (kind, name, example) one after the other gives."""
        conversations = [c for row in rows for c in self._conversations(*row)]
        differences = (found for c in conversations for found in self._differences(c))
        return Outcome(
            case=case,
            conversations=len(conversations),
            ids=sum(len(c.ids.ids) for c in conversations),
            difference=next(differences, None),
        )

    def _conversations(self, kind: str, name: str, example: dict) -> Iterator[_Conversation]:
        options = {"tokenizer": self._tokenizer, "chat": self._chat, "names": [name]}
        if kind == "sft":
            (ids,) = chat_lib.tokenize([example["messages"]], **options)
            messages = example["messages"]
            yield _Conversation(name=name, messages=messages, ids=ids, final_only=False)
            return
        (sides,) = chat_lib.tokenize_pairs([example], **options)
        for side, ids in zip(("chosen", "rejected"), sides, strict=True):
            messages = example["prompt"] + example[side]
            name_of_side = f"{name} ({side})"
            yield _Conversation(name=name_of_side, messages=messages, ids=ids, final_only=True)

    def _differences(self, conversation: _Conversation) -> Iterator[Difference]:
        """The first difference of each comparison that finds one."""
        messages, ids = conversation.messages, conversation.ids.ids.tolist()
        text = chat_lib.render(messages, chat=self._chat).text
        ask = self._exported.apply_chat_template
        prompt = chat_lib.generation_prompt(messages, self._tokenizer, chat=self._chat)
        asked = ask(messages, add_generation_prompt=True, return_dict=False)
        comparisons = [
            ("texts of the template", chat_lib.BOS + text, ask(messages, tokenize=False), repr),
            ("ids of the template", ids, ask(messages, return_dict=False), self._named),
            ("ids of the generation prompt", prompt, asked, self._named),
            ("trained texts", self._trained(conversation), self._answers(conversation), repr),
        ]
        if self._library:
            theirs = [self._tokenizer.bos_id, *self._library.encode(text)]
            comparisons.append(("ids of tokenizer.model", ids, theirs, self._named))
        for what, ours, theirs, named in comparisons:
            if ours != theirs:
                yield _difference(conversation.name, what, ours, theirs, named)

    def _named(self, id: int) -> str:
        return f"{id} {self._tokenizer.backend.id_to_token(id)!r}"

    def _trained(self, conversation: _Conversation) -> str:
        """The trained ids as text, span after span."""
        ids = conversation.ids.ids.tolist()
        spans = conversation.ids.spans.tolist()
        return "".join(
            self._decoded(ids[start], ids[start + 1 : stop + 1]) for start, stop in spans
        )

    def _decoded(self, before: int, ids: list[int]) -> str:
        """The text of ids that follow id `before`; a decoder takes a space off each beginning."""
        head = self._tokenizer.decode([before], skip_special=False)
        text, run, is_first = "", [], before not in self._added
        for id in [*ids, None]:
            if id is not None and id not in self._added:
                run.append(id)
                continue
            if run and is_first:
                text += self._tokenizer.decode([before, *run], skip_special=False)[len(head) :]
            elif run:
                text += self._tokenizer.decode(run, skip_special=False)
            text += self._added.get(id, "")
            run, is_first = [], False
        return text.replace("\u2581", " ")  # to SentencePiece, these are one character

    def _answers(self, conversation: _Conversation) -> str:
        """What is to be trained on, from the messages: the last of them where that is all."""
        messages, texts = conversation.messages, []
        roles = [None, *(message["role"] for message in messages)]
        for place, message in enumerate(messages):
            is_last = place + 1 == len(messages)
            if message["role"] != "assistant" or (conversation.final_only and not is_last):
                continue
            answer = message["content"].strip() + chat_lib.EOS
            before = roles[place]
            if self._chat != "spec" and (
                before is None or (before == "assistant" and not conversation.final_only)
            ):
                answer = "<|assistant|>\n" + answer
            elif self._chat == "paper":
                answer = re.sub(rf"\A{SPECIAL}", "", answer)  # masked with the swallowed newline
            if self._chat == "paper":
                answer = re.sub(rf"\s*{SPECIAL}\s*", r"\1", answer)
            for token in self._tokens.values():  # some take the white space beside them
                form = r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip
                answer = re.sub(form, lambda _, text=token.content: text, answer)
            texts.append(answer + "\n" * (self._chat == "open_instruct" and not is_last))
        return "".join(texts).replace("\u2581", " ")


def _difference(
    case: str, what: str, ours: Sequence, theirs: Sequence, named: Callable
) -> Difference:
    shorter = min(len(ours), len(theirs))
    at = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
    sides = [[named(entry) for entry in side[: at + SHOWN_BEHIND]] for side in (ours, theirs)]
    return Difference(case=case, what=what, at=at, ours=sides[0], theirs=sides[1])
