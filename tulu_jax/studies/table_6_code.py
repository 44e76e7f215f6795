"""Table 6: Code TÜLU 2, from Code Llama."""

from tulu_jax.evals.paper_tables import SEVEN
from tulu_jax.studies import tiny_runs
from tulu_jax.studies.declared import Cell, Design, Expected, Run, Score, Study, answers

COLUMNS = (*SEVEN, "truthfulqa")
_SIZES = ("7B", "13B", "34B")
_BASES = {f"Code Llama {size}": f"code_llama_{size.lower()}" for size in _SIZES}
_INSTRUCT = {f"Code Llama Instruct {size}": f"instruct_{size.lower()}" for size in _SIZES}
_CODE = {f"Code Tulu 2 {size}": f"sft_code_{size.lower()}" for size in _SIZES}
_TEXT = {f"Tulu 2 {size}": f"sft_{size.lower()}" for size in ("7B", "13B")}
_ROWS = _BASES | _INSTRUCT | _CODE | _TEXT
_PROGRAMS = Score(benchmark=tiny_runs.PROGRAMS, metric="exact_match")
_MIXTURE = "tulu_tiny_some_programs"


def _instruct(size: str) -> Run:
    """Its folder is expected beside the base's."""
    return Run(
        name=f"instruct_{size.lower()}", gin_file=f"sft_code_{size.lower()}.gin", initial="llama2",
        overrides={"HF_FOLDER": f"models/CodeLlama-{size.lower()}-Instruct-hf"},
    )  # fmt: skip


def _delta(score: Score) -> Cell:
    return Cell(run="from_code", minus="from_text", score=score)


STUDY = Study(
    name="table_6_code",
    title="Table 6: Code TÜLU 2",
    question="What does a base that was trained on code gain and lose with the same mixture?",
    paper=Design(
        runs=(
            *(Run(name=name, gin_file=f"{code}.gin", initial="none")
              for name, code in zip(_BASES.values(), _CODE.values(), strict=True)),
            *(_instruct(size) for size in _SIZES),
            *(Run(name=name, gin_file=f"{name}.gin") for name in (_CODE | _TEXT).values()),
        ),
        benchmarks=COLUMNS,
        cells=tuple(answers("6", _ROWS, (*COLUMNS, "average_8"))),
        varies=("model", "base", "data.tokenizer", "optimizer.learning_rate"),
    ),
    tiny=Design(
        runs=(
            # As Llama-2, and as Code Llama, which is Llama-2 trained further on code.
            tiny_runs.run("base", tiny_runs.SFT, updates=300, seeds=(1,),
                          MIXTURE="tulu_tiny_no_facts"),
            tiny_runs.run("code_base", tiny_runs.SFT, updates=300, seeds=(1,), base="base",
                          MIXTURE=tiny_runs.PROGRAMS),
            tiny_runs.run("from_text", tiny_runs.SFT, updates=150, base="base", MIXTURE=_MIXTURE),
            tiny_runs.run("from_code", tiny_runs.SFT, updates=150, base="code_base",
                          MIXTURE=_MIXTURE),
        ),
        benchmarks=(tiny_runs.BENCHMARK, tiny_runs.PROGRAMS),
        cells=(
            *(Cell(run=run, score=score)
              for score in (_PROGRAMS, tiny_runs.EXACT)
              for run in ("base", "code_base", "from_text", "from_code")),
            *map(_delta, (_PROGRAMS, tiny_runs.EXACT)),
        ),
        expected=(
            Expected(says="From a base trained on code, programs are answered better",
                     cell=_delta(_PROGRAMS), above=0.0),
            Expected(says="From a base trained on code, the rest is answered worse",
                     cell=_delta(tiny_runs.EXACT), below=0.0),
        ),
        varies=("data.train", "base", "num_steps", "eval_every", "checkpoint"),
    ),
)  # fmt: skip
