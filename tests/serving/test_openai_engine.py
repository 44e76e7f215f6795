"""A server that is down, slow, or answers nonsense: each is named in one line, after as many tries
as are meant."""

import http.server
import json
import socket
import threading
import time

import pytest

from tulu_jax import validation
from tulu_jax.decode.sampling import Sampling
from tulu_jax.serving import openai_engine

GREEDY = Sampling(max_new_tokens=4)
GOOD = {
    "choices": [
        {
            "index": 0, "text": " warm", "finish_reason": "stop", "token_ids": [7, 2],
            "logprobs": {"token_logprobs": [-0.5, -0.25], "top_logprobs": None},
        }
    ]
}  # fmt: skip
SCORED = {
    "choices": [
        {
            "index": 0, "text": "a b c", "finish_reason": "length",
            "logprobs": {
                "token_logprobs": [None, -2.0, -0.5],
                "top_logprobs": [None, {"x": -1.0, "b": -2.0}, {"c": -0.5}],
            },
        }
    ]
}  # fmt: skip


class Server(http.server.ThreadingHTTPServer):
    """Gives the `answers` in turn, the last one again and again: (status, body), or seconds to
    wait."""

    daemon_threads = True

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked, self.ended = answers, [], threading.Event()
        self.most = self.now = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        server = self.server
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
            server.asked.append(json.loads(body))
            answer = server.answers[min(len(server.asked), len(server.answers)) - 1]
        if isinstance(answer, float):
            server.ended.wait(answer)
            answer = (200, GOOD)
        status, content = answer
        content = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        with server.lock:
            server.now -= 1
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.send_header("content-type", "application/json")
        if status == 429:
            self.send_header("retry-after", "0.01")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *about):
        pass


@pytest.fixture
def server():
    started = []

    def start(*answers):
        started.append(Server(answers))
        return started[-1]

    yield start
    for one in started:
        one.ended.set()
        one.shutdown()
        one.server_close()


def engine(url, **options):
    options = dict(model="m", tries=3, timeout=60, first_wait=0.01) | options
    return openai_engine.OpenAIEngine(url, **options)


def test_what_is_asked_and_what_is_read(server):
    one = server((200, GOOD))
    sampling = Sampling(
        max_new_tokens=4, temperature=0.5, top_p=0.9, top_k=5, stop=("\n",), stop_ids=(9,)
    )
    (replies,) = engine(one.url).generate([[1, 5]], sampling, seeds=[3])
    assert replies[0].text == " warm" and replies[0].ended == "stop"
    assert (replies[0].ids, replies[0].token_logps) == ([7, 2], [-0.5, -0.25])
    assert one.asked == [
        {
            "model": "m", "prompt": [1, 5], "max_tokens": 4, "temperature": 0.5, "top_p": 0.9,
            "n": 1, "stop": ["\n"], "seed": 3, "logprobs": 0, "top_k": 5, "stop_token_ids": [9],
            "return_token_ids": True,
        }
    ]  # fmt: skip
    (replies,) = engine(one.url, details=False).generate(["Hi"], GREEDY, seeds=None)
    assert replies[0].ids is None and replies[0].token_logps is None
    assert not {"logprobs", "return_token_ids", "top_k"} & one.asked[-1].keys()
    one.answers = [(200, SCORED)]
    (score,) = engine(one.url).score([[1]], [[5, 6]])
    assert score.token_logps == [-2.0, -0.5] and score.likeliest_logps == [-1.0, -0.5]
    assert not score.is_greedy and score.likeliest is None
    (score,) = engine(one.url).score([[1, 5]], [[6]])
    assert score.is_greedy and one.asked[-1]["prompt"] == [1, 5, 6]


def test_what_passes_is_tried_again(server):
    one = server((500, "oh"), (429, {"error": {"message": "busy"}}), (200, "<html>"), (200, GOOD))
    ((reply,),) = engine(one.url, tries=4).generate([[1]], GREEDY, seeds=None)
    assert reply.text == " warm" and len(one.asked) == 4


def test_requests_are_under_way_together_and_not_more_than_may(server):
    one = server(0.1)
    replies = engine(one.url, concurrency=4).generate([[1]] * 12, GREEDY, seeds=None)
    assert len(replies) == 12 and 2 <= one.most <= 4


CHOICE = GOOD["choices"][0]
NONSENSE = [
    ((200, "<html>Welcome</html>"), "answered '<html>Welcome</html>', which is not JSON"),
    ((200, "[]"), "answered '[]'; expected an object"),
    ((200, ""), "answered '', which is not JSON"),
    ((200, {"object": "list"}), "expected 'choices' in it, a list"),
    ((200, {"choices": []}), "gave 0 choices; expected 1"),
    ((200, {"choices": ["x"]}), "answered 'x'; expected 'index' in it"),
    ((200, {"choices": [CHOICE | {"text": None}]}), "expected 'text' in it, a str"),
    ((200, {"choices": [CHOICE | {"finish_reason": "tool"}]}), "ended a reply for 'tool'"),
    ((503, "no\nupstream"), "the server says status 503: no upstream"),
    ((429, {"error": {"message": "slow down"}}), "says status 429: slow down"),
]


@pytest.mark.parametrize(("answer", "said"), NONSENSE)
def test_nonsense_is_named_after_so_many_tries(server, answer, said):
    one = server(answer)
    with pytest.raises(validation.UsageError) as error:
        engine(one.url).generate([[1]], GREEDY, seeds=None)
    assert said in str(error.value) and str(error.value).endswith(", after 3 tries")
    assert one.url in str(error.value) and "\n" not in str(error.value)
    assert len(one.asked) == 3


def test_what_cannot_pass_is_tried_once(server):
    one = server((400, {"error": {"message": "prompt is too\nlong"}}))
    with pytest.raises(validation.UsageError, match=r"status 400: prompt is too long$"):
        engine(one.url).generate([[1]] * 3, GREEDY, seeds=None)
    assert len(one.asked) <= 3


def test_a_server_that_is_down_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(validation.UsageError, match=r"cannot be reached .* after 3 tries$"):
            engine(url).generate([[1]], GREEDY, seeds=None)
        with pytest.raises(validation.UsageError, match=r"cannot be reached .* after 2 tries$"):
            engine(url, model=None, tries=2)


def test_a_slow_server_is_named(server):
    one = server(120.0)
    begin = time.monotonic()
    with pytest.raises(validation.UsageError, match=r"no answer within 0.2 s.* after 2 tries$"):
        engine(one.url, timeout=0.2, tries=2).generate([[1]], GREEDY, seeds=None)
    assert time.monotonic() - begin < 100


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (None, "gives no log-probabilities of a prompt"),
        ({"token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]}, "of a prompt of 3 ids"),
        (
            {"token_logprobs": [None, "x", -1.0], "top_logprobs": [None, {"a": -1.0}, {"a": -1.0}]},
            "gave the log-probability 'x'; expected a number, after 3 tries",
        ),
        (
            {"token_logprobs": [None, -1.0, -1.0], "top_logprobs": [None, {}, {"a": -1.0}]},
            "gave the top log-probabilities {}",
        ),
    ],
)
def test_a_server_that_cannot_score_is_named(server, about, said):
    one = server((200, {"choices": [GOOD["choices"][0] | {"logprobs": about}]}))
    with pytest.raises(validation.UsageError) as error:
        engine(one.url).score([[1]], [[5, 6]])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_wrong_requests_are_named_before_any_is_sent(server):
    one = server((200, GOOD))
    with pytest.raises(validation.UsageError, match=r"no seeds for 1 prompts at temperature 1\.0"):
        drawn = Sampling(max_new_tokens=4, temperature=1.0)
        engine(one.url).generate([[1]], drawn, seeds=None)
    with pytest.raises(validation.UsageError, match=r"continuation 0 is \[\]; expected ids"):
        engine(one.url).score([[1]], [[]])
    with pytest.raises(validation.UsageError, match="expected that of a server"):
        engine("localhost:8000")
    assert not one.asked
