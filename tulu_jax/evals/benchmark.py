"""The shape that all benchmarks have: requests for an engine, questions for a judge, scores.

A benchmark is a frozen dataclass in a file of its own. It reads its data in the upstream layout and
makes requests; what asks an engine (`run.py`) knows none of them. Requests, answers and verdicts
are plain values, so that a stopped evaluation goes on, and so that what another tool wrote is
scored by the same code.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from etils import epath

from tulu_jax.data import chat as chat_lib
from tulu_jax.decode.sampling import Sampling

Messages = list[dict[str, str]]
Verdicts = Mapping[str, Sequence[str]]  # of each question, by its id: what the judge said


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One item of a benchmark, put to a model.

    `prompt` is a conversation that ends with a user's turn, or a raw text (a base model's, and
    Codex-Eval's). `prefix` is what the answer is forced to begin with; the answer is without it.
    `sampling` says how it is generated; None if `choices` are scored instead, as continuations that
    follow prompt and prefix. `then` are further user turns, each asked after the reply to the one
    before. `truth` holds what `score` compares with (JSON values).
    """

    id: str
    group: str  # the task, subject, language or category that breakdowns have
    prompt: Messages | str
    prefix: str = ""
    sampling: Sampling | None = None
    choices: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    truth: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What an engine said to a request: its samples, or with `then` the reply of each turn, without
    prefix and stop; how each ended ('stop' or 'length'); or of each choice the summed
    log-probability. `prompt_hash` is that of the ids that were asked (xxh3 of int32)."""

    id: str
    prompt_hash: str
    texts: list[str] = dataclasses.field(default_factory=list)
    ended: list[str] = dataclasses.field(default_factory=list)
    choice_logps: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One question for a judge: a conversation for a chat endpoint, or a plain text for a
    classifier or a judge that completes. `kind` says which judge: 'alpaca_eval', 'mt_bench',
    'toxicity', 'truth' or 'info'."""

    id: str
    kind: str
    prompt: Messages | str
    sampling: Sampling | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a benchmark. `value` is None while a judge is pending: never a number then.
    `items` are the values of single items (their mean over `groups` or over all, as the benchmark
    has it, is `value`): intervals and paired tests are made from them. `standard_error` is in the
    unit of `value`."""

    name: str  # "accuracy", "f1", "pass@10", "win_rate", …
    value: float | None
    standard_error: float | None
    items: dict[str, float]  # by request id
    groups: dict[str, float]  # by group
    is_percent: bool = True  # value in [0, 1], shown in percent; otherwise shown as it is


class Benchmark(Protocol):
    """What each file of a benchmark has. A frozen dataclass; its fields are its switches, of which
    `subset` ('paper' or 'full') is the first."""

    name: ClassVar[str]  # "gsm8k": the name on the command line, of files and of the paper's column
    judges: ClassVar[tuple[str, ...]]  # the kinds of its questions; () without a judge
    subset: str

    def requests(
        self, data: epath.Path, tokenizer: chat_lib.ChatTokenizer, *, is_chat: bool
    ) -> list[Request]:
        """The items, in order. `data` is the folder that holds one folder a benchmark; `is_chat`
        says whether prompts are conversations or, for a base model, raw texts. Raises `UsageError`
        that names files that are missing or altered."""

    def questions(self, requests: Sequence[Request], answers: Sequence[Answer]) -> list[Question]:
        """What the judge is asked; none without a judge."""

    def score(
        self, requests: Sequence[Request], answers: Sequence[Answer], verdicts: Verdicts | None
    ) -> list[Metric]:
        """The metrics, the paper's first. With `verdicts` None, or some missing, what needs a judge
        is pending."""
