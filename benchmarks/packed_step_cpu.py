"""Conversations per second: packed rows against one conversation a row, on real lengths.

    python benchmarks/packed_step_cpu.py [--data_root=../shared/data]

The lengths are those of the rows of the mixture `real_small_sft` with the stories260K tokenizer,
cut at T = 512, or of `tulu_tiny` at T = 256 where the real rows are absent. Both sides run the same
model and the same update on rows from the same loader; only `packing` differs.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time

import outcome

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from tulu_jax import step as step_lib
from tulu_jax.data import loader, tulu_tiny
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.objectives import sft
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import optim
from tulu_jax.training.checkpoint import CheckpointConfig
from tulu_jax.training.state import Frozen, TrainState

MODEL = LlamaConfig(
    vocab_size=512, num_layers=5, embed_dim=128, mlp_dim=352, num_heads=8, num_kv_heads=4,
    head_dim=16, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=512,
)  # fmt: skip
ROWS, TARGET = 8, 1.0


def side(data: loader.DataConfig):
    """The rows of one packing, and a function that makes update k and returns its conversations."""
    config = TrainConfig(
        model=MODEL,
        data=data,
        objective=sft.SFTConfig(),
        optimizer=optim.OptimizerConfig(learning_rate=1e-4, warmup_ratio=0.0),
        checkpoint=CheckpointConfig(every=1),
        execution=ExecutionConfig(compute_dtype="float32", remat_policy="save_projections"),
        workdir="unused",
        base=None,
        batch_size=ROWS,
        num_steps=10**6,
    )
    rows = loader.prepare(data, split="train")
    step = jax.jit(step_lib.make_train_step(config, 10**6), donate_argnums=0)
    params = jax.jit(lambda: llama.init_params(MODEL, jax.random.key(0)))()
    opt_state = optim.make(config.optimizer, 10**6).init(params)
    state = [TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)]

    def update(k: int) -> tuple[float, float]:
        built = [rows.row(i) for i in range(k * ROWS, (k + 1) * ROWS)]
        batch = {name: jnp.asarray(np.stack([row[name] for row in built])) for name in built[0]}
        state[0], measured = step(state[0], Frozen(), batch)
        values = measured.scalars
        return float(values["conversations"]), float(values["nonpadding"] / values["positions"])

    return rows, update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_root", default=str(pathlib.Path("..", "shared", "data")))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    root = pathlib.Path(arguments.data_root)
    with tempfile.TemporaryDirectory() as folder:
        if root.is_dir():
            tokenizer = str(root / "models/stories260K/tok512.model")
            common = dict(train="real_small_sft", tokenizer=tokenizer, data_root=str(root))
            common |= dict(max_length=512, holdout_every=20, accept_counts=True)
        else:
            print(f"real rows not found at {root}: using tulu_tiny")
            common = dict(train="tulu_tiny", max_length=256)
            common |= dict(tokenizer=tulu_tiny.tokenizer(f"{folder}/tokenizer"))
        sides = {
            packing: side(loader.DataConfig(packing=packing, cache_dir=folder, **common))
            for packing in ("best_fit", "none")
        }
        rates = {name: [] for name in sides}
        useful = {name: [] for name in sides}
        for k in range(arguments.rounds + 2):
            for name, (_, update) in sides.items():
                start = time.perf_counter()
                conversations, fraction = update(k)
                if k >= 2:
                    rates[name].append(conversations / (time.perf_counter() - start))
                    useful[name].append(fraction)
        print(f"{common['train']}, T = {common['max_length']}, {ROWS} rows an update, medians")
        print(f"{'packing':9} {'rows/epoch':>10} {'useful':>7} {'conversations/s':>16}")
        for name, (rows, _) in sides.items():
            print(
                f"{name:9} {rows.rows_per_epoch:10,} {statistics.mean(useful[name]):7.1%} "
                f"{statistics.median(rates[name]):16.1f}"
            )
        ratio = statistics.median(rates["best_fit"]) / statistics.median(rates["none"])
        summary = {"name": "packed_step_cpu", "ratio": ratio, "target": TARGET}
        summary |= {"ok": ratio >= TARGET, "mixture": common["train"]}
        outcome.tell(summary)


if __name__ == "__main__":
    main()
