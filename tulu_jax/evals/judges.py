"""Who answers the questions of benchmarks: an endpoint, a classifier, a model, a sandbox.

`answer` asks each question once: verdicts are kept in a file by what they depend on. A judge is
anything with `about`, `announce` and `verdicts`, as `Judge` has them.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import pathlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from absl import logging

from tulu_jax import strict_json, validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import sandbox
from tulu_jax.evals.benchmark import Question
from tulu_jax.serving.engine import Engine

CHARACTERS = 4  # of English in a token, roughly
CHUNK = 256  # questions between which a model's verdicts are kept
SHOWN = 3  # ids in a message


class Judge(Protocol):
    """Answers questions of one kind or several."""

    def about(self) -> dict[str, Any]:
        """JSON values on which verdicts depend, beside the question."""

    def announce(self, questions: Sequence[Question]) -> str:
        """What is printed before these are asked: how many, and what they cost."""

    def verdicts(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """(place, text) of each question, as they come; None where this judge takes none such."""


def answer(
    questions: Sequence[Question],
    judges: Mapping[str, Judge],
    *,
    cache: str | os.PathLike[str],
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[str, list[str]]:
    """What `judges`, by kind, say to questions: of each id its verdicts, in the order of questions.

    Questions of kinds without a judge are not among them. A verdict is '' where a judge does not
    take the question; those are told, and asked again the next time. `progress` is given how many
    verdicts are there, of how many. Verdicts that the file `cache` has are not asked for, and every
    new one is written to it as it comes: after a kill or a failure, what was paid is there. Raises
    `UsageError`.
    """
    judged = [question for question in questions if question.kind in judges]
    about = {kind: judges[kind].about() for kind in {question.kind for question in judged}}
    keys = [_key(question, about[question.kind]) for question in judged]
    with _Cache(pathlib.Path(cache)) as kept:
        missing: dict[str, Question] = {}
        for key, question in zip(keys, judged, strict=True):
            if key not in kept.texts:
                missing.setdefault(key, question)
        done, refused = len(set(keys)) - len(missing), []
        for kind, judge in judges.items():
            asked = [(key, question) for key, question in missing.items() if question.kind == kind]
            if not asked:
                continue
            say(judge.announce([question for _, question in asked]))
            for place, text in judge.verdicts([question for _, question in asked]):
                key, question = asked[place]
                if text is None:
                    refused.append(question.id)
                else:
                    kept.add(key, text)
                done += 1
                progress(done, len(set(keys)))
        if refused:
            more = ", …" if len(refused) > SHOWN else ""
            say(
                f"{len(refused):,} questions have no verdict, being too long for the judge or "
                f"against its rules: {', '.join(refused[:SHOWN])}{more}"
            )
        found: dict[str, list[str]] = {}
        for key, question in zip(keys, judged, strict=True):
            found.setdefault(question.id, []).append(kept.texts.get(key, ""))
    return found


def _key(question: Question, about: Mapping[str, Any]) -> str:
    sampling = question.sampling and dataclasses.asdict(question.sampling)
    content = [about, question.prompt, sampling]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Cache:
    """Verdicts by key in a file of JSON lines, open for more, for one process at a time.

    What a killed process left of its last line is cut off. Raises `UsageError` for other lines that
    are none, and while another process has the file.
    """

    def __init__(self, path: pathlib.Path):
        if "://" in str(path) or str(path).startswith("gs:/"):
            raise validation.UsageError(
                f"{path}: found a bucket, expected a local file: verdicts are added one by one"
            )
        self.path, self.texts = path, {}

    def __enter__(self) -> "_Cache":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise validation.UsageError(
                    f"{self.path}: another process judges with this file; wait for it, or give "
                    "another"
                ) from error
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def add(self, key: str, text: str) -> None:
        self.texts[key] = text
        self._file.write(json.dumps({"key": key, "text": text}).encode() + b"\n")
        self._file.flush()

    def _read(self) -> None:
        self._file.seek(0)
        *lines, rest = self._file.read().split(b"\n")
        if rest:
            logging.warning("%s: the last line was half written; it is asked again", self.path)
            self._file.truncate(sum(len(line) + 1 for line in lines))
        for number, line in enumerate(lines, 1):
            try:
                row = strict_json.loads(line)
                key, text = row["key"], row["text"]
            except (ValueError, TypeError, KeyError):
                key = text = None
            if not (isinstance(key, str) and isinstance(text, str)):
                raise validation.UsageError(
                    f"{self.path}, line {number}: found {line[:60]!r}; expected a verdict, "
                    '{"key": …, "text": …}; remove the line, or give another file'
                )
            self.texts[key] = text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """US dollars for a million tokens that a judge reads and writes, and who says so."""

    read: float
    written: float
    source: str


# Last looked at 2026-11-29, in the source of alpaca_eval 0.3.1 (2023), and not checked since.
PRICES = {
    model: Price(read=30.0, written=60.0, source="alpaca_eval 0.3.1, of 2023; unverified")
    for model in ("gpt-4", "gpt-4-0613")
}


class Endpoint:
    """A model behind an OpenAI-compatible server, for questions that are conversations.

    `url` ends in /v1; the key is `OPENAI_API_KEY` of the environment. `price` is that of the model:
    None is as `PRICES` has it, or unknown. The rest is as `OpenAIEngine` has it.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        price: Price | None = None,
        concurrency: int = 16,
        tries: int = 5,
        timeout: float | int = 120,
        first_wait: float | int = 0.5,
    ):
        try:
            from tulu_jax.serving import openai_engine
        except ImportError as error:
            raise validation.UsageError(
                f"a judge at an endpoint needs the package openai ({error}); pip install "
                '"tulu_jax[eval]"'
            ) from error
        self.engine = openai_engine.OpenAIEngine(
            url, model=model, concurrency=concurrency, tries=tries, timeout=timeout,
            details=False, first_wait=first_wait,
        )  # fmt: skip
        self.price = price or PRICES.get(model)

    def about(self) -> dict[str, Any]:
        return {"model": self.engine.model}

    def announce(self, questions: Sequence[Question]) -> str:
        """How many questions, and what they cost at most: all tokens allowed are written."""
        read = sum(
            math.ceil(len(turn["content"]) / CHARACTERS) for q in questions for turn in q.prompt
        )
        written = sum(_sampling(question).max_new_tokens for question in questions)
        said = (
            f"{self.engine.model} at {self.engine.url} is asked {len(questions):,} questions: "
            f"about {read:,} tokens to read, at most {written:,} to write"
        )
        if self.price is None:
            return f"{said}; its price is not known, so give one to see the cost"
        cost = (read * self.price.read + written * self.price.written) / 1e6
        return f"{said}; at most about {cost:,.2f} US dollars (price: {self.price.source})"

    def verdicts(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        yield from self.engine.chats(
            [question.prompt for question in questions], [_sampling(one) for one in questions]
        )


def _sampling(question: Question) -> Sampling:
    if question.sampling is None:
        raise validation.UsageError(
            f"question {question.id} does not say how it is to be answered; expected its sampling"
        )
    return question.sampling


class Toxicity:
    """ToxiGen's classifier by its folder: the probability that a text is toxic, as text."""

    def __init__(self, folder: str | os.PathLike[str]):
        from tulu_jax.interop import text_classifier

        self.folder = folder
        self.classifier = text_classifier.TextClassifier(folder)

    def about(self) -> dict[str, Any]:
        return {"classifier": _identity(self.folder)}

    def announce(self, questions: Sequence[Question]) -> str:
        return f"the classifier in {self.folder} reads {len(questions):,} texts"

    def verdicts(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        texts = [question.prompt for question in questions]
        for place, chance in self.classifier.probabilities(texts):
            yield place, str(chance)


class YesOrNo:
    """A model that goes on with " yes" or " no", such as TruthfulQA's two judges, by an engine.

    The verdict is 'yes' where the probability of " yes" is at least a half. `name` tells the model
    from others: its folder, of which the sizes of files count too.
    """

    def __init__(self, engine: Engine, tokenizer: chat_lib.ChatTokenizer, *, name: str):
        self.engine, self.tokenizer, self.name = engine, tokenizer, name

    def about(self) -> dict[str, Any]:
        return {"yes_or_no": _identity(self.name)}

    def announce(self, questions: Sequence[Question]) -> str:
        return f"{self.name} says yes or no to {len(questions):,} questions"

    def verdicts(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        for start in range(0, len(questions), CHUNK):
            chunk = questions[start : start + CHUNK]
            for place, chance in enumerate(self.chances([q.prompt for q in chunk]), start):
                yield place, "yes" if chance >= 0.5 else "no"

    def chances(self, texts: Sequence[str]) -> list[float]:
        """The probability of " yes" after each text: of all its tokens, if these are several."""
        prompts, continuations = [], []
        for text in texts:
            prompt, whole = (
                [self.tokenizer.bos_id, *self.tokenizer.encode(one)]
                for one in (text, f"{text} yes")
            )
            pairs = enumerate(zip(prompt, whole, strict=False))
            same = next((place for place, (a, b) in pairs if a != b), len(prompt))
            prompts.append(whole[:same])
            continuations.append(whole[same:])
        scores = self.engine.score(prompts, continuations)
        return [math.exp(math.fsum(score.token_logps)) for score in scores]


class Execution:
    """Runs programs in a sandbox; each question is one, as `sandbox.program` reads it."""

    def __init__(self, *, seconds: float = sandbox.SECONDS, memory: int = sandbox.MEMORY):
        self.seconds, self.memory, self.way = seconds, memory, sandbox.found()

    def about(self) -> dict[str, Any]:
        limits = {"seconds": self.seconds, "memory": self.memory}
        return {"execution": limits, "python": platform.python_version()}

    def announce(self, questions: Sequence[Question]) -> str:
        return f"{len(questions):,} programs are executed in sandboxes made by {self.way}"

    def verdicts(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        programs = [question.prompt for question in questions]
        yield from sandbox.verdicts(
            programs, seconds=self.seconds, memory=self.memory, way=self.way
        )


def _identity(folder: str | os.PathLike[str]) -> list:
    """A model's folder as a cache knows it: its files, their sizes and times. A name that is no
    folder is itself."""
    path = pathlib.Path(os.path.realpath(os.path.expanduser(folder)))
    if not path.is_dir():
        return [str(folder)]
    files = [one for one in sorted(path.iterdir()) if one.is_file()]
    with contextlib.suppress(FileNotFoundError):
        return [str(path), *[[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]]
    return [str(path)]
