"""Raw UltraFeedback records to pairs: draws, scores, ties, repairs."""

import collections
import copy
import dataclasses
import json
import random

import hypothesis
import pytest
from hypothesis import strategies as st
from preference_rows import completion, drawing, record

import tulu_jax.data.preferences  # noqa: F401  it registers the tasks
from tulu_jax.data import examples, registry
from tulu_jax.data.sources import ultrafeedback

Dropped = registry.Dropped


def slots(row: dict, rejected: str, score: str = "overall", tens: str = "keep"):
    """(chosen slot, rejected slot) of a raw record whose responses are their slots."""
    found = ultrafeedback.binarize(row, rejected=rejected, score=score, tens=tens)
    if isinstance(found, Dropped):
        return found.reason
    said = tuple(int(found[side][0]["content"]) for side in ("chosen", "rejected"))
    assert said == (found["about"]["slot_chosen"], found["about"]["slot_rejected"])
    return said


def scored(*scores: float, **options) -> dict:
    return record(*(completion(str(i), score) for i, score in enumerate(scores)), **options)


def original_draw(completions: list[tuple]) -> tuple:
    """The first public binarization as its script has it: module-level generator and all."""
    random.seed(42)
    chosen = max(completions, key=lambda completion: completion[0])
    rejected = random.choice(completions)
    while rejected == chosen:
        rejected = random.choice(completions)
    return chosen, rejected


@pytest.mark.parametrize("best", range(4))
def test_first_draw_of_four_is_slot_0_or_2(best):
    found = slots(scored(*(9.0 if i == best else float(i) for i in range(4))), "first")
    assert found == (best, 2 if best == 0 else 0)


@hypothesis.given(st.lists(st.sampled_from([1.0, 2.0, 7.0, 8.5, 10.0]), min_size=2, max_size=7))
def test_first_draw_is_the_original_script_s(scores):
    rows = [(score, str(i), f"m-{i}") for i, score in enumerate(scores)]
    chosen, rejected = original_draw(rows)
    expected = (int(chosen[1]), int(rejected[1]))
    if chosen[0] == rejected[0]:
        expected = "equal scores"
    assert slots(scored(*scores), "first") == expected


def test_lowest_and_random_draws():
    assert slots(scored(5.0, 2.0, 8.0, 2.0), "lowest") == (2, 1)
    drawn = collections.Counter(
        slots(scored(5.0, 2.0, 8.0, 3.0, instruction=f"p{i}"), "random") for i in range(300)
    )
    assert set(drawn) == {(2, 0), (2, 1), (2, 3)} and min(drawn.values()) > 70
    row = scored(5.0, 2.0, 8.0, 3.0)
    assert len({slots(row, "random") for _ in range(5)}) == 1  # of a record, always the same


def test_the_first_of_equals_is_chosen_and_ties_with_the_rejected_are_dropped():
    assert slots(scored(1.0, 8.0, 8.0, 3.0), "lowest") == (1, 0)
    assert slots(scored(8.0, 3.0, 8.0, 1.0), "first") == "equal scores"  # slots 0 and 2
    assert slots(scored(4.0, 4.0), "lowest") == "equal scores"


def test_too_few_or_equal_completions_are_dropped():
    few = "fewer than two scored completions"
    assert slots(record(), "first") == slots(scored(3.0), "lowest") == few
    same = [completion("0", 5.0)] * 3
    assert slots(record(*same), "first") == "completions all the same"


def test_mean_of_aspects_leaves_out_what_is_not_rated():
    row = record(
        completion("0", 10.0, ("1", "N/A", "2")),  # 1.5
        completion("1", 1.0, ("4", "4", "N/A", "N/A")),  # 4
        completion("2", 9.0, ("N/A", "N/A")),  # none
        completion("3", 5.0, ("5", "2"), annotations={"a": {"Rating": "2"}, "b": None}),  # 2
    )
    assert slots(row, "lowest", "aspects") == (1, 0)
    found = ultrafeedback.binarize(row, rejected="lowest", score="aspects", tens="keep")
    assert (found["about"]["score_chosen"], found["about"]["score_rejected"]) == (4.0, 1.5)
    assert slots(record(*row["completions"][:3:2]), "lowest", "aspects") == (
        "fewer than two scored completions"
    )
    with pytest.raises(ValueError, match=r"found the rating '9'; expected '1' to '5' or 'N/A'"):
        slots(record(completion("0", 1.0, ("9",)), completion("1", 1.0)), "first", "aspects")


def test_overall_scores_of_10_are_kept_or_repaired():
    row = record(
        completion("0", 10.0, ("1", "2", "3")),  # a mean of 2: meant as 1
        completion("1", 7.0),
        completion("2", 10.0, ("4", "4")),  # was asked for again: left out
        completion("3", 3.0),
    )
    assert slots(row, "lowest", tens="keep") == (0, 3)
    assert slots(row, "lowest", tens="repair") == (1, 0)
    row["completions"][2] = completion("2", 10.0, ("4", "5"))
    assert slots(row, "lowest", tens="repair") == (2, 0)
    repaired = [c | {"fine-grained_score": 2.0} for c in row["completions"]]
    assert slots(record(*repaired), "lowest", tens="repair") == (0, 3)


@pytest.mark.parametrize("name", ["first", "random", "lowest", "aspects_random", "aspects_lowest"])
def test_truthfulqa_is_left_out_of_all_but_the_first_binarization(name):
    rows = [
        record(
            completion("0", 9.0, "5"), completion("1", 1.0, "1"), instruction=source, source=source
        )
        for source in ("truthful_qa", "flan")
    ]
    task = registry.TaskRegistry.get(f"ultrafeedback_{name}")
    task = dataclasses.replace(task, sources={"train": lambda: rows})
    found = examples.load_examples(task, drawing())
    expected = ["truthful_qa", "flan"] if name == "first" else ["flan"]
    assert [example["about"]["source"] for example in found.examples] == expected
    assert found.dropped == ({} if name == "first" else {"TruthfulQA prompt": 1})


@pytest.mark.parametrize("option", ["rejected", "score", "tens"])
def test_unknown_binarization_is_refused(option):
    options = {"rejected": "first", "score": "overall", "tens": "keep"} | {option: "x"}
    with pytest.raises(ValueError, match=rf"{option} = 'x'; expected one of"):
        ultrafeedback.binarize(scored(1.0, 2.0), **options)


def test_the_raw_schema_example_of_ultrafeedback(shared_data):
    path = shared_data / "preference_raw" / "ultrafeedback" / "raw_schema_example.json"
    raw = json.loads(path.read_text())
    worse = copy.deepcopy(raw["completions"][0]) | {"response": "No.", "model": "gpt-4"}
    for aspect in worse["annotations"].values():
        aspect["Rating"] = "1"
    raw["completions"].append(worse)
    found = ultrafeedback.binarize(raw, rejected="lowest", score="aspects", tens="keep")
    assert found["about"] == {
        "source": "sharegpt",
        "model_chosen": "falcon-40b-instruct",
        "model_rejected": "gpt-4",
        "slot_chosen": 0,
        "slot_rejected": 1,
        "score_chosen": 2.75,
        "score_rejected": 1.0,
    }
    with pytest.raises(ValueError, match=r"missing column 'overall_score'"):
        ultrafeedback.binarize(raw, rejected="first", score="overall", tens="keep")
