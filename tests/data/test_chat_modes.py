"""Each chat mode against what it is named after, by an encoder that shares no code with ours.

`slow_ids` does what the slow Llama tokenizers did: split the text at the special tokens, and give
each stretch between them to the `sentencepiece` library. With `strip`, white space on both sides of
a special token goes first, as in transformers 4.31, which the TÜLU 2 trainer ran on.

What is trained is held against the originals' rule, `original_rule`, which counts ids of prefixes.

`reference_vectors/sft_encoding.jsonl`, the outputs of open-instruct of November 2023, is mode
`open_instruct` to the last label. `easylm_labels` there differ from `labels` at position 0 alone,
where it labels BOS, which no shifted example has among its targets. `spec` has the same ids and
trains the same but for 29871 13, the newline after an inner `</s>`.
"""

import itertools
import json
import re

import hypothesis
import numpy as np
import pytest
import sentencepiece
from encoded_chats import encode_conversation
from hypothesis import strategies as st

from tulu_jax.data import chat
from tulu_jax.interop import tokenizer_export

SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}


@pytest.fixture(scope="module")
def model_file(shared_data) -> str:
    return str(shared_data / "tokenizer" / "llama2" / "tokenizer.model")


@pytest.fixture(scope="module")
def llama2(model_file) -> chat.ChatTokenizer:
    return chat.load_tokenizer(model_file)


@pytest.fixture(scope="module")
def pieces(model_file) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=model_file)


@pytest.fixture(scope="module")
def real_chats(shared_data) -> list[list[dict]]:
    """ShareGPT conversations of up to 244 turns, every path through the Open Assistant trees, and
    both sides of multi-turn pairs, as the files have them."""
    raw = shared_data / "instruct_raw"
    found = []
    for name in ("vicuna_sample_230629", "gpt4_final_data_sample_230629"):
        rows = json.loads((raw / "sharegpt" / f"{name}.json").read_text())
        found += [sharegpt(row["conversations"]) for row in rows]
    for line in (raw / "oasst1" / "en_100_tree.jsonl").read_text().splitlines():
        found += paths(json.loads(line)["prompt"])
    pairs = shared_data / "preference_raw" / "sharegpt_pairs" / "dpo_en_demo.json"
    for row in json.loads(pairs.read_text()):
        found += [sharegpt(row["conversations"] + [row[side]]) for side in ("chosen", "rejected")]
    assert sum(len(messages) > 2 for messages in found) > 100
    return found


def sharegpt(turns: list[dict]) -> list[dict]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles.get(t["from"], t["from"]), "content": t["value"]} for t in turns]


def paths(node: dict) -> list[list[dict]]:
    """The conversation from this message to each leaf below it."""
    role = {"prompter": "user"}.get(node["role"], node["role"])
    own = [{"role": role, "content": node["text"]}]
    below = [path for reply in node["replies"] for path in paths(reply)]
    return [own + path for path in below] or [own]


def slow_ids(text: str, pieces, *, strip: bool) -> list[int]:
    parts = re.split("(<s>|</s>|<unk>)", text)
    if strip:
        for index, part in enumerate(parts):
            if part in SPECIAL:
                parts[index - 1] = parts[index - 1].rstrip()
                parts[index + 1] = parts[index + 1].lstrip()
    ids = []
    for part in parts:
        ids += [SPECIAL[part]] if part in SPECIAL else pieces.encode(part)
    return ids


def untrimmed(messages: list[dict]) -> str:
    text = ""
    for message in messages:
        eos = "</s>" if message["role"] == "assistant" else ""
        text += "<|" + message["role"] + "|>\n" + message["content"].strip() + eos + "\n"
    return text


def template(messages: list[dict]) -> str:
    """The text as the original wrote it: BOS as text, one message after the other, stripped."""
    return "<s>" + untrimmed(messages).strip()


def original_rule(messages: list[dict], encode, *, max_seq_length: int) -> list[bool]:
    """Which ids of a conversation, BOS first, the originals train, by their rule in our words.

    Each run of non-assistant text is masked from the number of ids of all text before it, to the
    number of ids of all text up to its end and a following assistant header, BOS counted on top.
    """

    def count(part: str) -> int:
        return min(len(encode(part)), max_seq_length)

    trains = [True] * min(len(encode(template(messages))), max_seq_length)
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            continue
        before_an_answer = [m["role"] for m in messages[place + 1 : place + 2]] == ["assistant"]
        start = count(untrimmed(messages[:place]))
        stop = count(untrimmed(messages[: place + 1]) + "<|assistant|>\n" * before_an_answer)
        for index in range(start + 1, min(stop + 1, len(trains))):
            trains[index] = False
    return trains


def assert_trained_as_the_originals(conversation, llama2, pieces, max_seq_length=1 << 20):
    """`max_seq_length` counts ids before the shift, `max_length` those behind it."""
    for mode in ("paper", "open_instruct"):
        theirs = original_rule(
            conversation,
            lambda text, strip=mode == "paper": slow_ids(text, pieces, strip=strip),
            max_seq_length=max_seq_length,
        )
        ours = encode_conversation(conversation, llama2, chat=mode, max_length=max_seq_length - 1)
        assert ours.loss_mask.tolist() == theirs[1:], mode


def assert_as_the_slow_encoder(conversation, llama2, pieces):
    for mode in chat.MODES:
        (ours,) = chat.tokenize([conversation], tokenizer=llama2, chat=mode, names=["t/0"])
        theirs = slow_ids(template(conversation), pieces, strip=mode == "paper")
        assert ours.ids.tolist() == theirs, mode


SOME, ALL = 6, pytest.param(1, marks=pytest.mark.slow)  # every sixth conversation, or each


@pytest.mark.parametrize("every", [SOME, ALL])
def test_real_conversations_as_the_slow_encoder(real_chats, llama2, pieces, every):
    for conversation in real_chats[::every]:
        assert_as_the_slow_encoder(conversation, llama2, pieces)


def test_paper_swallows_the_newline_and_spec_keeps_it(real_chats, llama2):
    """The table of the four tokenizers: 2 529 in the trainer, 2 29871 13 29966 in a fast one."""
    conversation = next(messages for messages in real_chats if len(messages) > 2)
    behind = {}
    for mode in ("paper", "spec"):
        (row,) = chat.tokenize([conversation], tokenizer=llama2, chat=mode, names=["t/0"])
        ids = row.ids.tolist()
        behind[mode] = ids[ids.index(2) : ids.index(2) + 4]
    assert behind["paper"][:2] == [2, 529] and behind["spec"] == [2, 29871, 13, 29966]


FRAGMENTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        ["</s>", "<s>", "<unk>", " </s> ", "\n", "\r\n", "\u2028", "\x85", "\u2581", "  ", "💡"]
        + ["<|user|>\n", "<|assistant|>", "{{ x }}", "é", "e\u0301", "\x00", "東京", "< s>", "<s"]
    ),
)
CHATS = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant"]),
            "content": st.lists(FRAGMENTS, max_size=6).map("".join),
        }
    ),
    min_size=1,
    max_size=6,
)


@hypothesis.settings(deadline=None, max_examples=80)
@hypothesis.given(CHATS)
def test_drawn_conversations_as_the_slow_encoder(llama2, pieces, conversation):
    assert_as_the_slow_encoder(conversation, llama2, pieces)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_every_order_of_roles_is_trained_as_the_originals(llama2, pieces, length):
    """The assistant first, twice in a row, alone, last or not; empty answers; typed specials."""
    for roles in itertools.product(["system", "user", "assistant"], repeat=length):
        for content in ("Hi there", "", "</s> x", "<s>"):
            conversation = [{"role": role, "content": content} for role in roles]
            assert_trained_as_the_originals(conversation, llama2, pieces)


def test_the_header_of_a_first_assistant_turn(llama2):
    """`<|assistant|>` LF where nothing that is masked stands before it; `spec` masks it."""
    conversation = [
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Yes"},
        {"role": "assistant", "content": "So"},
    ]
    header = llama2.encode("<|assistant|>\n")
    for mode, trained in (("spec", 0), ("paper", len(header)), ("open_instruct", len(header))):
        encoded = encode_conversation(conversation, llama2, chat=mode)
        assert encoded.targets[: len(header)].tolist() == header
        assert encoded.loss_mask[: len(header)].sum() == trained


@hypothesis.settings(deadline=None, max_examples=80)
@hypothesis.given(CHATS, st.integers(2, 60))
def test_drawn_conversations_are_trained_as_the_originals(llama2, pieces, conversation, length):
    assert_trained_as_the_originals(conversation, llama2, pieces)
    assert_trained_as_the_originals(conversation, llama2, pieces, max_seq_length=length)


@pytest.mark.parametrize("every", [SOME, ALL])
def test_real_conversations_are_trained_as_the_originals(real_chats, llama2, pieces, every):
    for conversation in real_chats[::every]:
        if len(conversation) < 12:  # the rule encodes a text once for each of its turns
            assert_trained_as_the_originals(conversation, llama2, pieces)


def test_a_pair_trains_its_last_turn_as_the_original(llama2):
    """EasyLM's preference rows: all before the last message is masked, and its header with it."""
    answer = [{"role": "assistant", "content": "So"}]
    for prompt, first in (([], 0), (answer, None), ([{"role": "user", "content": "Hi"}], None)):
        for mode in ("paper", "open_instruct"):
            pair = {"prompt": prompt, "chosen": answer, "rejected": answer}
            ((chosen, _),) = chat.tokenize_pairs([pair], tokenizer=llama2, chat=mode, names=["t/0"])
            ((start, stop),) = chosen.spans.tolist()
            assert stop == len(chosen.ids) - 1
            assert start == (first if first is not None else stop - 2)


def test_reference_vectors_are_open_instruct(llama2, shared_data):
    lines = (shared_data / "reference_vectors" / "sft_encoding.jsonl").read_text().splitlines()
    assert lines
    for row in map(json.loads, lines):
        ours = encode_conversation(row["messages"], llama2, chat="open_instruct")
        assert [1, *ours.targets.tolist()] == row["input_ids"]
        labels = np.where(ours.loss_mask, ours.targets, -100).tolist()
        assert labels == row["labels"][1:] == row["easylm_labels"][1:]
        assert (row["labels"][0], row["easylm_labels"][0]) == (-100, 1)


def test_spec_differs_from_open_instruct_in_the_trained_newline_alone(real_chats, llama2):
    inner = 0
    for conversation in real_chats:
        spec, original = (
            encode_conversation(conversation, llama2, chat=mode)
            for mode in ("spec", "open_instruct")
        )
        assert np.array_equal(spec.targets, original.targets)
        assert not (spec.loss_mask & ~original.loss_mask).any()
        more = np.flatnonzero(original.loss_mask & ~spec.loss_mask).tolist()
        assert spec.targets[more].tolist() == [29871, 13] * (len(more) // 2)
        assert all(spec.tokens[at] == 2 for at in more[::2])
        inner += len(more) // 2
    assert inner > 100


@pytest.mark.parametrize("mode", chat.MODES)
def test_saved_template_of_each_mode(llama2, real_chats, tmp_path, mode):
    """`AutoTokenizer` opens what we export, and `apply_chat_template` gives our ids."""
    transformers = pytest.importorskip("transformers")
    tokenizer_export.save(llama2.backend, str(tmp_path), max_length=None, mode=mode)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs.is_fast
    rows = chat.tokenize(real_chats, tokenizer=llama2, chat=mode, names=["-"] * len(real_chats))
    for conversation, row in zip(real_chats, rows, strict=True):
        assert theirs.apply_chat_template(conversation, return_dict=False) == row.ids.tolist()
        prompt = conversation[:-1]
        asked = theirs.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert asked == chat.generation_prompt(prompt, llama2, chat=mode)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(CHATS)
def test_saved_templates_on_drawn_conversations(exported, llama2, conversation):
    for mode, theirs in exported.items():
        (row,) = chat.tokenize([conversation], tokenizer=llama2, chat=mode, names=["t/0"])
        assert theirs.apply_chat_template(conversation, return_dict=False) == row.ids.tolist()


@pytest.fixture(scope="module")
def exported(llama2, tmp_path_factory) -> dict:
    """A transformers tokenizer of each mode."""
    transformers = pytest.importorskip("transformers")
    opened = {}
    for mode in chat.MODES:
        folder = str(tmp_path_factory.mktemp(mode))
        tokenizer_export.save(llama2.backend, folder, max_length=None, mode=mode)
        opened[mode] = transformers.AutoTokenizer.from_pretrained(folder)
    return opened
