"""The encoder on chats that nobody would write: examples, or a `ValueError`, and no row lost."""

import dataclasses
import functools
import tempfile

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st
from raw_rows import identity, messages, pair

from tulu_jax.data import cache_files, chat, encode, examples, packing, registry, store, truncation

PIECES = st.sampled_from(
    ["<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>\n", "\n", " ", "\t", "\r\n", "▁", "\x00"]
    + [
        "\x85",
        "\u2028",
        "\ufeff",
        "\u200b",
        "\u0301",
        "é",
        "東京",
        "💡",
        "word",
        " two words",
        "b ",
    ]
)
UNICODE = st.characters(exclude_categories=["Cs"])
GOOD = st.lists(PIECES | st.text(UNICODE, max_size=6), max_size=6).map("".join)
ANY_TEXT = st.text(st.characters(), max_size=8)  # lone surrogates too
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
ROLES = st.sampled_from(["system", "user", "assistant"])
GOOD_MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": GOOD})
ODD_MESSAGE = st.fixed_dictionaries(
    {"role": ROLES | ANY_JSON, "content": GOOD | ANY_JSON}, optional={"name": ANY_JSON}
)
GOOD_CHAT = st.lists(GOOD_MESSAGE, min_size=1, max_size=7)
ANSWER = GOOD.map(lambda text: {"role": "assistant", "content": text})


@st.composite
def good_pairs(draw) -> dict:
    """The sides may go through further turns, equal up to their last."""
    shared = draw(st.lists(GOOD_MESSAGE, max_size=2))
    return {
        "prompt": draw(GOOD_CHAT),
        "chosen": [*shared, draw(ANSWER)],
        "rejected": [*shared, draw(ANSWER)],
    }


@functools.cache
def llama2(folder: str) -> chat.ChatTokenizer:
    return chat.load_tokenizer(folder)


@functools.cache
def with_added_tokens(folder: str) -> chat.ChatTokenizer:
    """Llama-2's, with tokens that stand in the contents, in the tags and at their borders."""
    backend = tokenizers.Tokenizer.from_str(llama2(folder).backend.to_str())
    texts = ("word", "b ", "<|assistant|>", "|>")
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in texts])
    size = backend.get_vocab_size()
    return dataclasses.replace(llama2(folder), backend=backend, vocab_size=size)


@pytest.fixture(params=["tulu_tiny", "llama2"])
def either(request, tokenizer) -> chat.ChatTokenizer:
    """The byte-level BPE of tulu_tiny, then Llama-2's where it is present."""
    if request.param == "tulu_tiny":
        return tokenizer
    folder = str(request.getfixturevalue("shared_data") / "tokenizer" / "llama2")
    return llama2(folder) if request.param == "llama2" else with_added_tokens(folder)


def task_of(kind: str, rows: list) -> registry.Task:
    return registry.Task(
        name="fuzz",
        kind=kind,
        sources={"train": lambda: rows},
        convert=identity,
        licence="-",
        origin="-",
    )


DRAWING = examples.Drawing(split="train", amount=None, seed=0, holdout_every=None, data_root=None)
FUZZ = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("either", ["tulu_tiny", "llama2", "added tokens"], indirect=True)
@pytest.mark.parametrize("mode", chat.MODES)
@hypothesis.settings(FUZZ, max_examples=60)
@hypothesis.given(conversation=GOOD_CHAT)
def test_any_unicode_is_encoded_with_the_answers_trained(either, mode, conversation):
    rendered = chat.render(conversation, chat=mode)
    (ids,) = chat.tokenize([conversation], tokenizer=either, chat=mode, names=["r"])
    encoded = chat.shift(ids)
    assert encoded.tokens[0] == either.bos_id
    assert (encoded.tokens[1:] == encoded.targets[:-1]).all()
    assert either.encode(rendered.text) == encoded.targets.tolist()
    answers = [message for message in conversation if message["role"] == "assistant"]
    assert len(rendered.turns) == len(ids.spans) == len(answers)
    assert encoded.loss_mask.sum() == sum(stop - start for start, stop in ids.spans)
    for (start, stop), turn, answer in zip(ids.spans, rendered.turns, answers, strict=True):
        content = rendered.text[turn.start : turn.content_end]
        assert content == answer["content"].strip() or mode == "paper"
        assert rendered.text[turn.content_end : turn.end] == chat.EOS
        trained = encoded.targets[start:stop].tolist()
        if not (mode == "paper" and rendered.text[turn.start - 1] != "\n"):
            assert either.eos_id in trained and (mode == "open_instruct" or trained[-1] == 2)


@pytest.mark.parametrize("mode", chat.MODES)
@pytest.mark.parametrize("rule", truncation.RULES)
@hypothesis.settings(FUZZ, max_examples=12)
@hypothesis.given(rows=st.lists(GOOD_CHAT, min_size=1, max_size=6), max_length=st.integers(2, 60))
def test_every_conversation_is_kept_or_counted(either, mode, rule, rows, max_length):
    check_counts("sft", [{"messages": row} for row in rows], either, mode, rule, max_length, False)


@pytest.mark.parametrize("mode", chat.MODES)
@pytest.mark.parametrize("rule", [rule for rule in truncation.RULES if rule != "split"])
@hypothesis.settings(FUZZ, max_examples=12)
@hypothesis.given(
    rows=st.lists(good_pairs(), min_size=1, max_size=5),
    max_length=st.integers(2, 60),
    one_row=st.booleans(),
)
def test_every_pair_is_kept_or_counted(either, mode, rule, rows, max_length, one_row):
    check_counts("preference", rows, either, mode, rule, max_length, one_row)


def check_counts(kind, rows, tokenizer, mode, rule, max_length, one_row) -> None:
    """Rows in are rows out and rows left out by a reason, and what is out fits and is trained."""
    encoding = encode.Encoding(
        tokenizer=tokenizer, chat=mode, max_length=max_length, truncation=rule, one_row=one_row
    )
    with tempfile.TemporaryDirectory() as cache:
        folder, counts = encode.encode_task(
            task_of(kind, rows), DRAWING, encoding=encoding, cache_dir=cache
        )
        assert counts.raw_rows == len(rows) and counts.not_drawn == 0
        dropped = sum(counts.dropped.values())
        assert counts.raw_rows + counts.added_parts == counts.examples + dropped
        assert counts.added_parts == 0 or rule == "split"
        aside = cache_files.aside(folder)
        assert len(aside) == dropped
        if not counts.examples:
            return
        kept = store.ExampleStore([folder], kind=kind, one_row=one_row)
        assert len(kept) == counts.examples and kept.lengths.max() <= max_length
        ids = [kept.name(i) for i in range(len(kept))] + [entry["id"] for entry in aside]
        assert len(set(ids)) == len(ids)
        assert {int(name.split("/")[1].split(".")[0]) for name in ids} == set(range(len(rows)))
        trained = 0
        for index in range(len(kept)):
            sides = kept.sides(index)
            for side, spans in sides:
                assert side[0] == tokenizer.bos_id and (spans[:, 1] <= len(side) - 1).all()
                masked = spans[:, 0] == spans[:, 1]  # only an empty answer, by the paper's rule
                assert (spans[:, 0] <= spans[:, 1]).all() and (mode == "paper" or not masked.any())
                trained += (spans[:, 1] - spans[:, 0]).sum()
            fill = packing.fill_pair_row if one_row else packing.fill_row
            row = fill([sides] if one_row else [sides[0]], capacity=max_length)
            assert row["loss_mask"].any()
        assert trained == counts.trained_tokens


def unwrapped(row: dict):
    return row["example"]


@pytest.mark.parametrize("kind", registry.KINDS)
@hypothesis.settings(FUZZ, max_examples=100)
@hypothesis.given(data=st.data())
def test_odd_rows_are_refused_by_their_id_or_encoded(tokenizer, kind, data):
    chats = st.lists(ODD_MESSAGE, max_size=4) | ANY_JSON
    keys = examples.KEYS[kind]
    example = st.fixed_dictionaries(dict.fromkeys(keys, chats), optional={"about": ANY_JSON})
    rows = [
        {"example": example}
        for example in data.draw(st.lists(example | ANY_JSON, min_size=1, max_size=3))
    ]
    task = dataclasses.replace(task_of(kind, rows), convert=unwrapped)
    encoding = encode.Encoding(
        tokenizer=tokenizer, chat="spec", max_length=40, truncation="cut", one_row=False
    )
    with tempfile.TemporaryDirectory() as cache:
        try:
            _, counts = encode.encode_task(task, DRAWING, encoding=encoding, cache_dir=cache)
        except ValueError as error:
            assert "row fuzz/" in str(error)
            str(error).encode()
        else:
            dropped = sum(counts.dropped.values())
            assert counts.examples + dropped == len(rows) + counts.added_parts


def test_an_answer_that_begins_as_a_special_token_is_counted(either):
    """In "paper" mode it swallows the newline before it, so that the prompts have other ids."""
    rows = [pair("q", "<s>a", "b"), pair("q", "a", "b")]
    encoding = encode.Encoding(
        tokenizer=either, chat="paper", max_length=40, truncation="cut", one_row=True
    )
    with tempfile.TemporaryDirectory() as cache:
        _, counts = encode.encode_task(
            task_of("preference", rows), DRAWING, encoding=encoding, cache_dir=cache
        )
    assert counts.dropped == {"prompts differ": 1} and counts.examples == 1


def test_every_bad_row_is_counted_and_the_first_are_named(tokenizer):
    rows = [{"messages": messages("q", "a")}] * 3 + [{"messages": [{"role": "user"}]}] * 9
    with pytest.raises(ValueError) as raised:
        examples.load_examples(task_of("sft", rows), DRAWING)
    assert "task 'fuzz': 9 of 12 rows are malformed" in str(raised.value)
    assert "row fuzz/3, message 0" in str(raised.value) and "and 4 more" in str(raised.value)


@pytest.mark.parametrize("rule", truncation.RULES)
def test_a_long_message(either, rule):
    check_long_message(either, rule, size=500_000)


@pytest.mark.slow
@pytest.mark.parametrize("rule", truncation.RULES)
def test_a_very_long_message(either, rule):
    """10 MB with Llama-2's tokenizer, the one such rows are for, and 1 MB with the small one."""
    check_long_message(either, rule, size=10_000_000 if either.vocab_size > 1000 else 1_000_000)


def check_long_message(tokenizer, rule, *, size: int) -> None:
    text = "The quick brown fox jumps over 13 lazy dogs. 東京 💡\n"
    rows = [
        {"messages": messages("q", text * (size // len(text.encode())))},
        {"messages": messages("q", "a")},
    ]
    check_counts("sft", rows, tokenizer, "spec", rule, 8192, False)
