"""Converters of instruction rows: what each takes, and what each says of bad input."""

import collections
import functools

import pytest
from raw_rows import messages

from tulu_jax.data import registry
from tulu_jax.data.sources import (
    conversations,
    flan,
    hard_coded,
    instruct,
    name_filter,
    orca,
    published,
    science,
)

Dropped = registry.Dropped
alpaca = functools.partial(instruct.alpaca, seed=42)
dolly = functools.partial(instruct.dolly, seed=42)


def texts(example: dict) -> list[str]:
    return [message["content"] for message in example["messages"]]


def test_templates_are_two_times_fourteen_with_weights_that_sum_to_one():
    for layouts in (instruct.WITH_INPUT, instruct.WITHOUT_INPUT):
        assert len(layouts) == len({user for user, _, _ in layouts}) == 14
        assert sum(weight for _, _, weight in layouts) == pytest.approx(1.0)
    assert all("{input}" in user for user, _, _ in instruct.WITH_INPUT)
    assert not any("{input}" in user for user, _, _ in instruct.WITHOUT_INPUT)


@pytest.mark.parametrize("context", ["", "1, {2}"])
def test_templates_are_drawn_by_weight(context):
    layouts = instruct.WITH_INPUT if context else instruct.WITHOUT_INPUT
    rows = 20_000
    found = collections.Counter(
        instruct.encode(f"Add {i}", context, "3", seed=42)[0]["content"]
        .replace(f"Add {i}", "{instruction}")
        .replace("1, {2}", "{input}")
        for i in range(rows)
    )
    assert set(found) == {user for user, _, _ in layouts}
    for user, _, weight in layouts:
        assert found[user] / rows == pytest.approx(weight, abs=0.01)


def test_alpaca_strips_and_depends_on_the_row_and_the_seed_alone():
    row = {"instruction": " Add.\n", "input": "1, 2\n", "output": " 3 "}
    user, assistant = texts(alpaca(row))
    layouts = [u.format(instruction="Add.", input="1, 2") for u, _, _ in instruct.WITH_INPUT]
    assert user in layouts and assistant == "3"
    assert alpaca(row) == alpaca(dict(row))
    users = {texts(instruct.alpaca(row, seed=seed))[0] for seed in range(50)}
    assert len(users) > 5
    bare = texts(alpaca(row | {"input": " \n"}))
    assert bare[0] in [u.format(instruction="Add.") for u, _, _ in instruct.WITHOUT_INPUT]


def test_dolly_has_columns_of_its_own_and_keeps_its_category():
    row = {"instruction": "Add.", "context": "1", "response": "1", "category": "closed_qa"}
    re_keyed = {"instruction": "Add.", "input": "1", "output": "1", "category": "closed_qa"}
    assert dolly(row) == alpaca(re_keyed)
    assert dolly(row)["about"] == {"category": "closed_qa"}


def test_lima_loses_an_odd_last_turn():
    row = {"conversations": ["a", "b", "c"], "source": "stackexchange"}
    assert conversations.lima(row) == {
        "messages": messages("a", "b"),
        "about": {"source": "stackexchange"},
    }
    assert conversations.lima({"conversations": ["a"]}) == Dropped("fewer than two turns")


def test_wizardlm_keeps_turns_from_human_and_gpt():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    row = {"idx": "x1", "conversations": turns * 2}
    assert conversations.wizardlm(row) == {
        "messages": messages("a", "b", "a", "b"),
        "about": {"idx": "x1"},
    }
    assert conversations.wizardlm({"conversations": []}) == Dropped("fewer than two turns")
    for wrong in (turns[:1], turns[::-1], [turns[0], turns[0]]):
        with pytest.raises(ValueError, match="expected 'human' and 'gpt' in turn, an even number"):
            conversations.wizardlm({"conversations": wrong})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Q?", "Q?\n"),
        ("Q?\n", "Q?\n"),
        ("A:", "A:"),
        ("A: \t", "A: \t"),
        ("A:\n\n", "A:\n\n"),
        ("Q? ", "Q? \n"),
        ("", "\n"),
    ],
)
def test_flan_prompts_end_with_a_newline_or_a_colon(prompt, expected):
    assert texts(flan.flan({"inputs": prompt, "targets": "t"})) == [expected, "t"]
    assert texts(flan.p3({"prompt": prompt, "completion": "t<|endoftext|>"})) == [expected, "t"]


def test_flan_cot_fields_have_their_newlines_written_out():
    fields = [r"Q?\nOptions:\n- yes", "yes", r"Because.\nSo."]
    assert texts(flan.cot_fields({"fields": fields})) == [
        "Q?\nOptions:\n- yes\n",
        "Because.\nSo.\nThe answer is yes.",
    ]


def test_orca_always_has_a_system_turn():
    row = {"id": "flan.1", "system_prompt": "", "question": "q", "response": "r"}
    system = {"role": "system", "content": ""}
    assert orca.open_orca(row) == {
        "messages": [system, *messages("q", "r")],
        "about": {"id": "flan.1"},
    }
    pair = {
        "input": {"messages": [system, {"role": "user", "content": "q"}]},
        "preferred_output": [{"role": "assistant", "content": "r"}],
    }
    assert orca.preferred(pair) == {"messages": [system, *messages("q", "r")]}


def test_science_names_its_task():
    row = {"dataset": "scifact_json", "input": "i", "output": "o"}
    assert science.science(row) == {
        "messages": messages("i", "o"),
        "about": {"dataset": "scifact_json"},
    }
    with pytest.raises(ValueError, match=r"unknown science task 'x'; expected one of"):
        science.science(row | {"dataset": "x"})


def test_hard_coded_rows_come_ten_times():
    row = {"Prompt": "Who are you?", "Output": "A camel."}
    found = hard_coded.hard_coded(row, repeat=10)
    assert found == [{"messages": messages("Who are you?", "A camel.")}] * 10


def test_published_rows_keep_empty_contents_and_their_ids():
    row = {"dataset": "cot", "id": "cot_1", "messages": messages("q", "")}
    assert published.published(row) == {
        "messages": messages("q", ""),
        "about": {"dataset": "cot", "id": "cot_1"},
    }
    with pytest.raises(ValueError, match=r"unknown role 'human'; expected one of \('system'"):
        published.published(row | {"messages": [{"role": "human", "content": ""}]})
    with pytest.raises(ValueError, match=r"found no messages; expected at least one"):
        published.published(row | {"messages": []})


def test_name_filter_has_its_22_strings_and_looks_everywhere_for_them():
    assert len(set(name_filter.NAMES)) == 22
    for name in name_filter.NAMES:
        for text in (name, name.upper(), f"x{name.lower()}y"):
            for chat in (messages(text, "a"), messages("q", text), messages("q", "a", text)):
                assert not name_filter.NAME_FILTER.keep({"messages": chat})
    for hit in ("a palm tree", "they bombard us", "Lombard", "Claudette"):
        assert not name_filter.NAME_FILTER.keep({"messages": messages(hit, "a")})
    for miss in ("GPT-2", "open-ai", "Bing", "Bard of Avon"[:3], "claud", "Alpaca", ""):
        assert name_filter.NAME_FILTER.keep({"messages": messages(miss, "a")})


TEXT = "a string of some length"
ROWS = {  # converter, a row it takes
    "alpaca": (alpaca, {"instruction": TEXT, "input": TEXT, "output": TEXT}),
    "dolly": (dolly, {"instruction": TEXT, "context": TEXT, "response": TEXT}),
    "flan": (flan.flan, {"inputs": TEXT, "targets": TEXT}),
    "p3": (flan.p3, {"prompt": TEXT, "completion": TEXT}),
    "open_orca": (orca.open_orca, {"system_prompt": TEXT, "question": TEXT, "response": TEXT}),
    "science": (science.science, {"dataset": "scitldr_aic", "input": TEXT, "output": TEXT}),
    "hard_coded": (
        functools.partial(hard_coded.hard_coded, repeat=10),
        {"Prompt": TEXT, "Output": TEXT},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_text_columns_that_are_missing_or_no_text_are_named(name):
    convert, row = ROWS[name]
    for column in row:
        rest = {key: value for key, value in row.items() if key != column}
        with pytest.raises(ValueError, match=rf"missing column '{column}'; found \["):
            convert(rest)
        for wrong, kind in (
            (None, "absent or null"),
            (3, "a int"),
            (["x"], "a list of str"),
            ({}, "a dict"),
        ):
            with pytest.raises(ValueError, match=rf"column '{column}' is {kind}; expected a str"):
                convert(row | {column: wrong})
        with pytest.raises(ValueError, match=rf"'{column}' is not valid Unicode \(.*surrogates"):
            convert(row | {column: "x\ud800"})


@pytest.mark.parametrize("name", ROWS)
def test_control_characters_and_ten_megabytes_are_kept(name):
    convert, row = ROWS[name]
    *_, column = row
    for text in ("a\x00\x1b[31m\u202e\ufeff\r\nb", "é" * 5_000_000):
        found = convert(row | {column: text})
        found = found[0] if isinstance(found, list) else found
        assert text in texts(found)[-1]


@pytest.mark.parametrize(
    ("convert", "row", "message"),
    [
        (conversations.lima, {}, r"found columns \[\]; expected 'conversations', a list of texts"),
        (conversations.lima, {"conversations": ["a", 1]}, r"'conversations', a list of texts"),
        (conversations.wizardlm, {}, r"missing column 'conversations'"),
        (conversations.wizardlm, {"conversations": ["a"]}, r"is a list of str; expected a list"),
        (flan.cot_fields, {"fields": ["a", "b"]}, r"expected 'fields', three texts"),
        (flan.cot_fields, {"fields": ["a", "b", None]}, r"a field is absent or null; expected a"),
        (orca.preferred, {}, r"missing column 'input'; found \[\]"),
        (
            orca.preferred,
            {"input": {"messages": []}, "preferred_output": []},
            r"found roles \[\]; expected system, user and assistant",
        ),
        (published.published, {"dataset": "d", "id": 3, "messages": []}, r"column 'id' is a int"),
        (published.published, {"dataset": "d", "id": "3"}, r"missing column 'messages'"),
    ],
)
def test_rows_of_another_shape_are_refused(convert, row, message):
    with pytest.raises(ValueError, match=message):
        convert(row)
