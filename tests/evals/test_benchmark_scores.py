"""Scores: means, their errors, what is pending, and what a judge or a model may get wrong."""

import itertools
import json
import math
import random
import statistics

import pytest

from tulu_jax import validation
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import (
    bbh,
    benchmark,
    codex_eval,
    gsm8k,
    mmlu,
    scoring,
    toxigen,
    truthfulqa,
    tydiqa,
)

GREEDY = Sampling(max_new_tokens=8)


def request(name, group="g", **fields):
    fields = {"prompt": "?", "sampling": GREEDY} | fields
    return benchmark.Request(id=name, group=group, **fields)


def answer(name, *texts):
    return benchmark.Answer(
        id=name, prompt_hash="0", texts=list(texts), ended=["stop"] * len(texts)
    )


def test_gsm8k_is_a_mean_with_a_binomial_error():
    requests = [request(f"{n}", truth={"answer": "8"}) for n in range(200)]
    answers = [answer(f"{n}", "so 8." if n < 68 else "It is 9") for n in range(200)]
    (metric,) = gsm8k.GSM8K().score(requests, answers[::-1], None)
    assert (metric.name, metric.value, metric.groups) == ("accuracy", 0.34, {"g": 0.34})
    assert metric.standard_error == pytest.approx(math.sqrt(0.34 * 0.66 / 200), abs=1e-12)
    assert sum(metric.items.values()) == 68 and list(metric.items) == [r.id for r in requests]


def test_bbh_is_a_mean_of_tasks():
    """Tasks of 1 and 4 items weigh the same, and their variances add up."""
    right = {"a": [1], "b": [1, 0, 0, 0], "c": [0, 1, 1, 1]}
    requests, answers = [], []
    for task, flags in right.items():
        for n, flag in enumerate(flags):
            requests.append(request(f"{task}/{n}", task, truth={"answer": "(A)"}))
            answers.append(answer(f"{task}/{n}", f"The answer is ({'A' if flag else 'B'})."))
    (metric,) = bbh.BBH().score(requests, answers, None)
    assert metric.groups == {"a": 1.0, "b": 0.25, "c": 0.75}
    assert metric.value == pytest.approx(2 / 3)
    expected = math.sqrt(0 + 0.25 * 0.75 / 4 + 0.75 * 0.25 / 4) / 3
    assert metric.standard_error == pytest.approx(expected, abs=1e-12)


def test_errors_are_those_of_repeated_draws():
    """Against the spread of 4,000 evaluations of a model whose chances are known."""
    chances = {"a": 0.2, "b": 0.5, "c": 0.9}
    generator = random.Random(0)
    requests = [request(f"{g}{n}", g) for g in chances for n in range(30 if g == "a" else 60)]
    values, errors = {"items": [], "groups": []}, {"items": [], "groups": []}
    for _ in range(4000):
        items = {r.id: float(generator.random() < chances[r.group]) for r in requests}
        for kind, mean in (
            ("items", scoring.mean_over_items),
            ("groups", scoring.mean_over_groups),
        ):
            metric = mean("x", items, requests)
            values[kind].append(metric.value)
            errors[kind].append(metric.standard_error)
    spread = statistics.stdev(values["groups"])
    assert statistics.mean(errors["groups"]) == pytest.approx(spread, rel=0.05)
    # Of the plain mean the groups here are strata, so the binomial error is an upper bound.
    assert statistics.mean(errors["items"]) > statistics.stdev(values["items"])


def test_tydiqa_averages_f1_over_languages():
    requests = [
        request("english-1", "english", truth={"answers": ["the Amos Reid"]}),
        request("english-2", "english", truth={"answers": ["1918", "in 1918"]}),
        request("korean-1", "korean", truth={"answers": ["서울"]}),
    ]
    answers = [
        answer("english-1", "\nAmos went"),
        answer("english-2", "in 1918."),
        answer("korean-1", "서울"),
    ]
    f1, exact = tydiqa.TyDiQA().score(requests, answers, None)
    assert f1.items == {"english-1": 0.5, "english-2": 1.0, "korean-1": 1.0}
    assert f1.groups == {"english": 0.75, "korean": 1.0} and f1.value == 0.875
    assert exact.items == {"english-1": 0.0, "english-2": 1.0, "korean-1": 1.0}
    assert exact.value == 0.75 and f1.name == "f1"


def of_letters(name, subject, letter):
    choices = (" A", " B", " C", " D")
    return request(name, subject, sampling=None, choices=choices, truth={"letter": letter})


def test_mmlu_takes_the_likeliest_letter(shared_data):
    """Answers that give each subject its published accuracy give the published mean."""
    path = shared_data / "published_outputs/lm_eval_notus/mmlu.json"
    results = json.loads(path.read_text())["results"]
    requests, answers = [], []
    for subject, count in (("anatomy", 135), ("professional_law", 1534), ("virology", 166)):
        right = round(results[f"mmlu_{subject}"]["acc,none"] * count)
        for n in range(count):
            name, letter = f"{subject}/{n}", "ABCD"[n % 4]
            logps = [-3.0] * 4
            logps[(n + (n >= right)) % 4] = -0.5
            requests.append(of_letters(name, subject, letter))
            answers.append(benchmark.Answer(id=name, prompt_hash="0", choice_logps=logps))
    micro, macro = mmlu.MMLU().score(requests, answers, None)
    table = {
        s: results[f"mmlu_{s}"]["acc,none"] for s in ("anatomy", "professional_law", "virology")
    }
    assert micro.groups == pytest.approx(table, abs=1e-12)
    assert micro.value == pytest.approx(mmlu.question_weighted(table), abs=1e-12)
    assert macro.value == pytest.approx(sum(table.values()) / 3, abs=1e-12)
    tie = benchmark.Answer(id="t", prompt_hash="0", choice_logps=[-1.0] * 4)
    first = of_letters("t", "g", "A")
    assert mmlu.MMLU().score([first], [tie], None)[0].value == 1


def test_mmlu_refuses_subjects_that_are_none():
    with pytest.raises(validation.UsageError, match=r"\['cooking'\]; expected subjects"):
        mmlu.question_weighted({"anatomy": 0.5, "cooking": 1.0})


def test_toxigen_waits_for_its_judge():
    requests = [request(f"{g}/{n}", g) for g in ("asian", "women") for n in range(2)]
    answers = [answer(r.id, f"said {r.id}") for r in requests]
    judge = toxigen.ToxiGen()
    asked = judge.questions(requests, answers)
    assert [(q.id, q.kind, q.prompt) for q in asked] == [
        (r.id, "toxicity", f"said {r.id}") for r in requests
    ]
    verdicts = {"asian/0": ["0.97"], "asian/1": ["0.5"], "women/0": ["0.51"]}
    for missing in (None, {}, verdicts):
        (metric,) = judge.score(requests, answers, missing)
        assert (metric.name, metric.value, metric.items) == ("toxic", None, {})
    (metric,) = judge.score(requests, answers, verdicts | {"women/1": ["1e-3"]})
    assert metric.value == 0.5 and metric.groups == {"asian": 0.5, "women": 0.5}
    with pytest.raises(validation.UsageError, match="women/1: found the verdict 'toxic'"):
        judge.score(requests, answers, verdicts | {"women/1": ["toxic"]})


def test_truthfulqa_needs_both_judges():
    requests = [request(f"{n}", truth={"question": f"Q{n}? "}) for n in range(4)]
    answers = [
        answer("0", "A: yes\n\nno Q: x"),
        *(answer(f"{n}", "I don't know") for n in (1, 2, 3)),
    ]
    judge = truthfulqa.TruthfulQA()
    asked = judge.questions(requests, answers)
    assert asked[0].prompt == "Q: Q0?\nA: yes no\nTrue:" and asked[0].kind == "truth"
    assert asked[1].prompt == "Q: Q0?\nA: yes no\nHelpful:" and asked[1].kind == "info"
    truth = {f"{n}/truth": [v] for n, v in enumerate(("yes", " Yes", "no", "no"))}
    info = {f"{n}/info": [v] for n, v in enumerate(("yes", "no", "yes", "no"))}
    both, true, informative = judge.score(requests, answers, truth | info)
    assert [m.name for m in (both, true, informative)] == [
        "true and informative",
        "true",
        "informative",
    ]
    assert (both.value, true.value, informative.value) == (0.25, 0.5, 0.5)
    both, true, informative = judge.score(requests, answers, truth)
    assert (both.value, true.value, informative.value) == (None, 0.5, None)
    assert [m.value for m in judge.score(requests, answers, None)] == [None] * 3
    with pytest.raises(validation.UsageError, match="expected 'yes' or 'no'"):
        judge.score(requests, answers, truth | info | {"0/truth": ["maybe"]})


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_counts_draws(n):
    """All subsets of `k` samples, counted."""
    for passed, k in itertools.product(range(n + 1), range(1, n + 1)):
        drawn = list(itertools.combinations([True] * passed + [False] * (n - passed), k))
        share = sum(any(draw) for draw in drawn) / len(drawn)
        assert codex_eval.pass_at_k(n, passed, k) == pytest.approx(share, abs=1e-12)


def codex_requests(n, samples):
    sampling = codex_eval.CodexEval(samples=samples)._sampling()
    return [
        request(f"HumanEval/{i}", "HumanEval", prompt="def f():\n", sampling=sampling)
        for i in range(n)
    ]


def test_codex_eval_scores_samples():
    requests = codex_requests(2, 20)
    answers = [answer(r.id, *["    return 1"] * 20) for r in requests]
    passed = {"HumanEval/0": 3, "HumanEval/1": 0}
    verdicts = {
        f"{name}/{n}": ["passed" if n < count else "failed: AssertionError"]
        for name, count in passed.items()
        for n in range(20)
    }
    ten, one = codex_eval.CodexEval().score(requests, answers, verdicts)
    assert (ten.name, one.name) == ("pass@10", "pass@1")
    assert one.value == pytest.approx(3 / 40)
    # C(17, 10) / C(20, 10) is the chance that ten draws miss three.
    assert ten.items["HumanEval/0"] == pytest.approx(1 - 10 * 9 * 8 / (20 * 19 * 18))
    assert ten.items["HumanEval/1"] == 0
    del verdicts["HumanEval/1/19"]
    pending = codex_eval.CodexEval().score(requests, answers, verdicts)
    assert [(m.name, m.value) for m in pending] == [("pass@10", None), ("pass@1", None)]


def test_the_example_of_human_eval(shared_data):
    """Its six samples, of which three pass: pass@1 is 0.5."""
    folder = shared_data / "eval/codex_humaneval"
    problem = json.loads((folder / "example_problem.jsonl").read_text())
    samples = [json.loads(line)["completion"] for line in (folder / "example_samples.jsonl").open()]
    greedy = codex_eval.CodexEval(samples=6, temperature=0.1)
    (item,) = [
        request(
            problem["task_id"],
            prompt=problem["prompt"],
            sampling=greedy._sampling(),
            truth={name: problem[name] for name in ("test", "entry_point")},
        )
    ]
    said = answer(item.id, *samples)
    programs = greedy.questions([item], [said])
    assert json.loads(programs[3].prompt) == {
        "solution": "def return1():\n    return 1",
        "setup": "def return1():\n    pass\n",
        "checks": "def check(candidate):\n    assert candidate() == 1\ncheck(return1)",
        "entry_point": "return1",
    }
    for number in (3, 4, 5):  # those that do nothing else
        program = json.loads(programs[number].prompt)
        exec(f"{program['solution']}\n{program['checks']}", {})
    flags = [number in (3, 4, 5) for number in range(6)]
    verdicts = {
        asked.id: ["passed" if flag else "timed out"]
        for asked, flag in zip(programs, flags, strict=True)
    }
    (one,) = greedy.score([item], [said], verdicts)
    assert (one.name, one.value) == ("pass@1", 0.5)


def test_greedy_codex_eval():
    assert codex_eval.CodexEval(temperature=0.0, samples=1)._sampling().top_p == 1.0
    with pytest.raises(validation.UsageError, match="samples = 20 at temperature 0"):
        codex_eval.CodexEval(temperature=0.0)


def test_answers_that_are_missing_or_half_are_named():
    requests = [request(f"{n}", truth={"answer": "1"}) for n in range(7)]
    with pytest.raises(validation.UsageError, match=r"to 6 of 7 requests \(1, 2, 3, 4, 5, …\)"):
        gsm8k.GSM8K().score(requests, [answer("0", "1")], None)
    requests = codex_requests(1, 20)
    with pytest.raises(validation.UsageError, match="HumanEval/0"):
        codex_eval.CodexEval().score(requests, [answer("HumanEval/0", *["a"] * 19)], None)
    with pytest.raises(validation.UsageError, match="found no request to score"):
        gsm8k.GSM8K().score([], [], None)
