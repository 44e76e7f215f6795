"""Every instruction converter on rows that nobody would write: an answer or `ValueError`."""

import copy
import functools
import itertools
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from tulu_jax.data import examples, registry
from tulu_jax.data.sources import (
    conversations,
    flan,
    hard_coded,
    instruct,
    name_filter,
    oasst,
    orca,
    own,
    published,
    readers,
    science,
    sharegpt,
)

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}] * 3
TREE = {
    "message_tree_id": "t",
    "prompt": {
        "text": "q",
        "role": "prompter",
        "deleted": False,
        "labels": {"quality": {"value": 0.5, "count": 1}},
        "replies": [
            {
                "text": f"a{value}",
                "role": "assistant",
                "deleted": False,
                "labels": {"quality": {"value": value, "count": 1}},
                "replies": [{"text": "q2", "role": "prompter", "replies": []}],
            }
            for value in (0.25, 0.75)
        ],
    },
}
CONVERTERS = {  # converter, a row it takes
    "alpaca": (
        functools.partial(instruct.alpaca, seed=42),
        {"instruction": "i", "input": "c", "output": "o"},
    ),
    "dolly": (
        functools.partial(instruct.dolly, seed=42),
        {"instruction": "i", "context": "c", "response": "o", "category": "qa"},
    ),
    "lima": (conversations.lima, {"conversations": ["q", "a", "q"], "source": "s"}),
    "wizardlm": (conversations.wizardlm, {"idx": "1", "conversations": TURNS}),
    "flan": (flan.flan, {"inputs": "q", "targets": "a", "task": "t"}),
    "p3": (flan.p3, {"prompt": "q", "completion": "a", "template": "t"}),
    "cot_fields": (flan.cot_fields, {"fields": ["q", "a", "r"]}),
    "open_orca": (
        orca.open_orca,
        {"id": "1", "system_prompt": "", "question": "q", "response": "a"},
    ),
    "orca_preferred": (
        orca.preferred,
        {
            "input": {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                ]
            },
            "preferred_output": [{"role": "assistant", "content": "a"}],
        },
    ),
    "science": (science.science, {"dataset": "scierc_ner", "input": "q", "output": "a"}),
    "hard_coded": (
        functools.partial(hard_coded.hard_coded, repeat=10),
        {"Prompt": "q", "Output": "a"},
    ),
    "published": (
        published.published,
        {
            "dataset": "cot",
            "id": "cot_1",
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        },
    ),
    "own": (
        own.conversation,
        {"id": "1", "messages": [{"role": "user", "content": "q", "weight": 1}]},
    ),
    "own_sharegpt": (own.conversation, {"conversations": TURNS}),
    "best_path": (oasst.best_path, TREE),
    "leaf_paths": (oasst.leaf_paths, TREE),
    "sharegpt": (
        functools.partial(sharegpt.split, limit=40, count=len, faithful=True),
        {"id": "1", "conversations": TURNS},
    ),
    "sharegpt_whole": (
        functools.partial(sharegpt.split, limit=40, count=len, faithful=False),
        {"id": "1", "conversations": TURNS},
    ),
}

ANY_TEXT = st.text(st.characters(), max_size=8)  # lone surrogates and control characters too
NAMES = st.sampled_from(
    sorted({name for _, row in CONVERTERS.values() for name in row} | {"from", "value", "role"})
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT | NAMES, inner, max_size=3)
    ),
    max_leaves=8,
)


def check(name: str, row: dict) -> list | None:
    """The parts of a row, checked as a task's are; None for `ValueError`."""
    convert, _ = CONVERTERS[name]
    before = json.dumps(row)
    try:
        found = convert(row)
    except ValueError as error:
        assert str(error)
        return None
    assert json.dumps(row) == before and repr(convert(row)) == repr(found)
    parts = found if isinstance(found, list) else [found]
    assert parts
    for part in parts:
        if isinstance(part, registry.Dropped):
            assert part.reason
            continue
        assert set(part) <= {"messages", "about"}
        examples.check_messages(part["messages"], name)
        json.dumps(part, ensure_ascii=False).encode()
        for value in part.get("about", {}).values():
            assert isinstance(value, str | int | float)
        name_filter.names_no_assistant(part)
    return parts


def mutated(draw, value):
    """`value` with one thing in it, at any depth, changed, taken out, repeated or added."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 3)):
        changed = copy.copy(value)
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(list(keys)))
        if not draw(st.integers(0, 4)):
            del changed[key]
        elif isinstance(changed, list) and not draw(st.integers(0, 4)):
            changed.insert(key, changed[key])
        else:
            changed[key] = mutated(draw, value[key])
        return changed
    return draw(ANY_JSON)


@st.composite
def mutated_rows(draw, row: dict) -> dict:
    for _ in range(draw(st.integers(1, 3))):
        row = mutated(draw, row)
        if not isinstance(row, dict):
            return {"a": row}
    return row


@pytest.mark.parametrize("name", CONVERTERS)
def test_a_good_row_is_taken(name):
    assert check(name, CONVERTERS[name][1])


@pytest.mark.parametrize("name", CONVERTERS)
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=st.data())
def test_any_row(name, data):
    columns = st.sampled_from(sorted(CONVERTERS[name][1])) | ANY_TEXT
    check(name, data.draw(st.dictionaries(columns, ANY_JSON, max_size=4)))


@pytest.mark.parametrize("name", CONVERTERS)
@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(data=st.data())
def test_a_row_with_something_changed(name, data):
    check(name, data.draw(mutated_rows(CONVERTERS[name][1])))


REAL = {  # real rows of the layout a converter takes
    "alpaca": "instruct_raw/code_alpaca/code_alpaca_20k.json",
    "lima": "instruct_raw/lima/train.jsonl",
    "p3": "instruct_raw/flan_v2/t0_p3_sample.jsonl",
    "cot_fields": "instruct_raw/cot/ecqa_train.tsv",
    "orca_preferred": "preference_raw/orca_dpo_pairs/validation.jsonl",
    "best_path": "instruct_raw/oasst1/en_100_tree.jsonl",
    "leaf_paths": "instruct_raw/oasst1/en_100_tree.jsonl",
    "sharegpt": "instruct_raw/sharegpt/glaive_toolcall_en_demo.json",
    "sharegpt_whole": "instruct_raw/sharegpt/gpt4_final_data_sample_230629.json",
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_row_with_something_changed(shared_data, name):
    rows = [
        row for _, row in itertools.islice(readers.read_placed(str(shared_data / REAL[name])), 20)
    ]
    assert all(check(name, row) for row in rows)

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(data=st.data())
    def run(data):
        check(name, data.draw(mutated_rows(data.draw(st.sampled_from(rows)))))

    run()


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.example(texts=["a", f" {sharegpt.PAGE_MARKUP}", "b"], faithful=False, limit=90)
@hypothesis.given(
    texts=st.lists(st.text(max_size=30), max_size=9),
    faithful=st.booleans(),
    limit=st.integers(10, 90),
)
def test_every_turn_of_a_conversation_is_in_a_chunk_or_counted(texts, faithful, limit):
    senders = ("human", "gpt")
    turns = [{"from": senders[i % 2], "value": text} for i, text in enumerate(texts)]
    parts = sharegpt.split({"conversations": turns}, limit=limit, count=len, faithful=faithful)
    kept = [m["content"] for part in parts if isinstance(part, dict) for m in part["messages"]]
    reasons = [part.reason for part in parts if isinstance(part, registry.Dropped)]
    marked = any(text.lstrip().startswith(sharegpt.PAGE_MARKUP) for text in texts)
    if marked or len(texts) < 2:
        assert reasons == ["markup of the shared page" if marked else "fewer than two turns"]
        assert not kept
        return
    pairs = len(reasons) - reasons.count("odd last turn")
    assert len(kept) + 2 * pairs + reasons.count("odd last turn") == len(texts)
    assert reasons.count("odd last turn") == len(texts) % 2
    rest = iter(texts)
    assert all(content in rest for content in kept)  # in order
