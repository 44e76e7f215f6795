"""Scoring multiple choice, questions/s on the CPU: ours against lm-eval's Hugging Face back end.

    python benchmarks/scoring.py       no examples and five, alternating, medians; ratio > 1: faster

Both sides: float32, the same thread count, a random Llama of 15M with a vocabulary of 32,000, the
same ids: MMLU questions of all 57 subjects, each with the continuations " A" to " D". The other
side is `HFLM._loglikelihood_tokens` of lm-eval where that is installed, with its own sorting,
batches padded on the right, of 1, 8 or 32, whichever takes it the least time in a run before, and
one forward pass for the four continuations of a question; else the same written here, and the table
says so. Questions are those of `eval/mmlu/test`, and of `dev` for the 19 subjects that the shared
data have no test of.
"""

import argparse
import csv
import functools
import os
import pathlib
import statistics
import tempfile
import time

import evals
import outcome

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from tulu_jax.data import chat
from tulu_jax.decode import decoder
from tulu_jax.interop import hf
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig

MODEL = LlamaConfig(
    vocab_size=32000, num_layers=6, embed_dim=288, mlp_dim=768, num_heads=6, num_kv_heads=6,
    head_dim=48, rope_theta=1e4, norm_eps=1e-5, max_positions=2048, tie_embeddings=True,
)  # fmt: skip
DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
TARGET = 2.0


def questions(folder: pathlib.Path, each: int, examples: int) -> list[str]:
    """`each` questions of every subject, behind `examples` answered ones of it."""
    found = []
    for dev in sorted((folder / "dev").glob("*.csv")):
        subject = dev.name.removesuffix("_dev.csv").removesuffix(".csv")
        shown = list(csv.reader(dev.open()))
        tests = list((folder / "test").glob(f"{subject}*.csv"))
        asked = list(csv.reader(tests[0].open())) if tests else shown
        name = subject.replace("_", " ")
        for row in asked[:each]:
            others = [_shown(r) + f" {r[5]}" for r in shown if r != row][:examples]
            head = f"The following are multiple choice questions (with answers) about {name}."
            found.append("\n\n".join([head, *others, _shown(row)]))
    return found


def _shown(row: list[str]) -> str:
    choices = [f"{letter}. {text}" for letter, text in zip("ABCD", row[1:5], strict=True)]
    return "\n".join([row[0], *choices, "Answer:"])


def requests(tokenizer, each: int, examples: int) -> tuple[list[list[int]], list[list[int]]]:
    """A prompt and a continuation for each choice of each question."""
    letters = [tokenizer.encode(f"Answer: {letter}")[-1] for letter in "ABCD"]
    prompts, continuations = [], []
    for text in questions(DATA / "eval" / "mmlu", each, examples):
        ids = [tokenizer.bos_id, *tokenizer.encode(text)][-(MODEL.max_positions - 1) :]
        prompts += [ids] * 4
        continuations += [[letter] for letter in letters]
    return prompts, continuations


def our_side(params, prompts, continuations):
    """A function that gives the log-probability of every continuation."""
    ours = decoder.Decoder(MODEL, ExecutionConfig(compute_dtype="float32"))
    return lambda: [score.logps for score in ours.score(params, prompts, continuations)]


def their_side(folder: str, tokenizer, prompts, continuations, threads: int):
    """(what it is, the same with transformers and torch, a function of the size of batches)."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = [
        ((str(n // 4), str(n % 4)), ids, continuation)
        for n, (ids, continuation) in enumerate(zip(prompts, continuations, strict=True))
    ]
    try:
        from lm_eval.models import huggingface
    except ImportError:
        return "its method", lambda batch: _as_lm_eval(model, asked, batch)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    lm = huggingface.HFLM(
        pretrained=model, tokenizer=wrapped, batch_size=1, device="cpu", dtype="float32",
        max_length=MODEL.max_positions,
    )  # fmt: skip

    def score(batch: int) -> list[float]:
        lm.batch_size_per_gpu = batch
        return [logp for logp, _ in lm._loglikelihood_tokens(asked, disable_tqdm=True)]

    return "lm-eval", score


def _as_lm_eval(model, asked, batch_size: int) -> list[float]:
    """lm-eval 0.4's `_loglikelihood_tokens`: contexts by falling length, batches padded on the
    right, scores of every position, and of a context once for all its continuations."""
    import torch

    by_context: dict[tuple[int, ...], list[int]] = {}
    for n, (_, ids, continuation) in enumerate(asked):
        by_context.setdefault((*ids, *continuation[:-1]), []).append(n)
    contexts = sorted(by_context, key=lambda ids: (-len(ids), ids))
    found = [0.0] * len(asked)
    for first in range(0, len(contexts), batch_size):
        batch = contexts[first : first + batch_size]
        tokens = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
        for row, ids in enumerate(batch):
            tokens[row, : len(ids)] = torch.tensor(ids)
        with torch.no_grad():
            logps = torch.nn.functional.log_softmax(model(tokens).logits, dim=-1)
        for row, ids in enumerate(batch):
            for n in by_context[ids]:
                continuation = torch.tensor(asked[n][2])
                own = logps[row, len(ids) - len(continuation) : len(ids)]
                found[n] = float(own.gather(1, continuation[:, None]).sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--each", type=int, default=5, help="questions of a subject")
    parser.add_argument("--examples", type=int, nargs="*", default=[0, 5])
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    tokenizer = chat.load_tokenizer(str(DATA / "tokenizer" / "llama2" / "tokenizer.model"))
    params = jax.jit(lambda: llama.init_params(MODEL, jax.random.key(0)))()
    results = {}
    print(f"{threads} threads, float32, {arguments.rounds} alternating rounds, medians")
    print("examples questions  ours /s theirs /s  ratio  gap  against, its batch")
    with tempfile.TemporaryDirectory() as folder:
        hf.save(f"{folder}/hf", params, MODEL, dtype="float32", generation_config={},
                write_tokenizer=None)  # fmt: skip
        for examples in arguments.examples:
            asked = requests(tokenizer, arguments.each, examples)
            count = len(asked[0]) // 4
            ours = our_side(params, *asked)
            against, theirs = their_side(f"{folder}/hf", tokenizer, *asked, threads)
            batch = evals.fastest(theirs)
            theirs = functools.partial(theirs, batch)
            gap = float(np.abs(np.subtract(ours(), theirs())).max())  # and compiles
            seconds = {"ours": [], "theirs": []}
            for _ in range(arguments.rounds):
                for side, run in (("ours", ours), ("theirs", theirs)):
                    start = time.perf_counter()
                    run()
                    seconds[side].append(time.perf_counter() - start)
            rates = {k: count / statistics.median(v) for k, v in seconds.items()}
            ratio = rates["ours"] / rates["theirs"]
            results[f"{examples} examples"] = {
                **rates, "ratio": ratio, "gap": gap, "questions": count, "against": against,
                "batch": batch,
            }  # fmt: skip
            print(f"{examples:8} {count:9} {rates['ours']:8.2f} {rates['theirs']:9.2f} {ratio:6.2f}"
                  f"  {gap:.0e}  {against}, {batch}", flush=True)  # fmt: skip
    ratio = min(result["ratio"] for result in results.values())
    summary = {"name": "scoring", "ratio": ratio, "target": TARGET, "ok": ratio >= TARGET}
    outcome.tell({**summary, "results": results})


if __name__ == "__main__":
    main()
