"""Requests and their answers: what is asked, what is kept, and that a stopped evaluation ends as if
it had not been stopped."""

import dataclasses
import json

import builders
import pytest
import small_models
from completions_server import Server

from tulu_jax import validation
from tulu_jax.data import tulu_tiny
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import predictions, run
from tulu_jax.evals.benchmark import Answer, Request
from tulu_jax.serving import engine as engine_lib
from tulu_jax.serving import openai_engine

ABOUT = {"model": "small", "switches": {"subset": "paper"}}
GREEDY = Sampling(max_new_tokens=6)
DRAWN = Sampling(max_new_tokens=6, temperature=0.9, samples=3)


@pytest.fixture(scope="module")
def own(tokenizer):
    return small_models.own_engine(tokenizer)


def requests() -> list[Request]:
    """Of every kind: greedy, drawn, with a prefix, raw, of two turns, and with choices."""
    asked = [messages for messages, _ in tulu_tiny.held_out()[:10]]
    kinds = [
        dict(sampling=GREEDY),
        dict(sampling=DRAWN),
        dict(sampling=GREEDY, prefix="The answer is:"),
        dict(prompt="Opposite of hot?\n", sampling=GREEDY),
        dict(sampling=GREEDY, then=("And of cold?",)),
        dict(sampling=dataclasses.replace(GREEDY, temperature=0.7), then=("Why?",)),
        *[dict(choices=(" yes", " no", " a cow"), prefix="The answer is:")] * 3,
        dict(prompt="Hot or cold?", choices=(" hot", " cold")),
    ]
    return [
        Request(**dict(id=f"q/{n}", group="abc"[n % 3], prompt=messages) | kind)
        for n, (messages, kind) in enumerate(zip(asked, kinds, strict=True))
    ]


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return run.encode("made.paper", requests(), tokenizer, chat="spec", is_cap=False)


@pytest.fixture(scope="module")
def whole(own, prompts, tmp_path_factory):
    """The bytes that one run without a stop leaves, and its answers."""
    path = tmp_path_factory.mktemp("whole") / "made.paper.jsonl"
    answers = run.answers(own, prompts, path, about=ABOUT, shows=False)
    return path.read_bytes(), answers, path.with_name("made.paper.about.json").read_bytes()


def put(path, whole):
    """The files of that run, at `path`."""
    path.write_bytes(whole[0])
    path.with_name("made.paper.about.json").write_bytes(whole[2])


def test_white_space_of_a_user_is_asked_as_it_is(tokenizer):
    """As the paper asked: one LF more before the answer of a question that ends with one."""
    messages = [{"role": "user", "content": "Opposite of hot?\n"}]
    request = Request(id="0", group="", prompt=messages, prefix="A:", sampling=GREEDY)
    (asked,) = run.encode("made", [request], tokenizer, chat="spec", is_cap=False).asked
    text = "<|user|>\nOpposite of hot?\n\n<|assistant|>\nA:"
    assert asked.prompt == [tokenizer.bos_id, *tokenizer.encode(text)]


def test_what_is_asked_is_what_an_engine_is_asked_by_hand(own, prompts, whole, tokenizer):
    asked, answers = requests(), whole[1]
    assert [answer.id for answer in answers] == [request.id for request in asked]

    def reply(ids, sampling=GREEDY, seed=0):
        (samples,) = own.generate([ids], sampling, seeds=[seed])
        return [sample.text for sample in samples]

    def chat(messages, prefix=""):
        return engine_lib.chat_prompt(messages, tokenizer, chat="spec", prefix=prefix)

    assert answers[0].texts == reply(chat(asked[0].prompt))
    drawn = reply(chat(asked[1].prompt), DRAWN, run.seed_of("made.paper", "q/1", 0))
    assert answers[1].texts == drawn and len(set(drawn)) > 1
    assert answers[2].texts == reply(chat(asked[2].prompt, "The answer is:"))
    raw = [tokenizer.bos_id, *tokenizer.encode("Opposite of hot?\n")]
    assert answers[3].texts == reply(raw)
    assert answers[3].prompt_hash == run.hash_of([raw])
    first = reply(chat(asked[4].prompt))
    both = [
        *asked[4].prompt,
        {"role": "assistant", "content": first[0]},
        {"role": "user", "content": "And of cold?"},
    ]
    assert answers[4].texts == first + reply(chat(both))
    pairs = engine_lib.chat_continuations(
        asked[6].prompt, asked[6].choices, tokenizer, chat="spec", prefix="The answer is:"
    )
    scores = [score.logps for score in own.score(*map(list, zip(*pairs, strict=True)))]
    assert answers[6].choice_logps == pytest.approx(scores, abs=1e-4)
    assert answers[6].texts == [] and len(answers[9].choice_logps) == 2
    assert {why for answer in answers for why in answer.ended} <= {"stop", "length"}


def test_an_evaluation_goes_on_behind_any_byte(own, prompts, whole, tmp_path, caplog):
    path = tmp_path / "made.paper.jsonl"
    content, answers, _ = whole
    put(path, whole)
    for kept in (0, 7, len(content) // 3, len(content) - 1):
        path.write_bytes(content[:kept])
        caplog.clear()
        assert run.answers(own, prompts, path, about=ABOUT, shows=False) == answers
        assert path.read_bytes() == content
        half = content[:kept].rpartition(b"\n")[2]
        assert ("was half written, and is dropped" in caplog.text) == bool(half)


def test_a_second_turn_goes_on_behind_the_first(own, prompts, whole, tmp_path):
    path = tmp_path / "made.paper.jsonl"
    content, answers, _ = whole
    put(path, whole)
    rows = [json.loads(line) for line in content.splitlines()]
    rows[5]["texts"], rows[5]["ended"] = rows[5]["texts"][:1], rows[5]["ended"][:1]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run.answers(own, prompts, path, about=ABOUT, shows=False) == answers
    assert path.read_bytes() == content


def test_answers_do_not_depend_on_their_order(own, whole, tokenizer, tmp_path):
    backwards = run.encode("made.paper", requests()[::-1], tokenizer, chat="spec", is_cap=False)
    found = run.answers(own, backwards, tmp_path / "x.jsonl", about=ABOUT, shows=False)
    for answer, other in zip(found[::-1], whole[1], strict=True):
        assert (answer.texts, answer.ended) == (other.texts, other.ended)
        assert answer.choice_logps == pytest.approx(other.choice_logps, abs=1e-4)


class Stopped(Exception):
    pass


def test_what_was_answered_before_a_failure_is_kept(own, prompts, whole, tmp_path):
    """An engine that fails in the middle, as a server does."""

    class Failing:
        max_length = own.max_length

        def __init__(self, most):
            self.left = most

        def score(self, *arguments):
            return own.score(*arguments)

        def generate(self, asked, sampling, *, seeds, done):
            def counted(place, replies):
                done(place, replies)
                self.left -= 1
                if not self.left:
                    raise Stopped

            return own.generate(asked, sampling, seeds=seeds, done=counted)

    path = tmp_path / "made.paper.jsonl"
    for most in (1, 2, 100):
        try:
            run.answers(Failing(most), prompts, path, about=ABOUT, shows=False)
        except Stopped:
            assert most < 100
    assert path.read_bytes() == whole[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[2].update(prompt_hash="0" * 16), r"1 rows whose prompt_hash.*'q/2'"),
        (lambda rows: rows[3].update(id="other"), r"1 requests that the benchmark does not have"),
        (lambda rows: rows[3].pop("texts"), r"line 4 is no prediction: expected the fields"),
        (lambda rows: rows[0].update(texts="a"), r"line 1 is no prediction"),
        (lambda rows: rows[0].update(choice_logps=[True]), r"line 1 is no prediction"),
    ],
)
def test_rows_of_something_else_are_refused(own, prompts, whole, tmp_path, change, said):
    path = tmp_path / "made.paper.jsonl"
    put(path, whole)
    rows = [json.loads(line) for line in whole[0].splitlines()]
    change(rows)
    before = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(before)
    with pytest.raises(validation.UsageError, match=said):
        run.answers(own, prompts, path, about=ABOUT, shows=False)
    assert path.read_text() == before


def test_another_model_template_or_setting_is_refused(own, prompts, whole, tmp_path, tokenizer):
    path = tmp_path / "made.paper.jsonl"
    put(path, whole)
    with pytest.raises(validation.UsageError, match=r"made with model = 'small', and now it is 'b"):
        run.answers(own, prompts, path, about=ABOUT | {"model": "big"}, shows=False)
    changed = dataclasses.replace(requests()[0], sampling=Sampling(max_new_tokens=7))
    other = run.encode(
        "made.paper", [changed, *requests()[1:]], tokenizer, chat="spec", is_cap=False
    )
    with pytest.raises(validation.UsageError, match=r"made with sampling = "):
        run.answers(own, other, path, about=ABOUT, shows=False)
    other = run.encode("made.paper", requests(), tokenizer, chat="paper", is_cap=False)
    with pytest.raises(validation.UsageError, match=r"chat = 'spec', and now it is 'paper'"):
        run.answers(own, other, path, about=ABOUT, shows=False)
    (path.with_name("made.paper.about.json")).unlink()
    with pytest.raises(validation.UsageError, match="nobody knows what was asked"):
        run.answers(own, prompts, path, about=ABOUT, shows=False)
    assert path.read_bytes() == whole[0]


def test_a_line_in_the_middle_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": \n{}\n')
    with pytest.raises(validation.UsageError, match=r"x\.jsonl, line 1 is not JSON"):
        predictions.read(path)
    row = Answer(id="a\u2028b", prompt_hash="0", texts=["\x85"], ended=["stop"])
    path.write_text(json.dumps(dataclasses.asdict(row)) + "\n")
    assert predictions.read(path) == [row]


def test_prompts_that_are_too_long_are_named_all_at_once(tokenizer):
    size = builders.MODEL.max_positions
    long = [{"role": "user", "content": "cow " * size}]
    asked = [
        Request(id=f"q/{n}", group="a", prompt=prompt, sampling=Sampling(max_new_tokens=120))
        for n, prompt in enumerate([long, *[r.prompt for r in requests()[:3]]])
    ]

    def problems(asked, *, is_cap, max_length=size):
        found = run.encode("made", asked, tokenizer, chat="spec", is_cap=is_cap)
        return list(run.length_problems(found, max_length)), found

    (said,), found = problems(asked, is_cap=False)
    longest = len(found.asked[0].prompt)
    assert longest > size
    assert said.startswith("made: 4 of 4 prompts and their answers are longer than the model's 128")
    assert f"'q/0' of {longest} ids, with 120 to come; expected a model of {longest + 120}" in said
    (said,), _ = problems(asked, is_cap=True)
    assert said.startswith("made: 1 of 4 prompts")
    assert problems(asked[1:], is_cap=True)[0] == []
    assert problems(asked, is_cap=False, max_length=None)[0] == []
    turns = dataclasses.replace(asked[1], sampling=Sampling(max_new_tokens=50), then=("Why?",))
    assert len(problems([turns], is_cap=False)[0]) == 1
    assert problems([dataclasses.replace(turns, then=())], is_cap=False)[0] == []


def test_a_model_that_never_ends_is_cut_at_what_it_holds(own, tokenizer, tmp_path):
    """As AlpacaEval asks: 8,192 new tokens at most, of a model of 128 positions."""
    endless = Sampling(max_new_tokens=8192, min_new_tokens=8192)
    asked = [dataclasses.replace(request, sampling=endless, then=()) for request in requests()[:2]]
    found = run.encode("alpaca", asked, tokenizer, chat="spec", is_cap=True)
    answers = run.answers(own, found, tmp_path / "x.jsonl", about=ABOUT, shows=False)
    assert [answer.ended for answer in answers] == [["length"], ["length"]]


def test_requests_of_one_id_are_a_bug(tokenizer):
    with pytest.raises(ValueError, match="several requests have the ids 'q/0'"):
        run.encode("x", [requests()[0]] * 2, tokenizer, chat="spec", is_cap=False)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, {"error": {"message": "down"}}), "the server says status 500: down, after 2 tries"),
        ((200, "<html>"), "answered '<html>', which is not JSON"),
        ((400, {"error": {"message": "no room"}}), "refuses a request with status 400: no room"),
        (12.0, "no answer within 3 s"),
    ],
)
def test_an_endpoint_that_fails_is_named_and_what_it_said_is_kept(
    tokenizer, tmp_path, answer, said
):
    asked = [
        Request(id=str(n), group="a", prompt=messages, sampling=GREEDY)
        for n, (messages, _) in enumerate(tulu_tiny.held_out()[:6])
    ]
    prompts = run.encode("made", asked, tokenizer, chat="spec", is_cap=False)
    path, server = tmp_path / "made.jsonl", Server(answer, good=3)
    try:
        theirs = openai_engine.OpenAIEngine(
            server.url, concurrency=1, tries=2, timeout=3, details=False, first_wait=0.01
        )
        assert theirs.max_length == 100
        with pytest.raises(validation.UsageError) as error:
            run.answers(theirs, prompts, path, about=ABOUT, shows=False)
        assert said in str(error.value) and "\n" not in str(error.value)
        assert 1 <= len(predictions.read(path)) <= 3
        server.answer, before = None, len(server.asked)
        answers = run.answers(theirs, prompts, path, about=ABOUT, shows=False)
    finally:
        server.shutdown()
        server.server_close()
    assert [one.texts for one in answers] == [[" yes"]] * 6
    assert 3 <= len(server.asked) - before <= 5
