"""What the workers of `peers_cpu.py` share: the model's size, the batches, and the driver's pipe.

A worker is `NAME_worker.py sft|dpo [--tiny]`, run by the interpreter of one peer, so this file
imports nothing but numpy. It builds a model with random weights and the peer's own trainer, makes
two updates, and answers on its standard output with JSON lines: first `ready`, the versions, and
`first_loss`; then, for each number that it reads from its standard input, `seconds` of one of that
many updates and the `loss` of the last. What the peer prints goes to standard error.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

STAGES = ("sft", "dpo")
LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY, CLIP_NORM = 1e-5, 0.9, 0.95, 1e-8, 0.0, 1.0
BETA = 0.1  # of DPO
ROPE_THETA, NORM_EPS = 1e4, 1e-5
SMALLEST_ID = 3  # below are the padding, beginning and end of a tokenizer


@dataclasses.dataclass(frozen=True)
class Size:
    """A Llama, in float32, as many key as query heads, untied tables; and its batches: `rows` of
    `length` tokens for SFT, `pairs` of a `prompt` and two answers of `answer` tokens for DPO."""

    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    head_dim: int
    vocab_size: int
    rows: int
    length: int
    pairs: int
    prompt: int
    answer: int


FULL = Size(4, 256, 688, 4, 64, 32000, rows=4, length=512, pairs=4, prompt=256, answer=256)
TINY = Size(1, 32, 64, 2, 16, 256, rows=2, length=32, pairs=2, prompt=16, answer=16)


def sft_tokens(size: Size) -> np.ndarray:
    """int32 [rows, length]; each but the first of a row is a target."""
    return _ids(size, size.rows, size.length)


def dpo_tokens(size: Size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts [pairs, prompt], chosen and rejected answers [pairs, answer], int32; all tokens of
    the answers are targets, and nothing is padding."""
    ids = _ids(size, size.pairs, size.prompt + 2 * size.answer)
    prompts, chosen, rejected = np.split(ids, [size.prompt, size.prompt + size.answer], axis=1)
    return prompts, chosen, rejected


def serve(build: Callable[[str, Size], Callable[[int], float]], packages: Sequence[str]) -> None:
    """Serves one worker. `build(stage, size)` gives a function that makes so many updates, waits
    until they are done, and returns the loss of the last; `packages` are those of the peer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()

    def tell(answer: dict) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    update = build(arguments.stage, TINY if arguments.tiny else FULL)
    first_loss = update(1)
    update(1)
    versions = {name: importlib.metadata.version(name) for name in (*packages, "jax")}
    tell({"ready": True, "versions": versions, "first_loss": first_loss})
    for line in sys.stdin:
        number, start = int(line), time.perf_counter()
        loss = update(number)
        tell({"seconds": (time.perf_counter() - start) / number, "loss": loss})


def _ids(size: Size, rows: int, length: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(SMALLEST_ID, size.vocab_size, (rows, length)).astype(np.int32)
