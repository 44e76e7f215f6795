"""Packed batches from the encode cache: tokens a second of one process, and waiting for data.

    python benchmarks/loader.py

Conversations of TÜLU V2's lengths (real texts, cut and joined to drawn lengths) are encoded and
packed to 8,192 once by us and once by TRL, which feeds torch's `DataLoader`. Both use two workers
(threads here, processes there) and read the same batches; rates alternate, medians. Then a step of
50,000 tokens a second is played beside our loader, and the share of it spent waiting is printed.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import datasets
import outcome
import torch
import trl
from packing import CAPACITY, paper_lengths
from trl.trainer import sft_trainer

from tulu_jax.data import cache_files, loader, registry

BATCH, WORKERS = 8, 2
STEP_TOKENS_PER_SECOND, WAITING_TARGET = 50_000, 0.01
CHARACTERS_PER_TOKEN = 4


def conversations(data_root: str, rows: int) -> list[dict]:
    """One question and an answer each, as long as the drawn length, out of real answers."""
    lines = pathlib.Path(data_root, "instruct_raw/lima/train.jsonl").read_text().splitlines()
    text = "\n\n".join(json.loads(line)["conversations"][1] for line in lines)
    result, at = [], 0
    for length in paper_lengths(rows):
        size = int(length) * CHARACTERS_PER_TOKEN
        at = at + size if at + 2 * size < len(text) else 0
        answer = {"role": "assistant", "content": text[at : at + size]}
        result.append({"messages": [{"role": "user", "content": "Go on."}, answer]})
    return result


def our_rows(rows: list[dict], tokenizer: str, folder: str) -> loader.Rows:
    registry.TaskRegistry.add(
        registry.Task(
            name="bench",
            kind="sft",
            sources={"train": lambda: rows},
            convert=lambda row: row,
            licence="-",
            origin="-",
        )
    )
    config = loader.DataConfig(
        train="bench", tokenizer=tokenizer, max_length=CAPACITY, cache_dir=folder, workers=WORKERS
    )
    return loader.prepare(config, split="train")


def batches(rows: loader.Rows, start: int, stop: int):
    return loader.batches(
        rows,
        batch_size=BATCH,
        start_step=start,
        num_steps=stop,
        process_index=0,
        process_count=1,
        workers=WORKERS,
    )


def trl_dataset(cache: str) -> datasets.Dataset:
    """The same ids and labels, packed by TRL."""
    (folder,) = pathlib.Path(cache).iterdir()
    rows = {"input_ids": [], "labels": []}
    for shard in cache_files.listing(folder).shards:
        table = cache_files.table(shard)
        for ids, spans in zip(
            table["ids"].to_pylist(), table["ids_spans"].to_pylist(), strict=True
        ):
            labels = [-100] * len(ids)
            for start, stop in zip(spans[::2], spans[1::2], strict=True):
                labels[start + 1 : stop + 1] = ids[start + 1 : stop + 1]
            rows["input_ids"].append(ids[:CAPACITY])
            rows["labels"].append(labels[:CAPACITY])
    dataset = datasets.Dataset.from_dict(rows)
    return trl.pack_dataset(dataset, CAPACITY, "bfd", {"batch_size": len(dataset)})


def trl_batches(dataset: datasets.Dataset):
    collate = sft_trainer.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return torch.utils.data.DataLoader(
        dataset.with_format(None),
        batch_size=BATCH,
        shuffle=True,
        num_workers=WORKERS,
        collate_fn=collate,
        persistent_workers=True,
    )


def rate(stream, count: int) -> float:
    """Tokens a second of `count` batches, after the first two."""
    for _ in range(2):
        next(stream)
    start, tokens = time.perf_counter(), 0
    for _ in range(count):
        batch = next(stream)
        tokens += (
            int((batch["segment_ids"] > 0).sum())
            if "tokens" in batch
            else batch["input_ids"].numel()
        )
    return tokens / (time.perf_counter() - start)


def waiting(rows: loader.Rows, steps: int) -> float:
    """Share of the time spent in `next` when a step takes its tokens / 50,000 seconds."""
    stream = batches(rows, 0, steps + 2)
    next(stream)
    waited, total = 0.0, 0.0
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - start
        time.sleep((batch["segment_ids"] > 0).sum() / STEP_TOKENS_PER_SECOND)
        total += time.perf_counter() - start
    return waited / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_root", default=str(pathlib.Path("..", "shared", "data")))
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    tokenizer = f"{arguments.data_root}/tokenizer/llama2"
    with tempfile.TemporaryDirectory() as folder:
        rows = our_rows(conversations(arguments.data_root, arguments.rows), tokenizer, folder)
        other = trl_batches(trl_dataset(folder))
        count = min(20, len(other) - 3)
        rates = {"ours": [], "TRL + DataLoader": []}
        for k in range(arguments.rounds):
            rates["ours"].append(rate(batches(rows, k * 30, k * 30 + 30), count))
            rates["TRL + DataLoader"].append(rate(iter(other), count))
        share = waiting(rows, arguments.steps)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(
        f"{arguments.rows:,} conversations packed to {CAPACITY:,}, {BATCH} rows a batch, {WORKERS} "
        f"workers, {arguments.rounds} alternating rounds of {count} batches, medians"
    )
    print(f"{'':17} {'tokens/s':>12}")
    for name, value in medians.items():
        print(f"{name:17} {value:12,.0f}")
    print(f"waiting beside a step of {STEP_TOKENS_PER_SECOND:,} tokens/s: {share:.3%}")
    ratio = medians["ours"] / medians["TRL + DataLoader"]
    ok = ratio >= 1.0 and share < WAITING_TARGET
    summary = {"name": "loader", "ratio": ratio, "target": 1.0, "ok": ok}
    outcome.tell(summary | {"tokens_per_second": medians["ours"], "waiting": share})


if __name__ == "__main__":
    main()
