"""The paper's second open question: DPO or PPO, from one start, on the same pairs and prompts.

A third arm trains nothing: of n answers of the start it takes the one that the reward model likes
most, at a KL divergence of at most log n − (n − 1)/n. All arms are asked at temperature 1, so that
what they say tells their KL divergence from the start as well.

A reward that can be cheated shows what the KL term is for: each character of a reply is worth
something, right or wrong (`ppo_rewards.right_or_long`).
"""

from tulu_jax.evals import measures
from tulu_jax.evals.paper_tables import SEVEN
from tulu_jax.studies import tiny_runs
from tulu_jax.studies.declared import (
    CHARACTERS,
    TRAINING,
    Against,
    Cell,
    Design,
    Expected,
    Run,
    Score,
    Study,
)

SIZES = ("7b", "13b", "70b")
_BEST_OF = (1, 4, 16)  # answers drawn to each prompt
_KL = Score(benchmark=tiny_runs.BENCHMARK, metric=measures.KL)
_REWARD = Score(benchmark=tiny_runs.BENCHMARK, metric=measures.REWARD)
_PROGRAM = Score(benchmark=TRAINING, metric="train/rollout/score")
_LENGTH = Score(benchmark=tiny_runs.BENCHMARK, metric=CHARACTERS)
_LONG = {"ppo.PPOConfig.reward": "right_or_long", "RESPONSE_LENGTH": 32, "MAX_LENGTH": 80,
         "LEARNING_RATE": 1.5e-3}  # fmt: skip
_TRAPS = {"trap_held": 0.5, "trap": 0.05, "trap_free": 0.0}  # KL coefficients
_VARIES = ("model", "objective", "data.", "optimizer.", "batch_size", "num_epochs", "num_steps",
           "base", "micro_batch_size", "mesh", "execution.")  # fmt: skip
_CURVES = ("train/loss", "train/rollout/score", "train/rollout/kl", "train/rollout/length",
           "train/policy/clipped", "train/value/explained")  # fmt: skip


def _ppo(name: str, updates: int, **overrides) -> Run:
    return tiny_runs.run(
        name, tiny_runs.PPO, updates=updates, base="sft", reward="rm", scored_by="rm",
        EVAL_EVERY=None, **overrides,
    )  # fmt: skip


def _best_of(of: Run, count: int, rm: str) -> Run:
    """The best of `count` answers of the run `of`."""
    return Run(
        name=f"best_of_{count}", gin_file=of.gin_file, seeds=of.seeds, base=of.name, scored_by=rm,
        best_of=count,
    )  # fmt: skip


def _of_size(size: str) -> tuple[Run, ...]:
    sft, rm = f"sft_{size}", f"rm_ultrafeedback_{size}"
    return (
        Run(name=sft, gin_file=f"{sft}.gin"),
        Run(name=f"dpo_uf_{size}", gin_file=f"dpo_{size}.gin", base=sft,
            overrides={"MIXTURE": "ultrafeedback_argilla_cleaned"}),
        Run(name=rm, gin_file=f"{rm}.gin", base=sft, is_evaluated=False),
        Run(name=f"ppo_{size}", gin_file=f"ppo_{size}.gin", base=sft, reward=rm),
    )  # fmt: skip


_SFT = tiny_runs.run("sft", tiny_runs.SFT, updates=350, is_evaluated=False)  # as the best of 1
_CHOSEN = tuple(f"best_of_{count}" for count in _BEST_OF)
_ARMS = ("dpo", "ppo", *_CHOSEN, *_TRAPS)
STUDY = Study(
    name="dpo_vs_ppo",
    title="DPO against PPO",
    question="From one start, on the same pairs: what do DPO and PPO change, and at what KL?",
    paper=Design(
        runs=tuple(run for size in SIZES for run in _of_size(size)),
        benchmarks=SEVEN,
        cells=tuple(
            Cell(run=f"ppo_{size}", minus=f"dpo_uf_{size}", score=Score(benchmark=column))
            for size in SIZES
            for column in (*SEVEN, "average_7")
        ),
        varies=_VARIES,
        curves=_CURVES,
        stability=True,
    ),
    tiny=Design(
        runs=(
            _SFT,
            tiny_runs.run("rm", tiny_runs.RM, updates=40, base="sft", is_evaluated=False),
            *(_best_of(_SFT, count, "rm") for count in _BEST_OF),
            tiny_runs.run("dpo", tiny_runs.DPO, updates=25, base="sft", scored_by="rm"),
            _ppo("ppo", 40),
            *(_ppo(name, 80, KL_COEF=kl, **_LONG) for name, kl in _TRAPS.items()),
        ),
        benchmarks=(tiny_runs.BENCHMARK,),
        cells=(
            *(
                Cell(run=run, score=score)
                for score in (tiny_runs.EXACT, tiny_runs.POLITE, _LENGTH, _REWARD, _KL)
                for run in _ARMS
            ),
            *(Cell(run=run, score=_PROGRAM) for run in _TRAPS),
        ),
        asked=("--temperature=1",),
        against=(
            Against(title="What each arm gains and costs, against its KL divergence from the start",
                    runs=("dpo", "ppo", *_CHOSEN), x=_KL,
                    ys=(_REWARD, tiny_runs.EXACT, tiny_runs.POLITE, _LENGTH)),
            Against(title="A reward that can be cheated, against the KL divergence",
                    runs=("best_of_1", *_TRAPS), x=_KL, ys=(_PROGRAM, tiny_runs.EXACT, _LENGTH)),
        ),
        expected=(
            Expected(says="PPO makes answers polite, the style that the reward model likes",
                     cell=Cell(run="ppo", minus="best_of_1", score=tiny_runs.POLITE), above=20.0),
            Expected(says="PPO loses less than 10 points of exact match",
                     cell=Cell(run="ppo", minus="best_of_1", score=tiny_runs.EXACT), above=-10.0),
            Expected(says="The best of 16 has more reward than the best of 4",
                     cell=Cell(run="best_of_16", minus="best_of_4", score=_REWARD), above=0.0),
            Expected(says="The best of 4 has more reward than one answer",
                     cell=Cell(run="best_of_4", minus="best_of_1", score=_REWARD), above=0.0),
            Expected(says="Without a KL term the trap makes answers longer than with a strong one",
                     cell=Cell(run="trap_free", minus="trap_held", score=_LENGTH), above=0.0),
            Expected(says="Without a KL term the trap costs exact match",
                     cell=Cell(run="trap_free", minus="trap_held", score=tiny_runs.EXACT),
                     below=0.0),
        ),
        varies=_VARIES,
        curves=_CURVES,
        stability=True,
    ),
)  # fmt: skip
