"""From the names of judges to what answers the questions of benchmarks.

A judge that is not named is not asked, and what needs it stays pending.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import tqdm

from tulu_jax.evals import model_folder
from tulu_jax.evals.benchmark import Benchmark, Question, Verdicts

CACHE = "verdicts.jsonl"  # in the folder of an evaluation
_AT_ENDPOINT = ("alpaca_eval", "mt_bench")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """Who judges, None where nobody does: the endpoint up to its /v1 with its model and its price
    (US dollars for a million tokens read and written; None: not known), and folders of ToxiGen's
    classifier and of TruthfulQA's two judges, which are decoded in `slots`."""

    url: str | None
    model: str
    price: tuple[float, float] | None
    toxicity: str | None
    truth: str | None
    info: str | None
    slots: int


def judge(
    named: Named, benchmarks: Sequence[Benchmark], out: pathlib.Path
) -> Callable[[Sequence[Question]], Verdicts]:
    """What answers questions of the kinds that `benchmarks` have and `named` knows; programs are
    always executed. What may fail before a model is loaded fails now, with a `UsageError`."""
    asked = {kind for one in benchmarks for kind in one.judges}
    makers = {kind: make for kind, make in _makers(named).items() if kind in asked}
    made = {kind: makers.pop(kind)() for kind in ("execution", *_AT_ENDPOINT) if kind in makers}

    def answer(questions: Sequence[Question]) -> Verdicts:
        kinds = {question.kind for question in questions}
        for kind in sorted(kinds & makers.keys()):
            made[kind] = makers.pop(kind)()
        judges = {kind: one for kind, one in made.items() if kind in kinds}
        if not judges:
            return {}
        with tqdm.tqdm(total=len(questions), desc="judged", unit="verdict") as bar:

            def progress(done: int, all_: int) -> None:
                bar.total, bar.n = all_, done
                bar.refresh()

            return _library().answer(questions, judges, cache=out / CACHE, progress=progress)

    return answer


def _makers(named: Named) -> dict[str, Callable]:
    makers: dict[str, Callable] = {"execution": lambda: _library().Execution()}
    if named.url is not None:
        makers |= dict.fromkeys(_AT_ENDPOINT, functools.partial(_endpoint, named))
    if named.toxicity is not None:
        makers["toxicity"] = lambda: _library().Toxicity(named.toxicity)
    for kind, folder in (("truth", named.truth), ("info", named.info)):
        if folder is not None:
            makers[kind] = functools.partial(_yes_or_no, folder, named.slots)
    return makers


def _library():
    from tulu_jax.evals import judges

    return judges


def _endpoint(named: Named):
    price = None
    if named.price is not None:
        read, written = named.price
        price = _library().Price(read=read, written=written, source="as it was given")
    return _library().Endpoint(named.url, model=named.model, price=price)


def _yes_or_no(folder: str, slots: int):
    tokenizer = model_folder.tokenizer_of(folder)
    engine = model_folder.load(folder, tokenizer, slots=slots)
    return _library().YesOrNo(engine, tokenizer, name=folder)
