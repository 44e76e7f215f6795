"""AlpacaEval against what alpaca_eval published: scores of annotations, prompts, order, parser."""

import collections
import json
import math

import pytest
from etils import epath

from tulu_jax import validation
from tulu_jax.evals import alpaca_eval
from tulu_jax.evals.benchmark import Answer

BENCH = alpaca_eval.AlpacaEval()
FIRST_WINS = "[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]"
SECOND_WINS = "[{'model': 'model_1', 'rank': 2}, {'model': 'model_2', 'rank': 1}]"


@pytest.fixture(scope="module")
def requests(shared_data):
    return BENCH.requests(epath.Path(shared_data / "eval"), None, is_chat=True)


@pytest.fixture(scope="module")
def published(shared_data):
    """The folder of tulu-2-dpo-7b."""
    return epath.Path(shared_data / "published_outputs/alpaca_eval/tulu-2-dpo-7b")


def answered(requests, texts) -> list[Answer]:
    return [
        Answer(id=r.id, prompt_hash="-", texts=[text], ended=["stop"])
        for r, text in zip(requests, texts, strict=True)
    ]


def test_published_annotations_give_the_published_numbers(requests, published):
    rows = alpaca_eval.annotations(published / "alpaca_eval_gpt4_annotations.json")
    rate, length = alpaca_eval.score_annotations(rows, requests)
    assert rate.value * 100 == pytest.approx(84.22360248447205, abs=1e-12)
    assert rate.standard_error * 100 == pytest.approx(1.2855613371106336, abs=1e-12)
    assert collections.Counter(rate.items.values()) == {1.0: 678, 0.0: 127}
    assert int(length.value) == 1663 and not length.is_percent
    assert set(rate.items) == {request.id for request in requests}
    assert set(rate.groups) == {"helpful_base", "koala", "oasst", "selfinstruct", "vicuna"}


def test_other_annotations(tmp_path):
    """Draws as 0 or 1.5, weighted preferences of later annotators, and rows without one."""
    preferences = [2, 1, 0, 1.5, 1.25, None, float("nan"), -1, 2.0]
    rows = [
        {"instruction": f"i{n % 3}", "output_1": "a", "output_2": "b" * n, "preference": preference}
        for n, preference in enumerate(preferences)
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    rate, length = alpaca_eval.score_annotations(alpaca_eval.annotations(path))
    values = [1.0, 0.0, 0.5, 0.5, 0.25, 1.0]
    assert list(rate.items.values()) == values
    mean = sum(values) / 6
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 5 / 6)
    assert rate.value == pytest.approx(mean) and rate.standard_error == pytest.approx(error)
    assert length.value == 4.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ('{"instruction": 1}', "no annotations"),
        ('[{"instruction": "a", "output_2": "b", "preference": "2"}]', "row 0: preference"),
        ('[{"instruction": "a"}, 3]', "row 0: output_2; row 1: instruction, output_2"),
    ],
)
def test_files_that_are_no_annotations(tmp_path, text, said):
    path = tmp_path / "annotations.json"
    path.write_text(text)
    with pytest.raises(validation.UsageError, match=said):
        alpaca_eval.annotations(path)


@pytest.mark.parametrize(
    ("text", "rank"),
    [
        (FIRST_WINS, 1),
        (SECOND_WINS, 2),
        ("[{'model': 'model_2', 'rank': 1}, {'model': 'model_1', 'rank': 2}]", 2),
        ('({"rank": 1.0, "model": "model_1"},)', 1),
        ("[{'model': 'model_1', 'rank': 3}, {'model': 'model_2', 'rank': 1}]", None),
        ("[{'model': 'model_2', 'rank': 1}]", None),
        ("[{'model': 'model_1', 'rank': '1'}]", None),
        ("{'model_1': 1}", None),
        (f"Here you are: {FIRST_WINS}", None),
        (FIRST_WINS[:-1], None),
        ("__import__('os').abort()", None),
        ("[" * 10_000, None),
        ("", None),
    ],
)
def test_rank(text, rank):
    assert alpaca_eval.rank(text) == rank


def test_questions_are_the_published_prompt_in_the_published_order(requests, published):
    """The prompt is put together here by replacing, as alpaca_eval does."""
    outputs = json.loads((published / "model_outputs.json").read_text())
    answers = answered(requests, [row["output"] for row in outputs])
    questions = {question.id: question for question in BENCH.questions(requests, answers)}
    file = epath.Path(alpaca_eval.__file__).parent / "alpaca_eval_gpt4.txt"
    system, user = file.read_text().split("<|im_end|>\n<|im_start|>user\n")
    switched = 0
    for request, row in zip(requests, outputs, strict=True):
        reference = request.truth["reference"]
        if row["output"] == reference:
            assert request.id not in questions
            continue
        first, second = reference, row["output"]
        if alpaca_eval.is_switched(row["instruction"]):
            first, second, switched = second, first, switched + 1
        expected = user.removesuffix("<|im_end|>")
        for name, value in (("output_2", second), ("output_1", first)):
            expected = expected.replace("{" + name + "}", value)
        expected = expected.replace("{instruction}", row["instruction"]).strip()
        asked = questions[request.id]
        assert asked.prompt[1] == {"role": "user", "content": expected}
        assert asked.prompt[0]["content"] == system.split("\n", 1)[1].strip()
        assert asked.sampling.max_new_tokens == 100 and asked.sampling.temperature == 0
    assert len(questions) == 804 and 350 < switched < 450


def test_score_undoes_the_order(requests):
    """A judge that always likes the answer it sees first likes the model's where it is first."""
    answers = answered(requests, [f"answer {n}" for n in range(len(requests))])
    questions = BENCH.questions(requests, answers)
    (rate, _) = BENCH.score(requests, answers, {q.id: [FIRST_WINS] for q in questions})
    switched = [alpaca_eval.is_switched(r.truth["instruction"]) for r in requests]
    assert list(rate.items.values()) == [float(one) for one in switched]


def test_a_missing_judge_is_pending_and_nonsense_is_left_out(requests):
    few = requests[:4]
    answers = answered(few, ["a", "bb", "ccc", few[3].truth["reference"]])
    pending, length = BENCH.score(few, answers, None)
    assert pending.value is None and not pending.items
    assert length.value == (6 + len(answers[3].texts[0])) / 4
    verdicts = {few[0].id: [FIRST_WINS], few[1].id: [SECOND_WINS]}
    assert BENCH.score(few, answers, verdicts)[0].value is None
    rate, _ = BENCH.score(few, answers, verdicts | {few[2].id: ["I like both."]})
    assert set(rate.items) == {few[0].id, few[1].id, few[3].id}
    assert rate.items[few[3].id] == 0.5  # the very reference is a draw, and nobody is asked
    nothing = {request.id: [""] for request in few[:3]}
    assert BENCH.score(few[:3], answers[:3], nothing)[0].value is None


def test_model_outputs_are_as_alpaca_eval_has_them(requests, published):
    rows = json.loads((published / "model_outputs.json").read_text())
    answers = answered(requests, [row["output"] for row in rows])
    made = json.loads(alpaca_eval.model_outputs(requests, answers, generator="tulu-2-dpo-7b"))
    assert made == rows


def test_a_base_model_is_asked_the_instruction_alone(shared_data):
    raw = BENCH.requests(epath.Path(shared_data / "eval"), None, is_chat=False)
    assert raw[0].prompt.startswith("What are the names of some famous actors")
    assert raw[0].sampling.max_new_tokens == 8192 and raw[0].sampling.temperature == 0
