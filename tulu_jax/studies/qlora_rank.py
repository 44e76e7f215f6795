"""A reproducer's third, and an open question: QLoRA against full fine-tuning, by size and rank."""

from tulu_jax.studies import tiny_runs
from tulu_jax.studies.declared import Cell, Design, Expected, Run, Score, Study
from tulu_jax.studies.table_5_qlora import COLUMNS, VARIES, tiny_qlora

_RANKS, _TINY_RANKS = (8, 16, 64, 256), (1, 4, 16, 64)
_SIZES = ("7b", "13b")


def _run(size: str, rank: int) -> Run:
    name = f"qlora_{size}" if rank == 64 else f"qlora_{size}_r{rank}"  # 64 is the paper's
    overrides = {} if rank == 64 else {"lora.LoRAConfig.rank": rank}
    return Run(name=name, gin_file=f"qlora_{size}.gin", overrides=overrides)


_RUNS = {size: [_run(size, rank) for rank in _RANKS] for size in _SIZES}
STUDY = Study(
    name="qlora_rank",
    title="QLoRA by size and rank",
    question="Does a larger rank close the distance to full fine-tuning, and at which size?",
    paper=Design(
        runs=(
            *(Run(name=f"sft_{size}", gin_file=f"sft_{size}.gin") for size in _SIZES),
            *(run for its in _RUNS.values() for run in its),
        ),
        benchmarks=COLUMNS,
        cells=tuple(
            Cell(run=run.name, minus=f"sft_{size}", score=Score(benchmark="average_8"))
            for size, its in _RUNS.items()
            for run in its
        ),
        varies=VARIES,
    ),
    tiny=Design(
        runs=(
            tiny_runs.run("base", tiny_runs.SFT, updates=300, seeds=(1,),
                          MIXTURE="tulu_tiny_no_facts"),
            *map(tiny_qlora, _TINY_RANKS),
        ),
        benchmarks=(tiny_runs.BENCHMARK,),
        cells=tuple(
            Cell(run=f"qlora_r{rank}", score=score)
            for rank in _TINY_RANKS
            for score in (tiny_runs.LOSS, tiny_runs.EXACT)
        ),
        expected=(
            Expected(says="The largest rank is ahead of rank 1, by the held-out loss",
                     cell=Cell(run=f"qlora_r{_TINY_RANKS[-1]}", minus="qlora_r1",
                               score=tiny_runs.LOSS), below=0.0),
        ),
        varies=(*VARIES, "data.train"),
    ),
)  # fmt: skip
