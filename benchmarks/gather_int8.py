"""SFT losses with weights gathered as int8 beside those gathered in bfloat16.

    python benchmarks/gather_int8.py [--updates=50]

A Llama of four layers learns `tulu_tiny` from random weights on eight fake devices, `fsdp` 4 x
`tensor` 2: the same rows, weights and order for all. A third run computes in float32, to say how
far bfloat16 itself moves a loss. No time is measured. The ratio is the mean loss of the last ten
updates with int8 over that with bfloat16.
"""

import argparse
import os
import tempfile

import outcome

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("NPROC", "64")  # threads: all of a device's collectives may wait at once

import jax
import jax.numpy as jnp
import numpy as np

from tulu_jax import step as step_lib
from tulu_jax.data import loader, tulu_tiny
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.objectives import sft
from tulu_jax.parallel import mesh as mesh_lib
from tulu_jax.parallel import sharding
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import optim
from tulu_jax.training.checkpoint import CheckpointConfig
from tulu_jax.training.state import Frozen, TrainState

MODEL = LlamaConfig(
    vocab_size=tulu_tiny.VOCAB_SIZE, num_layers=4, embed_dim=256, mlp_dim=512, num_heads=8,
    num_kv_heads=4, head_dim=32, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False,
    max_positions=256,
)  # fmt: skip
ROWS, LENGTH, LAST, TARGET = 8, 256, 10, 1.01
SIDES = {
    "float32": dict(compute_dtype="float32"),
    "bfloat16": dict(compute_dtype="bfloat16"),
    "int8": dict(compute_dtype="bfloat16", gather_dtype="int8"),
}


def losses(config: TrainConfig, rows: loader.Rows) -> np.ndarray:
    """float64 [num_steps]: the loss of each update of the run, before it is made."""
    mesh = mesh_lib.make(config.mesh)
    with jax.set_mesh(mesh):
        abstract, _ = step_lib.abstract_state(config, mesh)
        params = jax.jit(lambda: llama.init_params(MODEL, jax.random.key(0)))()
        opt_state = optim.make(config.optimizer, config.num_steps).init(params)
        state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)
        state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
        step = jax.jit(step_lib.make_train_step(config, config.num_steps), donate_argnums=0)
        of_rows = jax.NamedSharding(mesh, sharding.spec("batch", "length"))
        found = []
        for k in range(config.num_steps):
            built = [rows.row(i) for i in range(k * ROWS, (k + 1) * ROWS)]
            batch = {name: np.stack([row[name] for row in built]) for name in built[0]}
            state, measured = step(state, Frozen(), jax.device_put(batch, of_rows))
            found.append(float(measured.scalars["loss"]))
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=50)
    updates = parser.parse_args().updates
    with tempfile.TemporaryDirectory() as folder:
        data = loader.DataConfig(
            train="tulu_tiny",
            tokenizer=tulu_tiny.tokenizer(f"{folder}/tokenizer"),
            max_length=LENGTH,
            cache_dir=folder,
        )
        rows = loader.prepare(data, split="train")
        found = {}
        for name, execution in SIDES.items():
            config = TrainConfig(
                model=MODEL,
                data=data,
                objective=sft.SFTConfig(),
                optimizer=optim.OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.1),
                checkpoint=CheckpointConfig(every=1),
                execution=ExecutionConfig(remat_policy="save_projections", **execution),
                mesh=mesh_lib.MeshConfig(fsdp=4, tensor=2),
                workdir="unused",
                base=None,
                batch_size=ROWS,
                num_steps=updates,
            )
            found[name] = losses(config, rows)
    print(f"{'update':>6} " + " ".join(f"{name:>9}" for name in found) + "  int8 - bfloat16")
    apart = found["int8"] - found["bfloat16"]
    for k in [*range(0, updates, 5), updates - 1]:
        print(f"{k:6} " + " ".join(f"{x[k]:9.4f}" for x in found.values()) + f" {apart[k]:+16.5f}")
    of_bfloat16 = np.abs(found["bfloat16"] - found["float32"])
    ratio = found["int8"][-LAST:].mean() / found["bfloat16"][-LAST:].mean()
    summary = {"name": "gather_int8", "ratio": round(float(ratio), 5), "target": TARGET}
    summary |= {
        "ok": bool(ratio <= TARGET),
        "largest_difference": round(float(np.abs(apart).max()), 5),
        "mean_difference": round(float(np.abs(apart).mean()), 5),
        "mean_signed": round(float(apart.mean()), 5),
        "largest_of_bfloat16": round(float(of_bfloat16.max()), 5),
        "mean_of_bfloat16": round(float(of_bfloat16.mean()), 5),
    }
    outcome.tell(summary)


if __name__ == "__main__":
    main()
