"""What the runs of studies at scale 'tiny' share: a smaller model of tulu_tiny, and few updates.

A run takes 10 to 60 seconds on one core.
"""

from collections.abc import Mapping
from typing import Any

from tulu_jax.studies.declared import SEEDS, TRAINING, Run, Score

SFT, DPO, QLORA = "tulu_tiny_sft.gin", "tulu_tiny_dpo.gin", "tulu_tiny_qlora.gin"
RM, PPO = "tulu_tiny_rm.gin", "tulu_tiny_ppo.gin"
BENCHMARK, GERMAN, PROGRAMS = "tulu_tiny", "tulu_tiny_german", "tulu_tiny_programs"
EXACT = Score(benchmark=BENCHMARK, metric="exact_match")
POLITE = Score(benchmark=BENCHMARK, metric="polite")
LOSS = Score(benchmark=TRAINING, metric="eval/loss")
_MODEL = {
    "config.LlamaConfig.num_layers": 3,
    "config.LlamaConfig.embed_dim": 128,
    "config.LlamaConfig.mlp_dim": 384,
    "config.LlamaConfig.num_heads": 4,
    "config.LlamaConfig.num_kv_heads": 2,
}


def run(
    name: str, gin_file: str, *, updates: int, seeds: tuple[int, ...] = SEEDS,
    base: str | None = None, reward: str | None = None, scored_by: str | None = None,
    is_evaluated: bool = True, **overrides: Any,
) -> Run:  # fmt: skip
    """A run of so many updates, evaluated on its held-out rows at both ends and half-way;
    `overrides` are macros."""
    fields: Mapping[str, Any] = _MODEL | {
        "NUM_STEPS": updates,
        "EVAL_EVERY": max(1, updates // 2),
        "CHECKPOINT_EVERY": max(1, updates // 2),
        "metrics.LoggingConfig.tensorboard": False,
    }
    return Run(
        name=name, gin_file=gin_file, overrides={**fields, **overrides}, seeds=seeds, base=base,
        reward=reward, scored_by=scored_by, is_evaluated=is_evaluated,
    )  # fmt: skip


def exact(family: str) -> Score:
    """The exact matches of one family of prompts."""
    return Score(benchmark=BENCHMARK, metric="exact_match", group=family)
