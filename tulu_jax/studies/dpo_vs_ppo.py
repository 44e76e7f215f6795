"""The paper's second open question: DPO or PPO, from one start, on the same pairs and prompts.

A reward that can be cheated shows what the KL term is for: each character of a reply is worth
something, right or wrong (`ppo_rewards.right_or_long`).
"""

from tulu_jax.evals.paper_tables import SEVEN
from tulu_jax.studies import tiny_runs
from tulu_jax.studies.declared import (
    CHARACTERS,
    TRAINING,
    Cell,
    Design,
    Expected,
    Run,
    Score,
    Study,
)

SIZES = ("7b", "13b", "70b")
_KL = Score(benchmark=TRAINING, metric="train/rollout/kl")
_REWARD = Score(benchmark=TRAINING, metric="train/rollout/score")
_LENGTH = Score(benchmark=tiny_runs.BENCHMARK, metric=CHARACTERS)
_LONG = {"ppo.PPOConfig.reward": "right_or_long", "RESPONSE_LENGTH": 32, "MAX_LENGTH": 80}
_TRAPS = {"trap_held": 0.5, "trap": 0.05, "trap_free": 0.0}  # KL coefficients
_VARIES = ("model", "objective", "data.", "optimizer.", "batch_size", "num_epochs", "num_steps",
           "base", "micro_batch_size", "mesh", "execution.")  # fmt: skip
_CURVES = ("train/loss", "train/rollout/score", "train/rollout/kl", "train/rollout/length",
           "train/policy/clipped", "train/value/explained")  # fmt: skip


def _ppo(name: str, **overrides) -> Run:
    return tiny_runs.run(
        name, tiny_runs.PPO, updates=40, base="sft", reward="rm", EVAL_EVERY=None, **overrides
    )


def _of_size(size: str) -> tuple[Run, ...]:
    sft, rm = f"sft_{size}", f"rm_ultrafeedback_{size}"
    return (
        Run(name=sft, gin_file=f"{sft}.gin"),
        Run(name=f"dpo_uf_{size}", gin_file=f"dpo_{size}.gin", base=sft,
            overrides={"MIXTURE": "ultrafeedback_argilla_cleaned"}),
        Run(name=rm, gin_file=f"{rm}.gin", base=sft),
        Run(name=f"ppo_{size}", gin_file=f"ppo_{size}.gin", base=sft, reward=rm),
    )  # fmt: skip


_ARMS = ("sft", "dpo", "ppo", *_TRAPS)
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
            tiny_runs.run("sft", tiny_runs.SFT, updates=350),
            tiny_runs.run("rm", tiny_runs.RM, updates=40, base="sft"),
            tiny_runs.run("dpo", tiny_runs.DPO, updates=25, base="sft"),
            _ppo("ppo"),
            *(
                _ppo(name, KL_COEF=kl, **_LONG)
                for name, kl in _TRAPS.items()
            ),
        ),
        benchmarks=(tiny_runs.BENCHMARK,),
        cells=(
            *(
                Cell(run=run, score=score)
                for score in (tiny_runs.EXACT, tiny_runs.POLITE, _LENGTH)
                for run in _ARMS
            ),
            *(
                Cell(run=run, score=score)
                for score in (_REWARD, _KL)
                for run in ("ppo", *_TRAPS)
            ),
        ),
        expected=(
            Expected(says="PPO makes answers polite, the style that the reward model likes",
                     cell=Cell(run="ppo", minus="sft", score=tiny_runs.POLITE), above=20.0),
            Expected(says="PPO loses less than 10 points of exact match",
                     cell=Cell(run="ppo", minus="sft", score=tiny_runs.EXACT), above=-10.0),
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
