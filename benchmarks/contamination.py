"""Overlap with benchmarks and the audit of pairs: rows a CPU second (one core).

    python benchmarks/contamination.py --data_root=../shared/data

Rows of the mean length of TÜLU V2, about 820 words (1,097 Llama tokens), are put together from
the messages of real rows, and searched for every benchmark prompt below `<data_root>/eval`. Pairs
are UltraFeedback's with their words shuffled, so that no two are alike.
"""

import argparse
import random
import time

import numpy as np
import outcome

from tulu_jax.audit import benchmarks, contamination, preference_audit
from tulu_jax.data import components, examples

ROW_WORDS, SFT_ROWS, PAIRS = 820, 326_154, 61_966


def load(mixture: str, data_root: str) -> list[dict]:
    drawing = examples.Drawing(
        split="train", amount=None, seed=0, holdout_every=None, data_root=data_root
    )
    tasks = [component.task for component in components.of(mixture)]
    return [row for task in tasks for row in examples.load_examples(task, drawing).examples]


def search(rows: int, data_root: str) -> dict:
    """CPU seconds to index the prompts, and rows a CPU second."""
    rng = random.Random(0)
    texts = [m["content"] for row in load("real_small_sft", data_root) for m in row["messages"]]
    made = []
    for number in range(rows):
        messages, words = [], 0
        while words < ROW_WORDS:
            messages.append({"role": "user", "content": rng.choice(texts)})
            words += len(messages[-1]["content"].split())
        made.append((f"row/{number}", {"messages": messages}))
    start = time.process_time()
    index = contamination.Index(benchmarks.read_prompts(f"{data_root}/eval"))
    indexed = time.process_time()
    matches = sum(1 for _ in index.matches(made))
    rate = rows / (time.process_time() - indexed)
    return {
        "prompts": len(index.prompts),
        "seconds_to_index": round(indexed - start, 1),
        "rows_per_second": round(rate),
        "matches": matches,
        "minutes_for_tulu_v2": round(SFT_ROWS / rate / 60, 1),
    }


def audit(pairs: int, data_root: str) -> dict:
    """Pairs a CPU second."""
    rng = random.Random(0)

    def shuffled(text: str) -> str:
        words = text.split(" ")
        rng.shuffle(words)
        return " ".join(words)

    source, rows = load("real_small_dpo", data_root), []
    for number in range(pairs):
        row = dict(source[number % len(source)], prompt=[{"role": "user", "content": str(number)}])
        for side in ("chosen", "rejected"):
            content = shuffled(row[side][-1]["content"])
            row[side] = [{"role": "assistant", "content": content}]
        rows.append(row)
    lengths = [
        np.array([len(r[side][0]["content"]) for r in rows]) for side in ("chosen", "rejected")
    ]
    start = time.process_time()
    preference_audit.audit(
        preference_audit.Pairs(
            ids=[f"pair/{number}" for number in range(pairs)],
            examples=rows,
            chosen_tokens=lengths[0],
            rejected_tokens=lengths[1],
        )
    )
    rate = pairs / (time.process_time() - start)
    return {
        "pairs_per_second": round(rate),
        "minutes_for_ultrafeedback": round(PAIRS / rate / 60, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", required=True)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=10_000)
    flags = parser.parse_args()
    result = {**search(flags.rows, flags.data_root), **audit(flags.pairs, flags.data_root)}
    outcome.tell(result)


if __name__ == "__main__":
    main()
