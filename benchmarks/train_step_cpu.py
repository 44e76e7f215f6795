"""SFT step, tokens/s on the CPU: ours against transformers + torch, same weights and batch.

    python benchmarks/train_step_cpu.py        two sizes, alternating, medians; ratio > 1: faster

Both sides: float32, the same thread count, gradient clip 1.0, AdamW, one batch of full rows. The
torch side is `LlamaForCausalLM` with its default attention and loss and the fused AdamW. Weights
are made here, saved by our exporter and loaded by both. The ratio is one machine's on one day: two
of the same kind gave 1.78 and 1.04 (docs/benchmarks.md).
"""

import argparse
import os
import statistics
import tempfile
import time

import outcome

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from tulu_jax import step as step_lib
from tulu_jax.data.loader import DataConfig
from tulu_jax.interop import hf
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.objectives import sft
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import optim
from tulu_jax.training.checkpoint import CheckpointConfig
from tulu_jax.training.state import Frozen, TrainState

COMMON = dict(rope_theta=1e4, norm_eps=1e-5, max_positions=512, tie_embeddings=True)
SIZES = {
    "15M, vocabulary 32,000": (
        LlamaConfig(
            vocab_size=32000, num_layers=6, embed_dim=288, mlp_dim=768, num_heads=6,
            num_kv_heads=6, head_dim=48, **COMMON,
        ),
        4,
    ),
    "1M, vocabulary 512": (
        LlamaConfig(
            vocab_size=512, num_layers=5, embed_dim=128, mlp_dim=352, num_heads=8,
            num_kv_heads=4, head_dim=16, **COMMON,
        ),
        8,
    ),
}  # fmt: skip
LENGTH, LEARNING_RATE, TARGET = 512, 1e-4, 1.3


OURS = {"compute_dtype": "float32", "remat_policy": "save_projections"}
VARIANTS = {  # for --explain: what of our step is slow when it is done the plain way
    "ours": {},
    "dense attention": {"attention": "xla"},
    "blockwise attention": {"attention": "blockwise"},
    "layers rematerialised": {"remat_policy": "nothing_saveable"},
    "nothing rematerialised": {"remat": False},
}


def our_side(model: LlamaConfig, params, tokens, **execution):
    """A function that makes one update and returns its loss."""
    rows = tokens.shape[0]
    config = TrainConfig(
        model=model,
        data=DataConfig(train="tulu_tiny", tokenizer="unused", max_length=LENGTH),
        objective=sft.SFTConfig(),
        optimizer=optim.OptimizerConfig(learning_rate=LEARNING_RATE, warmup_ratio=0.0),
        checkpoint=CheckpointConfig(every=1),
        execution=ExecutionConfig(**(OURS | execution)),
        workdir="unused",
        base=None,
        batch_size=rows,
        num_steps=10**6,
    )
    step = jax.jit(step_lib.make_train_step(config, 10**6), donate_argnums=0)
    ones = jnp.ones((rows, LENGTH), jnp.int32)
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "loss_mask": ones.astype(bool),
        "segment_ids": ones,
        "positions": jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None], ones.shape),
    }
    opt_state = optim.make(config.optimizer, 10**6).init(params)
    state = [TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)]

    def update():
        state[0], measured = step(state[0], Frozen(), batch)
        return float(measured.scalars["loss"])

    return update


def torch_side(folder: str, tokens, threads: int):
    """The same with transformers and torch."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    inputs = torch.tensor(tokens[:, :-1], dtype=torch.long)
    # already shifted, as ours are: the model would shift once more
    targets = torch.tensor(tokens[:, 1:], dtype=torch.long)

    def update():
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return update


def measure(sides: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each update, the sides alternating; the first two rounds are thrown away."""
    seconds = {name: [] for name in sides}
    for round_ in range(rounds + 2):
        for name, update in sides.items():
            start = time.perf_counter()
            update()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def explain(rounds: int) -> None:
    """Milliseconds of our step in its variants, alternating: where a plain version loses time."""
    print(f"{'size':24} {'variant':22} {'ms':>8} {'of ours':>8}")
    for name, (model, rows) in SIZES.items():
        rng = np.random.default_rng(0)
        tokens = rng.integers(3, model.vocab_size, (rows, LENGTH + 1)).astype(np.int32)
        params = jax.jit(lambda m=model: llama.init_params(m, jax.random.key(0)))()
        sides = {
            variant: our_side(model, jax.tree.map(jnp.copy, params), tokens, **execution)
            for variant, execution in VARIANTS.items()
        }
        medians = {k: 1e3 * statistics.median(v) for k, v in measure(sides, rounds).items()}
        for variant, ms in medians.items():
            print(f"{name:24} {variant:22} {ms:8.0f} {ms / medians['ours']:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--explain", action="store_true", help="time our step done other ways")
    arguments = parser.parse_args()
    if arguments.explain:
        explain(arguments.rounds)
        return
    rounds = arguments.rounds
    threads = len(os.sched_getaffinity(0))
    results = {}
    print(f"{threads} threads, T = {LENGTH}, float32, {rounds} alternating rounds, medians")
    print(f"{'size':24} {'rows':>4} {'ours tok/s':>11} {'torch tok/s':>12} {'ratio':>6}  loss gap")
    for name, (model, rows) in SIZES.items():
        rng = np.random.default_rng(0)
        tokens = rng.integers(3, model.vocab_size, (rows, LENGTH + 1)).astype(np.int32)
        params = jax.jit(lambda m=model: llama.init_params(m, jax.random.key(0)))()
        with tempfile.TemporaryDirectory() as folder:
            hf.save(f"{folder}/hf", params, model, dtype="float32", generation_config={},
                    write_tokenizer=None)  # fmt: skip
            theirs = torch_side(f"{folder}/hf", tokens, threads)
        ours = our_side(model, params, tokens)
        gap = abs(ours() - theirs())
        seconds = measure({"ours": ours, "torch": theirs}, rounds)
        rates = {k: rows * LENGTH / statistics.median(v) for k, v in seconds.items()}
        ratio = rates["ours"] / rates["torch"]
        results[name] = {**rates, "ratio": ratio}
        print(
            f"{name:24} {rows:4} {rates['ours']:11,.0f} {rates['torch']:12,.0f} {ratio:6.2f}"
            f"  {gap:.1e}",
            flush=True,
        )
    ratio = min(result["ratio"] for result in results.values())
    summary = {"name": "train_step_cpu", "ratio": ratio, "target": TARGET, "ok": ratio >= TARGET}
    outcome.tell({**summary, "sizes": results})


if __name__ == "__main__":
    main()
