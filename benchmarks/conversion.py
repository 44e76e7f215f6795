"""Conversion in both directions against `transformers` load-and-save of the same bfloat16 weights.

    python benchmarks/conversion.py [--gigabytes=2.7] [--rounds=3]
    python benchmarks/conversion.py --thirteen_b [--layers=40]

Each conversion is a process of its own, which tells its seconds, without imports, and its peak of
resident memory. They take turns. `theirs` opens the folder with `from_pretrained` and writes it
with `save_pretrained`; `out` exports a checkpoint of these parameters, as training saves it, and
compares the digests of arrays; `in` makes the checkpoint of step 0 of the folder, moments of AdamW
included.
A rate is bytes of the weights over seconds. `--thirteen_b` has the widths of Llama 2 13B, and shows
the peaks where weights are many times the bound, 1.5 x the largest file + 1 GB.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import outcome

os.environ.setdefault("JAX_PLATFORMS", "cpu")
REPO = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

TARGET = 1.0
WIDTHS = dict(
    vocab_size=32000, embed_dim=2048, mlp_dim=5504, num_heads=16, num_kv_heads=16, head_dim=128,
    rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, max_positions=4096,
)  # fmt: skip


def model_of(given):
    """The model that is converted."""
    from tulu_jax.models import config

    if given.thirteen_b:
        return dataclasses.replace(config.named("llama2_13b"), num_layers=given.layers)
    one = config.LlamaConfig(num_layers=1, **WIDTHS)
    two = config.LlamaConfig(num_layers=2, **WIDTHS)
    per_layer = two.num_params - one.num_params
    layers = (given.gigabytes * 1e9 / 2 - one.num_params) / per_layer + 1
    return config.LlamaConfig(num_layers=max(1, round(layers)), **WIDTHS)


def run_config(folder: pathlib.Path, model):
    import builders

    from tulu_jax.data import tulu_tiny

    return builders.train_config(
        folder,
        tokenizer=tulu_tiny.tokenizer(str(folder / "tokenizer")),
        model=model,
        base=str(folder / "base"),
        param_dtype="bfloat16",
    )


def make_base(folder: pathlib.Path, model) -> None:
    """A Hugging Face folder of random weights, written weight by weight."""
    import ml_dtypes
    import numpy as np
    import tqdm
    from etils import epath

    from tulu_jax.interop import hf, layout, shards, weight_files

    base = folder / "base"
    base.mkdir()
    dtype, weights = np.dtype(ml_dtypes.bfloat16), layout.expected_weights(model)
    largest = max(math.prod(shape) for shape in weights.values())
    block = (np.random.default_rng(0).standard_normal(largest, np.float32) * 0.02).astype(dtype)
    made = ((name, block[: math.prod(shape)].reshape(shape)) for name, shape in weights.items())
    files = shards.plan(weights, dtype, hf.MAX_SHARD_BYTES)
    for file in files:
        shards.write(epath.Path(base), file, made, dtype, tqdm.tqdm(disable=True))
    if len(files) > 1:
        (base / weight_files.INDEX).write_text(json.dumps(shards.index(files, dtype)))
    fields = hf.write_config(model) | {"torch_dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(fields))


def save_as_training_does(folder: pathlib.Path, model) -> None:
    """A checkpoint of the parameters alone, in another workdir."""
    import jax
    import jax.numpy as jnp

    from tulu_jax import base, trainer
    from tulu_jax.interop import hf
    from tulu_jax.training import checkpoint
    from tulu_jax.training.state import Frozen, TrainState

    config = run_config(folder, model)
    params = hf.load(
        folder / "base",
        model,
        shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        dtype="bfloat16",
    )
    about = trainer.about(
        config, params, Frozen(), weights="-", of_base=base.about(config), tokenizer=None
    )
    saved = checkpoint.Checkpoints(str(folder / "trained"), config.checkpoint)
    saved.save(4, TrainState(step=jnp.int32(4), params=params, opt_state={}), about, {})
    saved.close()


def convert(folder: pathlib.Path, model, kind: str) -> None:
    """Inside a child: one conversion, or "idle" none; prints its seconds and its peak of memory in
    bytes."""
    if kind == "theirs":
        import torch
        import transformers

        out = folder / "theirs"
        start = time.perf_counter()
        found = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "base", dtype=torch.bfloat16
        )
        found.save_pretrained(out)
    else:
        import orbax.checkpoint  # noqa: F401 -- which is imported when it is needed

        from tulu_jax import conversion

        config = run_config(folder, model)
        out = pathlib.Path(config.workdir if kind == "in" else folder / "out")
        start = time.perf_counter()
        if kind == "in":
            conversion.write_first_step(config, "")
        elif kind == "out":
            if (folder / "trained").exists():
                config = dataclasses.replace(config, workdir=str(folder / "trained"))
            conversion.export(config, str(out), step=None, dtype="bfloat16", overwrite=False)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": peak_memory()}))


def peak_memory() -> int:
    """Bytes. Not `ru_maxrss`, which a child begins with that of its parent."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def measured(folder: pathlib.Path, kind: str) -> dict[str, float]:
    """One conversion in a process of its own; what it wrote is removed, but for a step 0 that the
    export is to read."""
    written = {"theirs": "theirs", "out": "out", "in": "run"}
    if kind in written:
        shutil.rmtree(folder / written[kind], ignore_errors=True)
    command = [sys.executable, __file__, *sys.argv[1:], f"--child={kind}", f"--folder={folder}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.strip().split("\n")[-1])


def same_weights(folder: pathlib.Path, model) -> bool:
    """Whether what was exported is what the base has, bit for bit."""
    import numpy as np

    from tulu_jax.interop import layout, sources

    ours, base = (sources.opened(folder / name, model) for name in ("out", "base"))
    return all(
        np.array_equal(ours.rows(n, slice(None)).view("u2"), base.rows(n, slice(None)).view("u2"))
        for n in layout.expected_weights(model)
    )


def line(kind: str, rate: float, peak: float, seconds: list[float]) -> str:
    spread = f"{min(seconds):.1f}-{max(seconds):.1f} s"
    return f"{kind:8} {rate:8.0f} MB/s  peak {peak / 1e9:5.2f} GB  {spread}"


def against_transformers(given, folder: pathlib.Path) -> None:
    model = model_of(given)
    num_bytes = 2 * model.num_params
    make_base(folder, model)
    save_as_training_does(folder, model)
    kinds = ("theirs", "out", "in")
    runs = {kind: [] for kind in kinds}
    for _ in range(given.rounds):
        for kind in kinds:
            runs[kind].append(measured(folder, kind))
    print(
        f"{model.num_params:,} parameters, {num_bytes / 1e9:.2f} GB, {given.rounds} rounds, medians"
    )
    rates = {}
    for kind, found in runs.items():
        seconds = [one["seconds"] for one in found]
        rates[kind] = num_bytes / 1e6 / statistics.median(seconds)
        print(line(kind, rates[kind], max(one["peak"] for one in found), seconds))
    same = same_weights(folder, model)
    print(f"exported weights equal the base's, bit for bit: {same}")
    ratios = {kind: rates[kind] / rates["theirs"] for kind in ("out", "in")}
    ratio = min(ratios.values())
    result = {"name": "conversion", "ratio": ratio, "target": TARGET}
    result |= {"ok": ratio >= TARGET and same, "ratios": ratios}
    outcome.tell(result | {kind: max(one["peak"] for one in runs[kind]) for kind in kinds})


def peaks(given, folder: pathlib.Path) -> None:
    """The peak of each direction with the widths of 13B, and what the parts of it are at 70B."""
    from tulu_jax.interop import hf, layout, shards
    from tulu_jax.models import config

    model, bfloat16 = model_of(given), hf.DTYPES["bfloat16"]
    need = 4.2 * model.num_params
    if shutil.disk_usage(folder).free < need:
        raise SystemExit(f"{folder} has less than {need / 1e9:.0f} GB free; give fewer --layers")
    make_base(folder, model)
    found = {"in": measured(folder, "in")}
    shutil.rmtree(folder / "base")
    found["out"] = measured(folder, "out")
    files = shards.plan(layout.expected_weights(model), bfloat16, hf.MAX_SHARD_BYTES)
    bound = 1.5 * max(file.num_bytes(bfloat16) for file in files) + 1e9
    print(f"{model.num_layers} layers of 13B: {2 * model.num_params / 1e9:.1f} GB in bfloat16")
    for kind, one in found.items():
        rate = 2 * model.num_params / 1e6 / one["seconds"]
        print(line(kind, rate, one["peak"], [one["seconds"]]))

    def largest(one) -> int:
        return max(math.prod(shape) for shape in layout.expected_weights(one).values())

    peak = max(one["peak"] for one in found.values())
    seventy = config.named("llama2_70b")
    idle = measured(folder, "idle")["peak"]
    per_value = (peak - idle) / largest(model)
    at_70b = idle + per_value * largest(seventy)
    print(
        f"computed for 70B: {idle / 1e9:.2f} GB of an idle process + {per_value:.1f} bytes a "
        f"value of the largest weight x {largest(seventy):,} = {at_70b / 1e9:.2f} GB"
    )
    result = {"name": "conversion_peak", "ratio": peak / bound, "target": 1.0, "ok": peak <= bound}
    outcome.tell(result | {"peak": peak, "bound": bound, "at_70b": at_70b})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--thirteen_b", action="store_true")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--child", help="inside: which conversion to run")
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    given = parser.parse_args()
    if given.child:
        convert(pathlib.Path(given.folder), model_of(given), given.child)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        (peaks if given.thirteen_b else against_transformers)(given, pathlib.Path(folder))


if __name__ == "__main__":
    main()
