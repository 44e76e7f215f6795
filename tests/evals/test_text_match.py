"""Rules of extraction and comparison, against published flags, and SQuAD's definition."""

import collections
import itertools
import json
import re
import string

import hypothesis
import hypothesis.strategies as st
import pytest
from etils import epath

from tulu_jax.evals import bbh, data_files, gsm8k, mmlu, text_match

SYSTEMS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
PUBLISHED_BBH = {  # accuracy in percent, of the *_eval_metrics.jsonl beside the outputs upstream
    "boolean_expressions": 92.8,
    "date_understanding": 87.2,
    "object_counting": 93.2,
    "penguins_in_a_table": 79.45205479452055,
}


@pytest.fixture(scope="module")
def published(shared_data):
    return shared_data / "published_outputs"


def test_every_flag_of_the_gsm8k_solutions(published):
    """OpenAI compares the texts behind the last "A:". The paper takes the last number, without
    sign and point: of 3,520 solutions it finds the same right, and ten more, such as "A: 3.6" for
    36. As numbers they are as OpenAI has them."""
    rows = [
        json.loads(line)
        for line in (published / "gsm8k_openai/example_model_solutions.jsonl").open()
    ]
    paper, numbers = gsm8k.GSM8K(), gsm8k.GSM8K(as_numbers=True)
    only_paper = []
    for row in rows:
        right = row["ground_truth"].rpartition("A:")[2].strip().replace(",", "")
        for system in SYSTEMS:
            solution, flag = row[system]["solution"], row[system]["is_correct"]
            assert gsm8k.openai_is_correct(solution, row["ground_truth"]) == flag
            assert numbers.is_correct(solution, right) == flag
            if paper.is_correct(solution, right) != flag:
                assert not flag
                only_paper.append((solution.rpartition("A:")[2].strip(), right))
    assert len(rows) == 880 and len(only_paper) == 10
    for said, right in only_paper:
        assert re.sub(r"[.-]", "", said) == right


@pytest.mark.parametrize("task", PUBLISHED_BBH)
@pytest.mark.parametrize("punctuation_ignored", [True, False])
def test_accuracy_of_code_davinci_on_bbh(published, task, punctuation_ignored):
    outputs = json.loads((published / f"bbh_code_davinci_002_cot/{task}.json").read_text())[
        "outputs"
    ]
    benchmark = bbh.BBH(punctuation_ignored=punctuation_ignored)
    right = [benchmark.is_correct(row["prediction"], row["target"]) for row in outputs]
    assert 100 * sum(right) / len(right) == pytest.approx(PUBLISHED_BBH[task], abs=1e-9)


def test_mmlu_from_its_table_of_subjects(published):
    results = json.loads((published / "lm_eval_notus/mmlu.json").read_text())
    table = {
        name.removeprefix("mmlu_"): row["acc,none"]
        for name, row in results["results"].items()
        if name in results["configs"]
    }
    assert len(table) == 57
    whole = results["results"]["mmlu"]["acc,none"]
    assert mmlu.question_weighted(table) == pytest.approx(whole, abs=1e-12)
    assert round(whole, 5) == 0.61693
    assert sum(table.values()) / 57 == pytest.approx(0.6259229248257674, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "plain", "signed"),
    [
        ("So it is $1,234.", "1234", "1234"),
        ("12,345,678 people", "12345678", "12345678"),
        ("1,2,3", "3", "3"),
        ("-7", "7", "-7"),
        ("it is -7.5 now", "-7.5", "-7.5"),
        ("12-7", "7", "7"),
        ("x = 5 -3", "3", "-3"),
        ("It costs $-10 or 10%", "10", "10"),
        ("about .5", ".5", ".5"),
        ("18.00", "18.00", "18.00"),
        ("no number", "no number", "no number"),
        ("", "", ""),
    ],
)
def test_last_number(text, plain, signed):
    assert text_match.last_number(text, signed=False) == plain
    assert text_match.last_number(text, signed=True) == signed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is (B).", "(B)"),
        ("The answer is 3.5 apples.", "3"),
        ("the answer is no", "the answer is no"),
        ("the answer is\nyes.", "the answer is\nyes."),
        ("So the answer is A. No, the answer is B.", "A"),
        ("So the answer is > ) ].", "> ) ]"),
        ("  (C)\n", "(C)"),
        ("", ""),
    ],
)
def test_after_answer_is(text, answer):
    assert text_match.after_answer_is(text) == answer


def test_what_punctuation_decides():
    """Where answers are brackets or have a sign, the paper's comparison is blind."""
    assert text_match.is_match("> ) }", "] ] ]", punctuation_ignored=True)
    assert not text_match.is_match("> ) }", "] ] ]", punctuation_ignored=False)
    assert text_match.is_match("-5", "5", punctuation_ignored=True)
    assert not text_match.is_match("-5", "5", punctuation_ignored=False)
    assert text_match.is_match("yes", "Yes", punctuation_ignored=False)


def official(prediction: str, truth: str) -> tuple[float, float]:
    """F1 and exact match, written down from the definition of SQuAD 1.1's evaluation alone."""

    def form(text):
        kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())

    said, right = form(prediction).split(), form(truth).split()
    left = list(right)
    common = 0
    for word in said:
        if word in left:
            left.remove(word)
            common += 1
    f1 = 2 * common / (len(said) + len(right)) if common else 0.0
    return f1, float(form(prediction) == form(truth))


def test_squad_on_real_passages(shared_data):
    """Each answer against those of the question, of the next question, and its passage's start."""
    files = data_files.load(epath.Path(shared_data / "eval"), "tydiqa", allow_altered=True).content
    seen = collections.Counter()
    for path, rows in files.items():
        for row, other in itertools.pairwise(rows):
            for said in (row["answers"][-1], other["answers"][0], row["context"][:60], "", "the"):
                expected = [official(said, answer) for answer in row["answers"]]
                f1 = text_match.squad_f1(said, row["answers"])
                exact = text_match.squad_exact(said, row["answers"])
                assert f1 == pytest.approx(max(f for f, _ in expected), abs=1e-12), path
                assert exact == max(e for _, e in expected)
                seen[f1 == 1, exact == 1, f1 == 0] += 1
    assert seen[True, True, False] > 3000 and seen[False, False, True] > 3000
    assert seen[False, False, False] > 300


WORDS = st.lists(
    st.sampled_from(["a", "the", "Tree", "tree!", "baum", "дом", "-", "3.5"]), max_size=6
)


@hypothesis.given(WORDS.map(" ".join), st.lists(WORDS.map(" ".join), min_size=1, max_size=3))
@hypothesis.settings(max_examples=200, deadline=None)
def test_squad_properties(said, answers):
    f1, exact = text_match.squad_f1(said, answers), text_match.squad_exact(said, answers)
    assert 0 <= f1 <= 1 and exact in (0, 1)
    assert f1 == text_match.squad_f1(said, answers[::-1])
    assert f1 >= text_match.squad_f1(said, answers[:1])
    if exact and any(text_match.normalized(answer) for answer in answers if said):
        assert f1 == 1 or text_match.normalized(said) == ""
    shuffled = " ".join(sorted(said.split()))
    assert text_match.squad_f1(shuffled, answers) == pytest.approx(f1)
    assert text_match.squad_f1(f"The {said}.", answers) == pytest.approx(f1)
