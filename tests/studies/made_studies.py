"""A small study and what its runs would leave: checkpoints by the trainer's own writers, scores."""

import json
import pathlib

import jax.numpy as jnp

from tulu_jax import cli, provenance
from tulu_jax.evals import predictions, scores
from tulu_jax.evals.benchmark import Answer, Metric
from tulu_jax.studies import run_states
from tulu_jax.studies.declared import Cell, Design, Expected, Run, Score, Study
from tulu_jax.training import checkpoint
from tulu_jax.training.state import TrainState

SMALL = {
    "config.LlamaConfig.num_layers": 1,
    "config.LlamaConfig.embed_dim": 32,
    "config.LlamaConfig.mlp_dim": 64,
    "config.LlamaConfig.head_dim": 8,
    "metrics.LoggingConfig.tensorboard": False,
    "NUM_STEPS": 4,
    "CHECKPOINT_EVERY": 2,
    "MAX_LENGTH": 64,
}
EXACT = Score(benchmark="tulu_tiny", metric="exact_match")
ITEMS = 40


def design(**changes) -> Design:
    """Two runs of two seeds, the second from the first."""
    fields = dict(
        runs=(
            Run(name="sft", gin_file="tulu_tiny_sft.gin", overrides=SMALL, seeds=(1, 2)),
            Run(
                name="dpo", gin_file="tulu_tiny_dpo.gin", overrides=SMALL, seeds=(1, 2), base="sft"
            ),
        ),
        benchmarks=("tulu_tiny",),
        cells=(
            Cell(run="sft", score=EXACT, paper=("3", "Tulu 2+DPO 7B", "alpaca_eval")),
            Cell(run="dpo", minus="sft", score=EXACT),
        ),
        expected=(
            Expected(says="it rises", cell=Cell(run="dpo", minus="sft", score=EXACT), above=0.0),
        ),
        varies=("objective", "data.", "optimizer.", "batch_size", "eval_every"),
    )
    return Design(**(fields | changes))


def study(of: Design) -> Study:
    return Study(name="made", title="A <made> study", question="Does it rise?", tiny=of)


def placed(of: Design, folder: pathlib.Path, only=()) -> list[run_states.Placed]:
    return run_states.place(
        of, of.chosen(only), configs=folder / "configs", root=str(folder / "runs"),
        below_bucket=False,
    )  # fmt: skip


def train(one: run_states.Placed, *, step: int = 4, git: str = "a" * 40) -> None:
    """Leaves of a run what tells of it: its config, a checkpoint's `about`, curves, provenance."""
    workdir = pathlib.Path(one.workdir)
    cli.load(one.gin_file, workdir=one.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.gin").write_text(cli.operative_config())
    config = cli.load(one.gin_file, workdir=one.workdir)
    checkpoints = checkpoint.Checkpoints(one.workdir, config.checkpoint)
    state = TrainState(step=jnp.int32(step), params={"x": jnp.zeros(1)}, opt_state=())
    checkpoints.save(step, state, {"must_match": {"num_steps": 4}}, {})
    checkpoints.close()
    lines = [{"step": n, "train/loss": 2.0 / n + one.seed / 10} for n in range(1, step + 1)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = {
        "seconds": 3.0, "first_step": 0, "last_step": step, "versions": {"jax": "1"},
        "git": {"revision": git, "changed": False}, "data": f"{one.run.name} rows",
        "hardware": {"devices": 1, "kind": "cpu", "platform": "cpu"},
    }  # fmt: skip
    (workdir / provenance.FILE).write_text(json.dumps([entry]))


def evaluate(one: run_states.Placed, right: int, *, pending: bool = False) -> None:
    """Leaves the scores of a run that had so many of `ITEMS` right."""
    folder = run_states.evals_folder(one, 4)
    folder.mkdir(parents=True, exist_ok=True)
    items = {str(n): float(n < right) for n in range(ITEMS)}
    share = right / ITEMS
    metric = Metric(
        name="exact_match", value=None if pending else share,
        standard_error=None if pending else (share * (1 - share) / ITEMS) ** 0.5,
        items={} if pending else items, groups={"a": share},
    )  # fmt: skip
    found = scores.Scored(
        benchmark="tulu_tiny", subset="paper", switches={"subset": "paper"}, requests=ITEMS,
        metrics=[metric], group_of=dict.fromkeys(items, "a"), ended={}, characters=None,
        group_characters={}, notes=[],
    )  # fmt: skip
    scores.save(folder, one.name, [found])
    rows = {id_: f"{id_}" for id_ in items}
    file = predictions.Predictions(folder / "tulu_tiny.paper.jsonl", about={}, hashes=rows)
    for id_ in items:
        file.add(Answer(id=id_, prompt_hash=id_, texts=["x" * (int(id_) + 1)], ended=["stop"]))
    file.close()
