"""A reproducer's first: both stages on the smallest model, before anything larger."""

from tulu_jax.evals.paper_tables import SEVEN
from tulu_jax.studies.declared import (
    CHANGE,
    SEEDS,
    TRAINING,
    Cell,
    Design,
    Expected,
    Run,
    Score,
    Study,
    answers,
)
from tulu_jax.studies.table_3_dpo import VARIES

_ROWS = {"Tulu 2 7B": "sft_7b", "Tulu 2+DPO 7B": "dpo_7b"}
_SHORT = {"EVAL_EVERY": 10, "CHECKPOINT_EVERY": 20, "BATCH_SIZE": 4,
          "metrics.LoggingConfig.tensorboard": False}  # fmt: skip


def _score(metric: str, group: str | None = CHANGE) -> Score:
    return Score(benchmark=TRAINING, metric=metric, group=group)


_LOSS = Cell(run="stories_sft", score=_score("eval/loss"))
_MARGIN = Cell(run="stories_dpo", score=_score("eval/rewards/margins"))
STUDY = Study(
    name="small_model",
    title="The V2 recipe on a small model",
    question="Do both stages learn from real rows: does the loss fall, and then the margin rise?",
    paper=Design(
        runs=(
            Run(name="sft_7b", gin_file="sft_7b.gin"),
            Run(name="dpo_7b", gin_file="dpo_7b.gin", base="sft_7b"),
        ),
        benchmarks=SEVEN,
        cells=tuple(answers("1", _ROWS, (*SEVEN, "average_7"))),
        varies=VARIES,
        stability=True,
    ),
    tiny=Design(  # real weights, tokenizer and rows: DATA_ROOT is ../shared/data
        runs=(
            Run(name="stories_sft", gin_file="stories260k_sft.gin", seeds=SEEDS,
                overrides=_SHORT | {"NUM_EPOCHS": 0.05}),
            Run(name="stories_dpo", gin_file="stories260k_dpo.gin", seeds=SEEDS, base="stories_sft",
                overrides=_SHORT | {"NUM_EPOCHS": 2.0, "BATCH_SIZE": 16}),
        ),
        benchmarks=(),
        cells=(
            Cell(run="stories_sft", score=_score("eval/loss", None)), _LOSS, _MARGIN,
            Cell(run="stories_dpo", score=_score("eval/rewards/accuracies", None)),
        ),
        expected=(
            Expected(says="The held-out loss falls in SFT", cell=_LOSS, below=0.0),
            Expected(says="The held-out reward margin rises in DPO", cell=_MARGIN, above=0.0),
        ),
        varies=VARIES,
        stability=True,
    ),
)  # fmt: skip
