"""Small configs and batches that several tests share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tulu_jax.data import fields as fields_lib
from tulu_jax.data import packing
from tulu_jax.data.loader import DataConfig
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.objectives import dpo, sft
from tulu_jax.parallel import sharding
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


def placed(mesh, objective, batch: dict) -> dict[str, jax.Array]:
    """`batch` on the devices of `mesh`, as the fields of `objective` say."""
    packing = "best_fit" if "branches" in batch else "none"
    fields = objective.fields(rows=1, length=1, packing=packing, places=1)
    return {
        name: jax.device_put(value, jax.NamedSharding(mesh, sharding.spec(*fields[name].axes)))
        for name, value in batch.items()
    }


def sft_batch(rows: int, length: int, seed: int = 0) -> dict[str, jnp.ndarray]:
    """Packed rows with very unequal numbers of trained tokens and some padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, MODEL.vocab_size, (rows, length + 1))
    fields = fields_lib.conversations(rows=rows, length=length)
    batch = {name: np.zeros(field.shape, field.dtype) for name, field in fields.items()}
    batch["tokens"][:], batch["targets"][:] = tokens[:, :-1], tokens[:, 1:]
    segment_ids, positions, loss_mask = (
        batch[name] for name in ("segment_ids", "positions", "loss_mask")
    )
    for row in range(rows):
        first, last = sorted(rng.integers(1, length, 2))
        segment_ids[row, :first], segment_ids[row, first:last] = 1, 2
        positions[row, :first], positions[row, first:last] = range(first), range(last - first)
        loss_mask[row] = (rng.random(length) < (row + 1) / rows) & (segment_ids[row] > 0)
        loss_mask[row, 0] = True
    return {name: jnp.asarray(value) for name, value in batch.items()}


def dpo_batch(pairs: int, length: int, seed: int = 0) -> dict[str, jnp.ndarray]:
    """Plain two-sequence rows [B, 2, T] with made-up reference log-probabilities."""
    flat = sft_batch(2 * pairs, length, seed)
    batch = {name: value.reshape(pairs, 2, length) for name, value in flat.items()}
    rng = np.random.default_rng(seed)
    return {
        **batch,
        "example": jnp.arange(pairs, dtype=jnp.int32),
        "ref_logps": jnp.asarray(rng.uniform(-60, -20, (pairs, 2)), jnp.float32),
        "truncated": jnp.asarray(rng.random(pairs) < 0.3),
    }


def random_pairs(count: int, length: int, seed: int = 0) -> list:
    """Pairs of (ids, trained ranges); prompts and answers have 1 to `length` / 3 tokens each."""
    rng, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        prompt, *answers = (
            rng.integers(3, MODEL.vocab_size, rng.integers(1, length // 3)) for _ in range(3)
        )
        sides = [np.concatenate([prompt, answer]) for answer in answers]
        pairs.append([(ids, np.array([[len(prompt) - 1, len(ids) - 1]])) for ids in sides])
    return pairs


def plain_rows(pairs: list, length: int) -> dict[str, jnp.ndarray]:
    """`pairs` as plain rows [B, 2, T], without reference."""
    sides = [[packing.fill_row([pair[side]], capacity=length) for side in (0, 1)] for pair in pairs]
    batch = {name: np.stack([[s[name] for s in two] for two in sides]) for name in sides[0][0]}
    return _with_examples(batch, np.arange(len(pairs)))


def packed_rows(pairs: list, rows: int, length: int) -> dict[str, jnp.ndarray]:
    """`pairs` in `rows` packed rows [B, T], pair i in row i mod B; the last place holds none."""
    most = -(-len(pairs) // rows) + 1
    filled = [packing.fill_pair_row(pairs[r::rows], capacity=length) for r in range(rows)]
    example = np.full((rows, most), -1)
    for r in range(rows):
        here = range(r, len(pairs), rows)
        example[r, : len(here)] = here
    return _with_examples({n: np.stack([row[n] for row in filled]) for n in filled[0]}, example)


def packed_dpo_batch(pairs: int, rows: int, length: int) -> dict[str, jnp.ndarray]:
    """Packed rows [B, T] of random pairs with made-up reference log-probabilities."""
    batch = packed_rows(random_pairs(pairs, length // 2), rows, length)
    made_up = np.random.default_rng(0).uniform(-60, -20, (*batch["example"].shape, 2))
    return {**batch, "ref_logps": jnp.asarray(made_up, jnp.float32)}


def _with_examples(batch: dict, example: np.ndarray) -> dict[str, jnp.ndarray]:
    truncated = (example >= 0) & (example % 3 == 0)
    batch |= {"example": example.astype(np.int32), "truncated": truncated}
    return {name: jnp.asarray(value) for name, value in batch.items()}
