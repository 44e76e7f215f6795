"""Table 6: Code TÜLU 2, from Code Llama."""

from tulu_jax.evals.paper_tables import SEVEN
from tulu_jax.studies.declared import Design, Run, Study, answers

COLUMNS = (*SEVEN, "truthfulqa")
_ROWS = {f"Code Tulu 2 {size}": f"sft_code_{size.lower()}" for size in ("7B", "13B", "34B")} | {
    f"Tulu 2 {size}": f"sft_{size.lower()}" for size in ("7B", "13B")
}

STUDY = Study(
    name="table_6_code",
    title="Table 6: Code TÜLU 2",
    question="What does a base that was trained on code gain and lose with the same mixture?",
    paper=Design(
        runs=tuple(Run(name=name, gin_file=f"{name}.gin") for name in _ROWS.values()),
        benchmarks=COLUMNS,
        cells=tuple(answers("6", _ROWS, (*COLUMNS, "average_8"))),
        varies=("model", "base", "data.tokenizer", "optimizer.learning_rate"),
    ),
    lacks="no small model here was trained on code",
)
