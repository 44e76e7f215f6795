"""Table 3: what DPO changes, at 7B, 13B and 70B."""

from tulu_jax.evals.paper_tables import SEVEN
from tulu_jax.studies import tiny_runs
from tulu_jax.studies.declared import CHARACTERS, Cell, Design, Expected, Run, Score, Study

SIZES = ("7B", "13B", "70B")
PAPER_RUNS = tuple(
    Run(name=f"{stage}_{size.lower()}", gin_file=f"{stage}_{size.lower()}.gin",
        base=f"sft_{size.lower()}" if stage == "dpo" else None)
    for size in SIZES
    for stage in ("sft", "dpo")
)  # fmt: skip
# Both stages have their own: rows, objective, rate, length of the run.
VARIES = ("model", "objective", "data.", "optimizer.", "batch_size", "num_epochs", "num_steps",
          "eval_every", "base")  # fmt: skip
_LENGTH = Score(benchmark=tiny_runs.BENCHMARK, metric=CHARACTERS)
_CURVES = (
    "train/loss", "eval/loss", "eval/rewards/accuracies", "eval/rewards/margins"
)  # fmt: skip


def _delta(score: Score) -> Cell:
    return Cell(run="dpo", minus="sft", score=score)


STUDY = Study(
    name="table_3_dpo",
    title="Table 3: what DPO changes",
    question="DPO − SFT: does DPO change the style of answers, and leave accuracy as it is?",
    paper=Design(
        runs=PAPER_RUNS,
        benchmarks=SEVEN,
        cells=tuple(
            Cell(
                run=f"dpo_{size.lower()}", minus=f"sft_{size.lower()}",
                score=Score(benchmark=column), paper=("3", f"Tulu 2+DPO {size}", column),
            )
            for size in SIZES
            for column in (*SEVEN, "average_7")
        ),
        varies=VARIES,
        curves=_CURVES,
        stability=True,
    ),
    tiny=Design(
        runs=(
            tiny_runs.run("sft", tiny_runs.SFT, updates=350),
            tiny_runs.run("dpo", tiny_runs.DPO, updates=25, base="sft"),
        ),
        benchmarks=(tiny_runs.BENCHMARK,),
        cells=(
            *(Cell(run=run, score=s) for s in (tiny_runs.EXACT, tiny_runs.POLITE, _LENGTH)
              for run in ("sft", "dpo")),
            *map(_delta, (tiny_runs.EXACT, tiny_runs.POLITE, _LENGTH)),
        ),
        expected=(
            Expected(says="DPO makes answers polite, the style that its pairs prefer",
                     cell=_delta(tiny_runs.POLITE), above=20.0),
            Expected(says="DPO loses less than 10 points of exact match",
                     cell=_delta(tiny_runs.EXACT), above=-10.0),
            Expected(says="DPO makes answers longer", cell=_delta(_LENGTH), above=0.0),
        ),
        varies=VARIES,
        curves=_CURVES,
        stability=True,
    ),
)  # fmt: skip
