"""Figure 1: how long the conversations of the V2 mixture are, in tokens."""

from tulu_jax.audit.card import PAPER_LENGTHS
from tulu_jax.studies.declared import DATA, Cell, Design, Expected, Run, Score, Study

_LONGER = Cell(run="german", minus="english", score=Score(benchmark=DATA, metric="mean"))
STUDY = Study(
    name="figure_1_lengths",
    title="Figure 1: the lengths of the V2 mixture",
    question="Are the rows as long as the paper's? The card beside the runs has the histogram.",
    paper=Design(
        runs=(Run(name="sft_7b", gin_file="sft_7b.gin", only_prepared=True),),
        benchmarks=(),
        cells=tuple(
            Cell(run="sft_7b", score=Score(benchmark=DATA, metric=metric), printed=float(number))
            for metric, number in PAPER_LENGTHS.items()
            if metric != "rows"
        )
        + (
            Cell(
                run="sft_7b",
                score=Score(benchmark=DATA, metric="count"),
                printed=float(PAPER_LENGTHS["rows"]),
            ),
        ),
    ),
    tiny=Design(
        runs=tuple(
            Run(
                name=name,
                gin_file="tulu_tiny_sft.gin",
                overrides={"MIXTURE": mixture},
                only_prepared=True,
            )
            for name, mixture in (("english", "tulu_tiny"), ("german", "tulu_tiny_german"))
        ),
        benchmarks=(),
        cells=(
            *(Cell(run=name, score=Score(benchmark=DATA, metric="mean"))
              for name in ("english", "german")),
            _LONGER,
        ),
        expected=(
            Expected(
                says="A tokenizer of English needs more tokens for German", cell=_LONGER, above=0.0
            ),
        ),
        varies=("data.train",),
    ),
)  # fmt: skip
