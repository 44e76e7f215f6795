"""An `Engine` on any server that speaks OpenAI's completions, such as vLLM with an exported folder.

Prompts go as ids. What is not OpenAI's goes as vLLM names it, and only where it is needed: `top_k`,
`min_tokens`, `stop_token_ids`, `return_token_ids`. Scores are read from a prompt that is echoed
with its log-probabilities (`echo`, `logprobs`, `max_tokens` 0).
"""

import concurrent.futures
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import openai

from tulu_jax import strict_json, validation
from tulu_jax.decode.results import Score
from tulu_jax.decode.sampling import Sampling
from tulu_jax.serving.engine import Done, Ids, Reply, with_seeds

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before another try; doubled, with jitter
SHOWN = 200  # characters of what a server said
# What OpenAI, vLLM and Azure say in refusing one request.
ONE_REFUSED = ("context_length_exceeded", "maximum context length", "content_filter")
TRIED_AGAIN = (408, 409, 425, 429)  # and 500 and above


_LEFT = object()  # instead of what was not asked, since something else failed


class NotTakenError(validation.UsageError):
    """A server does not take this request for its length or its content; it may take others."""


class _AgainError(Exception):
    """A try that may do better next time, after `wait` seconds if the server said so."""

    def __init__(self, said: str, wait: float | None = None):
        super().__init__(said)
        self.wait = wait


class OpenAIEngine:
    """The model that the server at `url` (…/v1) calls `model`; None: the one that it has.

    At most `concurrency` requests are under way. One is tried `tries` times, with growing pauses
    between them; then a `UsageError` says in one line what the server did. A try ends after
    `timeout` seconds in which nothing comes. With `details`, replies have ids and
    log-probabilities, which asks for vLLM's `return_token_ids`; without, only what every server
    knows is asked for. `max_length` is that of the model; None: as the server's list of models has
    it (`max_model_len`, as vLLM tells it), if it is read and says so. The key of a server that
    wants one is `OPENAI_API_KEY` of the environment.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        concurrency: int = 32,
        tries: int = 5,
        timeout: float | int = 600,
        details: bool = True,
        max_length: int | None = None,
        first_wait: float | int = FIRST_WAIT,
    ):
        if not url.startswith(("http://", "https://")):
            raise validation.UsageError(
                f"url = {url!r}: expected that of a server, such as http://127.0.0.1:8000/v1"
            )
        for name, value in (("concurrency", concurrency), ("tries", tries), ("timeout", timeout)):
            if value <= 0:
                raise validation.UsageError(f"{name} = {value}: expected a positive number")
        self.url, self.tries, self.timeout, self.details = url, tries, timeout, details
        self.concurrency, self.first_wait = concurrency, first_wait
        self.client = openai.OpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            max_retries=0,  # nonsense is tried again as well, so the tries are counted here
            timeout=timeout,
        )
        self.max_length = max_length
        self.model = model or self._only_model()

    def generate(
        self,
        prompts: Sequence[Ids | str],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None,
        done: Done | None = None,
    ) -> list[list[Reply]]:
        """As `Engine` has it. What a seed draws is the server's affair; ours draws as `OwnEngine`
        does."""
        seeds = with_seeds(prompts, sampling, seeds)
        asked = self._asked(sampling)
        requests = [
            {**asked, "prompt": p if isinstance(p, str) else list(p), "seed": seed}
            for p, seed in zip(prompts, seeds, strict=True)
        ]
        for request in requests if self.max_length is not None else ():
            if not isinstance(request["prompt"], str):  # what a server would refuse
                room = self.max_length - len(request["prompt"])
                request["max_tokens"] = max(1, min(sampling.max_new_tokens, room))
        return self._all(requests, lambda answer, _: self._replies(answer, sampling.samples), done)

    def score(self, prompts: Sequence[Ids], continuations: Sequence[Ids]) -> list[Score]:
        """As `Engine` has it. Raises `UsageError` for a server that gives no log-probabilities of a
        prompt."""
        if len(prompts) != len(continuations):
            raise validation.UsageError(
                f"there are {len(continuations)} continuations, {len(prompts)} prompts"
            )
        for what, lists in (("prompt", prompts), ("continuation", continuations)):
            for i, ids in enumerate(lists):
                if isinstance(ids, str) or not len(ids):
                    raise validation.UsageError(
                        f"cannot score: {what} {i} is {ids!r}; expected ids, at least one"
                    )
        asked = {"max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0.0}
        requests = [
            {**asked, "prompt": [*map(int, prompt), *map(int, ids)]}
            for prompt, ids in zip(prompts, continuations, strict=True)
        ]
        lengths = [len(ids) for ids in continuations]
        return self._all(requests, lambda answer, n: self._score(answer, requests[n], lengths[n]))

    def chats(
        self, conversations: Sequence[list[dict]], samplings: Sequence[Sampling]
    ) -> Iterator[tuple[int, str | None]]:
        """(place, reply) of each conversation, as they come; None for one that the server does not
        take, being too long for its model or against its rules.

        After a failure, what is under way still comes; then the failure is raised, a `UsageError`.
        """

        failures = []

        def reply(messages, sampling):
            if failures:
                return _LEFT
            asked = {
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
            }
            chat = self.client.chat.completions.with_raw_response
            try:
                return self._tried(
                    lambda: _said_in_chat(chat.create(model=self.model, messages=messages, **asked))
                )
            except NotTakenError:
                return None
            except BaseException as error:
                failures.append(error)
                raise

        with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool:
            try:
                tasks = {
                    pool.submit(reply, *one): place
                    for place, one in enumerate(zip(conversations, samplings, strict=True))
                }
                for task in concurrent.futures.as_completed(tasks):
                    if task.exception() is None and task.result() is not _LEFT:
                        yield tasks[task], task.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if failures:
            raise failures[0]

    def _asked(self, sampling: Sampling) -> dict[str, Any]:
        """The settings of a request as the protocol has them."""
        more = {
            "top_k": (sampling.top_k, 0),
            "min_tokens": (sampling.min_new_tokens, 0),
            "stop_token_ids": (list(sampling.stop_ids), []),
        }
        extra = {name: value for name, (value, neutral) in more.items() if value != neutral}
        asked = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "n": sampling.samples,
        }
        if sampling.stop:
            asked["stop"] = list(sampling.stop)
        if self.details:
            asked["logprobs"] = 0
            extra["return_token_ids"] = True
        return {**asked, "extra_body": extra} if extra else asked

    def _all(
        self,
        requests: list[dict],
        read: Callable[[Any, int], Any],
        done: Callable[[int, Any], None] | None = None,
    ) -> list:
        """What `read` makes of the answer to each request, of which `done` is told as they come;
        the first failure ends the rest."""
        told: dict[int, Any] = {}

        def tell(number: int, found: Any) -> None:
            told[number] = found
            if done is not None:
                done(number, found)

        with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool:
            tasks = {
                pool.submit(self._tried, lambda r=request, n=n: read(self._complete(r), n)): n
                for n, request in enumerate(requests)
            }
            try:
                for task in concurrent.futures.as_completed(tasks):
                    tell(tasks[task], task.result())
            except validation.UsageError:
                pool.shutdown(cancel_futures=True)  # those under way end, and are told of
                for task, number in tasks.items():
                    if number not in told and not task.cancelled() and not task.exception():
                        tell(number, task.result())
                raise
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [told[number] for number in range(len(requests))]

    def _complete(self, request: dict) -> Any:
        return self.client.completions.with_raw_response.create(model=self.model, **request)

    def _only_model(self) -> str:
        """The name of the model that the server has. Raises `UsageError` if it has none or many."""

        def read():
            answer = _json(self.client.models.with_raw_response.list())
            models = _at(answer, "data", list)
            names = [_at(one, "id", str) for one in models]
            if len(names) != 1:
                raise validation.UsageError(
                    f"{self.url} has the models {names}; expected one, or give its name"
                )
            told = models[0].get("max_model_len")
            if self.max_length is None and isinstance(told, int):
                self.max_length = told
            return names[0]

        return self._tried(read)

    def _tried(self, once: Callable[[], Any]) -> Any:
        """What `once` gives, tried again where that may help. Raises `UsageError`."""
        for number in range(1, self.tries + 1):
            try:
                return self._named(once)
            except _AgainError as error:
                if number == self.tries:
                    times = f"{number} tries" if number > 1 else "one try"
                    raise validation.UsageError(f"{self.url}: {error}, after {times}") from error
                wait = min(self.first_wait * 2 ** (number - 1), LONGEST_WAIT)
                time.sleep(error.wait or wait * random.uniform(0.5, 1.0))
        raise AssertionError("the last try returns or raises")

    def _named(self, once: Callable[[], Any]) -> Any:
        """`once`, with what went wrong in words."""
        try:
            return once()
        except openai.APITimeoutError as error:
            raise _AgainError(
                f"no answer within {self.timeout:g} s; expected one, or give a longer timeout or "
                "less concurrency"
            ) from error
        except openai.APIConnectionError as error:
            cause = _one_line(str(error.__cause__ or error))
            raise _AgainError(
                f"the server cannot be reached ({cause}); expected one that runs there"
            ) from error
        except openai.APIStatusError as error:
            said = f"status {error.status_code}: {_said(error)}"
            if error.status_code in TRIED_AGAIN or error.status_code >= 500:
                raise _AgainError(f"the server says {said}", _asked_wait(error)) from error
            if _is_of_one(error):
                raise NotTakenError(f"{self.url} refuses a request with {said}") from error
            raise validation.UsageError(f"{self.url} refuses a request with {said}") from error

    def _replies(self, raw, samples: int) -> list[Reply]:
        choices = _at(_json(raw), "choices", list)
        if len(choices) != samples:
            raise _AgainError(f"the server gave {len(choices)} choices; expected {samples}")
        in_order = sorted(choices, key=lambda choice: _at(choice, "index", int))
        return [self._reply(choice) for choice in in_order]

    def _reply(self, choice: dict) -> Reply:
        text, ended = _at(choice, "text", str), _at(choice, "finish_reason", str)
        if ended not in ("stop", "length"):
            raise _AgainError(f"the server ended a reply for {ended!r}; expected stop or length")
        ids = choice.get("token_ids") if self.details else None
        logps = None
        if self.details and choice.get("logprobs"):
            logps = _at(choice["logprobs"], "token_logprobs", list)
        return Reply(text=text, ended=ended, ids=ids, token_logps=logps)

    def _score(self, raw, request: dict, count: int) -> Score:
        choices = _at(_json(raw), "choices", list)
        given = choices[0].get("logprobs") if choices and isinstance(choices[0], dict) else None
        length = len(request["prompt"])
        logps = given.get("token_logprobs") if isinstance(given, dict) else None
        if not logps:
            raise validation.UsageError(
                f"{self.url} gives no log-probabilities of a prompt (echo and logprobs in "
                "/completions), and cannot score; use vLLM, python -m tulu_jax.serve, or our engine"
            )
        tops = _at(given, "top_logprobs", list)
        if len(logps) != length or len(tops) != length:
            raise validation.UsageError(
                f"{self.url} gives {len(logps)} log-probabilities of a prompt of {length} ids; "
                "expected one of each id; it takes no ids, or adds some of its own"
            )
        return _scored(list(_numbers(logps[-count:])), tops[-count:])


def _scored(logps: list[float], tops: list) -> Score:
    """The score whose likeliest tokens are `tops`, {text: log-probability} of each; their ids are
    not told."""
    largest = []
    for top in tops:
        if not isinstance(top, dict) or not top:
            raise _AgainError(f"the server gave the top log-probabilities {top!r}")
        largest.append(max(_numbers(top.values())))
    is_greedy = all(own >= most for own, most in zip(logps, largest, strict=True))
    return Score(token_logps=logps, likeliest=None, likeliest_logps=largest, is_greedy=is_greedy)


def _said_in_chat(raw) -> str:
    """The text of a chat completion."""
    choices = _at(_json(raw), "choices", list)
    if len(choices) != 1:
        raise _AgainError(f"the server gave {len(choices)} choices; expected one")
    return _at(_at(choices[0], "message", dict), "content", str)


def _is_of_one(error: openai.APIStatusError) -> bool:
    """Whether a server refuses a request for its length or its content."""
    said = f"{getattr(error, 'code', None)} {_said(error)}"
    return any(text in said for text in ONE_REFUSED)


def _numbers(values) -> Iterator[float]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise _AgainError(f"the server gave the log-probability {value!r}; expected a number")
        yield float(value)


def _json(raw) -> dict:
    """The object that a server answered. Raises `_AgainError` for anything else."""
    text = raw.text
    try:
        found = strict_json.loads(text, finite=False)
    except ValueError as error:
        raise _AgainError(
            f"the server answered {_one_line(text)!r}, which is not JSON; expected OpenAI's "
            "protocol, whose address mostly ends in /v1"
        ) from error
    if not isinstance(found, dict):
        raise _AgainError(f"the server answered {_one_line(text)!r}; expected an object")
    return found


def _at(found: Any, name: str, kind: type) -> Any:
    """`found[name]`, of that kind. Raises `_AgainError` for anything else."""
    if not isinstance(found, dict) or not isinstance(found.get(name), kind):
        raise _AgainError(
            f"the server answered {_one_line(str(found))!r}; expected {name!r} in it, a "
            f"{kind.__name__}"
        )
    return found[name]


def _said(error: openai.APIStatusError) -> str:
    """What a server said with an error, in one line."""
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return _one_line(body["message"])
    return _one_line(error.response.text) or "nothing"


def _asked_wait(error: openai.APIStatusError) -> float | None:
    """Seconds that a server asks to wait, at most as long as we would."""
    try:
        return min(max(float(error.response.headers["retry-after"]), 0.0), LONGEST_WAIT)
    except (KeyError, ValueError):
        return None


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[:SHOWN] + "…"
