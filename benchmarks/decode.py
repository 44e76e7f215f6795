"""Generation, new tokens/s on the CPU: ours against transformers + torch, same requests.

    python benchmarks/decode.py        batch 1 and batch 32, alternating, medians; ratio > 1: faster

Both sides: greedy, float32, the same thread count and weights, a random Llama of 15M with 32,000
ids. Batch 32 has prompts of 600 to 900 ids and answers of 50 to 400, as GSM8K with eight examples
has them. The answers' lengths stand in for where a trained model would end: ours sees the length of
one when it is reached, and takes requests as they come. `generate` of transformers gets the batch
padded on the left and goes on to the longest answer, as it does with a model that ends its answers.
Its cache is static, which took less of a step than the dynamic one (`--cache`); with `--compile`
its forward pass goes through `torch.compile`, which it does by itself on GPUs alone.
The ratio is one machine's on one day.
"""

import argparse
import os
import statistics
import tempfile
import time

import outcome

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from tulu_jax.decode import decoder
from tulu_jax.decode.sampling import Sampling
from tulu_jax.interop import hf
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig

MODEL = LlamaConfig(
    vocab_size=32000, num_layers=6, embed_dim=288, mlp_dim=768, num_heads=6, num_kv_heads=6,
    head_dim=48, rope_theta=1e4, norm_eps=1e-5, max_positions=2048, tie_embeddings=True,
)  # fmt: skip
TARGETS = {"batch 1": 1.2, "batch 32": 2.0}
USEFUL = 0.9


def requests(name: str, longest: int) -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens their answers have."""
    rng = np.random.default_rng(0)
    count = 32 if name == "batch 32" else 1
    lengths = rng.integers(600, 901, count)
    prompts = [rng.integers(3, MODEL.vocab_size, n).tolist() for n in lengths]
    return prompts, rng.integers(50, longest + 1, count).tolist()


def our_side(params, prompts, answers):
    """A function that generates all answers, and its decoder."""
    ours = decoder.Decoder(MODEL, ExecutionConfig(compute_dtype="float32"))
    samplings = [Sampling(max_new_tokens=n) for n in answers]

    def run():
        results = ours.generate(params, prompts, samplings, jax.random.key(0))
        return [result.ids for result in results]

    return run, ours


def torch_side(folder: str, prompts, answers, threads: int, cache: str, compiles: bool):
    """The same with transformers and torch."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # no answer ends before its length
    if compiles:
        model.forward = torch.compile(model.forward)
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

    def run():
        found = model.generate(
            tokens, attention_mask=mask, max_new_tokens=max(answers), do_sample=False,
            pad_token_id=0, cache_implementation=cache, disable_compile=True,
        )  # fmt: skip
        return [row[longest : longest + n].tolist() for row, n in zip(found, answers, strict=True)]

    return run


def same(a: list[list[int]], b: list[list[int]]) -> float:
    """The share of answers that are the same; they may part where two tokens are as likely."""
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=tuple(TARGETS))
    parser.add_argument("--longest", type=int, default=400, help="tokens of an answer")
    parser.add_argument("--cache", choices=("static", "dynamic"), default="static",
                        help="that of transformers")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="transformers' forward pass")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    params = jax.jit(lambda: llama.init_params(MODEL, jax.random.key(0)))()
    results = {}
    print(f"{threads} threads, float32, {arguments.rounds} alternating rounds, medians")
    print(f"{'':10} {'ours tok/s':>11} {'torch tok/s':>12} {'ratio':>6} {'useful':>7} {'held':>5}"
          f" {'same':>5}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        hf.save(f"{folder}/hf", params, MODEL, dtype="float32", generation_config={},
                write_tokenizer=None)  # fmt: skip
        for name in [arguments.only] if arguments.only else TARGETS:
            prompts, answers = requests(name, arguments.longest)
            ours, used = our_side(params, prompts, answers)
            sides = {
                "ours": ours,
                "torch": torch_side(
                    f"{folder}/hf", prompts, answers, threads, arguments.cache, arguments.compile
                ),
            }
            agree = same(*(side() for side in sides.values()))  # and compiles
            seconds = {side: [] for side in sides}
            for _ in range(arguments.rounds):
                for side, run in sides.items():
                    start = time.perf_counter()
                    run()
                    seconds[side].append(time.perf_counter() - start)
            rates = {k: sum(answers) / statistics.median(v) for k, v in seconds.items()}
            usage = used.usage
            results[name] = result = {
                **rates,
                "ratio": rates["ours"] / rates["torch"],
                "useful": usage.useful / usage.decoded,
                "wasted_of_held_pages": 1 - usage.live / usage.held,
                "same_answers": agree,
            }
            print(f"{name:10} {rates['ours']:11.1f} {rates['torch']:12.1f} {result['ratio']:6.2f}"
                  f" {result['useful']:7.1%} {result['wasted_of_held_pages']:5.1%} {agree:5.0%}",
                  flush=True)  # fmt: skip
    ok = all(result["ratio"] >= TARGETS[name] for name, result in results.items())
    if "batch 32" in results:
        ok = ok and results["batch 32"]["useful"] >= USEFUL
    summary = {"name": "decode", "targets": TARGETS, "useful_target": USEFUL, "ok": ok}
    outcome.tell({**summary, "results": results})


if __name__ == "__main__":
    main()
