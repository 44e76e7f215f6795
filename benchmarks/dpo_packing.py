"""DPO rows three ways on real lengths: pairs/s, and the positions of a row that are any use.

    python benchmarks/dpo_packing.py [--data_root=../shared/data]

`branches`: the prompt once, both answers as its branches, many pairs a row (ours). `plain`: both
answers after a prompt of their own, packed by the same best fit. `padded`: one answer a row, as
the original trainer did. UltraFeedback pairs with the Llama-2 tokenizer, rows of 8,192. The update
is that of a tiny Llama, its ids taken modulo a vocabulary of 512: only the lengths matter here.
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
from tulu_jax.data import loader, packing
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.objectives import dpo
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import optim
from tulu_jax.training.checkpoint import CheckpointConfig
from tulu_jax.training.state import Frozen, TrainState

MODEL = LlamaConfig(
    vocab_size=512, num_layers=2, embed_dim=128, mlp_dim=352, num_heads=8, num_kv_heads=4,
    head_dim=16, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=8192,
)  # fmt: skip
LENGTH, TARGET = 8192, 1.0
ROWS = 2  # of an update; of `padded`, pairs


def with_own_prompts(pair):
    """The pair with nothing shared: its first trained range, an empty one, starts at 0."""
    return [(ids, np.concatenate([[[0, 0]], spans])) for ids, spans in pair]


def layouts(pairs: list) -> dict[str, tuple[packing.Plan, callable]]:
    """The plan of one epoch in each layout, and what fills one of its rows."""
    plain = [with_own_prompts(pair) for pair in pairs]
    single = np.array([sum(len(ids) - 1 for ids, _ in pair) for pair in pairs])
    shared = single - np.array([int(pair[0][1][0, 0]) for pair in pairs])
    longest = np.array([max(len(ids) - 1 for ids, _ in pair) for pair in pairs])
    most = int(LENGTH // shared.min())

    def packed(source):
        def fill(members):
            row = packing.fill_pair_row([source[i] for i in members], capacity=LENGTH)
            row["example"] = np.full(most, -1, np.int32)
            row["example"][: len(members)] = members
            return row

        return fill

    def padded(members):
        sides = [packing.fill_row([side], capacity=LENGTH) for side in pairs[members[0]]]
        row = {name: np.stack([side[name] for side in sides]) for name in sides[0]}
        return row | {"example": np.int32(members[0])}

    def plan(lengths, kind):
        return packing.epoch_plan(lengths, capacity=LENGTH, packing=kind, seed=0, epoch=0)

    return {
        "branches": (plan(shared, "best_fit"), packed(pairs)),
        "plain": (plan(single, "best_fit"), packed(plain)),
        "padded": (plan(longest, "none"), padded),
    }


def updater(data: loader.DataConfig, rows: int):
    """A function that makes one update, row after row, of a batch."""
    config = TrainConfig(
        model=MODEL,
        data=data,
        objective=dpo.DPOConfig(),
        optimizer=optim.OptimizerConfig(learning_rate=1e-5, warmup_ratio=0.0),
        checkpoint=CheckpointConfig(every=1),
        execution=ExecutionConfig(compute_dtype="float32", remat_policy="save_projections"),
        workdir="unused",
        base=None,
        batch_size=rows,
        micro_batch_size=1,
        num_steps=10**6,
    )
    params = jax.jit(lambda: llama.init_params(MODEL, jax.random.key(0)))()
    opt_state = optim.make(config.optimizer, 10**6).init(params)
    state = [TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)]
    step = jax.jit(step_lib.make_train_step(config, 10**6), donate_argnums=0)

    def update(batch):
        state[0], measured = step(state[0], Frozen(), batch)
        return float(measured.scalars["loss"])

    return update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_root", default=str(pathlib.Path("..", "shared", "data")))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    root = pathlib.Path(arguments.data_root)
    with tempfile.TemporaryDirectory() as folder:
        data = loader.DataConfig(
            train="real_small_dpo",
            tokenizer=str(root / "tokenizer/llama2/tokenizer.model"),
            data_root=str(root),
            max_length=LENGTH,
            cache_dir=folder,
            accept_counts=True,
        )
        store = loader.prepare(data, split="train").store
        pairs = [store.sides(i) for i in range(len(store))]
    small = [[(ids.astype(np.int32) % 512, spans) for ids, spans in pair] for pair in pairs]
    found = layouts(small)
    updates = {name: updater(data, ROWS) for name in found}
    seconds = {name: [] for name in found}
    for k in range(arguments.rounds + 1):
        for name, (plan, fill) in found.items():
            rows = [fill(plan.row((k * ROWS + r) % plan.num_rows)) for r in range(ROWS)]
            batch = {field: np.stack([row[field] for row in rows]) for field in rows[0]}
            batch["truncated"] = np.zeros(batch["example"].shape, bool)
            batch["ref_logps"] = np.zeros((*batch["example"].shape, 2), np.float32)
            start = time.perf_counter()
            updates[name](batch)
            if k:
                seconds[name].append((time.perf_counter() - start) / ROWS)
    lengths = np.array([[len(ids) - 1 for ids, _ in pair] for pair in pairs])
    prompts = np.array([int(pair[0][1][0, 0]) for pair in pairs])
    useful = lengths.sum() - prompts.sum()  # every position that the loss depends on, once
    print(
        f"{len(pairs)} pairs, prompts of {prompts.mean():.0f} tokens on average, sides of "
        f"{lengths.mean():.0f} with it, rows of {LENGTH:,}"
    )
    print(f"{'layout':9} {'rows/epoch':>10} {'pairs/row':>9} {'useful':>7} {'pairs/s':>8}")
    table = {}
    for name, (plan, _) in found.items():
        rows = plan.num_rows * (2 if name == "padded" else 1)
        table[name] = {
            "rows": rows,
            "pairs_per_row": len(pairs) / rows,
            "useful": float(useful / (rows * LENGTH)),
            # one row costs what another does; how many pairs it holds is a matter of luck
            "pairs_per_second": len(pairs) / plan.num_rows / statistics.median(seconds[name]),
        }
        print(
            f"{name:9} {rows:10} {table[name]['pairs_per_row']:9.2f} "
            f"{table[name]['useful']:7.1%} {table[name]['pairs_per_second']:8.2f}"
        )
    rate = {name: row["pairs_per_second"] for name, row in table.items()}
    ratio = rate["branches"] / rate["plain"]
    summary = {"name": "dpo_packing", "ratio": ratio, "target": TARGET, "ok": ratio >= TARGET}
    summary["against_padded"] = rate["branches"] / rate["padded"]
    outcome.tell(summary | {"layouts": table})


if __name__ == "__main__":
    main()
