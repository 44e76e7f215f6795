"""Small configs and batches that several tests share."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tulu_jax.data.loader import DataConfig
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.objectives import dpo, sft
from tulu_jax.parallel.mesh import MeshConfig
from tulu_jax.recipe import TrainConfig
from tulu_jax.training.checkpoint import CheckpointConfig
from tulu_jax.training.metrics import LoggingConfig
from tulu_jax.training.optim import OptimizerConfig

MODEL = LlamaConfig(
    vocab_size=512, num_layers=2, embed_dim=32, mlp_dim=64, num_heads=8, num_kv_heads=4,
    head_dim=8, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, max_positions=128,
)  # fmt: skip


def train_config(workdir, *, tokenizer="unused", dpo_stage=False, **changes) -> TrainConfig:
    """An all-float32 run of a two-layer model on tulu_tiny, on one device."""
    values = dict(
        model=MODEL,
        data=DataConfig(
            train="tulu_tiny_preference" if dpo_stage else "tulu_tiny",
            tokenizer=str(tokenizer),
            max_length=64,
            packing="none" if dpo_stage else "best_fit",
            cache_dir=str(workdir / "cache"),
        ),
        objective=dpo.DPOConfig(vocab_chunk=32) if dpo_stage else sft.SFTConfig(vocab_chunk=32),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.1),
        checkpoint=CheckpointConfig(every=4),
        execution=ExecutionConfig(compute_dtype="float32", attention="xla", remat=False),
        mesh=MeshConfig(data=8),
        logging=LoggingConfig(tensorboard=False),
        workdir=str(workdir / "run"),
        base=None,
        batch_size=8,
        num_steps=8,
    )
    return TrainConfig(**(values | changes))


def replace(config, **changes):
    """`dataclasses.replace`, with dotted names for nested fields given as `outer__inner`."""
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        if inner:
            value = replace(getattr(config, outer), **{inner: value})
        config = dataclasses.replace(config, **{outer: value})
    return config


def sft_batch(rows: int, length: int, seed: int = 0) -> dict[str, jnp.ndarray]:
    """Packed rows with very unequal numbers of trained tokens and some padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, MODEL.vocab_size, (rows, length + 1))
    segment_ids, positions = np.zeros((2, rows, length), np.int32)
    loss_mask = np.zeros((rows, length), bool)
    for row in range(rows):
        first, last = sorted(rng.integers(1, length, 2))
        segment_ids[row, :first], segment_ids[row, first:last] = 1, 2
        positions[row, :first], positions[row, first:last] = range(first), range(last - first)
        loss_mask[row] = (rng.random(length) < (row + 1) / rows) & (segment_ids[row] > 0)
        loss_mask[row, 0] = True
    return {
        "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "loss_mask": jnp.asarray(loss_mask),
        "segment_ids": jnp.asarray(segment_ids),
        "positions": jnp.asarray(positions),
    }


def dpo_batch(pairs: int, length: int, seed: int = 0) -> dict[str, jnp.ndarray]:
    """Plain two-sequence rows [B, 2, T] with made-up reference log-probabilities."""
    flat = sft_batch(2 * pairs, length, seed)
    batch = {name: value.reshape(pairs, 2, length) for name, value in flat.items()}
    rng = np.random.default_rng(seed)
    return {
        **batch,
        "example": jnp.arange(pairs, dtype=jnp.int32),
        "ref_logps": jnp.asarray(rng.uniform(-60, -20, (pairs, 2)), jnp.float32),
    }
