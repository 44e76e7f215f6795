"""An open question: what each part of the mixture gives, by leaving it out, and by its weight."""

from tulu_jax.data.tulu import V2_COMPONENTS
from tulu_jax.data.tulu_tiny import FAMILIES, MIXTURES
from tulu_jax.evals.paper_tables import SEVEN
from tulu_jax.studies import tiny_runs
from tulu_jax.studies.declared import Cell, Design, Expected, Run, Score, Study

_LEFT_OUT = ("kind", "reverse", "larger")
_HALF = "half_sharegpt"  # the mixture with half of ShareGPT, its largest part


def _mixture(name: str, tasks: dict) -> dict:
    return {
        "MIXTURE": "@registry.Mixture()",
        "registry.Mixture.name": name,
        "registry.Mixture.tasks": tasks,
    }


def _without(family: str) -> Run:
    tasks = {f"tulu_tiny.{name}": None for name in FAMILIES if name != family}
    return tiny_runs.run(
        f"without_{family}", tiny_runs.SFT, updates=350,
        **_mixture(f"tulu_tiny_without_{family}", tasks),
    )  # fmt: skip


_PAPER_RUNS = tuple(
    Run(name=f"without_{name}", gin_file="sft_7b.gin",
        overrides={"MIXTURE": f"tulu_v2_sft_without_{name}"})
    for name in V2_COMPONENTS
) + (
    Run(name=_HALF, gin_file="sft_7b.gin", overrides=_mixture(
        _HALF, {f"tulu_v2.{name}": 0.5 if name == "sharegpt" else 1.0 for name in V2_COMPONENTS}
    )),
)  # fmt: skip
STUDY = Study(
    name="leave_one_out",
    title="What each part of the mixture gives",
    question="What is lost without a part of the mixture, and what with less of its largest?",
    paper=Design(
        runs=(Run(name="sft_7b", gin_file="sft_7b.gin"), *_PAPER_RUNS),
        benchmarks=SEVEN,
        cells=tuple(
            Cell(run=run.name, minus="sft_7b", score=Score(benchmark=column))
            for run in _PAPER_RUNS
            for column in (*SEVEN, "average_7")
        ),
        varies=("data.train",),
    ),
    tiny=Design(
        runs=(
            tiny_runs.run("all", tiny_runs.SFT, updates=350, MIXTURE=next(iter(MIXTURES))),
            *map(_without, _LEFT_OUT),
        ),
        benchmarks=(tiny_runs.BENCHMARK,),
        cells=tuple(
            Cell(run=f"without_{family}", minus="all", score=score)
            for family in _LEFT_OUT
            for score in (tiny_runs.EXACT, tiny_runs.exact(family))
        ),
        expected=tuple(
            Expected(
                says=f"Without the family '{family}' its accuracy is lost",
                cell=Cell(run=f"without_{family}", minus="all", score=tiny_runs.exact(family)),
                below=0.0,
            )
            for family in _LEFT_OUT
        ),
        varies=("data.train",),
    ),
)  # fmt: skip
