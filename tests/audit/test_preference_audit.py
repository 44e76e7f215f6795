"""The audit of pairs: planted biases are measured, and real pairs give what was seen of them."""

import math

import numpy as np
import pytest
from raw_rows import pair

from tulu_jax.audit import card, near_duplicates, preference_audit
from tulu_jax.data import loader, registry


def pairs_of(rows: list[dict], *, tokens=None) -> preference_audit.Pairs:
    """Pairs whose answers are as long as they have words, unless `tokens` are given."""
    if tokens is None:
        sides = ("chosen", "rejected")
        tokens = [[len(row[side][-1]["content"].split()) for side in sides] for row in rows]
    chosen, rejected = np.array(tokens, int).reshape(-1, 2).T
    return preference_audit.Pairs(
        ids=[f"t/{i}" for i in range(len(rows))],
        examples=rows,
        chosen_tokens=chosen,
        rejected_tokens=rejected,
    )


def scored(row: dict, chosen: float, rejected: float) -> dict:
    return row | {"about": {"score_chosen": chosen, "score_rejected": rejected}}


def test_planted_length_bias():
    rows = [pair(f"q{i}", "a b c d", "a") for i in range(8)] + [pair("x", "a", "a b c")] * 2
    found = preference_audit.length_bias(pairs_of([*rows, pair("y", "a b", "b a")]))
    assert (found["pairs"], found["chosen_longer"], found["equal"]) == (11, 8, 1)
    assert found["mean_difference"] == pytest.approx((8 * 3 - 2 * 2) / 11)
    assert found["median_difference"] == 3
    share = found["longer_chosen"]
    assert (share["on_one_side"], share["chosen_share"]) == (10, 0.8)
    assert share["low"] == pytest.approx(0.4902, abs=1e-4)  # Wilson's interval of 8 of 10
    assert share["high"] == pytest.approx(0.9433, abs=1e-4)
    assert sum(found["histogram"]["counts"]) == 11 and found["by_score_gap"] == "not recorded"


@pytest.mark.parametrize("count", range(1, 400, 7))
def test_an_interval_holds_its_share(count):
    for row in (pair("q", "a b", "c"), pair("q", "a", "b c")):
        found = preference_audit.length_bias(pairs_of([row] * count))["longer_chosen"]
        assert 0 <= found["low"] <= found["chosen_share"] <= found["high"] <= 1


def test_length_bias_by_task_and_by_score_gap():
    rows = [scored(pair(f"q{i}", "a b" if i < 4 else "a", "b c d"), 5 + i, 5) for i in range(8)]
    pairs = pairs_of(rows, tokens=[[2, 1]] * 6 + [[1, 2]] * 2)
    found = preference_audit.length_bias(pairs)
    groups = [(g["from"], g["to"], g["pairs"], g["chosen_longer"]) for g in found["by_score_gap"]]
    assert sum(g[2] for g in groups) == 8 and groups[0][0] == 0 and groups[-1][1] == 7
    assert all(low <= high for low, high, *_ in groups)
    assert [g[3] for g in groups][-1] < groups[-1][2]
    (task,) = found["by_task"]
    assert task["task"] == "t" and task["chosen_longer"] == 6


def test_one_score_gap_is_one_group():
    found = preference_audit.length_bias(pairs_of([scored(pair("q", "a", "b"), 2, 1)] * 5))
    assert [(g["from"], g["to"], g["pairs"]) for g in found["by_score_gap"]] == [(1, 1, 5)]


def test_planted_ties_and_disagreements():
    rows = [
        scored(pair(f"q{i}", "a", "b"), *both) for i, both in enumerate([(3, 3), (2, 5), (5, 1)])
    ]
    found = preference_audit.scores(pairs_of([*rows, pair("without", "a", "b")]))
    assert (found["recorded"], found["ties"], found["chosen_below_rejected"]) == (3, 1, 1)
    assert found["such_pairs"] == ["t/1"] and found["mean_gap"] == pytest.approx(1 / 3)
    assert preference_audit.scores(pairs_of([pair("q", "a", "b")])) == "not recorded"


def test_repeated_prompts_and_contradictions():
    rows = [
        pair("same", "a", "b"),
        pair(" same\n", "b", "c"),  # b was rejected above
        pair("other", "a", "b"),
        pair("other", "a", "c"),
        pair("once", "b", "a"),
    ]
    found = preference_audit.repeated_prompts(pairs_of(rows))
    assert (found["distinct"], found["repeated"], found["pairs_of_repeated"]) == (3, 2, 4)
    assert found["contradicting"] == 1 and found["such_pairs"] == [["t/0", "t/1"]]


def text(*changed: int, words: int = 60) -> str:
    return " ".join(f"x{i}" if i in changed else f"w{i}" for i in range(words))


def test_near_duplicates_within_a_pair_and_a_near_miss():
    """One of 60 words changed takes 5 of 56 5-grams: 51 of 61 are common; two take 10 of 56."""
    one, two = (near_duplicates.shingles(text(*c)) for c in ((30,), (15, 45)))
    whole = near_duplicates.shingles(text())
    assert near_duplicates.jaccard(whole, one) == pytest.approx(51 / 61)
    assert near_duplicates.jaccard(whole, two) == pytest.approx(46 / 66)
    rows = [pair("q0", text(), text(30)), pair("q1", f"{text(1)} end", text(15, 45, 58))]
    found = preference_audit.similarity(pairs_of(rows))
    assert found["within_alike"] == 1 and found["such_pairs"] == ["t/0"]
    assert sum(found["histogram"]["counts"]) == 2


def test_near_duplicates_across_pairs():
    other = [" ".join(f"{c}{i}" for i in range(50)) for c in "abcdefgh"]
    rows = [
        pair("q0", text(), other[0]),
        pair("q1", other[1], text(30)),  # near the chosen answer of q0
        pair("q2", other[2], other[3]),
        pair("q3", "Yes.", other[4]),
        pair("q4", "yes", other[5]),
        pair("q5", text(15, 45), other[6]),  # 46 of 66: a near miss
    ]
    found = preference_audit.similarity(pairs_of(rows))
    assert (found["across_answers"], found["across_groups"]) == (4, 2)
    assert found["across_on_both_sides"] == 1 and found["within_alike"] == 0
    assert {g["text"] for g in found["largest_groups"]} == {text()[:100], "Yes."}


def test_clusters_find_every_planted_group_among_many():
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 5000, 40))) for _ in range(300)]
    copies = {i: f"{texts[i]} and a little more" for i in range(0, 300, 10)}
    sets = [near_duplicates.shingles(t) for t in [*texts, *copies.values()]]
    groups = near_duplicates.clusters(sets, threshold=0.8)
    assert sorted(groups) == sorted([i, 300 + n] for n, i in enumerate(copies))
    assert near_duplicates.clusters([], threshold=0.8) == []


def test_features_on_one_side():
    rows = [pair(f"q{i}", "I’m sorry, but no.", "Sure! Here:\n- one\n- two") for i in range(3)]
    rows += [pair("r", "Sure thing", "I cannot help with that"), pair("s", "Surely", "done?")]
    found = {r["feature"]: r for r in preference_audit.regularities(pairs_of(rows))}
    refusal = found["refuses or apologises"]
    assert (refusal["in_chosen"], refusal["in_rejected"], refusal["on_one_side"]) == (3, 1, 4)
    assert refusal["chosen_share"] == 0.75
    agreement = found["opens with agreement (Sure, Yes, …)"]
    assert (agreement["in_chosen"], agreement["in_rejected"]) == (1, 3)
    assert found["has a list"]["chosen_share"] == 0 == found["has a list"]["low"]
    assert found["has a code block"]["chosen_share"] is None
    assert found["ends with a question"]["in_rejected"] == 1


def test_openings_are_those_that_stand_most_unevenly():
    rows = [pair(f"q{i}", "Step one", "Look here") for i in range(25)]
    rows += [pair(f"r{i}", *(("I am", "We are")[:: 1 if i % 2 else -1])) for i in range(40)]
    rows += [pair(f"s{i}", "Rare", "Seldom") for i in range(preference_audit.OPENING_PAIRS - 1)]
    found = preference_audit.openings(pairs_of(rows))
    assert [o["word"] for o in found] == ["look", "step", "i", "we"]
    assert [o["chosen_share"] for o in found] == [0, 1, 0.5, 0.5]


def test_slots_and_models():
    rows = [pair(f"q{i}", "a", "b") for i in range(4)]
    assert preference_audit.slots(pairs_of(rows)) == "not recorded"
    assert preference_audit.models(pairs_of(rows)) == "not recorded"
    for row, (chosen, rejected) in zip(rows[:3], [(0, 2), (1, 0), (0, 3)], strict=True):
        row["about"] = {"slot_chosen": chosen, "slot_rejected": rejected}
        row["about"] |= {"model_chosen": f"m{chosen}", "model_rejected": f"m{rejected}"}
    slots = preference_audit.slots(pairs_of(rows))
    assert slots["chosen"] == [2, 1, 0, 0] and slots["rejected"] == [1, 0, 1, 1]
    assert slots["earlier_chosen"]["chosen_share"] == pytest.approx(2 / 3)
    best = preference_audit.models(pairs_of(rows))[0]
    assert (best["model"], best["on_one_side"]) == ("m0", 3)


def test_an_audit_holds_plain_values_only():
    def plain(value) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or (type(value) in (str, int, float) and value == value)

    rows = [scored(pair("q", "a b", "c"), 2, 1), pair("q", "c", "d")]
    assert plain(preference_audit.audit(pairs_of(rows)))
    assert not math.isnan(preference_audit.audit(pairs_of(rows))["scores"]["mean_gap"])


@pytest.fixture(scope="module")
def real_audit(shared_data, tmp_path_factory) -> dict:
    """The audit of real UltraFeedback and Orca pairs, lengths in Llama tokens."""
    tasks = ("ultrafeedback_binarized", "orca_dpo_pairs_sample")
    config = loader.DataConfig(
        train=registry.Mixture(name="two", tasks=dict.fromkeys(tasks)),
        tokenizer=str(shared_data / "tokenizer/llama2"),
        data_root=str(shared_data),
        max_length=4096,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )
    rows = loader.prepare(config, split="train")
    return card.build(config, {"train": rows}, batch_size=8, prompts=None).numbers["audit"]


def test_real_pairs_are_biased_in_length_against_each_other(real_audit):
    """UltraFeedback chooses the longer answer a little more often; Orca the shorter one seven
    times of eight."""
    feedback, orca = real_audit["length"]["by_task"]
    assert (feedback["pairs"], feedback["chosen_longer"], feedback["equal"]) == (445, 243, 3)
    assert (orca["pairs"], orca["chosen_longer"], orca["equal"]) == (190, 24, 0)
    assert orca["mean_difference"] == pytest.approx(-144.8, abs=0.1)
    gaps = real_audit["length"]["by_score_gap"]
    assert [(g["from"], g["to"], g["pairs"]) for g in gaps] == [
        (0.5, 1.0, 191),
        (1.5, 1.5, 53),
        (2.0, 3.5, 107),
        (4.0, 7.5, 94),
    ]


def test_real_pairs_agree_with_their_scores_and_are_distinct(real_audit):
    assert real_audit["scores"]["recorded"] == 445
    assert real_audit["scores"]["chosen_below_rejected"] == real_audit["scores"]["ties"] == 0
    assert real_audit["similarity"]["such_pairs"] == ["ultrafeedback_binarized/436"]
    assert real_audit["slots"] == "not recorded"
