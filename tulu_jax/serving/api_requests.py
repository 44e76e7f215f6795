"""The bodies of OpenAI's completions and chat completions, as requests of the decoder.

Every field is looked at: one that is unknown, or whose value asks for what is not there, is refused
by its name. A field that would change nothing (`presence_penalty` 0) is taken.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from tulu_jax import strict_json, validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.decode.sampling import Sampling

MOST_CHOICES = 128  # of a request: it stands in line before others
MOST_PROMPTS = 512
DEFAULT_TOKENS = 16  # of completions, as OpenAI has it
INVALID = "invalid_request_error"


class ApiError(Exception):
    """What is wrong with a request: a status, a message, the field, and OpenAI's name for it."""

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None,
        kind: str = INVALID,
    ):  # fmt: skip
        super().__init__(message)
        self.param, self.status, self.code, self.kind = param, status, code, kind

    def body(self) -> dict:
        """The error as OpenAI's clients read it."""
        about = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": about}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """What is served: its name, its tokenizer, the chat template it was trained with, and how long
    a prompt and its continuation may be."""

    name: str
    tokenizer: chat_lib.ChatTokenizer
    chat: str
    max_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A request: `prompts` in ids, each continued as `sampling` says, with None not at all.

    `logprobs` are wanted of the chosen tokens, and with `top` of the likeliest at each place;
    `echo`: the prompt is part of the answer.
    """

    prompts: list[list[int]]
    sampling: Sampling | None
    seed: int | None
    is_chat: bool
    stream: bool
    include_usage: bool
    logprobs: bool
    top: bool
    echo: bool
    token_ids: bool


class _Fields:
    """The fields of a body, each taken once."""

    def __init__(self, body: dict):
        self.left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, default: Any, right: Callable[[Any], bool], expected: str) -> Any:
        """The value of a field, `default` if there is none. Raises `ApiError` unless it is
        `right`."""
        if name not in self.left:
            return default
        value = self.left.pop(name)
        if not right(value):
            raise ApiError(
                f"{name} = {_short(value)}: expected {expected}", param=name, code="invalid_value"
            )
        return value

    def flag(self, name: str) -> bool:
        return self.take(name, False, lambda v: isinstance(v, bool), "true or false")

    def whole(self, name: str, default: int | None, least: int, most: int) -> int | None:
        return self.take(
            name, default, lambda v: _is_whole(v) and least <= v <= most,
            f"a whole number from {least} to {most}",
        )  # fmt: skip

    def number(self, name: str, default: float, least: float, most: float) -> float:
        def right(value):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            return is_number and least <= value <= most

        return float(self.take(name, default, right, f"a number from {least:g} to {most:g}"))

    def neutral(self, values: dict[str, tuple]) -> None:
        """Takes fields that may only say what is so anyway."""
        for name, allowed in values.items():
            if name in self.left and not any(_same(self.left[name], value) for value in allowed):
                said = " or ".join(strict_json.dumps(value) for value in allowed)
                raise ApiError(
                    f"{name} is not supported by this server; leave it out"
                    + (f", or set it to {said}" if said else ""),
                    param=name, code="unsupported_parameter",
                )  # fmt: skip
            self.left.pop(name, None)

    def end(self, known: tuple[str, ...]) -> None:
        """Raises `ApiError` for fields that nobody took."""
        if self.left:
            name = next(iter(self.left))
            near = difflib.get_close_matches(name, known, n=1)
            raise ApiError(
                f"unknown parameter {', '.join(map(repr, self.left))}; "
                + (f"did you mean {near[0]!r}? " if near else "")
                + f"expected some of {', '.join(known)}",
                param=name, code="unknown_parameter",
            )  # fmt: skip


SHARED = (
    "model", "temperature", "top_p", "n", "stop", "stream", "stream_options", "seed", "logprobs",
    "user", "top_k", "min_tokens", "stop_token_ids", "return_token_ids",
)  # fmt: skip
COMPLETION = ("prompt", "max_tokens", "echo", "add_special_tokens", *SHARED)
CHAT = ("messages", "max_tokens", "max_completion_tokens", "top_logprobs", *SHARED)

NEUTRAL = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "ignore_eos": (False,),
}
NEUTRAL_COMPLETION = {**NEUTRAL, "best_of": (1,), "suffix": ("",)}
NEUTRAL_CHAT = {
    **NEUTRAL,
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}


def parse(text: bytes) -> dict:
    """The object of a body. Raises `ApiError`."""
    try:
        body = strict_json.loads(text)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}; expected an object") from error
    if not isinstance(body, dict):
        raise ApiError(f"the body is {_short(body)}; expected an object")
    return body


def completion(body: dict, served: Served) -> Asked:
    """A request to /v1/completions. Raises `ApiError`."""
    fields = _Fields(body)
    _check_model(fields, served)
    special = fields.take(
        "add_special_tokens", True, lambda v: isinstance(v, bool), "true or false"
    )
    prompts = _prompts(fields, served, special)
    echo, logprobs = fields.flag("echo"), fields.whole("logprobs", None, 0, 1)
    if (most := fields.whole("max_tokens", DEFAULT_TOKENS, 0, validation.MOST)) == 0 and not echo:
        raise ApiError(
            "max_tokens = 0: expected at least 1, or echo with it", param="max_tokens",
            code="invalid_value",
        )  # fmt: skip
    fields.neutral(NEUTRAL_COMPLETION)
    asked = _asked(
        fields, served, prompts, most=most, is_chat=False, echo=echo,
        logprobs=logprobs is not None, top=bool(logprobs),
    )  # fmt: skip
    fields.end(COMPLETION)
    if asked.stream and (echo or not most):
        raise ApiError("echo is not streamed; leave out one of echo and stream", param="echo")
    return asked


def chat(body: dict, served: Served) -> Asked:
    """A request to /v1/chat/completions. Raises `ApiError`."""
    fields = _Fields(body)
    _check_model(fields, served)
    messages = fields.take("messages", None, lambda v: isinstance(v, list), "a list of messages")
    try:
        prompt = chat_lib.generation_prompt(_plain(messages), served.tokenizer, chat=served.chat)
    except ValueError as error:
        said = str(error).removeprefix("row of the prompt").removeprefix(", ").removeprefix(": ")
        raise ApiError(f"messages: {said}", param="messages", code="invalid_value") from error
    both = [name for name in ("max_tokens", "max_completion_tokens") if name in fields.left]
    if len(both) == 2:
        raise ApiError(f"{' and '.join(both)} are the same; give one", param=both[0])
    left = max(served.max_length - len(prompt), 1)
    most = fields.whole(both[0] if both else "max_tokens", left, 1, validation.MOST)
    logprobs, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, 0, 1)
    if top and not logprobs:
        raise ApiError("top_logprobs needs logprobs = true", param="top_logprobs")
    fields.neutral(NEUTRAL_CHAT)
    asked = _asked(
        fields, served, [prompt], most=most, is_chat=True, echo=False, logprobs=logprobs,
        top=bool(top),
    )  # fmt: skip
    fields.end(CHAT)
    return asked


def _asked(
    fields: _Fields, served: Served, prompts: list[list[int]], *, most: int, **known
) -> Asked:
    """What both kinds of request have."""
    stream = fields.flag("stream")
    options = _Fields(fields.take("stream_options", {}, lambda v: isinstance(v, dict), "an object"))
    include_usage = options.flag("include_usage")
    options.end(("include_usage",))
    if include_usage and not stream:
        raise ApiError("stream_options needs stream = true", param="stream_options")
    seed = fields.whole("seed", None, 0, 2**32 - 1)
    fields.take("user", "", lambda v: isinstance(v, str), "a string")  # says who asks, no more
    token_ids = fields.flag("return_token_ids")
    sampling = _sampling(fields, served, most)
    if known["top"] and sampling is not None and sampling.temperature:
        raise ApiError(
            "the likeliest tokens (logprobs = 1, top_logprobs = 1) are given at temperature 0 "
            "alone; ask for the chosen ones (logprobs = 0, or true without top_logprobs)",
            param="top_logprobs" if known["is_chat"] else "logprobs", code="unsupported_value",
        )  # fmt: skip
    return Asked(
        prompts=prompts, sampling=sampling, seed=seed, stream=stream, include_usage=include_usage,
        token_ids=token_ids, **known,
    )  # fmt: skip


def _sampling(fields: _Fields, served: Served, most: int) -> Sampling | None:
    """The settings of a request; None if it asks for no token."""
    stop = fields.take(
        "stop", [], lambda v: isinstance(v, str) or _all(v, str), "a string or a list of strings"
    )
    stop_ids = fields.take(
        "stop_token_ids", [], lambda v: isinstance(v, list) and all(map(_is_whole, v)),
        "a list of ids",
    )  # fmt: skip
    values = dict(
        max_new_tokens=most,
        min_new_tokens=fields.whole("min_tokens", 0, 0, validation.MOST),
        temperature=fields.number("temperature", 1.0, 0.0, 100.0),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0),
        top_k=max(fields.whole("top_k", 0, -1, validation.MOST), 0),
        samples=fields.whole("n", 1, 1, MOST_CHOICES),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_ids=tuple(dict.fromkeys((served.tokenizer.eos_id, *stop_ids))),
    )
    if not most:
        if values["samples"] != 1:
            raise ApiError("n is of no use with max_tokens = 0; leave it out", param="n")
        return None
    with validation.collect() as problems:
        sampling = Sampling(**values)
    if problems:
        said = "; ".join(problems).replace("Sampling: ", "")
        names = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "samples": "n"}
        for ours, theirs in (names | {"stop_ids": "stop_token_ids"}).items():
            said = said.replace(ours, theirs)
        raise ApiError(said, param=said.split(" ")[0], code="invalid_value")
    return sampling


def _check_model(fields: _Fields, served: Served) -> None:
    """Raises `ApiError` for a model that is not served."""
    name = fields.take("model", None, lambda v: isinstance(v, str), "the name of a model")
    if name is None:
        raise ApiError(f"model is missing; expected {served.name!r}", param="model")
    if name != served.name:
        raise ApiError(
            f"there is no model {name!r}; this server has {served.name!r}",
            param="model", status=404, code="model_not_found",
        )  # fmt: skip


def _prompts(fields: _Fields, served: Served, special: bool) -> list[list[int]]:
    """The prompts of a completion: a text, ids, or a list of texts or of lists of ids."""

    def is_ids(value):
        return isinstance(value, list) and bool(value) and all(map(_is_whole, value))

    def right(value):
        one = isinstance(value, str) or is_ids(value)
        return one or (
            isinstance(value, list)
            and 0 < len(value) <= MOST_PROMPTS
            and all(isinstance(v, str) or is_ids(v) for v in value)
        )

    expected = f"a text, ids, or a list of 1 to {MOST_PROMPTS:,} texts or lists of ids; none empty"
    found = fields.take("prompt", None, right, expected)
    if found is None:
        raise ApiError(f"prompt is missing; expected {expected}", param="prompt")
    listed = [found] if isinstance(found, str) or is_ids(found) else found
    begin = [served.tokenizer.bos_id] if special else []
    return [[*begin, *served.tokenizer.encode(p)] if isinstance(p, str) else p for p in listed]


def _plain(messages: list | None) -> list:
    """Messages with texts as contents; a list of text parts becomes one."""
    if messages is None:
        raise ValueError("expected a list of messages")
    plain = []
    for number, message in enumerate(messages):
        if isinstance(message, dict):
            more = [k for k, v in message.items() if k not in ("role", "content", "name") and v]
            if more:
                raise ValueError(f"message {number}: {', '.join(more)} is not supported")
            content = message.get("content")
            if isinstance(content, list):
                if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
                    raise ValueError(f"message {number}: found {_short(content)}; expected texts")
                content = "".join(part["text"] for part in content)
            message = {k: v for k, v in message.items() if k == "role"} | {"content": content}
        plain.append(message)
    return plain


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) for v in value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _same(value: Any, other: Any) -> bool:
    """Equal, and not only as True equals 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _short(value: Any) -> str:
    text = strict_json.dumps(value)
    return text if len(text) <= 80 else text[:80] + "…"
