"""An open question: what an audit finds in UltraFeedback, and what DPO on it then amplifies."""

from tulu_jax.data import preferences, tulu_tiny
from tulu_jax.evals.paper_tables import SEVEN
from tulu_jax.studies import tiny_runs
from tulu_jax.studies.declared import CHARACTERS, Cell, Design, Expected, Run, Score, Study
from tulu_jax.studies.table_3_dpo import VARIES

_SUBSETS = {
    **{f"dpo_7b_{name}": f"{preferences.PAPERS}_audited_{name}" for name in preferences.AUDITED},
    "dpo_7b_no_truthfulqa": "ultrafeedback_ai2_cleaned",
}
_AMPLIFIED = (
    Score(benchmark="alpaca_eval", metric=CHARACTERS), Score(benchmark="alpaca_eval"),
    Score(benchmark="mt_bench"), Score(benchmark="truthfulqa"), Score(benchmark="gsm8k"),
)  # fmt: skip
_LENGTH = Score(benchmark=tiny_runs.BENCHMARK, metric=CHARACTERS)
# The chosen side is the longer one in each pair of one set, the shorter one in each of the other.
_TASKS = {"dpo": "tulu_tiny_preference", "dpo_terse": tulu_tiny.TERSE_PREFERENCE,
          "dpo_even": tulu_tiny.EVEN_PREFERENCE}  # fmt: skip


def _from(run: str, score: Score) -> Cell:
    return Cell(run=run, minus="sft", score=score)


STUDY = Study(
    name="ultrafeedback_audit",
    title="UltraFeedback audited, and what DPO amplifies",
    question="Pairs prefer more than quality: length, slips, copies, a benchmark's questions. How "
    "much of it is in the model that DPO makes of them?",
    paper=Design(
        runs=(
            Run(name="sft_7b", gin_file="sft_7b.gin"),
            Run(name="dpo_7b", gin_file="dpo_7b.gin", base="sft_7b"),
            *(
                Run(name=name, gin_file="dpo_7b.gin", base="sft_7b", overrides={"MIXTURE": task})
                for name, task in _SUBSETS.items()
            ),
        ),
        benchmarks=SEVEN,
        cells=tuple(
            Cell(run=run, minus=minus, score=score)
            for run, minus in (("dpo_7b", "sft_7b"), *((name, "dpo_7b") for name in _SUBSETS))
            for score in _AMPLIFIED
        ),
        varies=VARIES,
        stability=True,
    ),
    tiny=Design(
        runs=(
            tiny_runs.run("sft", tiny_runs.SFT, updates=350),
            tiny_runs.run("dpo", tiny_runs.DPO, updates=25, base="sft"),
            *(
                tiny_runs.run(name, tiny_runs.DPO, updates=25, base="sft", MIXTURE=task)
                for name, task in _TASKS.items()
                if name != "dpo"
            ),
        ),
        benchmarks=(tiny_runs.BENCHMARK,),
        cells=tuple(
            _from(run, score)
            for run in _TASKS
            for score in (_LENGTH, tiny_runs.POLITE, tiny_runs.EXACT)
        ),
        expected=(
            Expected(says="Pairs whose longer answer is chosen make answers longer",
                     cell=_from("dpo", _LENGTH), above=0.0),
            Expected(says="Pairs whose shorter answer is chosen make them no longer",
                     cell=_from("dpo_terse", _LENGTH), below=0.5),
            Expected(says="Pairs of which half choose the longer lengthen answers less",
                     cell=Cell(run="dpo_even", minus="dpo", score=_LENGTH), below=0.0),
        ),
        varies=VARIES,
    ),
)  # fmt: skip
