"""An open question: what DPO on pairs of one language does to another (TyDi QA in table 3)."""

from tulu_jax.studies import tiny_runs
from tulu_jax.studies.declared import Cell, Design, Expected, Score, Study
from tulu_jax.studies.table_3_dpo import PAPER_RUNS, SIZES, VARIES

LANGUAGES = ("arabic", "bengali", "english", "finnish", "indonesian", "korean", "russian",
             "swahili", "telugu")  # fmt: skip
_GERMAN = Score(benchmark=tiny_runs.GERMAN, metric="exact_match")
_MIXED = Score(benchmark=tiny_runs.GERMAN, metric="exact_match", group="mixed")
_STYLE = Score(benchmark=tiny_runs.GERMAN, metric="polite")


def _delta(score: Score) -> Cell:
    return Cell(run="dpo_two", minus="sft_two", score=score)  # of two languages


STUDY = Study(
    name="multilingual",
    title="A second language before and after DPO",
    question="What do pairs in English change of answers in other languages?",
    paper=Design(
        runs=PAPER_RUNS,
        benchmarks=("tydiqa",),
        cells=tuple(
            Cell(run=f"dpo_{size.lower()}", minus=f"sft_{size.lower()}",
                 score=Score(benchmark="tydiqa", group=language),
                 paper=None if language else ("3", f"Tulu 2+DPO {size}", "tydiqa"))
            for size in SIZES
            for language in (None, *LANGUAGES)
        ),
        varies=VARIES,
    ),
    tiny=Design(
        runs=(
            tiny_runs.run("sft_two", tiny_runs.SFT, updates=350, MIXTURE="tulu_tiny_two_languages"),
            tiny_runs.run("dpo_two", tiny_runs.DPO, updates=25, base="sft_two"),
        ),
        benchmarks=(tiny_runs.BENCHMARK, tiny_runs.GERMAN),
        cells=(
            *(Cell(run=run, score=_GERMAN) for run in ("sft_two", "dpo_two")),
            *map(_delta, (tiny_runs.EXACT, _GERMAN, _MIXED, tiny_runs.POLITE, _STYLE)),
        ),
        expected=(
            Expected(says="Pairs in English make answers in German polite too",
                     cell=_delta(_STYLE), above=0.0),
            Expected(says="Pairs in English cost German no more than 10 points",
                     cell=_delta(_GERMAN), above=-10.0),
        ),
        varies=VARIES,
    ),
)  # fmt: skip
