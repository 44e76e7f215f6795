"""What the server adds to the decoder: tokens/s over HTTP against `Decoder.generate`, on the CPU.

    python benchmarks/serving.py    32 requests, alternating, medians; ratio < 1: the server costs

The server (uvicorn, the decoder thread) and its client (`OpenAIEngine`, all requests under way) are
in this one process, as is the other side: the same requests, greedy, in one call. A random Llama of
15M with a vocabulary of 4,096, float32, prompts of 20 to 200 ids, answers of 16 to 64. The time to
the first piece of a stream is that of a prompt of 100 ids on an idle server.
"""

import argparse
import os
import socket
import statistics
import tempfile
import threading
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import uvicorn

from tulu_jax.data import chat, tulu_tiny
from tulu_jax.decode import batcher as batcher_lib
from tulu_jax.decode.decoder import Decoder
from tulu_jax.decode.sampling import Sampling
from tulu_jax.models import llama
from tulu_jax.models.config import ExecutionConfig, LlamaConfig
from tulu_jax.serving import api_requests, app, openai_engine

MODEL = LlamaConfig(
    vocab_size=4096, num_layers=6, embed_dim=288, mlp_dim=768, num_heads=6, num_kv_heads=6,
    head_dim=48, rope_theta=1e4, norm_eps=1e-5, max_positions=1024, tie_embeddings=True,
)  # fmt: skip


def served(params, tokenizer):
    """(address, what ends it) of a server of `params`."""
    decoder = Decoder(MODEL, ExecutionConfig(compute_dtype="float32"))
    batcher = batcher_lib.Batcher(decoder, params, mesh=None, detokenize=tokenizer.decode)
    about = api_requests.Served(
        name="random", tokenizer=tokenizer, chat="spec", max_length=MODEL.max_positions
    )
    config = uvicorn.Config(app.make(batcher, about), log_config=None, access_log=False)
    server = uvicorn.Server(config)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    batcher.start()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()

    def end():
        server.should_exit = True
        thread.join()
        batcher.close()

    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1", end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    options = parser.parse_args()
    tokenizer = chat.load_tokenizer(tulu_tiny.tokenizer(tempfile.mkdtemp()))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: np.asarray(0.05 * rng.normal(size=leaf.shape), np.float32),
        llama.abstract_params(MODEL, "float32"),
    )
    # The tokenizer knows fewer ids than the model makes; its decoder drops the others.
    prompts = [rng.integers(3, 500, n).tolist() for n in rng.integers(20, 200, options.requests)]
    most = rng.integers(16, 65, options.requests).tolist()
    samplings = [Sampling(max_new_tokens=n, stop_ids=(tokenizer.eos_id,)) for n in most]
    ours = Decoder(MODEL, ExecutionConfig(compute_dtype="float32"))
    url, end = served(params, tokenizer)
    engine = openai_engine.OpenAIEngine(url, concurrency=options.requests)

    def alone():
        results = ours.generate(
            params, prompts, samplings, jax.random.key(0), detokenize=tokenizer.decode
        )
        return [result.ids for result in results]

    def over_http():
        """All at once, each with its own length: what many clients would ask."""
        found = [None] * len(prompts)

        def ask(n):
            sampling = Sampling(max_new_tokens=most[n])
            found[n] = engine.generate([prompts[n]], sampling, seeds=None)[0][0].ids

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    same = alone() == over_http()
    sides = {"alone": alone, "over HTTP": over_http}
    over_http()  # what joined in another order may have needed another program
    seconds = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            tokens = sum(map(len, side()))
            seconds[name].append(time.perf_counter() - begin)
    rates = {name: tokens / statistics.median(found) for name, found in seconds.items()}
    firsts = []
    for _ in range(options.rounds + 1):
        begin = time.perf_counter()
        stream = engine.client.completions.create(
            model="random", prompt=prompts[0][:20] * 5, max_tokens=16, temperature=0, stream=True
        )
        next(iter(stream))
        firsts.append(time.perf_counter() - begin)
        stream.close()
    end()
    print(f"{options.requests} requests, {tokens} tokens, the same ids: {same}")
    for name, rate in rates.items():
        print(f"{name:>10} {rate:8.1f} tokens/s")
    print(f"ratio {rates['over HTTP'] / rates['alone']:.2f}")
    print(f"first piece {1000 * statistics.median(firsts[1:]):.0f} ms")


if __name__ == "__main__":
    main()
