"""A reproducer's second: is DPO stable at every size, and for which rates and batches?"""

from tulu_jax.studies import tiny_runs
from tulu_jax.studies.declared import TRAINING, Cell, Design, Expected, Run, Score, Study

_RATES, _ROWS = (1e-7, 5e-7, 2e-6, 1e-5), (3, 12)  # of 7B: 3 rows hold 32 pairs, the paper's
_TINY_RATES, _TINY_ROWS = (1e-5, 1e-4, 3e-3), (4, 8)
_ACCURACY = Score(benchmark=TRAINING, metric="eval/rewards/accuracies")
_MARGIN = Score(benchmark=TRAINING, metric="eval/rewards/margins")
_CURVES = ("train/loss", "train/kl", "train/grad_norm", "eval/rewards/margins",
           "eval/rewards/accuracies")  # fmt: skip


def _name(rate: float, rows: int) -> str:
    return f"dpo_{rate:.0e}_{rows}".replace("e-0", "e-")


_SWEEP = tuple(
    Run(name=_name(rate, rows), gin_file="dpo_7b.gin", base="sft_7b",
        overrides={"LEARNING_RATE": rate, "BATCH_SIZE": rows})
    for rate in _RATES
    for rows in _ROWS
    if (rate, rows) != (5e-7, 3)  # that is dpo_7b itself
)  # fmt: skip
_TINY = tuple(
    tiny_runs.run(_name(rate, rows), tiny_runs.DPO, updates=20, base="sft_short",
                  LEARNING_RATE=rate, BATCH_SIZE=rows)
    for rate in _TINY_RATES
    for rows in _TINY_ROWS
)  # fmt: skip
_SIZES = tuple(
    Run(name=f"{stage}_{size}", gin_file=f"{stage}_{size}.gin",
        base=f"sft_{size}" if stage == "dpo" else None)
    for size in ("7b", "13b", "70b")
    for stage in ("sft", "dpo")
)  # fmt: skip
_LOWEST, _HIGHEST = (_name(rate, 4) for rate in (_TINY_RATES[0], _TINY_RATES[-1]))
STUDY = Study(
    name="dpo_stability",
    title="DPO's stability, by size, rate and batch",
    question="Which DPO runs diverge, and when; what do margins, KL and gradients say before that?",
    paper=Design(
        runs=(*_SIZES, *_SWEEP),
        benchmarks=(),
        cells=tuple(
            Cell(run=run.name, score=score)
            for run in (*_SIZES[1::2], *_SWEEP)
            for score in (_ACCURACY, _MARGIN)
        ),
        varies=("model", "objective", "data.", "optimizer.", "batch_size", "num_", "base"),
        curves=_CURVES,
        stability=True,
    ),
    tiny=Design(
        runs=(tiny_runs.run("sft_short", tiny_runs.SFT, updates=200, seeds=(1,)), *_TINY),
        benchmarks=(tiny_runs.BENCHMARK,),
        cells=tuple(
            Cell(run=run.name, score=score)
            for run in _TINY
            for score in (tiny_runs.EXACT, _ACCURACY, _MARGIN)
        ),
        expected=(
            Expected(says="The highest rate gives the larger margin",
                     cell=Cell(run=_HIGHEST, minus=_LOWEST, score=_MARGIN), above=0.0),
            Expected(says="The highest rate costs exact match",
                     cell=Cell(run=_HIGHEST, minus=_LOWEST, score=tiny_runs.EXACT), below=0.0),
        ),
        varies=("objective", "data.", "optimizer.", "batch_size", "num_steps", "base"),
        curves=_CURVES,
        stability=True,
    ),
)  # fmt: skip
