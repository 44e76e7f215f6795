"""The server in a process of its own, asked by OpenAI's client; our two engines agree."""

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import commands
import gin
import jax
import numpy as np
import openai
import pytest

from tulu_jax import cli, trained, validation
from tulu_jax.decode.decoder import Decoder
from tulu_jax.decode.sampling import Sampling
from tulu_jax.serving import engine as engine_lib
from tulu_jax.serving import openai_engine

NAME, SLOTS = "small", 4
MESSAGES = [{"role": "user", "content": "What is the opposite of hot?"}]
TEXT = "The opposite of hot is"


@pytest.fixture(scope="module")
def gin_file(tmp_path_factory, tokenizer_dir):
    """A small model in place of that of tulu_tiny."""
    path = tmp_path_factory.mktemp("serving") / "small.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\n"
        "from tulu_jax.models import config\n"
        "include 'tulu_tiny_sft.gin'\n"
        f"TOKENIZER = {tokenizer_dir!r}\n"
        "config.LlamaConfig.num_layers = 2\n"
        "config.LlamaConfig.embed_dim = 32\n"
        "config.LlamaConfig.mlp_dim = 64\n"
        "config.LlamaConfig.num_heads = 4\n"
        "config.LlamaConfig.num_kv_heads = 2\n"
        "config.LlamaConfig.head_dim = 8\n"
    )
    return path


@contextlib.contextmanager
def serving(gin_file, *flags):
    """A server's process and its address, once it listens."""
    environment = dict(os.environ, XLA_FLAGS="")  # one device
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tulu_jax.serve", f"--gin_file={gin_file}", "--initial"),
            *("--port=0", f"--slots={SLOTS}", "--steps_per_visit=4", *flags),
        ],
        cwd=gin_file.parent, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        found = re.search(r"at (http://\S+/v1);", line)
        if not found:
            process.kill()
            pytest.fail(f"the server said {line!r} and {process.stderr.read()}")
        yield process, found[1]
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def url(gin_file):
    with serving(gin_file) as (_, address):
        yield address


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def own(gin_file):
    """Our engine with the parameters that are served."""
    config = cli.load(str(gin_file), [], workdir=str(gin_file.parent / "run"))
    gin.clear_config()
    model = trained.Generator(config, initial=True, max_new_tokens=1)
    decoder = Decoder(config.model, config.execution, slots=SLOTS, steps=4)
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(np.asarray(leaf)), model.params)
    return engine_lib.OwnEngine(decoder, params, model.tokenizer, mesh=None)


@pytest.fixture(scope="module")
def other(url):
    return openai_engine.OpenAIEngine(url, concurrency=8, tries=1, timeout=120)


def health(url):
    with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=60) as answer:
        return json.load(answer)


def until(true, seconds=60):
    for _ in range(seconds * 20):
        if true():
            return
        time.sleep(0.05)
    pytest.fail("still not so")


def greedy(own, prompt, most=12, **changes):
    ((reply,),) = own.generate([prompt], Sampling(max_new_tokens=most, **changes), seeds=None)
    return reply


def test_completions_of_texts_and_ids(client, own):
    reply = greedy(own, TEXT)
    ids = [own.tokenizer.bos_id, *own.tokenizer.encode(TEXT)]
    for prompt in (TEXT, ids):
        answer = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=12, temperature=0, logprobs=0
        )
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == (reply.text, reply.ended)
        np.testing.assert_allclose(choice.logprobs.token_logprobs, reply.token_logps, atol=1e-5)
        assert "".join(choice.logprobs.tokens) == reply.text
        assert choice.logprobs.text_offset[0] == 0
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(reply.ids))
    several = client.completions.create(
        model=NAME, prompt=[ids, ids[:4], TEXT], max_tokens=5, temperature=0
    )
    texts = [greedy(own, prompt, 5).text for prompt in (ids, ids[:4], TEXT)]
    assert [choice.text for choice in several.choices] == texts
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert [model.id for model in client.models.list()] == [NAME]


def test_chats_have_the_template_of_training(client, own):
    prompt = engine_lib.chat_prompt(MESSAGES, own.tokenizer, chat="spec")
    reply = greedy(own, prompt)
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    for messages in (MESSAGES, parts):
        answer = client.chat.completions.create(
            model=NAME, messages=messages, max_completion_tokens=12, temperature=0,
            logprobs=True, top_logprobs=1,
        )  # fmt: skip
        (choice,) = answer.choices
        assert choice.message.content == reply.text and choice.message.role == "assistant"
        assert choice.finish_reason == reply.ended
        content = choice.logprobs.content
        logps = [token.logprob for token in content]
        np.testing.assert_allclose(logps, reply.token_logps, atol=1e-5)
        assert [token.top_logprobs[0].logprob for token in content] == logps
        assert answer.usage.prompt_tokens == len(prompt)


def test_a_stream_says_what_a_whole_answer_does(client):
    request = dict(
        model=NAME, messages=MESSAGES, max_tokens=20, temperature=1, seed=3, n=2, logprobs=True
    )
    whole = client.chat.completions.create(**request)
    texts, logps, ended, roles = ["", ""], [[], []], [None, None], []
    usage = None
    for chunk in client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            roles += [choice.delta.role] * (choice.delta.role is not None)
            texts[choice.index] += choice.delta.content
            if choice.logprobs:
                logps[choice.index] += [token.logprob for token in choice.logprobs.content]
            ended[choice.index] = choice.finish_reason or ended[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert logps == [[t.logprob for t in choice.logprobs.content] for choice in whole.choices]
    assert ended == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage and roles == ["assistant"] * 2
    chunks = list(
        client.completions.create(
            model=NAME, prompt=TEXT, max_tokens=20, temperature=0, stream=True, logprobs=0
        )
    )
    whole = client.completions.create(
        model=NAME, prompt=TEXT, max_tokens=20, temperature=0, logprobs=0
    )
    assert len(chunks) > 1
    for name in ("tokens", "token_logprobs", "text_offset"):
        parts = [part for c in chunks for part in getattr(c.choices[0].logprobs, name)]
        assert parts == getattr(whole.choices[0].logprobs, name)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_log_probabilities_of_a_prompt(client, own):
    ids = [own.tokenizer.bos_id, *own.tokenizer.encode(TEXT)]
    (score,) = own.score([ids[:1]], [ids[1:]])
    reply = greedy(own, ids, 1)
    for most, made in ((0, []), (1, reply.token_logps)):
        answer = client.completions.create(
            model=NAME, prompt=ids, max_tokens=most, temperature=0, echo=True, logprobs=1
        )
        (choice,) = answer.choices
        said = choice.logprobs
        assert said.token_logprobs[0] is None and said.top_logprobs[0] is None
        expected = np.array([*score.token_logps, *made])
        np.testing.assert_allclose(said.token_logprobs[1:], expected, atol=1e-5)
        best = np.array([*score.likeliest_logps, *made])
        found = [next(iter(top.values())) for top in said.top_logprobs[1:]]
        np.testing.assert_allclose(found, best, atol=1e-5)
        assert "".join(said.tokens) == "<s>" + TEXT + (reply.text if most else "")
        assert choice.text == TEXT + (reply.text if most else "")


def test_stop_strings_and_stop_ids(client, own):
    reply = greedy(own, TEXT, 20)
    stop = reply.text[4:7]
    ended = greedy(own, TEXT, 20, stop=(stop,))
    answer = client.completions.create(
        model=NAME, prompt=TEXT, max_tokens=20, temperature=0, stop=[stop, "never said"]
    )
    (choice,) = answer.choices
    assert choice.text == ended.text and stop not in choice.text
    assert choice.finish_reason == "stop" and reply.text.startswith(choice.text)
    pieces = client.completions.create(
        model=NAME, prompt=TEXT, max_tokens=20, temperature=0, stop=stop, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == ended.text
    answer = client.completions.create(
        model=NAME, prompt=TEXT, max_tokens=20, temperature=0,
        extra_body={"stop_token_ids": [reply.ids[2]], "return_token_ids": True},
    )  # fmt: skip
    cut = reply.ids[: reply.ids.index(reply.ids[2]) + 1]
    assert answer.choices[0].token_ids == cut and answer.choices[0].finish_reason == "stop"


def test_requests_of_many_clients_get_what_each_gets_alone(client, own):
    """They share the slots: twelve requests, of other lengths and settings, in four."""
    requests = [
        dict(prompt=TEXT[: 3 + 2 * i], max_tokens=3 + 3 * i, seed=i, temperature=float(i % 3))
        for i in range(12)
    ]

    def ask(request):
        return client.completions.create(model=NAME, **request).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, requests))
    for request, text in zip(requests, texts, strict=True):
        sampling = Sampling(
            max_new_tokens=request["max_tokens"], temperature=request["temperature"]
        )
        ((reply,),) = own.generate([request["prompt"]], sampling, seeds=[request["seed"]])
        assert text == reply.text


ENGINE_SAMPLINGS = [
    Sampling(max_new_tokens=10),
    Sampling(max_new_tokens=10, temperature=0.8, top_p=0.9, top_k=40, samples=3, stop=("e",)),
    Sampling(max_new_tokens=10, min_new_tokens=3, temperature=1.0, stop_ids=(7, 70)),
]


@pytest.mark.parametrize("sampling", ENGINE_SAMPLINGS)
def test_both_engines_generate_the_same(own, other, sampling):
    chats = [engine_lib.chat_prompt(MESSAGES, own.tokenizer, chat="spec", prefix="Cold")]
    prompts, seeds = [*chats, [1, 5, 9, 200], "Say"], [5, 6, 4_000_000_000]
    ours, theirs = (e.generate(prompts, sampling, seeds=seeds) for e in (own, other))
    assert [len(replies) for replies in ours] == [sampling.samples] * 3
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert (a.text, a.ended, a.ids) == (b.text, b.ended, b.ids)
        np.testing.assert_allclose(a.token_logps, b.token_logps, atol=1e-5)


def test_both_engines_score_the_same(own, other):
    """Also what each of them generates greedily is greedy, and letters after a chat."""
    pairs = engine_lib.chat_continuations(
        MESSAGES, ["A", "B", "C and more"], own.tokenizer, chat="spec", prefix="The answer is: "
    )
    reply = greedy(own, TEXT, 6)
    ids = [own.tokenizer.bos_id, *own.tokenizer.encode(TEXT)]
    prompts, continuations = zip(*pairs, (ids, reply.ids), ([1], [5, 6, 7]), strict=True)
    ours, theirs = (e.score(prompts, continuations) for e in (own, other))
    assert ours[-2].is_greedy
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.token_logps, b.token_logps, atol=1e-5)
        np.testing.assert_allclose(a.likeliest_logps, b.likeliest_logps, atol=1e-5)
        assert a.is_greedy == b.is_greedy and b.likeliest is None


def test_continuations_are_encoded_with_what_is_before_them(tokenizer):
    options = dict(chat="spec", prefix="The answ")
    prompt = engine_lib.chat_prompt(MESSAGES, tokenizer, **options)
    ((before, added),) = engine_lib.chat_continuations(MESSAGES, ["er is"], tokenizer, **options)
    whole = engine_lib.chat_prompt(MESSAGES, tokenizer, chat="spec", prefix="The answer is")
    assert before + added == whole and prompt[: len(before)] == before
    with pytest.raises(validation.UsageError, match="'' adds no token"):
        engine_lib.chat_continuations(MESSAGES, [""], tokenizer, **options)


LONG = dict(max_tokens=400, temperature=1.0, n=64)  # 25,600 tokens in four slots


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots(url, client, stream):
    before = health(url)["given_up"]
    host = url.split("/")[2]
    connection = http.client.HTTPConnection(host, timeout=60)
    body = json.dumps({"model": NAME, "prompt": TEXT, "stream": stream, **LONG})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    if stream:
        assert connection.getresponse().read(6) == b"data: "
    until(lambda: health(url)["running"] == SLOTS)
    connection.sock.close() if connection.sock else connection.close()
    connection.close()
    until(lambda: health(url)["given_up"] == before + 1)
    until(lambda: health(url)["running"] == 0)
    assert health(url)["waiting"] == 0
    assert client.completions.create(model=NAME, prompt=TEXT, max_tokens=1).choices


WRONG = [
    ({"max_token": 5}, "max_token", "unknown parameter 'max_token'; did you mean 'max_tokens'?"),
    ({"presence_penalty": 0.5}, "presence_penalty", "is not supported by this server"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported by this server"),
    ({"max_tokens": 0}, "max_tokens", "expected at least 1"),
    ({"max_tokens": "many"}, "max_tokens", 'max_tokens = "many": expected a whole number'),
    ({"temperature": -1}, "temperature", "temperature = -1: expected a number from 0"),
    ({"temperature": 0, "top_p": 0.5}, "top_p", "at temperature 0"),
    ({"temperature": 0, "n": 2}, "n", "n = 2 at temperature 0"),
    ({"n": 1000}, "n", "expected a whole number from 1 to 128"),
    ({"stop": [""]}, "a", "a string of `stop` is empty"),
    ({"stop": 5}, "stop", "expected a string or a list of strings"),
    ({"logprobs": 5}, "logprobs", "expected a whole number from 0 to 1"),
    ({"logprobs": 1}, "logprobs", "at temperature 0 alone"),
    ({"seed": -1}, "seed", "expected a whole number from 0"),
    ({"echo": True, "stream": True}, "echo", "leave out one of echo and stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream = true"),
    ({"prompt": [1, 600]}, "prompt", "has the id 600; the model's vocabulary has 512"),
    ({"prompt": [1] * 600}, "prompt", "has 600 ids; expected at most 511"),
    ({"prompt": []}, "prompt", "none empty"),
    ({"prompt": [[1], []]}, "prompt", "none empty"),
    ({"prompt": None}, "prompt", "prompt is missing"),
    ({"stop_token_ids": list(range(3, 12))}, "prompt", "there are 10 stop ids"),
]


@pytest.mark.parametrize(("changes", "param", "said"), WRONG)
def test_what_is_wrong_is_named(client, changes, param, said):
    body = {"model": NAME, "prompt": TEXT, **changes}
    with pytest.raises(openai.BadRequestError) as error:
        client.post("/completions", body=body, cast_to=object)
    assert said in error.value.body["message"]
    assert (error.value.status_code, error.value.param) == (400, param)
    assert error.value.type == "invalid_request_error"


WRONG_CHATS = [
    ({"messages": []}, "messages", "expected a non-empty list"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "unknown role 'robot'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages", "content is a NoneType"),
    ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
    ({"top_logprobs": 1}, "top_logprobs", "needs logprobs = true"),
    ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "are the same; give one"),
    ({"prompt": "x"}, "prompt", "unknown parameter 'prompt'"),
    ({"messages": [{"role": "user", "content": "x " * 900}]}, "messages", "expected at most 511"),
]


@pytest.mark.parametrize(("changes", "param", "said"), WRONG_CHATS)
def test_what_is_wrong_with_a_chat_is_named(client, changes, param, said):
    body = {"model": NAME, "messages": MESSAGES, **changes}
    with pytest.raises(openai.BadRequestError) as error:
        client.post("/chat/completions", body=body, cast_to=object)
    assert said in error.value.body["message"] and error.value.param == param


def test_what_is_no_request_is_named(url, client):
    def post(path, data, kind="application/json"):
        request = urllib.request.Request(url + path, data, {"content-type": kind})
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=60)
        return error.value.code, json.load(error.value)["error"]["message"]

    status, said = post("/completions", b'{"model": ')
    assert status == 400 and "the body is not JSON" in said
    assert post("/completions", b"[]")[1] == "the body is []; expected an object"
    assert post("/completions", b"{}", "text/plain")[0] == 415
    assert post("/embeddings", b"{}")[0] == 404
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; this server has"):
        client.completions.create(model="gpt", prompt=TEXT)


def test_a_port_that_is_taken_is_named(url, gin_file, capsys):
    port = url.split(":")[2].split("/")[0]
    assert commands.run("serve", f"--gin_file={gin_file}", f"--port={port}") == 2
    said = capsys.readouterr().err.strip()
    assert f"--port={port}: Address already in use; expected an address" in said
    assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_a_full_line_and_a_stop(gin_file):
    """Its own server: more than may wait are told to come later; SIGTERM ends it, also with a
    stream under way."""
    with serving(gin_file, "--most_waiting=1") as (process, url):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        stream = client.completions.create(model=NAME, prompt=TEXT, stream=True, **LONG)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="1 requests wait already"):
            client.completions.create(model=NAME, prompt=TEXT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
