"""Table 5: QLoRA against full fine-tuning, at 7B, 13B and 70B."""

from tulu_jax.evals.paper_tables import SEVEN
from tulu_jax.studies import tiny_runs
from tulu_jax.studies.declared import Cell, Design, Expected, Run, Study, answers

COLUMNS = (*SEVEN, "truthfulqa")
SIZES = ("7B", "13B", "70B")
_BASES = {f"Llama-2 {size}": f"llama2_{size.lower()}" for size in SIZES}
_TRAINED = {f"Tulu 2 {size}": f"sft_{size.lower()}" for size in SIZES} | {
    f"Tulu 2 QLoRA {size}": f"qlora_{size.lower()}" for size in SIZES
}
# QLoRA has a recipe of its own (§3.4, appendix B).
VARIES = ("model", "adapter", "quant", "param_dtype", "optimizer.", "num_epochs", "num_steps",
          "batch_size", "data.max_length", "base")  # fmt: skip
_RANKS = (1, 16)
_UPDATES = 150


def tiny_qlora(rank: int) -> Run:
    """QLoRA of `rank` on what the base has not seen, scaled by 1 / √rank, so that adapters of all
    ranks move as fast (Kalajdzievski 2023): with alpha / rank one rate suits one rank."""
    return tiny_runs.run(
        f"qlora_r{rank}", tiny_runs.QLORA, updates=_UPDATES, base="base",
        **{"MIXTURE": "tulu_tiny_all", "lora.LoRAConfig.rank": rank,
           "lora.LoRAConfig.alpha": 1.0, "lora.LoRAConfig.rank_stabilised": True,
           "LEARNING_RATE": 1e-2},
    )  # fmt: skip


STUDY = Study(
    name="table_5_qlora",
    title="Table 5: QLoRA against full fine-tuning",
    question="How far is QLoRA behind full fine-tuning, from one base, and what does rank give?",
    paper=Design(
        runs=(
            *(Run(name=f"llama2_{size.lower()}", gin_file=f"sft_{size.lower()}.gin", initial="none")
              for size in SIZES),
            *(Run(name=name, gin_file=f"{name}.gin") for name in _TRAINED.values()),
        ),
        benchmarks=COLUMNS,
        cells=tuple(answers("5", _BASES | _TRAINED, (*COLUMNS, "average_8"))),
        varies=VARIES,
    ),
    tiny=Design(
        runs=(
            # The base has seen no facts; what is then trained must learn them.
            tiny_runs.run("base", tiny_runs.SFT, updates=300, seeds=(1,),
                          MIXTURE="tulu_tiny_no_facts"),
            tiny_runs.run("full", tiny_runs.SFT, updates=_UPDATES, base="base",
                          MIXTURE="tulu_tiny_all"),
            *map(tiny_qlora, _RANKS),
        ),
        benchmarks=(tiny_runs.BENCHMARK,),
        cells=(
            *(Cell(run=run, score=tiny_runs.EXACT)
              for run in ("base", "full", "qlora_r1", "qlora_r16")),
            Cell(run="qlora_r1", minus="full", score=tiny_runs.EXACT),
            Cell(run="qlora_r16", minus="full", score=tiny_runs.EXACT),
            Cell(run="qlora_r16", minus="qlora_r1", score=tiny_runs.EXACT),
            *(Cell(run=run, score=score)
              for run in ("full", "qlora_r1", "qlora_r16")
              for score in (tiny_runs.LOSS, tiny_runs.exact("kind"))),
        ),
        expected=(
            Expected(says="QLoRA of rank 1 trails full fine-tuning, by the held-out loss",
                     cell=Cell(run="qlora_r1", minus="full", score=tiny_runs.LOSS), above=0.0),
            Expected(says="Rank 16 is ahead of rank 1, by the held-out loss",
                     cell=Cell(run="qlora_r16", minus="qlora_r1", score=tiny_runs.LOSS),
                     below=0.0),
            Expected(says="Full fine-tuning is ahead of its base",
                     cell=Cell(run="full", minus="base", score=tiny_runs.EXACT), above=0.0),
        ),
        varies=(*VARIES, "data.train"),
    ),
)  # fmt: skip
