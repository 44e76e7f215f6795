"""What becomes of examples that are longer than a row, under every rule, with every row counted."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from encoded_chats import encode_conversation
from raw_rows import messages, pair

from tulu_jax.data import chat, loader, truncation

LONG_CHAT = {"messages": messages(*(f"Say: hen {'fox ' * n}" for n in (2, 3, 4, 5, 6, 7)))}


def pair_length(chosen: chat.TokenIds, rejected: chat.TokenIds) -> int:
    """Positions of a pair in one row: its prompt but for the last token, once, then each answer
    behind that last token, which has a target in both."""
    return len(chosen.ids) - 1 + len(rejected.ids) - 1 - int(chosen.spans[0, 0])


@pytest.fixture
def rows_under(tokenizer_dir, tmp_path, add_task):
    """`rows_under(rows, rule, max_length)` prepares a task of these rows."""

    def prepare(rows, rule, max_length, *, kind="sft", packing="none"):
        name = f"t{len(added)}"
        added.append(add_task(name, {"train": lambda: rows}, kind=kind))
        config = loader.DataConfig(
            train=name,
            tokenizer=tokenizer_dir,
            max_length=max_length,
            truncation=rule,
            packing=packing,
            cache_dir=str(tmp_path),
        )
        return loader.prepare(config, split="train")

    added = []
    return prepare


def texts(rows, tokenizer) -> list[str]:
    found = []
    for index in range(rows.num_examples):
        ids, _ = rows.store.sides(index)[0]
        found.append(tokenizer.decode(ids, skip_special=False))
    return found


def test_whole_turns_end_with_the_last_assistant_turn_that_fits(rows_under, tokenizer):
    whole = encode_conversation(LONG_CHAT["messages"], tokenizer, chat="spec")
    ends = np.flatnonzero(whole.targets == tokenizer.eos_id) + 1
    rows = rows_under([LONG_CHAT], "whole_turns", int(ends[1]) + 5)
    assert rows.stats.cut == 1 and rows.store.lengths.tolist() == [ends[1]]
    (text,) = texts(rows, tokenizer)
    assert text.endswith("</s>") and text.count("</s>") == 2
    late = {"messages": messages("hen", "fox " * 40)}
    none = rows_under([late, {"messages": messages("hen", "fox")}], "whole_turns", 30)
    assert none.stats.dropped == {"no whole turn fits": 1} and none.num_examples == 1


def test_split_between_exchanges_loses_no_message(rows_under, tokenizer):
    system = [{"role": "system", "content": "Kind: red"}]
    long = {"messages": system + LONG_CHAT["messages"]}
    rows = rows_under([long, {"messages": messages("hen", "fox")}], "split", 45)
    assert rows.stats.cut == 0 and rows.stats.dropped == {}
    (counts,) = rows.stats.tasks
    assert counts.raw_rows + counts.added_parts == rows.num_examples > 3
    assert rows.store.lengths.max() <= 45
    names = [rows.store.name(i) for i in range(rows.num_examples)]
    assert names == [f"t0/0.{i}" for i in range(rows.num_examples - 1)] + ["t0/1"]
    found = texts(rows, tokenizer)
    joined = "\n".join(text.removeprefix("<s>") for text in found[:-1])
    assert joined == chat.render(long["messages"], chat="spec").text
    assert all(text.startswith("<s><|user|>") for text in found[1:])


def test_an_exchange_that_is_too_long_by_itself_is_cut(rows_under):
    long = {"messages": messages("hen", "fox", "hen", "fox " * 100, "hen", "fox")}
    rows = rows_under([long], "split", 45)
    assert (rows.num_examples, rows.stats.cut) == (3, 1)
    assert rows.store.lengths.max() == 45


def answers(rows, index, tokenizer) -> list[str]:
    return [
        tokenizer.decode(ids[1:][spans[0, 0] : spans[0, 1]], skip_special=False)
        for ids, spans in rows.store.sides(index)
    ]


def test_both_answers_of_a_pair_are_cut_to_one_limit(rows_under, tokenizer):
    pairs = [pair("Say: hen", "fox " * 80, "owl " * 90), pair("Say: hen", "fox", "owl " * 90)]
    rows = rows_under(pairs, "cut", 100, kind="preference", packing="best_fit")
    assert rows.stats.cut == 2 and rows.store.lengths.max() <= 100
    (chosen, rejected), (short, long) = (answers(rows, i, tokenizer) for i in (0, 1))
    lengths = [len(tokenizer.encode("\n" + text)) for text in (chosen, rejected)]
    assert abs(lengths[0] - lengths[1]) <= 1
    assert short == "fox</s>" and not long.endswith("</s>")
    assert rows.store.lengths[1] == 100


def test_a_pair_whose_difference_is_cut_away_is_dropped(rows_under):
    same = "fox " * 100
    rows = rows_under(
        [pair("Say: hen", same + "a", same + "b"), pair("hen", "a", "b")],
        *("cut", 60),
        kind="preference",
    )
    assert rows.stats.dropped == {"difference cut away": 1} and rows.num_examples == 1


def test_a_prompt_that_fills_the_row_leaves_nothing_to_train(rows_under):
    for packing in ("none", "best_fit"):
        rows = rows_under(
            [pair("hen " * 100, "a", "b"), pair("hen", "a", "b")],
            *("cut", 60),
            kind="preference",
            packing=packing,
        )
        assert rows.stats.dropped == {"prompt fills the row": 1}


@pytest.mark.parametrize("rule", ["cut", "whole_turns", "split"])
def test_a_filled_row_is_told_from_one_without_an_answer(rows_under, rule):
    """And from an answer of which the row has room for a part only."""
    filled = {"messages": messages("hen " * 100, "fox", "hen", "fox")}
    rows = rows_under(
        [filled, {"messages": messages("hen " * 100)}, {"messages": messages("hen", "fox")}],
        *(rule, 60),
    )
    dropped = {"prompt fills the row": 1, "no trained token": 1}
    assert rows.stats.dropped == dropped
    assert rows.num_examples == (2 if rule == "split" else 1)


@st.composite
def pairs_of_ids(draw):
    shared = draw(st.integers(1, 30))
    sides = []
    for _ in range(2):
        answer = draw(st.integers(1, 40))
        ids = np.array(
            [1] + [7] * shared + draw(st.lists(st.integers(3, 9), min_size=answer, max_size=answer))
        )
        sides.append(chat.TokenIds(ids=ids, spans=np.array([[shared, len(ids) - 1]])))
    return sides


@hypothesis.given(
    pairs_of_ids(), st.integers(2, 60), st.sampled_from(["cut", "drop", "whole_turns"])
)
def test_a_pair_that_is_kept_fits_and_is_a_prefix(sides, max_length, rule):
    outcome, kept = truncation.fit(sides, max_length=max_length, rule=rule, one_row=True)
    fits = pair_length(*sides) <= max_length
    assert (outcome == truncation.WHOLE) == fits
    if outcome > truncation.CUT:
        assert kept == [] and outcome in truncation.REASONS
        return
    assert pair_length(*kept) <= max_length
    for before, after in zip(sides, kept, strict=True):
        assert after.ids.tolist() == before.ids[: len(after.ids)].tolist()
        assert after.spans[0, 0] == before.spans[0, 0] and truncation.trained(after) > 0
        assert after.spans[0, 1] == len(after.ids) - 1
    if not fits:  # the room is used: one more token of both limits would not fit
        spare = max_length - pair_length(*kept)
        assert spare <= 1


def test_rules_are_listed(rows_under):
    with pytest.raises(ValueError, match=r"truncation = 'cut_left'"):
        rows_under([LONG_CHAT], "cut_left", 60)
