"""MT-Bench against what FastChat published: judge texts, prompts, formats; Vicuna's reviews."""

import json
import math

import pytest
from etils import epath

from tulu_jax import validation
from tulu_jax.evals import mt_bench
from tulu_jax.evals.benchmark import Answer

BENCH = mt_bench.MTBench()


@pytest.fixture(scope="module")
def requests(shared_data):
    return BENCH.requests(epath.Path(shared_data / "eval"), None, is_chat=True)


@pytest.fixture(scope="module")
def granite(shared_data):
    return epath.Path(shared_data / "published_outputs/mt_bench_granite")


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered(requests, turns: dict[int, list[str]]) -> list[Answer]:
    return [
        Answer(id=r.id, prompt_hash="-", texts=turns[r.truth["question_id"]], ended=["stop"] * 2)
        for r in requests
    ]


def test_published_judge_texts_have_their_published_scores(granite):
    rows = lines(granite / "gpt-4_single.jsonl")
    assert [mt_bench.rating(row["judgment"]) for row in rows] == [row["score"] for row in rows]
    assert sum(row["score"] == -1 for row in rows) == 83


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[5]]", 5),
        ("[[7.5]] and then [[9]]", 7.5),
        ("[1] before [[10]]", 10),
        ("only [3] here, and [4]", 3),
        ("[[8.]]", 8.0),
        ("[[08]]", 8),
        ("[[ 5 ]], [[5/10]], [[rating]], [[-2]]", -1),
        ("5", -1),
        ("", -1),
    ],
)
def test_rating(text, rating):
    assert mt_bench.rating(text) == rating


@pytest.mark.parametrize("name", ["alpaca-13b", "gpt35"])
def test_vicuna_reviews_have_their_published_scores(shared_data, name):
    """All 80 of a file; the first line has them in 77."""
    folder = epath.Path(shared_data / "published_outputs/vicuna_reviews")
    rows = lines(folder / f"review_{name}_vicuna-13b.jsonl")
    assert [mt_bench.review_scores(row["text"]) for row in rows] == [
        tuple(row["score"]) for row in rows
    ]
    first = [mt_bench.review_scores(row["text"].split("\n")[0]) for row in rows]
    assert first.count(None) == 3


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("7.5 9\nBoth…", (7.5, 9)),
        ("8, 9", (8, 9)),
        ("8 9 10\nAssistant 1: 3\nAssistant 2: 4 (good)", (3, 4)),
        ("Words.\nAssistant 1: 3\nAssistant 2: 4\nNo:\nAssistant 1: 5\nAssistant 2: 6", (5, 6)),
        ("Words.\nIn the end the scores are (1, 5) for both.", (1, 5)),
        ("Assistant 1 is better than Assistant 2 by 3 points.", None),
        ("", None),
    ],
)
def test_review_scores(text, scores):
    assert mt_bench.review_scores(text) == scores


def test_questions_are_those_that_fastchat_asked(requests, granite):
    """The judge's prompts of a published file, all of them, from the answers they are about."""
    turns = {
        row["question_id"]: row["choices"][0]["turns"]
        for row in lines(granite / "model_answer.jsonl")
    }
    questions = {q.id: q for q in BENCH.questions(requests, answered(requests, turns))}
    assert len(questions) == 160
    for row in lines(granite / "gpt-4_single.jsonl"):
        expected = row["user_prompt"]
        for text in turns[row["question_id"]]:  # FastChat strips replies; that file has them raw
            expected = expected.replace(text, text.strip())
        asked = questions[f"mt_bench/{row['question_id']}/{row['turn']}"]
        assert asked.prompt[1]["content"] == expected
    systems = {question.prompt[0]["content"][:28] for question in questions.values()}
    assert systems == {"You are a helpful assistant.", "Please act as an impartial j"}


def test_requests_are_the_published_ones(requests):
    by_group = {request.group: request for request in requests}
    assert len(requests) == 80 and len(by_group) == 8
    drawn = {name: one.sampling.temperature for name, one in by_group.items()}
    assert drawn == {
        "writing": 0.7, "roleplay": 0.7, "reasoning": 0.0, "math": 0.0, "coding": 0.0,
        "extraction": 0.0, "stem": 0.1, "humanities": 0.1,
    }  # fmt: skip
    assert {request.sampling.max_new_tokens for request in requests} == {1024}
    assert all(len(request.then) == 1 for request in requests)
    with_reference = {request.group for request in requests if request.truth["reference"]}
    assert with_reference == {"math", "reasoning", "coding"}
    json.dumps([request.truth for request in requests])


def test_score(requests):
    """Means of turns and of categories; turns without a rating are left out."""
    answers = answered(requests, {r.truth["question_id"]: ["a", "b"] for r in requests})
    assert {m.value for m in BENCH.score(requests, answers, None)} == {None}
    verdicts = {q.id: ["Fine. Rating: [[8]]"] for q in BENCH.questions(requests, answers)}
    writing = [request.id for request in requests if request.group == "writing"]
    for name in writing:
        verdicts[f"{name}/2"] = ["[[4]]"]
    score, first, second, unrated = BENCH.score(requests, answers, verdicts)
    assert (score.value, first.value, second.value) == (7.75, 8.0, 7.5)
    assert score.groups["writing"] == 6.0 and score.groups["math"] == 8.0
    assert score.items[writing[0]] == 6.0 and unrated.value == 0.0
    values = [6.0] * 10 + [8.0] * 70  # conversations, each the mean of its turns
    error = math.sqrt(sum((v - 7.75) ** 2 for v in values) / 79 / 80)
    assert score.standard_error == pytest.approx(error)
    verdicts[f"{writing[0]}/1"] = ["no rating"]
    score, first, _, unrated = BENCH.score(requests, answers, verdicts)
    assert score.value == pytest.approx((160 * 7.75 - 8) / 159) and first.value == 8.0
    assert unrated.value == 1 / 160 and unrated.is_percent and not score.is_percent
    del verdicts[f"{writing[0]}/1"]
    assert BENCH.score(requests, answers, verdicts)[0].value is None


def test_judgments_of_fastchat_are_scored(requests, granite):
    rows = mt_bench.judgments(granite / "gpt-4_single.jsonl")
    found = {metric.name: metric.value for metric in mt_bench.score_judgments(rows, requests)}
    rated = [row["score"] for row in rows if row["score"] != -1]
    assert found["score"] == pytest.approx(sum(rated) / len(rated))
    assert found["unrated"] == 83 / 107
    scores_alone = [{key: value for key, value in row.items() if key != "judgment"} for row in rows]
    again = {m.name: m.value for m in mt_bench.score_judgments(scores_alone, requests)}
    assert again == found


def test_files_that_are_no_judgments(tmp_path, granite):
    path = tmp_path / "gpt-4_single.jsonl"
    text = (granite / "gpt-4_single.jsonl").read_text().splitlines()[0]
    path.write_text(f'{text}\n{{"question_id": 1}}\n{text[:80]}\n')
    with pytest.raises(validation.UsageError, match="lines 2, 3 are no judgments"):
        mt_bench.judgments(path)
    other = json.dumps(json.loads(text) | {"model": "other"})
    path.write_text(f"{text}\n{other}\n")
    with pytest.raises(validation.UsageError, match="granite-7b-lab, other; expected one of"):
        mt_bench.judgments(path)
    assert len(mt_bench.judgments(path, model="other")) == 1


def test_answers_are_as_fastchat_has_them(requests, granite):
    published = lines(granite / "model_answer.jsonl")
    turns = {row["question_id"]: row["choices"][0]["turns"] for row in published}
    answers = answered(requests, turns)
    text = mt_bench.model_answers(requests, answers, model="granite", time=1.5)
    made = [json.loads(line) for line in text.splitlines()]
    assert [set(row) for row in made] == [set(row) for row in published]
    assert [row["question_id"] for row in made] == [row["question_id"] for row in published]
    for row in made:
        stripped = [turn.strip() for turn in turns[row["question_id"]]]
        assert row["choices"] == [{"index": 0, "turns": stripped}]


def test_a_base_model_is_refused(shared_data):
    with pytest.raises(validation.UsageError, match="made of conversations"):
        BENCH.requests(epath.Path(shared_data / "eval"), None, is_chat=False)
