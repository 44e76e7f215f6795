"""ShareGPT conversations: where they are split, what is left out, and what is counted."""

import hypothesis
import pytest
from hypothesis import strategies as st
from raw_rows import messages

from tulu_jax.data import registry
from tulu_jax.data.sources import sharegpt

Dropped = registry.Dropped
LOST = Dropped(sharegpt.LOST)


def row(*contents: str, senders: tuple[str, ...] = sharegpt.SENDERS, **more) -> dict:
    turns = [
        {"from": senders[index % len(senders)], "value": content}
        for index, content in enumerate(contents)
    ]
    return {"id": "c", "conversations": turns} | more


def split(given: dict, *, limit: int = 60, faithful: bool = True) -> list:
    """A text of n characters has n + 1 tokens, so a turn costs n + 7."""
    return sharegpt.split(given, limit=limit, count=lambda text: len(text) + 1, faithful=faithful)


def chunk(start: int, *contents: str) -> dict:
    return {"messages": messages(*contents), "about": {"id": f"c_{start}"}}


def test_pairs_fill_a_chunk_up_to_the_limit():
    texts = ["a" * 3] * 8  # a pair costs 20
    assert split(row(*texts[:6])) == [chunk(0, *texts[:6])]
    assert split(row(*texts), limit=59) == [chunk(0, *texts[:4]), chunk(4, *texts[4:])]


def test_the_last_pair_is_lost_if_it_begins_a_chunk_unless_told_otherwise():
    texts = ["a" * 3] * 8
    assert split(row(*texts)) == [chunk(0, *texts[:6]), LOST]
    assert split(row(*texts), faithful=False) == [chunk(0, *texts[:6]), chunk(6, *texts[6:])]


def test_a_pair_over_the_limit_is_left_out():
    long = "x" * 47  # with an empty answer, 61: one too many
    over = Dropped("pair of over 60 tokens")
    assert split(row("x" * 46, "")) == [chunk(0, "x" * 46, "")]
    assert split(row(long, "")) == [over]
    whole = [chunk(0, "a", "b"), over, chunk(4, "c", "d")]
    assert split(row("a", "b", long, "", "c", "d"), faithful=False) == whole
    assert split(row("a", "b", long, "", "c", "d")) == [chunk(0, "a", "b"), over, LOST]
    more = split(row("a", "b", long, "", "c", "d", "e", "f"))
    assert more == [chunk(0, "a", "b"), over, chunk(4, "c", "d", "e", "f")]


def test_odd_lengths():
    assert split(row("a", "b", "c")) == [chunk(0, "a", "b"), Dropped("odd last turn")]
    assert split(row("a")) == split(row()) == [Dropped("fewer than two turns")]


@pytest.mark.parametrize(
    ("senders", "reason"),
    [
        (("system", "gpt"), "chunk with a system turn"),
        (("human", "bing"), "chunk with a bing turn"),
        (("gpt", "human"), "chunk not from human and gpt in turn"),
        (("user", "chatgpt"), "chunk not from human and gpt in turn"),
        (("human", "function_call", "observation", "gpt"), "chunk not from human and gpt in turn"),
    ],
)
def test_chunks_with_other_senders_are_left_out(senders, reason):
    assert split(row("a", "b", "c", "d", senders=senders)) == [Dropped(reason)]


def test_the_other_chunks_of_a_conversation_are_kept():
    texts = ["a" * 20] * 6
    given = row(*texts)
    given["conversations"][3]["from"] = "bing"
    assert split(given, faithful=False) == [
        chunk(0, *texts[:2]),
        Dropped("chunk with a bing turn"),
        chunk(4, *texts[4:]),
    ]


def test_markup_in_a_text_is_text_and_that_of_the_page_is_not():
    texts = ["<p>What is &lt;br&gt;?</p>", "<div>A break.</div>\n```html\nCopy code<br>\n```"]
    assert split(row(*texts), limit=200) == [chunk(0, *texts)]
    raw = '\n<div class="markdown prose w-full break-words"><p>Hi</p></div>'
    assert split(row("a", raw, "b", "c"), limit=999) == [Dropped("markup of the shared page")]


def test_a_conversation_without_an_id_has_chunks_without_one():
    given = row("a", "b")
    del given["id"]
    assert split(given) == [{"messages": messages("a", "b")}]


@hypothesis.given(
    costs=st.lists(st.integers(1, 12), max_size=12),
    limit=st.integers(1, 15),
    faithful=st.booleans(),
)
def test_every_pair_is_in_one_range(costs, limit, faithful):
    ranges = sharegpt.cut(costs, limit=limit, faithful=faithful)
    assert [pair for pairs, _ in ranges for pair in pairs] == list(range(len(costs)))
    for pairs, reason in ranges:
        total = sum(costs[pair] for pair in pairs)
        if reason is None:
            assert pairs and total <= limit
        elif reason == sharegpt.LOST:
            assert faithful and pairs == range(len(costs) - 1, len(costs)) and total <= limit
        else:
            assert len(pairs) == 1 and total > limit


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"missing column 'conversations'; found \[\]"),
        ({"conversations": {"from": "human"}}, r"'conversations' is a dict; expected a list"),
        ({"conversations": ["a", "b"]}, r"'conversations' is a list of str; expected a list"),
        ({"conversations": [{"from": "human"}]}, r"missing column 'value'; found \['from'\]"),
        ({"conversations": [{"from": None, "value": "a"}]}, r"column 'from' is absent or null"),
        (row("a", "b\ud800"), r"column 'value' is not valid Unicode"),
        (row("a", "b", id="\ud800"), r"column 'id' is not valid Unicode"),
    ],
)
def test_what_is_no_conversation_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        split(given)


@pytest.fixture
def llama(shared_data, monkeypatch) -> str:
    folder = str(shared_data / "tokenizer/llama2")
    monkeypatch.setenv(sharegpt.TOKENIZER_VARIABLE, folder)
    return folder


def test_llama_tokens_count_bos(llama):
    assert sharegpt.llama_tokens("Hello world") == 3
    assert sharegpt.llama_tokens("") == 1


def test_recipes_split_at_their_limits(llama):
    turn = "word " * 900
    assert 1700 < 2 * (sharegpt.llama_tokens(turn) + 6) < 2048
    given = row(*[turn] * 8)
    starts = [
        [int(part["about"]["id"].split("_")[1]) for part in parts if not isinstance(part, Dropped)]
        for parts in (sharegpt.split_v1(given), sharegpt.split_v2(given))
    ]
    assert starts == [[0, 2, 4], [0, 4]]
    assert LOST in sharegpt.split_v1(given) and LOST not in sharegpt.split_v2(given)
    assert not any(isinstance(part, Dropped) for part in sharegpt.split_v2_whole(given))


def test_the_tokenizer_must_be_named_and_be_llamas(monkeypatch, tmp_path, shared_data):
    monkeypatch.delenv(sharegpt.TOKENIZER_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=r"set TULU_JAX_LLAMA_TOKENIZER to Llama's token"):
        sharegpt.split_v2(row("a", "b"))
    monkeypatch.setenv(sharegpt.TOKENIZER_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"tokenizer.model: no such file; set TULU_JAX"):
        sharegpt.split_v2(row("a", "b"))
    other = str(shared_data / "models/stories260K/tok512.model")
    monkeypatch.setenv(sharegpt.TOKENIZER_VARIABLE, other)
    with pytest.raises(FileNotFoundError, match=r"tok512.model: found another tokenizer"):
        sharegpt.split_v2(row("a", "b"))
