"""Two evaluations side by side: the tests of significance against scipy's, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats

from tulu_jax import validation
from tulu_jax.evals import compare_runs, predictions, scores
from tulu_jax.evals.benchmark import Answer, Metric, Request


def metric(values, groups, *, macro=False) -> Metric:
    """A metric of items "0", "1", …, averaged over all of them or over groups."""
    values = np.asarray(values, float)
    by_group = {g: values[[one == g for one in groups]].mean() for g in dict.fromkeys(groups)}
    return Metric(
        name="m",
        value=float(np.mean(list(by_group.values())) if macro else values.mean()),
        standard_error=0.01,
        items={str(n): float(value) for n, value in enumerate(values)},
        groups={g: float(value) for g, value in by_group.items()},
    )


def group_of(groups) -> dict[str, str]:
    return {str(n): group for n, group in enumerate(groups)}


def test_right_and_wrong_items_are_tested_exactly():
    rng = np.random.default_rng(0)
    groups = ["a"] * 200
    first = (rng.random(200) < 0.4).astype(float)
    second = np.where(rng.random(200) < 0.2, 1 - first, first)
    a, b = metric(first, groups), metric(second, groups)
    found = compare_runs.difference(a, b, group_of(groups))
    up, down = int((second > first).sum()), int((second < first).sum())
    assert (found.better, found.worse, found.test) == (up, down, "McNemar, exact")
    assert found.p == pytest.approx(scipy.stats.binomtest(up, up + down, 0.5).pvalue)
    assert found.value == pytest.approx(b.value - a.value)
    back = compare_runs.difference(b, a, group_of(groups))
    assert (back.value, back.low, back.high) == pytest.approx(
        (-found.value, -found.high, -found.low)
    )
    assert back.p == found.p
    same = compare_runs.difference(a, a, group_of(groups))
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("won", "lost", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (10, 2, 0.03857421875)]
)
def test_mcnemar(won, lost, p):
    assert compare_runs.mcnemar(won, lost) == compare_runs.mcnemar(lost, won) == p


@pytest.mark.slow
def test_of_14_042_items_the_exact_test_is_no_overflow():
    assert compare_runs.mcnemar(7100, 6900) == pytest.approx(
        scipy.stats.binomtest(7100, 14000, 0.5).pvalue, rel=1e-9
    )


def test_other_items_are_tested_by_pairs():
    rng = np.random.default_rng(1)
    groups = ["a"] * 50
    first = rng.random(50)
    second = first + rng.normal(0.05, 0.1, 50)
    found = compare_runs.difference(metric(first, groups), metric(second, groups), group_of(groups))
    theirs = scipy.stats.ttest_rel(second, first)
    assert found.p == pytest.approx(theirs.pvalue) and found.test == "paired t"
    low, high = theirs.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_a_mean_over_groups_is_compared_as_one():
    """TyDiQA: languages of 10 and of 90 items count the same."""
    rng = np.random.default_rng(2)
    groups = ["a"] * 10 + ["b"] * 90
    first = rng.random(100)
    second = first + np.where(np.array(groups) == "a", 0.3, 0.0) + rng.normal(0, 0.1, 100)
    sides = [metric(values, groups, macro=True) for values in (first, second)]
    found = compare_runs.difference(*sides, group_of(groups))
    assert found.test == "paired t over groups"
    assert found.value == pytest.approx(sides[1].value - sides[0].value)
    # Against drawing items anew within each group.
    drawn = [
        np.mean([
            rng.choice(d, (4000, len(d))).mean(axis=1)
            for d in ((second - first)[:10], (second - first)[10:])
        ], axis=0)
    ]  # fmt: skip
    half = 1.96 * np.std(drawn)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def saved(folder, values, *, texts=("x",), prompt_hash="0" * 16, name="gsm8k", pending=False):
    """An evaluation of one benchmark, as the runner leaves it."""
    groups = ["a", "b"] * (len(values) // 2)
    requests = [Request(id=str(n), group=group, prompt="p") for n, group in enumerate(groups)]
    answers = [
        Answer(id=r.id, prompt_hash=prompt_hash, texts=list(texts), ended=["stop"])
        for r in requests
    ]
    found = metric(values, groups)
    if pending:
        found = dataclasses.replace(found, value=None, standard_error=None, items={}, groups={})
    file = predictions.Predictions(
        folder / f"{name}.paper.jsonl", about={}, hashes=dict.fromkeys(
            (r.id for r in requests), prompt_hash
        ),
    )  # fmt: skip
    for answer in answers:
        file.add(answer)
    file.close()
    scored = scores.scored(name, {"subset": "paper"}, requests, answers, [found], notes=[])
    scores.save(folder, folder.name, [scored])
    return folder


def test_two_folders(tmp_path):
    a = saved(tmp_path / "a", [0, 0, 1, 1, 0, 0, 0, 0], texts=["ab"])
    b = saved(tmp_path / "b", [1, 1, 1, 0, 1, 1, 1, 1], texts=["abcd"])
    saved(b, [0.5] * 8, name="mmlu")
    pairs, alone = compare_runs.compare([a, b])
    assert alone == [f"mmlu.paper is in {b} alone"]
    table = list(compare_runs.lines(pairs))
    assert table[0].split() == ["benchmark", "metric", "A", "B", "B", "-", "A,", "95", "%", "p",
                                "up", "down", "test"]  # fmt: skip
    row = next(line for line in table if line.startswith("gsm8k.paper  m "[:13]))
    assert "25.0 ± 2.0" in row and "87.5 ± 2.0" in row and "+62.5 [" in row
    assert row.split()[-4:] == ["6", "1", "McNemar,", "exact"]
    assert "0.125" in row
    assert "+2" in table[-1] and "characters" in table[-1]
    out = tmp_path / "out.jsonl"
    assert compare_runs.write_differences(pairs, [a, b], out) == 7
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "3", "4", "5", "6", "7"]
    assert lines[0] == {
        "benchmark": "gsm8k.paper", "metric": "m", "id": "0", "group": "a", "a": 0.0, "b": 1.0,
        "texts_a": ["ab"], "texts_b": ["abcd"],
    }  # fmt: skip
    groups = list(scores.group_lines(pairs[0], ["A", "B"]))
    assert groups[2].split() == ["a", "25.0", "2", "100.0", "4"]


def test_pending_is_never_a_number(tmp_path):
    folders = [
        saved(tmp_path / "a", [0, 1], pending=True), saved(tmp_path / "b", [0, 1], pending=True)
    ]  # fmt: skip
    pairs, _ = compare_runs.compare(folders)
    row = list(compare_runs.lines(pairs))[1]
    assert row.split() == ["gsm8k.paper", "m", "pending", "pending"]
    assert compare_runs.write_differences(pairs, folders, tmp_path / "out.jsonl") == 0


def test_what_is_not_the_same_is_refused(tmp_path):
    a = saved(tmp_path / "a", [0, 1, 0, 1])
    other = saved(tmp_path / "other", [0, 1, 0, 1], prompt_hash="1" * 16)
    fewer = saved(tmp_path / "fewer", [0, 1])
    mmlu = saved(tmp_path / "mmlu", [0, 1], name="mmlu")
    with pytest.raises(
        validation.UsageError, match=r"4 of 4 prompts differ \('0', '1', '2', '3'\)"
    ):
        compare_runs.compare([a, other])
    with pytest.raises(validation.UsageError, match=r"2 items are in \S+/a alone \('2', '3'\)"):
        compare_runs.compare([a, fewer])
    with pytest.raises(validation.UsageError, match="expected a benchmark that both have"):
        compare_runs.compare([a, mmlu])
    with pytest.raises(validation.UsageError, match=r"nowhere/scores\.json does not exist"):
        compare_runs.compare([a, tmp_path / "nowhere"])
    (a / scores.FILE).write_text("{")
    with pytest.raises(validation.UsageError, match="holds no scores"):
        compare_runs.compare([a, a])


def test_scores_of_another_model_are_not_mixed(tmp_path):
    folder = saved(tmp_path / "a", [0, 1])
    _, found = scores.load(folder)
    with pytest.raises(validation.UsageError, match="has scores of a; these are of b"):
        scores.save(folder, "b", found)


def test_the_table_beside_the_paper(tmp_path):
    folder = tmp_path / "a"
    for name in ("mmlu", "gsm8k", "bbh", "tydiqa", "codex_eval", "alpaca_eval", "truthfulqa"):
        saved(folder, [0, 1], name=name)
    found = scores.load(folder)[1]
    table = list(scores.lines(found, paper_row="Tulu 2+DPO 7B"))
    assert next(line for line in table if line.startswith("gsm8k")).split()[:6] == [
        "gsm8k", "m", "50.0", "±", "2.0", "34.5"
    ]  # fmt: skip
    averages = [line.split() for line in table if line.startswith("average")]
    assert averages[0] == ["average", "of", "7", "pending", "56.3", "[1]"]
    assert averages[1] == ["average", "of", "8", "pending"]
    assert "[1] the paper contradicts itself: its columns give 57.1" in table
    assert any(line.startswith("OLMo 4 has of Tulu 2+DPO 7B: mmlu 50.7") for line in table)
    assert scores.averages(found, "paper")["average_7"] == ["toxigen"]
    saved(folder, [0, 1, 0, 0], name="toxigen")
    found = scores.load(folder)[1]
    averages = scores.averages(found, "paper")
    assert averages["average_7"][0] == pytest.approx((6 * 50 + 75) / 7)
    assert averages["average_8"][0] == pytest.approx((7 * 50 + 75) / 8)
    assert averages["average_7"][1] == pytest.approx(100 * 0.01 * 7**0.5 / 7)
    assert any(line.startswith("average of 8") and "53.1 ±" in line for line in
               scores.lines(found, paper_row=None))  # fmt: skip
