"""Benchmarks through our runner against lm-eval's Hugging Face back end, wall time on the CPU.

    python benchmarks/evals.py       a share of each subset, alternating, medians; ratio > 1: faster

Both sides: float32, the same thread count, a random Llama of 15M with a vocabulary of 32,000, the
same prompts in ids: those of GSM8K, BBH and MMLU, every `--every`th of the paper's subset of the
rows at hand. A random model ends no answer, so answers are as long as published ones are in the
mean: 125 tokens of GSM8K, 113 of BBH. Ours is `run.answers` as `evaluate` calls it; the other side
is `HFLM.generate_until` and `HFLM._loglikelihood_tokens` of lm-eval, in batches of 1, 8 or 32,
whichever takes it the least time in a run before. Loading and compiling are in neither; one run of
each comes before.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import statistics
import tempfile
import time

import outcome

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from etils import epath

from tulu_jax.data import chat
from tulu_jax.decode.decoder import Decoder
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import bbh, gsm8k, mmlu, run
from tulu_jax.interop import hf
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.serving.engine import OwnEngine

MODEL = LlamaConfig(
    vocab_size=32000, num_layers=6, embed_dim=288, mlp_dim=768, num_heads=6, num_kv_heads=6,
    head_dim=48, rope_theta=1e4, norm_eps=1e-5, max_positions=4096, tie_embeddings=True,
)  # fmt: skip
DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
ANSWERS = {"gsm8k": 125, "bbh": 113}
TARGET, BATCHES, CHAT = 2.0, (1, 8, 32), "spec"


def prompts(tokenizer, every: int) -> list[run.Prompts]:
    """Every `every`th request of the three benchmarks, with answers of one length."""
    found = []
    for of in (gsm8k.GSM8K, bbh.BBH, mmlu.MMLU):
        made = of(allow_altered=True)
        requests = made.requests(epath.Path(DATA / "eval"), tokenizer, is_chat=True)[::every]
        if made.name in ANSWERS:
            sampling = Sampling(max_new_tokens=ANSWERS[made.name])
            requests = [dataclasses.replace(r, sampling=sampling) for r in requests]
        found.append(run.encode(made.name, requests, tokenizer, chat=CHAT, is_cap=False))
    return found


def our_side(params, tokenizer, asked: run.Prompts):
    """A function that answers all of them into a new file."""
    decoder = Decoder(MODEL, ExecutionConfig(compute_dtype="float32"), slots=16)
    engine = OwnEngine(decoder, params, tokenizer, mesh=None)

    def answer():
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "answers.jsonl"
            return run.answers(engine, asked, path, about={}, shows=False)

    return answer


def their_side(folder: str, tokenizer, asked: run.Prompts, threads: int):
    """The same through lm-eval, from the same ids, a function of the size of its batches."""
    import torch
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models import huggingface

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    ids = {str(n): one.prompt for n, one in enumerate(asked.asked)}

    class FromIds(huggingface.HFLM):
        """Contexts are the numbers of prompts, so that both sides have the same ids."""

        def tok_encode(self, string, *args, **kwargs):
            return ids.get(string) or super().tok_encode(string, *args, **kwargs)

        def tok_batch_encode(self, strings, *args, **kwargs):
            rows = [ids[string] for string in strings]
            longest = max(map(len, rows))
            tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            return tokens, mask

    lm = FromIds(
        pretrained=model, tokenizer=wrapped, batch_size=1, device="cpu", dtype="float32",
        max_length=MODEL.max_positions,
    )  # fmt: skip
    if asked.name not in ANSWERS:
        scored = [
            ((str(n), str(k)), prompt, continuation)
            for n, one in enumerate(asked.asked)
            for k, (prompt, continuation) in enumerate(one.choices)
        ]

        def score(batch: int):
            lm.batch_size_per_gpu = batch
            return lm._loglikelihood_tokens(scored, disable_tqdm=True)

        return score
    settings = {"until": ["</s>"], "max_gen_toks": ANSWERS[asked.name], "do_sample": False}
    instances = [
        Instance(request_type="generate_until", doc={}, arguments=(name, dict(settings)), idx=n)
        for n, name in enumerate(ids)
    ]

    def generate(batch: int):
        lm.batch_size_per_gpu = batch
        return lm.generate_until(instances, disable_tqdm=True)

    return generate


def fastest(side) -> int:
    """The size of batches that takes `side` the least time, after a run to warm up."""
    side(BATCHES[0])
    seconds = {}
    for batch in BATCHES:
        start = time.perf_counter()
        side(batch)
        seconds[batch] = time.perf_counter() - start
    return min(seconds, key=seconds.get)


def agreed(asked: run.Prompts, ours, theirs) -> float:
    """Of choices the share of requests whose best is the same; of texts that of equal ones."""
    if asked.name in ANSWERS:
        pairs = [(a.texts[0].strip(), b.strip()) for a, b in zip(ours, theirs, strict=True)]
        return sum(a == b for a, b in pairs) / len(pairs)
    scores = iter(logp for logp, _ in theirs)
    same = 0
    for answer in ours:
        other = [next(scores) for _ in answer.choice_logps]
        best = [max(range(len(s)), key=s.__getitem__) for s in (answer.choice_logps, other)]
        same += best[0] == best[1]
    return same / len(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=20)
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    tokenizer = chat.load_tokenizer(str(DATA / "tokenizer" / "llama2" / "tokenizer.model"))
    params = jax.jit(lambda: llama.init_params(MODEL, jax.random.key(0)))()
    results, total = {}, {"ours": 0.0, "theirs": 0.0}
    print(f"{threads} threads, float32, {arguments.rounds} alternating rounds, medians; "
          f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(f"{'':8}{'requests':>9}{'ours s':>9}{'theirs s':>9}{'ratio':>7}{'same':>6}{'batch':>7}")
    with tempfile.TemporaryDirectory() as folder:
        hf.save(f"{folder}/hf", params, MODEL, dtype="float32", generation_config={},
                write_tokenizer=None)  # fmt: skip
        for asked in prompts(tokenizer, arguments.every):
            theirs = their_side(f"{folder}/hf", tokenizer, asked, threads)
            batch = fastest(theirs)
            sides = {
                "ours": our_side(params, tokenizer, asked),
                "theirs": functools.partial(theirs, batch),
            }
            same = agreed(asked, *(side() for side in sides.values()))  # and compiles
            seconds = {name: [] for name in sides}
            for _ in range(arguments.rounds):
                for name, side in sides.items():
                    start = time.perf_counter()
                    side()
                    seconds[name].append(time.perf_counter() - start)
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            total = {name: total[name] + medians[name] for name in total}
            ratio = medians["theirs"] / medians["ours"]
            results[asked.name] = {
                **medians, "ratio": ratio, "same": same, "requests": len(asked.asked),
                "batch": batch,
            }  # fmt: skip
            print(f"{asked.name:8}{len(asked.asked):9}{medians['ours']:9.1f}"
                  f"{medians['theirs']:9.1f}{ratio:7.2f}{same:6.0%}{batch:7}",
                  flush=True)  # fmt: skip
    ratio = total["theirs"] / total["ours"]
    summary = {"name": "evals", "ratio": ratio, "target": TARGET, "ok": ratio >= TARGET}
    outcome.tell({**summary, "results": results})


if __name__ == "__main__":
    main()
