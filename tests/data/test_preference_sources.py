"""Preference converters: what each takes, how pairs are made, and what each says of bad input."""

import collections
import copy
import functools

import hypothesis
import pytest
from hypothesis import strategies as st
from preference_rows import LAYOUTS, h4, of_rows, ranked, sharegpt_turn
from raw_rows import messages, pair

from tulu_jax.data import components, preferences, registry
from tulu_jax.data.sources import hh, pair_filters, rankings

Dropped = registry.Dropped


def converted(name: str, **changes):
    convert, row = LAYOUTS[name]
    return convert(row | changes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_pair(name):
    convert, row = LAYOUTS[name]
    before = copy.deepcopy(row)
    (found,) = of_rows(convert, [row]).examples
    assert {key: found[key] for key in ("prompt", "chosen", "rejected")} == pair("p", "good", "bad")
    assert row == before


def test_what_is_kept_for_audits():
    assert converted("h4")["about"] == {
        "prompt_id": "id",
        "score_chosen": 9.0,
        "score_rejected": 8.0,
    }
    assert converted("argilla")["about"] == {
        "source": "flan_v2_cot",
        "score_chosen": 4.75,
        "score_rejected": 2.0,
    }
    assert converted("ultrafeedback")["about"] == {
        "source": "flan",
        "model_chosen": "m-good",
        "model_rejected": "m-bad",
        "slot_chosen": 1,
        "slot_rejected": 0,
        "score_chosen": 10.0,
        "score_rejected": 3.0,
    }
    assert converted("nectar")[0]["about"] == {
        "model_chosen": "a",
        "model_rejected": "b",
        "slot_chosen": 1,
        "slot_rejected": 0,
        "score_chosen": -1.0,
        "score_rejected": -2.0,
    }


def test_ties_are_dropped_or_kept_by_name_and_inverted_scores_are_refused():
    assert converted("h4", score_rejected=9.0) == Dropped("equal scores")
    assert converted("argilla", **{"rejected-rating": 4.75}) == Dropped("equal scores")
    tied = {"score_chosen": 8.0, "score_rejected": 8.0}
    assert converted("trl", metadata=tied) == Dropped("equal scores")
    keeping = functools.partial(h4, ties="keep")
    kept = keeping(LAYOUTS["h4"][1] | tied)
    assert kept["about"] == {"prompt_id": "id"} | tied
    with pytest.raises(ValueError, match=r"chosen scores 9.0, rejected 9.5"):
        converted("h4", score_rejected=9.5)
    with pytest.raises(ValueError, match=r"ties = 'both'; expected one of"):
        functools.partial(h4, ties="both")(LAYOUTS["h4"][1])


def test_the_paper_s_task_alone_keeps_ties():
    kept = {
        name
        for name in registry.TaskRegistry.names()
        if getattr(registry.TaskRegistry.get(name).convert, "keywords", {}).get("ties") == "keep"
    }
    audited = {f"ultrafeedback_h4_first_audited_{name}" for name in preferences.AUDITED}
    assert kept == {"ultrafeedback_h4_first"} | audited
    (paper,) = components.of("tulu_2_dpo")
    assert (paper.task.name, paper.amount, paper.task.expected) == (
        "ultrafeedback_h4_first",
        None,
        registry.expected_examples("tulu_2_dpo"),
    )


def test_audited_pairs_are_the_papers_without_those_of_one_rule():
    def example(chosen, rejected, **about):
        return pair("p", chosen, rejected) | {"about": about}

    keep = pair_filters.of_equal_length
    assert keep(example("a" * 100, "b" * 125)) and keep(example("b" * 125, "a" * 100))
    assert not keep(example("a" * 100, "b" * 126)) and not keep(example("b" * 126, " " + "a" * 100))
    keep = pair_filters.scored_as_labelled
    assert keep(example("a", "b")) and keep(example("a", "b", score_chosen=8, score_rejected=7.5))
    assert not keep(example("a", "b", score_chosen=8, score_rejected=8))
    keep = pair_filters.of_different_answers
    assert keep(example("one two three four", "one two three five"))
    assert not keep(example("one two three four five", "ONE two three four five one"))
    for name, rule in preferences.AUDITED.items():
        task = registry.TaskRegistry.get(f"{preferences.PAPERS}_audited_{name}")
        assert (
            task.filters == (rule,)
            and task.convert is registry.TaskRegistry.get(preferences.PAPERS).convert
        )


# Dialogues and rankings.


def test_hh_finds_the_shared_prompt_by_turns():
    shared = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: and?\n\nAssistant: I think"
    found = hh.hh_rlhf({"chosen": shared + " so.", "rejected": shared + " not\n\nso."})
    assert found == {
        "prompt": messages("hi", "Hello.", "and?"),
        "chosen": [{"role": "assistant", "content": "I think so."}],
        "rejected": [{"role": "assistant", "content": "I think not\n\nso."}],
    }


SAID = st.text(max_size=9).filter(lambda text: not hh.TURN.search(f"\n\n{text}"))
DIALOGUES = st.lists(st.tuples(st.sampled_from(sorted(hh.ROLES)), SAID), min_size=1, max_size=4)


@hypothesis.given(DIALOGUES, SAID, SAID)
def test_hh_turns_are_what_was_said(shared, better, worse):
    def dialogue(answer: str) -> str:
        return "".join(f"\n\n{who}: {text}" for who, text in [*shared, ("Assistant", answer)])

    found = hh.hh_rlhf({"chosen": dialogue(better), "rejected": dialogue(worse)})
    assert found["prompt"] == [
        {"role": hh.ROLES[who], "content": text.strip()} for who, text in shared
    ]
    assert [found[side] for side in ("chosen", "rejected")] == [
        [{"role": "assistant", "content": text.strip()}] for text in (better, worse)
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: A\n\nAssistant: c", "sides part before"),
        (
            "\n\nHuman: a\n\nAssistant: b",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "sides part before",
        ),
        ("\n\nHuman: a", "\n\nHuman: b", "ends with the human"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "no prompt"),
    ],
)
def test_hh_pairs_that_compare_no_two_answers_are_dropped(chosen, rejected, reason):
    assert hh.hh_rlhf({"chosen": chosen, "rejected": rejected}).reason.startswith(reason)


def test_hh_text_that_is_no_dialogue_is_refused():
    with pytest.raises(ValueError, match=r"a dialogue begins with 'Human: a'; expected"):
        hh.hh_rlhf({"chosen": "Human: a", "rejected": "Human: a"})


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("adjacent", ["a1>a2", "a2>a0", "a0>a3"]),
        ("best_vs_each", ["a1>a2", "a1>a0", "a1>a3"]),
        ("best_vs_worst", ["a1>a3"]),
    ],
)
def test_rankings_to_pairs(rule, expected):
    found = rankings.nectar(ranked(3, 1, 2, 4), rule=rule)
    assert [f"{p['chosen'][0]['content']}>{p['rejected'][0]['content']}" for p in found] == expected


def test_best_against_a_random_other_is_the_default_and_depends_on_the_prompt_alone():
    task = registry.TaskRegistry.get("nectar")
    assert task.convert.keywords == {"rule": "best_vs_random"}
    drawn = collections.Counter()
    for i in range(300):
        row = ranked(3, 1, 2, 4) | {"prompt": f"q{i}"}
        (found,) = task.convert(row)
        assert task.convert(row) == [found] and found["chosen"][0]["content"] == "a1"
        drawn[found["rejected"][0]["content"]] += 1
    assert set(drawn) == {"a0", "a2", "a3"} and min(drawn.values()) > 70


def test_equal_ranks_short_rankings_and_odd_prompts():
    nectar = functools.partial(rankings.nectar, rule="adjacent")
    tied = nectar(ranked(1, 2, 2))
    assert [isinstance(p, Dropped) for p in tied] == [False, True]
    assert tied[1] == Dropped("equal ranks")
    assert nectar(ranked(1)) == Dropped("fewer than two answers")
    row = ranked(1, 2)
    for prompt, expected in (
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c \n\nAssistant:", messages("a", "b", "c")),
        ("\n\nHuman: a", messages("a")),
        (" plain\n\nHuman: text", messages(" plain\n\nHuman: text")),
    ):
        assert nectar(row | {"prompt": prompt})[0]["prompt"] == expected
    answered = nectar(row | {"prompt": "\n\nHuman: a\n\nAssistant: b"})
    assert answered == Dropped("the prompt ends with an answer")
    assert nectar(row | {"prompt": "\n\nAssistant: "}) == Dropped("no prompt")
    with pytest.raises(ValueError, match=r"rule = 'worst'; expected one of"):
        rankings.nectar(row, rule="worst")


def test_system_turns_are_kept_where_they_say_something():
    system = {"role": "system", "content": "Be brief."}
    assert converted("orca", system="Be brief.")["prompt"] == [system, *messages("p")]
    turns = [sharegpt_turn("system", "Be brief."), sharegpt_turn("human", "p")]
    assert converted("sharegpt", conversations=turns)["prompt"] == [system, *messages("p")]
    assert converted("alpaca", input=" x\n")["prompt"] == messages("p\n\nx")


# Bad input.


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("h4", {"chosen": "p"}, r"'chosen' is a str; expected a list of objects"),
        ("h4", {"chosen": [{"role": "user"}]}, r"message 0: 'content' is absent or null"),
        ("h4", {"chosen": messages("p", "a", "b")}, r"chosen has 3 messages, rejected 2"),
        ("h4", {"chosen": messages("p")}, r"chosen has 1 messages, rejected 2"),
        ("h4", {"chosen": messages("q", "good")}, r"prompts of .* differ at message 0"),
        ("h4", {"score_chosen": None}, r"'score_chosen' is absent or null; expected a finite"),
        ("h4", {"score_chosen": True}, r"'score_chosen' is a bool; expected a finite number"),
        ("h4", {"score_chosen": float("nan")}, r"'score_chosen' is a float; expected a finite"),
        ("h4", {"score_chosen": 10**400}, r"'score_chosen' is a float; expected a finite"),
        ("trl", {"metadata": [1]}, r"'metadata' is a list of int; expected an object"),
        ("trl", {"metadata": {}}, r"missing column 'score_chosen'; found \[\]"),
        ("trl", {"chosen": 3}, r"column 'chosen' is a int; expected a string"),
        ("sharegpt", {"chosen": sharegpt_turn("bot", "x")}, r"unknown role 'bot'; expected one of"),
        ("nectar", {"answers": {}}, r"'answers' is a dict; expected a list of objects"),
        ("ultrafeedback", {"completions": None}, r"'completions' is absent or null"),
    ],
)
def test_malformed_rows_are_refused_by_column(name, changes, message):
    with pytest.raises(ValueError, match=message):
        converted(name, **changes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_column_is_named(name):
    convert, row = LAYOUTS[name]
    unused = {"prompt", "prompt_id", "messages", "source", "qid", "output", "turns"}
    unused |= {"chosen-model", "rejected-model"}
    if name in ("trl", "nectar"):
        unused -= {"prompt"}
    for column in row.keys() - unused:
        with pytest.raises(ValueError, match=f"missing column '{column}'"):
            convert({key: value for key, value in row.items() if key != column})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("h4", {"chosen": [{"role": "tool", "content": "p"}, *messages("p", "x")[1:]]}, "differ"),
        (
            "openai",
            {"input": {"messages": [{"role": "tool", "content": "p"}]}},
            r"row t/0.*unknown role 'tool'",
        ),
        ("openai", {"input": {"messages": []}}, r"row t/0.*expected a non-empty list"),
        ("openai", {"preferred_output": messages("a")}, r"row t/0.*chosen ends with role 'user'"),
        (
            "openai",
            {"preferred_output": messages("a", "b"), "non_preferred_output": messages("c", "d")},
            r"row t/0.*the sides differ before their last message",
        ),
        ("alpaca", {"chosen": "\ud800"}, r"row t/0.*'chosen' is not valid Unicode"),
        ("trl", {"prompt": "\udfff"}, r"row t/0.*'prompt' is not valid Unicode"),
    ],
)
def test_what_only_the_checks_after_conversion_see_names_the_row(name, changes, message):
    convert, row = LAYOUTS[name]
    with pytest.raises(ValueError, match=message):
        of_rows(convert, [row | changes])


def test_empty_identical_and_repeated_pairs_are_counted():
    convert, row = LAYOUTS["orca"]
    rows = [row, row | {"chosen": " \n"}, row | {"chosen": "bad "}, row]
    found = of_rows(convert, rows)
    assert len(found.examples) == 1
    assert found.dropped == {"empty side": 1, "identical sides": 1, "duplicate pair": 1}
