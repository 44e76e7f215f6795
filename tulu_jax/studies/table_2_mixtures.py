"""Table 2: ShareGPT alone, the V1 and the V2 mixture, by supervised fine-tuning."""

from tulu_jax.data.tulu_tiny import FACTS
from tulu_jax.evals.paper_tables import SEVEN
from tulu_jax.studies import tiny_runs
from tulu_jax.studies.declared import Cell, Design, Expected, Run, Study, answers

COLUMNS = (*SEVEN, "truthfulqa")
_FILES = {
    "ShareGPT 7B": "sft_sharegpt_7b",
    **{f"Tulu V1 mix {size}": f"sft_v1_{size.lower()}" for size in ("7B", "13B", "70B")},
    **{f"Tulu 2 {size}": f"sft_{size.lower()}" for size in ("7B", "13B", "70B")},
}
_MIXTURES = {"dialogue": "tulu_tiny_dialogue", "no_facts": "tulu_tiny_no_facts",
             "all": "tulu_tiny_all"}  # fmt: skip
_REMEMBER = tiny_runs.exact("remember")


def _more(run: str, minus: str, score, says: str) -> Expected:
    return Expected(says=says, cell=Cell(run=run, minus=minus, score=score), above=0.0)


STUDY = Study(
    name="table_2_mixtures",
    title="Table 2: what the mixture gives",
    question="Does a mixture of more sources score higher, and what is lost without one of them?",
    paper=Design(
        runs=tuple(Run(name=name, gin_file=f"{name}.gin") for name in _FILES.values()),
        benchmarks=COLUMNS,
        cells=tuple(answers("2", _FILES, (*COLUMNS, "average_8"))),
        varies=("model", "data.train", "optimizer.learning_rate", "base"),
    ),
    tiny=Design(
        runs=tuple(
            tiny_runs.run(name, tiny_runs.SFT, updates=350, MIXTURE=mixture)
            for name, mixture in _MIXTURES.items()
        ),
        benchmarks=(tiny_runs.BENCHMARK,),
        cells=(
            *(Cell(run=name, score=tiny_runs.EXACT) for name in _MIXTURES),
            Cell(run="all", minus="no_facts", score=tiny_runs.EXACT),
            *(Cell(run="all", minus="no_facts", score=tiny_runs.exact(f)) for f in FACTS),
            Cell(run="all", minus="dialogue", score=tiny_runs.EXACT),
            *(Cell(run=name, score=_REMEMBER) for name in _MIXTURES),
        ),
        expected=(
            _more("all", "no_facts", tiny_runs.exact("kind"),
                  "A mixture without the families of facts loses the accuracy on them"),
            _more("all", "dialogue", tiny_runs.EXACT,
                  "A mixture of one family is behind that of all"),
            _more("no_facts", "dialogue", tiny_runs.EXACT,
                  "A mixture of seven families is ahead of that of one"),
        ),
        varies=("data.train",),
    ),
)  # fmt: skip
