"""Raw conversations to token ids and masks on disk: ours against TRL's dataset preparation.

    python benchmarks/encoding.py [--data_root=../shared/data]

Both start from the same `messages` of real rows and the same Llama-2 tokenizer, and both must give
the same ids and the same trained positions (TRL's template has the generation markers that its
`assistant_only_loss` needs). A rate is rows over the time that the second half of them adds, which
leaves out what starting costs. Alternating runs, medians; TRL has the better of one and two worker
processes. Other work on the machine lowers the ratio (docs/benchmarks.md).
"""

import argparse
import pathlib
import random
import statistics
import tempfile
import time

import datasets
import numpy as np
import outcome
import transformers
import trl

from tulu_jax.data import cache_files, chat, components, encode, examples, registry
from tulu_jax.interop import tokenizer_export

TARGET = 3.5
PAPER_ROWS, PAPER_MEAN_LENGTH, PAPER_MINUTES = 326_154, 1_097, 10
SOURCES = ("lima", "gpt4_alpaca", "code_alpaca", "dolly", "stanford_alpaca", "orca_preferred")
TRL_TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>\\n' -}}"
    "{%- generation -%}{{- message['content'] | trim + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- '<|' + message['role'] + '|>\\n' + message['content'] | trim -}}{%- endif -%}"
    "{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}{%- endfor -%}"
)


def real_rows(data_root: str) -> list[dict]:
    """`{"messages"}` of the rows at hand, shuffled: instruction sources, sides of UltraFeedback."""
    rows = []
    for name in (*SOURCES, "ultrafeedback_binarized"):
        drawing = examples.Drawing(
            split="train", amount=None, seed=0, holdout_every=None, data_root=data_root
        )
        (component,) = components.of(name)
        for example in examples.load_examples(component.task, drawing).examples:
            if "messages" in example:
                rows.append({"messages": example["messages"]})
            else:
                rows += [
                    {"messages": example["prompt"] + example[side]}
                    for side in ("chosen", "rejected")
                ]
    random.Random(0).shuffle(rows)
    return rows


def ours(rows: list[dict], tokenizer: chat.ChatTokenizer) -> tuple[float, list]:
    """Seconds, and (ids, trained ids) of each row."""
    task = registry.Task(
        name="bench",
        kind="sft",
        sources={"train": lambda: rows},
        convert=lambda row: row,
        licence="-",
        origin="-",
    )
    encoding = encode.Encoding(
        tokenizer=tokenizer, chat="spec", max_length=8192, truncation="cut", one_row=False
    )
    drawing = examples.Drawing(
        split="train", amount=None, seed=0, holdout_every=None, data_root=None
    )
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cached, _ = encode.encode_task(task, drawing, encoding=encoding, cache_dir=folder)
        seconds = time.perf_counter() - start
        return seconds, [_trained(shard) for shard in cache_files.listing(cached).shards]


def _trained(shard) -> list[tuple[list, list]]:
    table = cache_files.table(shard)
    result = []
    for ids, spans in zip(table["ids"].to_pylist(), table["ids_spans"].to_pylist(), strict=True):
        targets = ids[1:]
        pairs = np.array(spans).reshape(-1, 2)
        result.append((ids, [t for start, stop in pairs for t in targets[start:stop]]))
    return result


def theirs(rows: list[dict], trainer, workers: int | None) -> tuple[float, list]:
    trainer.args.dataset_num_proc = workers
    dataset = datasets.Dataset.from_list(rows)
    start = time.perf_counter()
    prepared = trainer._prepare_dataset(
        dataset, trainer.processing_class, trainer.args, False, None, "train"
    )
    seconds = time.perf_counter() - start
    return seconds, [
        (
            row["input_ids"],
            [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100],
        )
        for row in prepared
    ]


def trl_trainer(tokenizer_folder: str, workdir: str):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template, tokenizer.pad_token = TRL_TEMPLATE, "<unk>"
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    arguments = trl.SFTConfig(
        output_dir=workdir,
        assistant_only_loss=True,
        max_length=8192,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return trl.SFTTrainer(
        model=transformers.LlamaForCausalLM(config),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([{"messages": messages}] * 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_root", default=str(pathlib.Path("..", "shared", "data")))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    rows = real_rows(arguments.data_root)
    tokenizer = chat.load_tokenizer(f"{arguments.data_root}/tokenizer/llama2")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_export.save(tokenizer.backend, folder, max_length=8192, mode="spec")
        trainer = trl_trainer(folder, f"{folder}/trl")
        sides = {
            "ours": lambda rows: ours(rows, tokenizer),
            "TRL, 1 process": lambda rows: theirs(rows, trainer, None),
            "TRL, 2 processes": lambda rows: theirs(rows, trainer, 2),
        }
        seconds, results = {name: [] for name in sides}, {}
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                half, _ = side(rows[: len(rows) // 2])
                whole, results[name] = side(rows)
                seconds[name].append(whole - half)
    for name, times in seconds.items():
        if min(times) <= 0:
            raise SystemExit(
                f"{name}: all rows took no longer than half of them, so there is no rate; the "
                "machine does other work. Run it again"
            )
    encoded = [row for shard in results["ours"] for row in shard]
    prepared = results["TRL, 1 process"]
    same = sum(a == b for a, b in zip(encoded, prepared, strict=True))
    tokens = sum(len(ids) for ids, _ in encoded)
    half = len(rows) - len(rows) // 2
    rates = {name: half / statistics.median(times) for name, times in seconds.items()}
    print(
        f"{len(rows):,} real conversations, {tokens:,} tokens (mean {tokens / len(rows):.0f}), "
        f"trl {trl.__version__}, {arguments.rounds} alternating rounds, medians"
    )
    print(f"{'':18} {'rows/s':>9} {'tokens/s':>12}")
    for name, rate in rates.items():
        print(f"{name:18} {rate:9,.0f} {rate * tokens / len(rows):12,.0f}")
    print(f"same ids and trained ids: {same:,} of {len(rows):,} rows")
    tokens_per_second = rates["ours"] * tokens / len(rows)
    minutes = PAPER_ROWS * PAPER_MEAN_LENGTH / tokens_per_second / 60
    print(f"{PAPER_ROWS:,} rows of mean {PAPER_MEAN_LENGTH:,}: {minutes:.1f} minutes, by tokens")
    ratio = rates["ours"] / max(rate for name, rate in rates.items() if name != "ours")
    ok = ratio >= TARGET and minutes <= PAPER_MINUTES and same == len(rows)
    summary = {"name": "encoding", "ratio": ratio, "target": TARGET, "ok": ok}
    outcome.tell(summary | {"minutes_for_tulu_v2": minutes, "rows_per_second": rates["ours"]})


if __name__ == "__main__":
    main()
