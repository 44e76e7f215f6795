"""The embedded default: answers known, prompts held out, styles as stated."""

import collections
import re

from tulu_jax.data import chat, registry, tulu_tiny
from tulu_jax.data.sources import tiny_instructions as source


def key(messages: list[dict]) -> tuple:
    return tuple((m["role"], m["content"]) for m in messages)


def prompts_of(messages: list[dict]) -> set:
    """What precedes each assistant turn."""
    return {key(messages[:i]) for i, m in enumerate(messages) if m["role"] == "assistant"}


def test_held_out_prompts_are_in_no_train_row():
    held_out = {key(prompt) for prompt, _ in tulu_tiny.held_out()}
    assert len(held_out) == len(tulu_tiny.held_out()) > 180
    for row in source.sft_rows("train"):
        assert not held_out & prompts_of(row["messages"])
    for row in source.preference_rows("train"):
        assert key(row["prompt"]) not in held_out
    assert {key(row["messages"][:-1]) for row in source.sft_rows("validation")} == held_out
    assert {key(row["prompt"]) for row in source.preference_rows("validation")} == held_out


def test_a_held_out_prompt_differs_from_train_only_as_its_family_does():
    """Every word of a held-out prompt and answer is a word of the train rows."""
    rows = [row["messages"] for row in source.sft_rows("train")]
    words = set(re.findall(r"\w+", " ".join(m["content"] for row in rows for m in row)))
    for prompt, answer in tulu_tiny.held_out():
        text = " ".join([*(m["content"] for m in prompt), answer])
        assert set(re.findall(r"\w+", text)) <= words
    assert len(words) < 160


def test_styles_are_in_their_proportions():
    styles = collections.Counter(
        tulu_tiny.style(row["messages"][-1]["content"]) for row in source.sft_rows("train")
    )
    total = sum(styles.values())
    assert total == source.NUM_TRAIN and set(styles) == {"terse", "polite"}
    assert abs(styles["polite"] / total - source.POLITE_SHARE) < 0.02


def test_pairs_prefer_the_polite_form_of_the_same_answer():
    for split in registry.SPLITS:
        for row in source.preference_rows(split):
            (chosen,), (rejected,) = row["chosen"], row["rejected"]
            assert chosen["content"] == f"Sure: {rejected['content']}."


def test_exact_match_and_style():
    assert tulu_tiny.is_exact(" red\n", "red") and tulu_tiny.is_exact("Sure: red.", "red")
    assert not tulu_tiny.is_exact("red.", "red") and not tulu_tiny.is_exact("Sure: blue.", "red")
    assert [tulu_tiny.style(r) for r in ("red", "Sure: no.", "Sure: red", "")] == [
        "terse",
        "polite",
        "other",
        "other",
    ]


def test_answers_of_each_family():
    answers = {prompt[-1]["content"]: answer for prompt, answer in tulu_tiny.held_out()}
    for row in source.sft_rows("train"):
        answers[row["messages"][-2]["content"]] = row["messages"][-1]["content"]
    answers = {q: a.removeprefix("Sure: ").removesuffix(".") for q, a in answers.items()}
    checks = collections.Counter()
    for question, answer in answers.items():
        head, _, rest = question.partition(": ")
        given = rest.split()
        expected = {
            "Repeat": given,
            "Say": given,
            "First word": given[:1],
            "First of": given[:1],
            "Last word": given[-1:],
            "Last of": given[-1:],
            "Reverse": given[::-1],
            "Backwards": given[::-1],
        }.get(head)
        if question.startswith("Which is larger"):
            expected = [str(max(int(n) for n in question.rstrip("?").split() if n.isdigit()))]
        if expected is not None:
            checks[head.partition(",")[0]] += 1
            assert answer.split() == expected, question
    assert len(checks) == 9


def test_conversations_are_short_and_some_have_two_turns(tokenizer):
    rows = [row["messages"] for row in source.sft_rows("train")[:2000]]
    encoded = chat.tokenize(rows, tokenizer=tokenizer, chat="spec", names=["-"] * len(rows))
    lengths = [len(row.ids) for row in encoded]
    assert 15 <= sum(lengths) / len(lengths) <= 40 and max(lengths) <= 64
    assert sum(len(row.spans) == 2 for row in encoded) > 100
