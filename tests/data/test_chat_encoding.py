"""Text, ids and mask of conversations, literally; and the same through `transformers`."""

import json

import hypothesis
import numpy as np
import pytest
from encoded_chats import encode_conversation
from hypothesis import strategies as st

from tulu_jax.data import chat
from tulu_jax.interop import tokenizer_export

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi "},
    {"role": "assistant", "content": "Hello!\n"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Goodbye."},
]
TEXT = (
    "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello!</s>\n"
    "<|user|>\nBye\n<|assistant|>\nGoodbye.</s>"
)
# (token, target, piece of the target, trained): the Llama-2 tokenizer.
LLAMA2_TABLE = [
    (1, 529, "▁<", 0),
    (529, 29989, "|", 0),
    (29989, 5205, "system", 0),
    (5205, 29989, "|", 0),
    (29989, 29958, ">", 0),
    (29958, 13, "<0x0A>", 0),
    (13, 3629, "Be", 0),
    (3629, 11473, "▁brief", 0),
    (11473, 29889, ".", 0),
    (29889, 13, "<0x0A>", 0),
    (13, 29966, "<", 0),
    (29966, 29989, "|", 0),
    (29989, 1792, "user", 0),
    (1792, 29989, "|", 0),
    (29989, 29958, ">", 0),
    (29958, 13, "<0x0A>", 0),
    (13, 18567, "Hi", 0),
    (18567, 13, "<0x0A>", 0),
    (13, 29966, "<", 0),
    (29966, 29989, "|", 0),
    (29989, 465, "ass", 0),
    (465, 22137, "istant", 0),
    (22137, 29989, "|", 0),
    (29989, 29958, ">", 0),
    (29958, 13, "<0x0A>", 0),
    (13, 10994, "Hello", 1),
    (10994, 29991, "!", 1),
    (29991, 2, "</s>", 1),
    (2, 29871, "▁", 0),
    (29871, 13, "<0x0A>", 0),
    (13, 29966, "<", 0),
    (29966, 29989, "|", 0),
    (29989, 1792, "user", 0),
    (1792, 29989, "|", 0),
    (29989, 29958, ">", 0),
    (29958, 13, "<0x0A>", 0),
    (13, 2059, "By", 0),
    (2059, 29872, "e", 0),
    (29872, 13, "<0x0A>", 0),
    (13, 29966, "<", 0),
    (29966, 29989, "|", 0),
    (29989, 465, "ass", 0),
    (465, 22137, "istant", 0),
    (22137, 29989, "|", 0),
    (29989, 29958, ">", 0),
    (29958, 13, "<0x0A>", 0),
    (13, 18420, "Good", 1),
    (18420, 26966, "bye", 1),
    (26966, 29889, ".", 1),
    (29889, 2, "</s>", 1),
]
# (target, trained) of a two-turn dialogue: the tokenizer trained on tulu_tiny; Ċ is LF, Ġ a space.
TINY_TABLE = [
    ("<|", 0), ("user", 0), ("|>", 0), ("Ċ", 0),
    ("Say", 0), (":", 0), ("Ġhen", 0), ("Ġfox", 0), ("Ċ", 0),
    ("<|", 0), ("assistant", 0), ("|>", 0), ("Ċ", 0),
    ("hen", 1), ("Ġfox", 1), ("</s>", 1), ("Ċ", 0),
    ("<|", 0), ("user", 0), ("|>", 0), ("Ċ", 0),
    ("Kind", 0), (":", 0), ("Ġred", 0), ("Ċ", 0),
    ("<|", 0), ("assistant", 0), ("|>", 0), ("Ċ", 0),
    ("Sure", 1), (":", 1), ("Ġcolour", 1), (".", 1), ("</s>", 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def llama2(shared_data) -> chat.ChatTokenizer:
    return chat.load_tokenizer(str(shared_data / "tokenizer" / "llama2" / "tokenizer.model"))


def test_text_and_turns():
    rendered = chat.render(CONVERSATION, chat="spec")
    assert rendered.text == TEXT
    contents = [TEXT[turn.start : turn.content_end] for turn in rendered.turns]
    assert contents == ["Hello!", "Goodbye."]
    assert all(TEXT[turn.content_end : turn.end] == "</s>" for turn in rendered.turns)


def test_llama2_ids_and_mask_side_by_side(llama2):
    encoded = encode_conversation(CONVERSATION, llama2, chat="spec")
    pieces = [llama2.backend.id_to_token(int(i)) for i in encoded.targets]
    columns = (encoded.tokens.tolist(), encoded.targets.tolist(), pieces, encoded.loss_mask)
    assert [(*row[:3], int(row[3])) for row in zip(*columns, strict=True)] == LLAMA2_TABLE


def test_trained_tokenizer_mask_side_by_side(tokenizer):
    texts = ("Say: hen fox", "hen fox", "Kind: red", "Sure: colour.")
    conversation = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
    encoded = encode_conversation(conversation, tokenizer, chat="spec")
    pieces = [tokenizer.backend.id_to_token(int(i)) for i in encoded.targets]
    assert list(zip(pieces, encoded.loss_mask.astype(int).tolist(), strict=True)) == TINY_TABLE
    assert encoded.tokens[0] == tokenizer.bos_id == 1


def test_llama2_ids_of_the_reference(llama2):
    """Ids of Llama-2's SentencePiece model; a classic fast tokenizer keeps the newline."""
    assert llama2.encode("<|user|>\n") == [529, 29989, 1792, 29989, 29958, 13]
    assert llama2.encode("\n<|assistant|>\n")[2:] == [29966, 29989, 465, 22137, 29989, 29958, 13]
    assert llama2.encode("<|system|>\n") == [529, 29989, 5205, 29989, 29958, 13]
    assert llama2.encode("</s>\n<|user|>")[:4] == [2, 29871, 13, 29966]
    assert [llama2.bos_id, *llama2.encode("Hello world")] == [1, 15043, 3186]
    assert llama2.vocab_size == 32000


def test_equals_the_original_encoder(llama2, shared_data):
    """Ids of open-instruct of November 2023; its labels also train 29871 13 after `</s>`."""
    lines = (shared_data / "reference_vectors" / "sft_encoding.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        encoded = encode_conversation(row["messages"], llama2, chat="spec")
        assert [1, *encoded.targets.tolist()] == row["input_ids"]
        theirs = np.array(row["labels"][1:]) != -100
        differ = encoded.targets[theirs != encoded.loss_mask]
        assert set(differ.tolist()) <= {29871, 13}
        assert (theirs | ~encoded.loss_mask).all()


def test_every_assistant_turn_is_trained_and_nothing_else(tokenizer):
    """Not the first only (EasyDeL#255), and not the generation prompt (maxtext#3284)."""
    encoded = encode_conversation(CONVERSATION, tokenizer, chat="spec")
    trained = tokenizer.decode(encoded.targets[encoded.loss_mask], skip_special=False)
    assert trained == "Hello!</s>Goodbye.</s>"


CONTENTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
CHATS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": CONTENTS}
    ),
    min_size=1,
    max_size=5,
)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(CHATS)
def test_trained_ids_are_contents_and_eos(tokenizer, conversation):
    contents = [m["content"].strip() for m in conversation if m["role"] == "assistant"]
    hypothesis.assume(not any("<s>" in text or "<unk>" in text for text in contents))
    encoded = encode_conversation(conversation, tokenizer, chat="spec")
    trained = encoded.targets[encoded.loss_mask]
    text = tokenizer.decode(trained, skip_special=False)
    assert text == "".join(content + "</s>" for content in contents)
    np.testing.assert_array_equal(encoded.tokens[1:], encoded.targets[:-1])


@pytest.mark.parametrize(
    "content", ["", "</s>", "a</s>b", "<s>", "\u200b", "é\u0301", "💡", "\x00"]
)
def test_adversarial_contents_are_masked_exactly(tokenizer, llama2, content):
    conversation = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    for tok in (tokenizer, llama2):
        encoded = encode_conversation(conversation, tok, chat="spec")
        trained = encoded.targets[encoded.loss_mask]
        assert trained[-1] == tok.eos_id
        assert len(trained) == 1 + len(tok.encode("\n" + content)) - len(tok.encode("\n"))


BORDERS = ["\n", "\n\n", " ", "</s>", "<s>", "a", "é", "\r", "\t", "<|assistant|>\n"]
BESIDE_BORDERS = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant"]),
            "content": st.lists(st.sampled_from(BORDERS), max_size=6).map("".join),
        }
    ),
    min_size=1,
    max_size=5,
)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(BESIDE_BORDERS, st.sampled_from(chat.MODES))
def test_counted_borders_are_the_places_in_the_text(tokenizer, llama2, conversation, mode):
    for tok in (tokenizer, llama2):
        for messages, is_plain in ((conversation, False), (CONVERSATION, True)):
            rendered = chat.render(messages, chat=mode)
            encoding = tok.backend.encode(rendered.text, add_special_tokens=False)
            ids = np.array([tok.bos_id, *encoding.ids], np.int32)
            counted = chat._counted_borders(rendered, ids, tok)
            if is_plain:
                assert counted is not None
            if counted is not None:
                assert counted == [
                    chat._turn_borders(turn, encoding, ids, tok.eos_id, "of the test")
                    for turn in rendered.turns
                ]


def test_generation_prompt_is_the_start_of_the_training_ids(tokenizer, llama2):
    for tok in (tokenizer, llama2):
        prompt = chat.generation_prompt(CONVERSATION[:-1], tok, chat="spec")
        encoded = encode_conversation(CONVERSATION, tok, chat="spec")
        assert prompt == encoded.tokens[: len(prompt)].tolist()
        assert encoded.loss_mask[len(prompt) - 1] and not encoded.loss_mask[len(prompt) - 2]


def test_pair_trains_the_final_turn_after_identical_prompts(tokenizer):
    pair = {
        "prompt": CONVERSATION[:4],
        "chosen": [{"role": "assistant", "content": "Sure: Goodbye."}],
        "rejected": [{"role": "assistant", "content": "Goodbye."}],
    }
    (both,) = chat.tokenize_pairs([pair], tokenizer=tokenizer, chat="spec", names=["t/0"])
    assert chat.same_prompt(*both)
    chosen, rejected = map(chat.shift, both)
    sides = [
        tokenizer.decode(s.targets[s.loss_mask], skip_special=False) for s in (chosen, rejected)
    ]
    assert sides == ["Sure: Goodbye.</s>", "Goodbye.</s>"]
    starts = [int(np.argmax(side.loss_mask)) for side in (chosen, rejected)]
    assert starts[0] == starts[1]
    np.testing.assert_array_equal(chosen.tokens[: starts[0] + 1], rejected.tokens[: starts[0] + 1])


def test_pair_with_different_prompts_is_found(tokenizer):
    pair = {
        "prompt": CONVERSATION[:2],
        "chosen": CONVERSATION[2:],
        "rejected": [CONVERSATION[2], {"role": "user", "content": "Go"}, CONVERSATION[4]],
    }
    (both,) = chat.tokenize_pairs([pair], tokenizer=tokenizer, chat="spec", names=["t/7"])
    assert not chat.same_prompt(*both)


CHAT_CASES = [
    CONVERSATION,
    CONVERSATION[1:3],
    CONVERSATION[:4],
    CONVERSATION[:1] + CONVERSATION[1:2],
    [{"role": "system", "content": ""}, *CONVERSATION[1:3]],
    [{"role": "user", "content": " \n "}, {"role": "assistant", "content": ""}],
    [{"role": "user", "content": "{{ bos_token }} {% x %}</s>"}, CONVERSATION[2]],
    [{"role": "user", "content": "naïve 💡\r\n\ttab  two"}, {"role": "assistant", "content": "é"}],
]


def test_transformers_chat_template_gives_our_ids(tokenizer, llama2, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, ours in (("tulu_tiny", tokenizer), ("llama2", llama2)):
        folder = str(tmp_path / name)
        tokenizer_export.save(ours.backend, folder, max_length=4096, mode="spec")
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for conversation in CHAT_CASES:
            text = theirs.apply_chat_template(conversation, tokenize=False)
            assert text == "<s>" + chat.render(conversation, chat="spec").text
            ids = theirs.apply_chat_template(conversation, return_dict=False)
            (row,) = chat.tokenize([conversation], tokenizer=ours, chat="spec", names=["t/0"])
            assert ids == row.ids.tolist()
            prompt = theirs.apply_chat_template(
                conversation, add_generation_prompt=True, return_dict=False
            )
            assert prompt == chat.generation_prompt(conversation, ours, chat="spec")
        with pytest.raises(Exception, match="unknown role tool"):
            theirs.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], r"row t/3: found messages \[\]; expected a non-empty list"),
        ([{"role": "tool", "content": "x"}], r"row t/3, message 0: unknown role 'tool'"),
        ([{"role": "user"}], r"row t/3, message 0: found .*expected 'role' and 'content'"),
        ([{"role": "user", "content": 3}], r"row t/3, message 0: content is a int"),
        ([{"role": "user", "content": "a\ud800"}], r"row t/3, message 0: content is not valid"),
    ],
)
def test_malformed_messages_name_the_row(tokenizer, conversation, message):
    with pytest.raises(ValueError, match=message):
        encode_conversation(conversation, tokenizer, chat="spec", name="t/3")


def test_a_mode_that_does_not_exist(tokenizer):
    with pytest.raises(
        ValueError, match=r"chat = 'papers': expected one of .*did you mean 'paper'"
    ):
        encode_conversation(CONVERSATION, tokenizer, chat="papers")
