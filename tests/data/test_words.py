"""Ids by words are the library's ids, and cuts are where the library's offsets say."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from tulu_jax.data import chat, examples, registry, words


@pytest.fixture(scope="module")
def llama2(shared_data) -> chat.ChatTokenizer:
    return chat.load_tokenizer(str(shared_data / "tokenizer" / "llama2"))


def changed(backend, change) -> tokenizers.Tokenizer:
    settings = json.loads(backend.to_str())
    change(settings)
    return tokenizers.Tokenizer.from_str(json.dumps(settings))


def test_llama_allows_it_and_byte_level_bpe_does_not(llama2, tokenizer, shared_data):
    assert llama2.words is not None and tokenizer.words is None
    tok512 = str(shared_data / "models" / "stories260K" / "tok512.model")
    assert chat.load_tokenizer(tok512).words is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(normalizer=s["normalizer"]["normalizers"][1]),
        lambda s: s.update(pre_tokenizer={"type": "Whitespace"}),
        lambda s: s["model"]["vocab"].update({"a▁b": 31999}),
        lambda s: s["model"]["vocab"].update({"a\n": 31999}),
        lambda s: s["added_tokens"][1].update(lstrip=True),
    ],
)
def test_a_tokenizer_for_which_words_do_not_stand_alone(llama2, change):
    assert not words.allows(changed(llama2.backend, change))


PARTS = [*"ab Z▁\n\t\r .,0東é💡\x00\u00a0", "</s>", "<s>", "  ", "<0x0A>", "word"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@hypothesis.settings(deadline=None, max_examples=400)
@hypothesis.given(st.lists(TEXTS | st.text(st.characters(exclude_categories=["Cs"])), max_size=4))
def test_ids_are_the_library_s(llama2, texts):
    encoded = words.Words(llama2.backend).encode(texts, [[]] * len(texts))
    expected = llama2.backend.encode_batch(texts, add_special_tokens=False)
    assert [ids.tolist() for ids, _ in encoded] == [e.ids for e in expected]


CONTENTS = TEXTS | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
CHATS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": CONTENTS}
    ),
    min_size=1,
    max_size=6,
)


def assert_same(conversations, llama2, mode) -> None:
    options = {"chat": mode, "names": ["t/0"] * len(conversations)}
    by_offsets = dataclasses.replace(llama2, words=None)
    ours = chat.tokenize(conversations, tokenizer=llama2, **options)
    theirs = chat.tokenize(conversations, tokenizer=by_offsets, **options)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.spans, b.spans)


@pytest.mark.parametrize("mode", chat.MODES)
@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(conversation=CHATS)
def test_chats_are_as_by_offsets(llama2, mode, conversation):
    assert_same([conversation], llama2, mode)


@pytest.fixture(scope="module")
def with_added_tokens(llama2) -> chat.ChatTokenizer:
    """Ones that stand in the contents, in the tags and at their borders."""
    backend = tokenizers.Tokenizer.from_str(llama2.backend.to_str())
    texts = ("word", "b ", "<|assistant|>", "|>")
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in texts])
    assert words.allows(backend)
    return dataclasses.replace(llama2, backend=backend, words=words.Words(backend))


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(conversation=CHATS, mode=st.sampled_from(chat.MODES))
def test_chats_with_added_tokens_are_as_by_offsets(with_added_tokens, conversation, mode):
    assert_same([conversation], with_added_tokens, mode)


@pytest.mark.parametrize("mode", chat.MODES)
def test_real_rows_are_as_by_offsets(llama2, shared_data, mode):
    conversations = []
    for component in registry.components("real_small_sft"):
        drawing = examples.Drawing(
            split="train", amount=None, seed=0, holdout_every=None, data_root=str(shared_data)
        )
        loaded = examples.load_examples(component.task, drawing)
        conversations += [example["messages"] for example in loaded.examples]
    assert_same(conversations, llama2, mode)


def test_cuts(llama2):
    text = "ab cd\nef</s>\nx"
    ((ids, at),) = llama2.words.encode([text], [[0, 6, 8, 12, 13, 14]])
    pieces = [llama2.backend.id_to_token(int(i)) for i in ids]
    assert pieces == ["▁ab", "▁cd", "<0x0A>", "ef", "</s>", "▁", "<0x0A>", "x"]
    assert at == [0, 3, 4, 5, 7, 8]
    for cut in (1, 3, 10):
        with pytest.raises(ValueError, match=rf"character {cut} of"):
            llama2.words.encode([text], [[cut]])


def test_words_are_kept_up_to_a_bound(llama2, monkeypatch):
    monkeypatch.setattr(words, "MOST_KEPT", 10)
    encoder = words.Words(llama2.backend)
    for start in range(0, 100, 10):
        text = " ".join(f"word{i}" for i in range(start, start + 10)) + " " + "x" * 100
        ((ids, _),) = encoder.encode([text], [[]])
        assert ids.tolist() == llama2.encode(text)
        assert len(encoder._known) <= 20
