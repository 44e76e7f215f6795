"""Table 4: MT-Bench, AlpacaEval and the length of answers, before and after DPO."""

from tulu_jax.studies import table_3_dpo
from tulu_jax.studies.declared import Design, Study, answers
from tulu_jax.studies.table_1_suite import ROWS
from tulu_jax.studies.table_3_dpo import PAPER_RUNS, VARIES

STUDY = Study(
    name="table_4_chat",
    title="Table 4: chat, and how long answers are",
    question="Do MT-Bench and AlpacaEval rise with DPO, and do answers become longer?",
    paper=Design(
        runs=PAPER_RUNS,
        benchmarks=("mt_bench", "alpaca_eval"),
        cells=tuple(answers("4", ROWS, ("mt_bench", "alpaca_eval", "output_length"))),
        varies=VARIES,
    ),
    tiny=table_3_dpo.STUDY.tiny,  # the same runs, whose table has lengths
)
