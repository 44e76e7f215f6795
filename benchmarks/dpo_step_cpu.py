"""A DPO update of real pairs on the CPU, pairs/s: ours against TRL's `DPOTrainer`.

    python benchmarks/dpo_step_cpu.py                 speed; ratio > 1: faster
    python benchmarks/dpo_step_cpu.py --trajectory    50 updates from the same weights, both losses

Both sides: UltraFeedback pairs with the ids of our encoder, float32, the same weights and threads,
AdamW with clip 1.0, and reference log-probabilities that were computed before. Ours is the update
of `step.py` on packed rows. TRL's is `DPOTrainer.train` without gradient checkpointing, with the
fused AdamW, on the pairs of the same update, sorted by length and padded in micro-batches, of which
it gets the best of the numbers in `MICRO_BATCHES`. (Its padding-free form is disabled in 1.16.)
With glibc's own settings torch's large arrays are mapped anew at each use, which costs TRL much of
its update where page faults are slow; `--keep_memory` is its best case, and no trainer's default.
"""

import argparse
import ctypes
import functools
import os
import pathlib
import statistics
import tempfile
import time

import outcome

os.environ["JAX_PLATFORMS"] = "cpu"

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import torch
import tqdm
import transformers
import trl

from tulu_jax import step as step_lib
from tulu_jax import trainer
from tulu_jax.data import chat, loader
from tulu_jax.interop import hf, tokenizer_export
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.objectives import dpo, dpo_feed
from tulu_jax.parallel.mesh import MeshConfig
from tulu_jax.recipe import TrainConfig
from tulu_jax.training import metrics as metrics_lib
from tulu_jax.training import optim
from tulu_jax.training.checkpoint import CheckpointConfig
from tulu_jax.training.metrics import LoggingConfig
from tulu_jax.training.state import Frozen, TrainState

MODEL = LlamaConfig(  # 15M
    vocab_size=32000, num_layers=6, embed_dim=288, mlp_dim=768, num_heads=6, num_kv_heads=6,
    head_dim=48, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=8192,
)  # fmt: skip
LENGTH, ROWS = 4096, 1  # of an update: about 5 pairs; none is longer than a row
MICRO_BATCHES = (1, 2)  # of TRL's update
TARGET = 2.0
TOLERANCE = 1e-4  # of the trajectory
EXECUTION = ExecutionConfig(compute_dtype="float32", remat_policy="save_projections")


def train_config(model, data, workdir: str, **changes) -> TrainConfig:
    """Our run; its updates are `batch_size` packed rows."""
    values = dict(
        model=model,
        data=data,
        objective=dpo.DPOConfig(),
        optimizer=optim.OptimizerConfig(learning_rate=1e-4, warmup_ratio=0.1),
        checkpoint=CheckpointConfig(every=10**6),
        execution=EXECUTION,
        mesh=MeshConfig(fsdp=1),
        logging=LoggingConfig(tensorboard=False),
        workdir=workdir,
        base=None,
        batch_size=ROWS,
    )
    return TrainConfig(**(values | changes))


def data_config(root: pathlib.Path, tokenizer: str, length: int, cache_dir: str):
    """Pairs that fit in one row whole; longer ones are left out, on both sides."""
    return loader.DataConfig(
        train="real_small_dpo",
        tokenizer=str(root / tokenizer),
        data_root=str(root),
        max_length=length,
        truncation="drop",
        accept_counts=True,
        cache_dir=cache_dir,
    )


def updates_of(rows: loader.Rows, batch_size: int, number: int) -> list[list[int]]:
    """The pairs of each of the first updates."""
    starts = range(0, number * batch_size, batch_size)
    return [
        [int(i) for row in range(start, start + batch_size) for i in rows.examples(row)]
        for start in starts
    ]


def in_micro_batches(rows: loader.Rows, pairs: list[int], number: int) -> list[np.ndarray]:
    """`pairs` sorted by their longer side and cut in `number` micro-batches."""
    longest = [max(len(ids) for ids, _ in rows.store.sides(i)) for i in pairs]
    return np.array_split(np.array(pairs)[np.argsort(longest)], number)


def trl_dataset(rows: loader.Rows, pairs, ref_logps: np.ndarray | None) -> datasets.Dataset:
    """`pairs`, in their order, in the columns that TRL's collator reads."""
    examples = []
    for i in pairs:
        chosen, rejected = rows.store.sides(int(i))
        start = int(chosen[1][0, 0]) + 1
        example = {
            "prompt_ids": chosen[0][:start].tolist(),
            "chosen_ids": chosen[0][start:].tolist(),
            "rejected_ids": rejected[0][start:].tolist(),
        }
        if ref_logps is not None:
            logps = (float(value) for value in ref_logps[i])
            example |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), logps, strict=True))
        examples.append(example)
    return datasets.Dataset.from_list(examples)


def keep_memory() -> None:
    """Memory freed by either side stays in the process, by glibc's mallopt."""
    mmap_max, trim_threshold = -4, -1  # the numbers of malloc.h
    libc = ctypes.CDLL(None)
    assert libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1)


class TRL(trl.DPOTrainer):
    """TRL's trainer on encoded pairs, in given micro-batches; keeps the loss of each of these."""

    def __init__(self, *arguments, micro_batches: list, **options):
        self.micro_batches, self.losses = micro_batches, []
        super().__init__(*arguments, **options)

    def _prepare_dataset(self, dataset, *arguments):
        return dataset  # the ids are those of our encoder

    def _precompute_ref_logps(self, dataset, *arguments):
        if "ref_chosen_logps" in dataset.column_names:
            return dataset
        return super()._precompute_ref_logps(dataset, *arguments)

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=self.micro_batches, collate_fn=self.data_collator
        )

    def compute_loss(self, *arguments, **options):
        loss = super().compute_loss(*arguments, **options)
        self.losses.append(loss.item())
        return loss


def trl_trainer(
    config: TrainConfig,
    folder: str,
    dataset,
    updates: list[list],
    *,
    workdir: str,
    callbacks: list | None = None,
) -> TRL:
    """TRL's side of `config`, from the weights and tokenizer in `folder`; an update is a list of
    micro-batches, as many in each."""
    optimizer = config.optimizer
    arguments = trl.DPOConfig(
        output_dir=workdir,
        beta=config.objective.beta,
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_accumulation_steps=len(updates[0]),
        max_steps=len(updates),
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=int(np.ceil(optimizer.warmup_ratio * len(updates))),
        optim="adamw_torch_fused",
        adam_beta1=optimizer.b1,
        adam_beta2=optimizer.b2,
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip_norm,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<unk>"
    return TRL(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        micro_batches=[[int(i) for i in micro] for update in updates for micro in update],
        callbacks=callbacks,
    )


def save_tokenizer(config: TrainConfig, folder: str) -> None:
    backend = chat.load_tokenizer(config.data.tokenizer).backend
    tokenizer_export.save(backend, folder, max_length=None, mode="spec")


class Alternating(transformers.TrainerCallback):
    """Seconds of TRL's updates, and, after each of them, of `ours`."""

    def __init__(self, ours=None):
        self.ours, self.seconds = ours, {"ours": [], "TRL": []}

    def on_train_begin(self, *arguments, **options):
        self.start = time.perf_counter()

    def on_step_end(self, *arguments, **options):
        self.seconds["TRL"].append(time.perf_counter() - self.start)
        self.start = time.perf_counter()
        if self.ours is not None:
            self.ours()
            self.seconds["ours"].append(time.perf_counter() - self.start)
            self.start = time.perf_counter()


def our_side(config: TrainConfig, rows: loader.Rows, ref_logps: np.ndarray, params, bar):
    """A function that makes one update, from the rows of the cache to the loss on the host."""
    step = jax.jit(step_lib.make_train_step(config, config.num_steps), donate_argnums=0)
    opt_state = optim.make(config.optimizer, config.num_steps).init(params)
    state = [TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)]
    batches = loader.batches(
        rows,
        batch_size=config.batch_size,
        start_step=0,
        num_steps=config.num_steps,
        process_index=0,
        process_count=1,
        workers=0,
    )

    def update():
        batch = dpo_feed.attached(rows, next(batches), ref_logps)
        state[0], measured = step(state[0], Frozen(), batch)
        bar.update()
        return float(measured.scalars["loss"])

    return update


def reference(config: TrainConfig, rows: loader.Rows, params, pairs: list[list[int]]) -> np.ndarray:
    """float32 [examples, 2] of the reference; zeros for pairs that no update has."""
    forward = llama.forward(config.model, config.execution)
    score = jax.jit(functools.partial(config.objective.response_logps, forward))
    logps = np.zeros((rows.num_examples, 2), np.float32)
    for number in tqdm.trange(len(pairs) * config.batch_size, desc="reference"):
        batch = {name: value[None] for name, value in rows.row(number).items()}
        known = batch["example"] >= 0
        logps[batch["example"][known]] = np.asarray(score(params, batch))[known]
    return logps


def fastest(candidates: dict[int, list], train) -> int:
    """The number of micro-batches with which TRL's one update is fastest, after a warm-up."""
    seconds = {}
    train([candidates[max(candidates)][-1:]])
    for number, update in candidates.items():
        seconds[number] = train([update])[0]
    best = min(seconds, key=seconds.get)
    listed = ", ".join(f"{number}: {value:.1f} s" for number, value in seconds.items())
    print(f"TRL's update in micro-batches of its pairs sorted by length: {listed}")
    return best


def speed(root: pathlib.Path, folder: str, rounds: int) -> None:
    """Alternating updates on the same pairs; the first is thrown away."""
    data = data_config(root, "tokenizer/llama2/tokenizer.model", LENGTH, f"{folder}/cache")
    rows = loader.prepare(data, split="train")
    config = train_config(MODEL, data, f"{folder}/run", num_steps=rounds + 1)
    params = jax.jit(lambda: llama.init_params(MODEL, jax.random.key(0)))()
    hf.save(
        f"{folder}/hf", params, MODEL, dtype="float32", generation_config={}, write_tokenizer=None
    )
    save_tokenizer(config, f"{folder}/hf")
    pairs = updates_of(rows, ROWS, rounds + 1)
    ref_logps = reference(config, rows, params, pairs)
    dataset = trl_dataset(rows, range(rows.num_examples), ref_logps)

    def train(updates, ours=None):
        callback = Alternating(ours)
        options = dict(workdir=f"{folder}/trl", callbacks=[callback])
        trl_trainer(config, f"{folder}/hf", dataset, updates, **options).train()
        return callback.seconds if ours else callback.seconds["TRL"]

    number = fastest({n: in_micro_batches(rows, pairs[0], n) for n in MICRO_BATCHES}, train)
    with tqdm.tqdm(total=rounds + 1, desc="updates") as bar:
        ours = our_side(config, rows, ref_logps, params, bar)
        seconds = train([in_micro_batches(rows, update, number) for update in pairs], ours)
    report_speed(rows, pairs, number, seconds)


def report_speed(rows: loader.Rows, pairs: list[list[int]], number: int, seconds: dict) -> None:
    sides = {i: [len(ids) - 1 for ids, _ in rows.store.sides(i)] for part in pairs for i in part}
    padded = sum(
        2 * len(micro) * max(max(sides[i]) for i in micro)
        for update in pairs
        for micro in in_micro_batches(rows, update, number)
    )
    positions = {"ours": len(pairs) * ROWS * LENGTH, "TRL": padded}
    useful = sum(int(rows.store.lengths[i]) for i in sides)
    print(
        f"{len(os.sched_getaffinity(0))} threads, {sum(map(len, pairs)) / len(pairs):.1f} pairs an "
        f"update, {useful / len(sides):.0f} positions each with the prompt once, "
        f"{len(pairs) - 1} alternating updates, medians; trl {trl.__version__}"
    )
    print(f"{'':6} {'pairs/s':>8} {'s/update':>9} {'positions':>10} {'of use':>7}")
    rates = {}
    for name, times in seconds.items():
        counted = zip(pairs[1:], times[1:], strict=True)
        rates[name] = statistics.median(len(update) / t for update, t in counted)
        print(
            f"{name:6} {rates[name]:8.2f} {statistics.median(times[1:]):9.2f} "
            f"{positions[name]:10,} {useful / positions[name]:7.1%}"
        )
    ratio = rates["ours"] / rates["TRL"]
    summary = {"name": "dpo_step_cpu", "ratio": ratio, "target": TARGET, "ok": ratio >= TARGET}
    outcome.tell(summary | {"pairs_per_second": rates, "micro_batches": number})


def both_losses(config: TrainConfig, folder: str, workdir: str) -> tuple[list, list, list]:
    """Losses of each update of `config`, ours by `trainer.Run` and TRL's, and their pairs' number.

    `folder` has the weights and the tokenizer for TRL; each side computes its own reference.
    """
    run = trainer.Run(config)
    run.train()
    lines = metrics_lib.read(config.workdir)
    ours = [line["train/loss"] for line in lines if "train/loss" in line]
    pairs = updates_of(run.feed.rows, config.batch_size, config.num_steps)
    used = np.unique(np.concatenate(pairs))
    dataset = trl_dataset(run.feed.rows, used, None)
    updates = [[np.searchsorted(used, update)] for update in pairs]
    theirs = trl_trainer(config, folder, dataset, updates, workdir=workdir)
    theirs.train()
    return ours, theirs.losses, [len(update) for update in pairs]


def trajectory(root: pathlib.Path, folder: str, updates: int) -> None:
    """Real weights (stories260K) and the real pairs that fit in rows of 1,024 of its tokens."""
    base = root / "models/stories260K-hf"
    data = data_config(root, "models/stories260K/tok512.model", 1024, f"{folder}/cache")
    config = train_config(
        hf.read_config(base),
        data,
        f"{folder}/run",
        base=str(base),
        batch_size=2,
        num_steps=updates,
        optimizer=optim.OptimizerConfig(learning_rate=2e-5, warmup_ratio=0.1),
    )
    save_tokenizer(config, f"{folder}/hf")
    for file in base.iterdir():
        pathlib.Path(folder, "hf", file.name).write_bytes(file.read_bytes())
    ours, theirs, pairs = both_losses(config, f"{folder}/hf", f"{folder}/trl")
    gaps = np.abs(np.array(ours) - np.array(theirs))
    print(
        f"{updates} updates of {sum(pairs) / updates:.1f} pairs, learning rate "
        f"{config.optimizer.learning_rate:g}, float32, trl {trl.__version__}"
    )
    print(f"{'update':>6} {'pairs':>6} {'ours':>10} {'TRL':>10} {'gap':>8}")
    for i in sorted({*range(0, updates, 7), int(gaps.argmax()), updates - 1}):
        print(f"{i + 1:6} {pairs[i]:6} {ours[i]:10.6f} {theirs[i]:10.6f} {gaps[i]:8.1e}")
    worst = float(gaps.max())
    summary = {"name": "dpo_trajectory", "ratio": TOLERANCE / worst, "target": 1.0}
    outcome.tell(summary | {"ok": worst <= TOLERANCE, "worst_gap": worst})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_root", default=str(pathlib.Path("..", "shared", "data")))
    parser.add_argument("--trajectory", action="store_true", help="compare losses, not speed")
    parser.add_argument("--keep_memory", action="store_true", help="glibc keeps freed memory")
    parser.add_argument("--rounds", type=int, default=9, help="timed updates")
    parser.add_argument("--updates", type=int, default=50, help="of the trajectory")
    arguments = parser.parse_args()
    if arguments.keep_memory:
        keep_memory()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    root = pathlib.Path(arguments.data_root)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.trajectory:
            trajectory(root, folder, arguments.updates)
        else:
            speed(root, folder, arguments.rounds)


if __name__ == "__main__":
    main()
