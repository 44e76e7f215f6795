"""Our update for `peers_cpu.py`: that of `step.py`, as `train` jits it. It knows one more stage,
`dpo_cached`: the reference's log-probabilities were computed before."""

import jax
import jax.numpy as jnp
import numpy as np
import protocol

from tulu_jax import step as step_lib
from tulu_jax.data import packing
from tulu_jax.data.loader import DataConfig
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.objectives import dpo, sft
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import optim
from tulu_jax.training.checkpoint import CheckpointConfig
from tulu_jax.training.state import TrainState

NUM_STEPS = 10**6  # so that the learning rate hardly falls
EXECUTION = ExecutionConfig(compute_dtype="float32", remat_policy="save_projections")


def train_config(size: protocol.Size, objective, *, rows: int, length: int) -> TrainConfig:
    return TrainConfig(
        model=LlamaConfig(
            vocab_size=size.vocab_size, num_layers=size.num_layers, embed_dim=size.embed_dim,
            mlp_dim=size.mlp_dim, num_heads=size.num_heads, num_kv_heads=size.num_heads,
            head_dim=size.head_dim, rope_theta=protocol.ROPE_THETA, norm_eps=protocol.NORM_EPS,
            tie_embeddings=False, max_positions=length,
        ),
        data=DataConfig(train="tulu_tiny", tokenizer="unused", max_length=length),
        objective=objective,
        optimizer=optim.OptimizerConfig(
            learning_rate=protocol.LEARNING_RATE, warmup_ratio=0.0, b1=protocol.B1, b2=protocol.B2,
            eps=protocol.EPS, weight_decay=protocol.WEIGHT_DECAY, clip_norm=protocol.CLIP_NORM,
        ),
        checkpoint=CheckpointConfig(every=NUM_STEPS),
        execution=EXECUTION,
        workdir="unused",
        base=None,
        batch_size=rows,
        num_steps=NUM_STEPS,
    )  # fmt: skip


def sft_batch(size: protocol.Size) -> dict[str, np.ndarray]:
    """Rows of `length` positions, of which the last has no target, as with the peers."""
    tokens = protocol.sft_tokens(size)
    targets = np.roll(tokens, -1, axis=1)
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": np.broadcast_to(np.arange(size.length) < size.length - 1, tokens.shape),
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(size.length, dtype=np.int32), tokens.shape),
    }


def dpo_batch(size: protocol.Size) -> dict[str, np.ndarray]:
    """A pair a row, its prompt once: `prompt` + 2 × `answer` positions, the last one padding."""
    span = np.array([[size.prompt - 1, size.prompt + size.answer - 1]])
    rows = []
    for prompt, *answers in zip(*protocol.dpo_tokens(size), strict=True):
        sides = [(np.concatenate([prompt, answer]), span) for answer in answers]
        rows.append(packing.fill_pair_row([sides], capacity=size.prompt + 2 * size.answer))
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    example = np.arange(size.pairs, dtype=np.int32)[:, None]
    return batch | {"example": example, "truncated": np.zeros(example.shape, bool)}


def build(stage: str, size: protocol.Size):
    if stage == "sft":
        batch, objective = sft_batch(size), sft.SFTConfig()
    else:
        reference = {"dpo": "resident", "dpo_cached": "cached"}[stage]
        batch = dpo_batch(size)
        objective = dpo.DPOConfig(beta=protocol.BETA, reference=reference)
    rows, length = batch["tokens"].shape
    config = train_config(size, objective, rows=rows, length=length)
    params = jax.jit(lambda: llama.init_params(config.model, jax.random.key(0)))()
    if stage == "dpo_cached":
        forward = llama.forward(config.model, config.execution)
        scored = jax.jit(lambda p, b: objective.response_logps(forward, p, b))(params, batch)
        batch["ref_logps"] = np.asarray(scored)
    params, frozen = step_lib.split(config, params)
    # what is donated must not be what the reference reads
    frozen = jax.tree.map(jnp.copy, frozen)
    opt_state = optim.make(config.optimizer, NUM_STEPS).init(params)
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)
    step = jax.jit(step_lib.make_train_step(config, NUM_STEPS), donate_argnums=0)

    def update(number: int) -> float:
        nonlocal state
        for _ in range(number):
            state, measured = step(state, frozen, batch)
        jax.block_until_ready(state)
        return float(measured.scalars["loss"])

    return update


if __name__ == "__main__":
    protocol.serve(build, ["tulu_jax"])
