"""Judges at a real local server that fails in every way, killed and started again; a model that
says yes; what is kept of verdicts."""

import json
import math
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from chat_server import Server

from tulu_jax import validation
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import judges, sandbox
from tulu_jax.evals.benchmark import Question

JUDGING = Sampling(max_new_tokens=100)
FAST = dict(model="judge", first_wait=0.01, timeout=5)


@pytest.fixture
def serve():
    servers = []

    def start(answers) -> Server:
        servers.append(Server(answers))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def question(name: str, kind="alpaca_eval", text: str | None = None) -> Question:
    messages = [{"role": "system", "content": "Judge."}, {"role": "user", "content": text or name}]
    return Question(id=name, kind=kind, prompt=messages, sampling=JUDGING)


def asked(server: Server, questions, path, **options):
    """What `answer` gives, and what it says."""
    said = []
    judge = judges.Endpoint(server.url, **FAST | options)
    found = judges.answer(questions, {"alpaca_eval": judge}, cache=path, say=said.append)
    return found, said


def test_answers_are_kept_and_cost_is_told_before(serve, tmp_path):
    path, server = tmp_path / "judged" / "verdicts.jsonl", None
    server = serve(lambda text, _: f"about {text}")
    questions = [question("a"), question("b"), question("c", text="a"), question("x", kind="truth")]
    price = judges.Price(read=30.0, written=60.0, source="a test")
    found, said = asked(server, questions, path, price=price)
    assert found == {"a": ["about a"], "b": ["about b"], "c": ["about a"]}
    assert server.texts() == {"a": 1, "b": 1}  # of one content once
    assert {key: server.asked[0][key] for key in ("model", "max_tokens", "temperature")} == {
        "model": "judge", "max_tokens": 100, "temperature": 0.0
    }  # fmt: skip
    cost = (2 * 3 * 30 + 200 * 60) / 1e6  # "Judge." is two tokens, roughly, and a letter one
    assert (
        "asked 2 questions: about 6 tokens to read, at most 200 to write; at most about "
        in (said[0])
    )
    assert f"{cost:.2f} US dollars (price: a test)" in said[0]

    found, said = asked(server, questions + [question("d")], path)
    assert found["a"] == ["about a"] and found["d"] == ["about d"]
    assert server.texts() == {"a": 1, "b": 1, "d": 1}
    assert "1 questions" in said[0] and "its price is not known" in said[0]
    found, said = asked(server, questions, path, model="another")
    assert server.texts()["a"] == 2 and len(path.read_text().splitlines()) == 5
    same_id = [question("a"), question("a", text="b")]
    assert asked(server, same_id, path)[0] == {"a": ["about a", "about b"]}


def test_prices_say_where_they_are_from():
    assert judges.PRICES["gpt-4-0613"].source.endswith("unverified")


def test_errors_that_pass_are_tried_again(serve, tmp_path):
    """500, 429, an answer that is no JSON, one without a text, a stall; then a verdict."""
    wrong = [
        (500, '{"error": {"message": "down"}}'),
        (429, "{}"),
        (200, "<html>"),
        (200, '{"choices": []}'),
        (200, '{"choices": [{"index": 0, "message": {"content": null}}]}'),
        2.0,
    ]
    server = serve(lambda text, number: wrong[number - 1] if number <= len(wrong) else "good")
    found, _ = asked(server, [question("a")], tmp_path / "v.jsonl", tries=7, timeout=1)
    assert found == {"a": ["good"]} and len(server.asked) == 7


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, '{"error": {"message": "out of order"}}'), "status 500: .*out of order.*3 tries"),
        ((401, '{"error": {"message": "no such key"}}'), "refuses a request with status 401"),
        ((200, "<html>"), "is not JSON; .*3 tries"),
        (5.0, "no answer within 0.5 s; .*3 tries"),
    ],
)
def test_errors_that_stay_are_named(serve, tmp_path, answer, said):
    server = serve(lambda text, number: answer)
    with pytest.raises(validation.UsageError, match=said):
        asked(server, [question("a")], tmp_path / "v.jsonl", tries=3, timeout=0.5)


def test_a_server_that_is_down_is_named(tmp_path):
    judge = judges.Endpoint("http://127.0.0.1:9/v1", **FAST, tries=2)
    with pytest.raises(validation.UsageError, match=r"cannot be reached .*after 2 tries"):
        judges.answer([question("a")], {"alpaca_eval": judge}, cache=tmp_path / "v.jsonl")


def test_what_was_paid_before_a_failure_is_kept(serve, tmp_path):
    path, is_down = tmp_path / "v.jsonl", threading.Event()

    def answers(text, number):
        if text == "q7":
            is_down.set()
        return (500, "{}") if is_down.is_set() else f"about {text}"

    server, questions = serve(answers), [question(f"q{n}") for n in range(20)]
    with pytest.raises(validation.UsageError, match="status 500"):
        asked(server, questions, path, concurrency=1, tries=2)
    assert len(path.read_text().splitlines()) == 7
    assert sum(server.texts().values()) == 7 + 2  # what follows a failure is not begun
    server.answers = lambda text, number: f"about {text}"
    found, _ = asked(server, questions, path)
    assert found == {f"q{n}": [f"about q{n}"] for n in range(20)}
    assert server.texts()["q3"] == 1


def test_a_question_that_is_too_long_does_not_stop_the_others(serve, tmp_path):
    error = {"message": "too long", "code": "context_length_exceeded"}
    server = serve(
        lambda text, _: (400, json.dumps({"error": error})) if text == "long" else "fine"
    )
    path = tmp_path / "v.jsonl"
    found, said = asked(server, [question("long"), question("short")], path)
    assert found == {"long": [""], "short": ["fine"]}
    assert said[-1].startswith("1 questions have no verdict") and said[-1].endswith(": long")
    asked(server, [question("long"), question("short")], path)
    assert server.texts() == {"long": 2, "short": 1}  # a judge with more room may take it


RUN = """
    import sys
    from tulu_jax.evals import judges
    from tulu_jax.evals.benchmark import Question
    from tulu_jax.decode.sampling import Sampling
    url, path = sys.argv[1:]
    judge = judges.Endpoint(url, model="judge", concurrency=2)
    questions = [
        Question(id=f"q{n}", kind="mt_bench", sampling=Sampling(max_new_tokens=9),
                 prompt=[{"role": "user", "content": f"q{n}"}])
        for n in range(40)
    ]
    judges.answer(questions, {"mt_bench": judge}, cache=path)
"""


def test_a_killed_process_goes_on_where_it_was(serve, tmp_path):
    """With a half line at the end, as a kill in the middle of a write leaves."""
    path, pause = tmp_path / "v.jsonl", threading.Event()

    def answers(text, number):
        if number > 10:
            pause.wait(60)
        return f"about {text}"

    server = serve(answers)
    command = [sys.executable, "-c", textwrap.dedent(RUN), server.url, str(path)]
    process = subprocess.Popen(command)
    while not (path.exists() and path.read_bytes().count(b"\n") == 10):
        assert process.poll() is None
        time.sleep(0.05)
    with pytest.raises(validation.UsageError, match="another process judges with this file"):
        asked(server, [question("q0")], path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pause.set()
    with path.open("ab") as file:
        file.write(b'{"key": "0f')
    done = []
    judge = judges.Endpoint(server.url, **FAST)
    questions = [
        Question(
            id=f"q{n}", kind="mt_bench", sampling=Sampling(max_new_tokens=9),
            prompt=[{"role": "user", "content": f"q{n}"}],
        )
        for n in range(40)
    ]  # fmt: skip
    found = judges.answer(
        questions, {"mt_bench": judge}, cache=path, progress=lambda *numbers: done.append(numbers)
    )
    assert found == {f"q{n}": [f"about q{n}"] for n in range(40)}
    assert done[0] == (11, 40) and done[-1] == (40, 40)
    assert max(server.texts().values()) <= 2  # twice only what was under way
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_that_holds_no_verdicts_is_refused(serve, tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text('{"key": "k", "text": "t"}\n{"id": 3}\n')
    with pytest.raises(validation.UsageError, match=r"v.jsonl, line 2: found .*expected a verdict"):
        asked(serve(lambda text, _: "x"), [question("a")], path)
    with pytest.raises(validation.UsageError, match="found a bucket, expected a local file"):
        asked(serve(lambda text, _: "x"), [question("a")], "gs://bucket/v.jsonl")


def test_programs_are_executed_by_a_judge(tmp_path):
    try:
        judge = judges.Execution(seconds=2.0)
    except validation.UsageError as error:
        pytest.skip(str(error))
    program = sandbox.Program(
        solution="def f(x):\n    return x", setup="", checks="assert f(1) == 1", entry_point="f"
    )
    questions = [
        Question(id="h/0", kind="execution", prompt=program.as_text()),
        Question(id="h/1", kind="execution", prompt="assert 1 == 2"),
    ]
    options = dict(cache=tmp_path / "v.jsonl", say=lambda line: None)
    found = judges.answer(questions, {"execution": judge}, **options)
    assert found == {"h/0": ["passed"], "h/1": ["failed: "]}


def test_yes_or_no_is_the_probability_of_the_model(tokenizer, tmp_path):
    """By our own decoder; a question's chance does not depend on the others."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tulu_jax.decode.decoder import Decoder
    from tulu_jax.models import llama
    from tulu_jax.models.config import ExecutionConfig, LlamaConfig
    from tulu_jax.serving.engine import OwnEngine

    config = LlamaConfig(
        vocab_size=512, num_layers=1, embed_dim=16, mlp_dim=32, num_heads=2, num_kv_heads=2,
        head_dim=8, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, max_positions=256,
    )  # fmt: skip
    execution = ExecutionConfig(compute_dtype="float32", remat=False)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32),
        llama.abstract_params(config, "float32"),
    )
    decoder = Decoder(config, execution, slots=2, page=16, row_length=64)
    engine = OwnEngine(decoder, params, tokenizer, mesh=None)
    judge = judges.YesOrNo(engine, tokenizer, name="a judge")
    texts = [f"Q: {word * n}?\nA: yes\nTrue:" for n, word in enumerate(("why ", "who "), 1)]
    chances = judge.chances(texts)
    assert [judge.chances([text])[0] for text in texts] == pytest.approx(chances, rel=1e-6)
    ids = [tokenizer.bos_id, *tokenizer.encode(f"{texts[0]} yes")]
    start = len([tokenizer.bos_id, *tokenizer.encode(texts[0])])
    logits = llama.logits(
        config, execution, params, tokens=jnp.asarray([ids]),
        segment_ids=jnp.ones((1, len(ids)), jnp.int32), positions=jnp.arange(len(ids))[None],
    )  # fmt: skip
    logps = jax.nn.log_softmax(logits[0].astype(jnp.float32))
    assert ids[:start] == [tokenizer.bos_id, *tokenizer.encode(texts[0])]
    expected = math.exp(sum(float(logps[n - 1, ids[n]]) for n in range(start, len(ids))))
    assert chances[0] == pytest.approx(expected, rel=1e-4)
    questions = [Question(id=f"t{n}", kind="truth", prompt=t) for n, t in enumerate(texts)]
    found = judges.answer(questions, {"truth": judge}, cache=tmp_path / "v.jsonl")
    assert found == {
        f"t{n}": ["yes" if chance >= 0.5 else "no"] for n, chance in enumerate(chances)
    }
