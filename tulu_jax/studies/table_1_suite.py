"""Table 1: the suite, TÜLU 2 and TÜLU 2+DPO at 7B, 13B and 70B."""

from tulu_jax.evals.paper_tables import SEVEN
from tulu_jax.studies import table_3_dpo
from tulu_jax.studies.declared import Design, Study, answers
from tulu_jax.studies.table_3_dpo import PAPER_RUNS, VARIES

ROWS = {f"Tulu 2 {size}": f"sft_{size.lower()}" for size in ("7B", "13B", "70B")} | {
    f"Tulu 2+DPO {size}": f"dpo_{size.lower()}" for size in ("7B", "13B", "70B")
}
STUDY = Study(
    name="table_1_suite",
    title="Table 1: the TÜLU 2 suite",
    question="What do the suite's models score on the seven benchmarks of the paper's average?",
    paper=Design(
        runs=PAPER_RUNS,
        benchmarks=SEVEN,
        cells=tuple(answers("1", ROWS, (*SEVEN, "average_7"))),
        varies=VARIES,
    ),
    tiny=table_3_dpo.STUDY.tiny,  # the same runs: both stages
)
