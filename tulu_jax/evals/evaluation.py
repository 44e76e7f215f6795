"""Benchmarks from their data to the table: asked, answered, judged, scored, shown.

What can be refused is refused before the model is loaded, for all benchmarks at once: their data,
and prompts that are too long. Each is then answered, judged and saved before the next begins.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from absl import logging
from etils import epath

from tulu_jax import atomic, validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.evals import catalogue, measures, paper_tables, run, scores
from tulu_jax.evals.benchmark import Answer, Benchmark, Metric, Question, Request, Verdicts
from tulu_jax.serving import engine as engine_lib
from tulu_jax.training import lease as lease_lib

Judge = Callable[[Sequence[Question]], Verdicts]  # of as many questions as it can judge
Measures = Callable[[], Mapping[str, measures.Measure]]  # by the names of their metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated: a name that its results bear, its tokenizer, `chat` as `run.encode` has
    it, the positions of its model (None: not told), and what loads it. Answers are generated at
    `temperature` (None: that of their benchmark); `measures` makes what is measured of them."""

    name: str
    tokenizer: chat_lib.ChatTokenizer
    chat: str
    max_length: int | None
    engine: Callable[[], engine_lib.Engine]
    temperature: float | None = None
    measures: Measures = dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepared:
    benchmark: Benchmark
    requests: list[Request]
    prompts: run.Prompts
    notes: list[str]


def evaluate(
    subject: Subject,
    benchmarks: Sequence[Benchmark],
    *,
    data: epath.Path,
    out: pathlib.Path,
    judge: Judge,
    shows: bool = True,
) -> list[scores.Scored]:
    """Evaluates in the folder `out`, which then has predictions and scores; all scores that are
    there. What was answered before is not asked again. Raises `UsageError`."""
    prepared = _prepare(subject, benchmarks, data)
    with lease_lib.held(str(out)):
        out.mkdir(parents=True, exist_ok=True)
        engine, measured, found = subject.engine(), subject.measures(), []
        for one in prepared:
            answers = run.answers(
                engine, one.prompts, out / f"{one.prompts.name}.jsonl",
                about={"model": subject.name, "switches": catalogue.switches(one.benchmark)},
                shows=shows,
            )  # fmt: skip
            _for_other_tools(one, answers, out, subject.name)
            added = measures.metrics(measured, one.prompts, answers)
            found = scores.save(out, subject.name, [_scored(one, answers, judge, added)])
    return found


def _prepare(subject: Subject, benchmarks: Sequence[Benchmark], data) -> list[_Prepared]:
    """The prompts of all benchmarks. Raises one `UsageError` with what is wrong in any."""
    prepared, problems = [], []
    for one in benchmarks:
        try:
            prepared.append(_prepared(subject, one, data))
        except validation.UsageError as error:
            problems.append(str(error))
            continue
        problems += run.length_problems(prepared[-1].prompts, subject.max_length)
    if problems:
        raise validation.UsageError("\n".join(problems))
    return prepared


def _prepared(subject: Subject, benchmark: Benchmark, data: epath.Path) -> _Prepared:
    is_chat = subject.chat != run.NO_CHAT
    requests = benchmark.requests(data, subject.tokenizer, is_chat=is_chat)
    if subject.temperature is not None:
        requests = [_drawn(request, subject.temperature) for request in requests]
    prompts = run.encode(
        f"{benchmark.name}.{benchmark.subset}", requests, subject.tokenizer,
        chat=subject.chat, is_cap=benchmark.name in catalogue.CAPPED,
    )  # fmt: skip
    notes = []
    if catalogue.switches(benchmark).get(catalogue.ALTERED):
        from tulu_jax.evals import data_files

        notes = [f"altered data: {note}" for note in data_files.notes(data, benchmark.name)]
    return _Prepared(benchmark=benchmark, requests=requests, prompts=prompts, notes=notes)


def _for_other_tools(
    one: _Prepared, answers: Sequence[Answer], out: pathlib.Path, model: str
) -> None:
    """Writes answers also as alpaca_eval and FastChat read them."""
    if one.benchmark.name == "alpaca_eval":
        from tulu_jax.evals import alpaca_eval

        text = alpaca_eval.model_outputs(one.requests, answers, generator=model)
        atomic.write_text(out / "model_outputs.json", text)
    elif one.benchmark.name == "mt_bench":
        from tulu_jax.evals import mt_bench

        text = mt_bench.model_answers(one.requests, answers, model=model, time=time.time())
        atomic.write_text(out / "model_answer.jsonl", text)


def _drawn(request: Request, temperature: float) -> Request:
    """`request`, its answer generated at `temperature` if it is generated."""
    if request.sampling is None:
        return request
    sampling = dataclasses.replace(request.sampling, temperature=temperature)
    return dataclasses.replace(request, sampling=sampling)


def _scored(
    one: _Prepared, answers: Sequence[Answer], judge: Judge, added: Sequence[Metric]
) -> scores.Scored:
    benchmark, requests = one.benchmark, one.requests
    verdicts = None
    if benchmark.judges and (questions := benchmark.questions(requests, answers)):
        verdicts = judge(questions) or None
        logging.info("%s: judged %d of %d", one.prompts.name, len(verdicts or ()), len(questions))
    metrics = [*benchmark.score(requests, answers, verdicts), *added]
    switches = catalogue.switches(benchmark)
    return scores.scored(benchmark.name, switches, requests, answers, metrics, notes=one.notes)


def table(
    found: Sequence[scores.Scored], *, names: Sequence[str], paper_row: str | None, groups: bool
) -> Iterator[str]:
    """What is printed: all scores, beside `paper_row`, or that of the first of `names` that the
    paper knows."""
    known = [row for name in names if (row := paper_tables.model_of(name))]
    row = paper_row or (known[0] if known else None)
    yield from scores.lines(found, paper_row=row)
    if groups:
        yield from scores.group_lines(found)
