"""LoRA and QLoRA steps against bitsandbytes + PEFT: the same losses, and tokens/s on the CPU.

    python benchmarks/qlora_step.py            # losses, tokens/s, bytes of a base
    python benchmarks/qlora_step.py --predict  # and dry runs: a QLoRA step over a LoRA step on TPUs

Losses: the same base, adapters of PEFT's own initialisation, batches, AdamW and rates on both
sides, dropout 0, float32; the base in NF4 with nested scales by the table rule of bitsandbytes' CPU
library ('bnb_cpu'), so that both hold the same weights. Speed: every side in turn in one process,
the same threads; transformers keeps all activations (no gradient checkpointing), with the fused
AdamW. The last line is JSON, and `ratio` is ours over bitsandbytes + PEFT with a base in NF4.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import outcome

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import tqdm
import transformers
from etils import epath

from tulu_jax import step as step_lib
from tulu_jax.data.loader import DataConfig
from tulu_jax.interop import hf
from tulu_jax.interop import peft as our_peft
from tulu_jax.models import llama, lora
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.objectives import sft
from tulu_jax.quant.nf4 import QuantConfig
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import optim
from tulu_jax.training.checkpoint import CheckpointConfig
from tulu_jax.training.state import TrainState

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMON = dict(rope_theta=1e4, norm_eps=1e-5, max_positions=512, tie_embeddings=False)
TINY = LlamaConfig(
    vocab_size=512, num_layers=4, embed_dim=128, mlp_dim=384, num_heads=4, num_kv_heads=2,
    head_dim=32, **COMMON,
)  # fmt: skip
SMALL = LlamaConfig(
    vocab_size=32000, num_layers=8, embed_dim=512, mlp_dim=1408, num_heads=8, num_kv_heads=8,
    head_dim=64, **COMMON,
)  # fmt: skip
ADAPTER = lora.LoRAConfig(rank=16, alpha=32.0, dropout=0.0)
LEARNING_RATE, UPDATES = 1e-3, {"LoRA": 50, "QLoRA": 20}
NEAR = {"LoRA": 1e-4, "QLoRA": 2e-3}  # most of which two losses may differ
TARGETS = {"QLoRA over theirs": 1.0, "LoRA over full": 1.2}
BYTES, STEP = 0.52, 1.08  # most bytes a parameter; most of a QLoRA step over a LoRA step
SLICES = ("v5e_8", "v6e_8")


def rows_of(model: LlamaConfig, count: int, length: int, seed: int) -> np.ndarray:
    """Rows [count, length + 1] of a walk over the vocabulary that a model can learn."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((count, length + 1), np.int32)
    rows[:, 0] = rng.integers(3, model.vocab_size, count)
    for at in range(length):
        jump = rng.choice([1, 2, 3, 50], count, p=[0.6, 0.2, 0.1, 0.1])
        rows[:, at + 1] = 3 + (rows[:, at] + jump) % (model.vocab_size - 3)
    return rows


def make_base(model: LlamaConfig, folder: str) -> None:
    """Random weights [float32] as a Hugging Face folder, which all sides load."""
    params = jax.jit(lambda: llama.init_params(model, jax.random.key(0)))()
    hf.save(folder, params, model, dtype="float32", generation_config={}, write_tokenizer=None)


def bytes_of(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


class Ours:
    """Our step. `kind` is 'full', 'LoRA' or 'QLoRA'; `adapters` a PEFT folder to begin with."""

    def __init__(self, model, folder, kind, *, rows, length, adapters=None):
        adapter = None if kind == "full" else ADAPTER
        quant = QuantConfig(mode="bnb_cpu") if kind == "QLoRA" else None
        config = TrainConfig(
            model=model,
            data=DataConfig(train="tulu_tiny", tokenizer="unused", max_length=length),
            objective=sft.SFTConfig(),
            optimizer=optim.OptimizerConfig(
                learning_rate=LEARNING_RATE, warmup_ratio=0.0, b2=0.999, clip_norm=1e30
            ),
            checkpoint=CheckpointConfig(every=1),
            execution=ExecutionConfig(compute_dtype="float32", remat_policy="save_projections"),
            workdir="unused",
            base=folder,
            batch_size=rows,
            num_steps=10**6,
            adapter=adapter,
            quant=quant,
        )
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        base = hf.load(folder, model, shardings=one, dtype="float32", quant=quant)
        trained, self.frozen = step_lib.split(config, base)
        if adapters is not None:
            trained = jax.tree.map(jnp.asarray, our_peft.load(epath.Path(adapters), ADAPTER, model))
        self.step = jax.jit(step_lib.make_train_step(config, 10**6), donate_argnums=0)
        opt_state = optim.make(config.optimizer, 10**6).init(trained)
        self.state = TrainState(step=jnp.zeros((), jnp.int32), params=trained, opt_state=opt_state)
        ones = jnp.ones((rows, length), jnp.int32)
        self.common = {
            "loss_mask": ones.astype(bool),
            "segment_ids": ones,
            "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], ones.shape),
        }

    def __call__(self, tokens: np.ndarray) -> float:
        """Makes one update on rows [B, T + 1]; its loss."""
        batch = {
            "tokens": jnp.asarray(tokens[:, :-1]),
            "targets": jnp.asarray(tokens[:, 1:]),
            **self.common,
        }
        self.state, measured = self.step(self.state, self.frozen, batch)
        return float(measured.scalars["loss"])


class Theirs:
    """The same by transformers, PEFT, and for QLoRA bitsandbytes. `save` names a folder for the
    adapters that it begins with."""

    def __init__(self, folder, kind, *, save=None):
        quant = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        how = {"quantization_config": quant} if kind == "QLoRA" else {}
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
        torch.manual_seed(0)
        settings = peft.LoraConfig(
            r=ADAPTER.rank,
            lora_alpha=ADAPTER.alpha,
            lora_dropout=0.0,
            target_modules=list(ADAPTER.names),
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(base, settings)
        self.model.train()
        if save is not None:
            self.model.save_pretrained(save)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
        )
        self.made = 0

    def __call__(self, tokens: np.ndarray) -> float:
        inputs = torch.tensor(tokens[:, :-1], dtype=torch.long)
        targets = torch.tensor(tokens[:, 1:], dtype=torch.long)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - self.made / 10**6)  # linear to 0, as ours
        self.made += 1
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def compare(kind: str, folder: str) -> dict:
    """Losses of both sides, update by update, from the same base and adapters."""
    rows, length = 4, 128
    with tempfile.TemporaryDirectory() as adapters:
        theirs = Theirs(folder, kind, save=adapters)
        ours = Ours(TINY, folder, kind, rows=rows, length=length, adapters=adapters)
    losses = []
    for update in range(UPDATES[kind]):
        tokens = rows_of(TINY, rows, length, seed=update)
        losses.append((ours(tokens), theirs(tokens)))
    apart = [abs(a - b) for a, b in losses]
    return {
        "updates": len(losses), "first": losses[0], "last": losses[-1],
        "most_apart": max(apart), "first_apart": apart[0], "allowed": NEAR[kind],
    }  # fmt: skip


def speeds(folder: str, rounds: int, *, rows: int = 4, length: int = 512) -> dict[str, float]:
    """Tokens/s of every side, in turn; the first two rounds are thrown away."""
    sides = {f"ours, {kind}": Ours(SMALL, folder, kind, rows=rows, length=length)
             for kind in ("full", "LoRA", "QLoRA")}  # fmt: skip
    sides |= {f"theirs, {kind}": Theirs(folder, kind) for kind in ("LoRA", "QLoRA")}
    tokens = rows_of(SMALL, rows, length, seed=0)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in tqdm.trange(rounds + 2, desc="steps", unit="round"):
        for name, update in sides.items():
            start = time.perf_counter()
            update(tokens)
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: rows * length / statistics.median(taken) for name, taken in seconds.items()}


def stored(folder: str) -> dict[str, float]:
    """Bytes of the base of SMALL in NF4, a parameter: of what is quantised, and of all."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = hf.load(folder, SMALL, shardings=one, dtype="bfloat16", quant=QuantConfig())
    linear = sum(SMALL.num_layers * a * b for a, b in SMALL.projections.values())
    packed = [
        kernel["kernel"]
        for part in found["model"]["layers"].values()
        for kernel in part.values()
        if isinstance(kernel, dict) and isinstance(kernel["kernel"], dict)
    ]
    return {
        "linear": bytes_of(packed) / linear,
        "all": bytes_of(found) / SMALL.num_params,
    }


def predicted(name: str, pod: str) -> dict:
    """The dry run of a published file on a slice."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "tulu_jax.dryrun", f"--gin_file={name}", f"--pod={pod}"]
        subprocess.run([*command, f"--out={out}"], cwd=ROOT, check=True)
        return json.loads((pathlib.Path(out) / "dryrun.json").read_text())[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--predict", action="store_true", help="dry runs on TPU slices as well")
    arguments = parser.parse_args()
    threads, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    torch.set_num_threads(threads)
    print(f"{threads} threads, load {load:.1f}, float32")
    with tempfile.TemporaryDirectory() as home:
        make_base(TINY, f"{home}/tiny")
        make_base(SMALL, f"{home}/small")
        losses = {kind: compare(kind, f"{home}/tiny") for kind in UPDATES}
        for kind, found in losses.items():
            (a, _), (b, _) = found["first"], found["last"]
            print(
                f"{kind:6} {found['updates']} updates, loss {a:.4f} to {b:.4f}: at most "
                f"{found['most_apart']:.1e} from PEFT's (allowed {found['allowed']:.0e})"
            )
        held = stored(f"{home}/small")
        print(f"bytes a parameter in NF4: {held['linear']:.4f} of linear layers (at most {BYTES})")
        rates = speeds(f"{home}/small", arguments.rounds)
    for name, rate in rates.items():
        print(f"{name:16} {rate:10,.0f} tokens/s")
    ratios = {
        "QLoRA over theirs": rates["ours, QLoRA"] / rates["theirs, QLoRA"],
        "LoRA over theirs": rates["ours, LoRA"] / rates["theirs, LoRA"],
        "LoRA over full": rates["ours, LoRA"] / rates["ours, full"],
    }
    for name, ratio in ratios.items():
        print(f"{name:18} {ratio:.2f}" + (f"  target {TARGETS[name]}" if name in TARGETS else ""))
    steps = {}
    for pod in SLICES if arguments.predict else ():
        seconds = {
            kind: predicted(f"{kind}_7b.gin", pod)["seconds"]["step"] for kind in ("qlora", "lora")
        }
        steps[pod] = {**seconds, "ratio": seconds["qlora"] / seconds["lora"]}
        print(f"{pod}: {seconds['qlora']:.3f} s over {seconds['lora']:.3f} s an update, "
              f"{steps[pod]['ratio']:.3f} (at most {STEP})")  # fmt: skip
    ok = (
        all(found["most_apart"] <= found["allowed"] for found in losses.values())
        and held["linear"] <= BYTES
        and all(ratios[name] >= target for name, target in TARGETS.items())
        and all(step["ratio"] <= STEP for step in steps.values())
    )
    summary = {"name": "qlora_step", "ratio": ratios["QLoRA over theirs"], "target": 1.0, "ok": ok}
    more = {"ratios": ratios, "tokens_per_s": rates, "losses": losses}
    more |= {"bytes_a_parameter": held, "predicted": steps}
    outcome.tell(summary | more)


if __name__ == "__main__":
    main()
