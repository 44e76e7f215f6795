"""Every published run compiled for its slice: what fits, how long, how much; and against MaxText.

    python benchmarks/pods.py                      # one run on two slices
    python benchmarks/pods.py --all                # every file on every pod; goes on if stopped
    python benchmarks/pods.py --calibrate=FOLDER   # published MaxText speeds against the estimate
    python benchmarks/pods.py --vs=maxtext --maxtext=FOLDER
    python benchmarks/pods.py --scaling            # 64, 256 and 1,024 chips, the same tokens a chip

FOLDER holds what `benchmarks/maxtext_aot.py` wrote. Each compilation is a process of its own
(`python -m tulu_jax.dryrun`); its result is kept below runs/pods, so that a stopped table goes on.
Runs that differ in their data alone, as the ablations do, share a compilation.
An MFU of ours counts the attention that is visible in the rows. MaxText's step is compared at full
rematerialisation, not at its fastest published policy. The last line is JSON.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import tqdm

from tulu_jax import atomic

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEPT = ROOT / "runs" / "pods"
SHORT = [("sft_7b.gin", "v5p_64"), ("dpo_70b.gin", "v5p_512")]
SPARE, SECONDS, GIGABYTES = 0.05, 180, 12
# The module of a run, its slice, and what was published: tokens/s a chip, or an MFU.
# Whether an MFU counts attention whole or its causal half is not always said; MaxText's formula had
# it whole until July 2025 (its #1988).
PUBLISHED = [
    ("llama2_70b_v5p_512", "v5p:4x8x8", 692),
    ("llama2_70b_v5e_256", "v5e:16x16", 0.57),
    ("llama2_70b_v4_128", "v4:4x4x4", 0.57),
    ("llama2_70b_v6e_256", "v6e:16x16", 905),
    ("own_16b_v5e_256", "v5e:16x16", 0.611),
    ("own_32b_v5e_256", "v5e:16x16", 0.6686),
    ("own_64b_v5e_256", "v5e:16x16", 0.599),
    ("own_128b_v5e_256", "v5e:16x16", 0.5606),
    ("own_64b_v5p_128", "v5p:4x4x4", 0.7031),
    ("own_128b_v5p_512", "v5p:4x8x8", 0.6883),
    ("own_128b_v5p_512-without_rings", "v5p:4x8x8", 0.6883),
    ("llama3_1_70b_v6e_64", "v6e:8x8", 876.7),
    ("llama3_1_70b_v6e_128", "v6e:8x16", 942.0),
    ("llama3_1_70b_v6e_256", "v6e:16x16", 960.2),
]
# What a module may be compiled with in place of all its layers: two depths give the rest.
DEPTHS = (4, 8)
SHALLOW = "{}-override_model_config_true-base_num_decoder_layers_{}"
# MaxText's own architecture: layers, width, width of the MLP, heads.
OWN = {"16b": (32, 4096, 28672, 64), "32b": (32, 8192, 28672, 64), "64b": (64, 8192, 28672, 64),
       "128b": (64, 8192, 57344, 128)}  # fmt: skip
# jax's splash kernels, forward and backward, for 32 heads x 8,192 x 128, causal: milliseconds as
# `benchmarks/attention.py` counts them.
SPLASH = {"v4": (4.33, 14.40), "v5e": (4.29, 9.15), "v5p": (1.90, 7.91), "v6e": (2.54, 4.31)}


def dry_run(name: str, pod: str | None, *arguments: str) -> dict:
    """The dry run's first result, with the seconds and the GB that the process took."""
    stem = "__".join([name.removesuffix(".gin"), pod or "own", *arguments]).replace("/", "_")
    path = KEPT / f"{stem.replace('--', '').replace('*', 'x')}.json"
    if path.exists():
        return json.loads(path.read_text())
    out = pathlib.Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "tulu_jax.dryrun", f"--gin_file={name}", f"--out={out}"]
    command += [f"--pod={pod}"] if pod else []
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1) or not (out / "dryrun.json").exists():
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{said[-3000:]}")
    result = json.loads((out / "dryrun.json").read_text())[0]
    result |= {"file": name, "pod": pod, "process_seconds": time.perf_counter() - start}
    result |= {"process_gb": usage.ru_maxrss * 1024 / 1e9}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(result))
    return result


def runs() -> list[tuple[str, str]]:
    """Every complete file of the paper with every slice that is laid out for it."""
    import gin

    from tulu_jax import cli
    from tulu_jax.parallel import slices

    found = []
    for path in sorted((ROOT / "configs").glob("*.gin")):
        gin.clear_config()
        if "SLICE = " in path.read_text():
            config = cli.load(path.name, workdir="unused")
            size = slices.size_of(config.model.num_params)
            known = slices.known(stage=config.stage, size=size)
            found += [(path.name, pod) for pod in known if not pod.endswith("_wide")]
    return found


def dry_runs(wanted: list[tuple[str, str]]) -> list[dict]:
    """The dry runs of `wanted`, one for those whose steps differ in nothing that is compiled."""
    import gin

    from tulu_jax import cli
    from tulu_jax.planning import plan

    results, compiled = [], {}
    for name, pod in tqdm.tqdm(wanted, desc="pods", unit="run"):
        gin.clear_config()
        config = cli.load(name, pod=pod, workdir="unused")
        sizes = (config.data.max_length, config.data.packing, config.batch_size, config.num_epochs)
        rest = (config.micro_batch_size, config.param_dtype, config.model, config.mesh)
        adapters = (config.adapter, config.quant)
        step = repr(
            (*sizes, *rest, *adapters, config.execution, config.objective, config.optimizer)
        )
        if step not in compiled:
            compiled[step] = dry_run(name, pod)
        result = compiled[step] | {"file": name, "same_as": compiled[step]["file"]}
        if "hours" in result:
            scale = plan.num_updates(config) / result["updates"]
            result |= {key: result[key] * scale for key in ("updates", "hours", "chip_hours")}
        results.append(result)
    return results


def row(result: dict) -> str:
    """A line of the Markdown table."""
    if "seconds" not in result:
        return f"| {result['file']} | {result['topology']} | does not fit | | | | | | | | | |"
    mesh = " x ".join(f"{k} {v}" for k, v in result["mesh"].items() if v > 1)
    step, (low, high) = result["seconds"]["step"], (result["band"][k] for k in ("low", "high"))
    star = "*" if result["band"]["extrapolated"] else ""
    compiled = f"{result['process_seconds']:.0f} s, {result['process_gb']:.1f} GB"
    if result["same_as"] != result["file"]:
        compiled = f"as {result['same_as']}"
    return (
        f"| {result['file']} | {result['topology']} | {mesh} | {result['remat_policy']} "
        f"| {result['bytes']['peak'] / 2**30:.1f} / {result['bytes']['hbm'] / 2**30:.0f} "
        f"({result['spare']:.0%}) | {step:.2f} ({low * step:.2f} to {high * step:.2f}{star}) "
        f"| {result['tokens_per_second_per_chip']:,.0f} "
        f"| {result['mfu']:.0%} / {result['mfu_whole_attention']:.0%} "
        f"| {result['binding']} | {result['hours']:.1f} | {result['chip_hours']:,.0f} "
        f"| {compiled} |"
    )


HEAD = (
    "| file | slice | mesh | remat | GiB / HBM (spare) | s an update (between) | tokens/s a chip "
    "| MFU (visible / whole attention) | binds | hours | chip-hours | compiled in |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def table(wanted: list[tuple[str, str]]) -> dict:
    """Prints the table of `wanted` runs; how many fit with room, and in how long they compiled."""
    results = dry_runs(wanted)
    print("\n".join([HEAD, *map(row, results)]))
    for result in results:
        for fault in result.get("faults", []):
            print(f"{result['file']} on {result['topology']}: {fault}")
    roomy = [r for r in results if r.get("spare", -1) >= SPARE]
    faulty = [r for r in results if r.get("faults")]
    slowest = max(r["process_seconds"] for r in results)
    largest = max(r["process_gb"] for r in results)
    return {
        "name": "pods",
        "ratio": len(roomy) / len(results),
        "target": 1.0,
        "ok": len(roomy) == len(results)
        and not faulty
        and slowest < SECONDS
        and largest < GIGABYTES,
        "faulty": len(faulty),
        "slowest_seconds": slowest,
        "largest_gb": largest,
    }


def maxtext(folder: pathlib.Path, stem: str, topology: str):
    """The predicted cost of MaxText's step, and what was compiled."""
    from tulu_jax.planning import topology as topology_lib

    topology_lib.enter()
    import numpy as np

    from tulu_jax.planning import cost, hlo

    about = json.loads((folder / f"{stem}.json").read_text())
    slice_ = topology_lib.parse(topology)
    places = np.array([[0, *spot[: len(slice_.shape)]] for spot in about["coordinates"]])
    length = int(about["settings"]["max_target_length"])
    heads = architecture(about["settings"]).num_heads
    rows = about["tokens_per_device"] / length

    def splash(name: str, text: str) -> tuple[str, float] | None:
        if not name.startswith("splash"):
            return None
        forward, backward = SPLASH[slice_.chip]
        halves = 2 if "dq_" in name or ("dkv" in name and "splash_mha_dq_" in module_text) else 1
        whole = forward if "fwd" in name else backward / halves
        return "attention", whole / 1e3 * rows * heads / 32 * (length / 8192) ** 2

    module_text = (folder / f"{stem}.hlo.txt").read_text()
    axes = cost.mesh_axes({"all": slice_.num_devices})
    about["rings"] = "windowed_dot_general" in module_text
    estimator = cost.Estimator(hlo.parse(module_text), slice_, places, axes, splash, 1.0)
    return estimator.estimate(), about


def architecture(settings: dict[str, str]):
    """The model of MaxText's `settings`, of one row of PUBLISHED's models."""
    from tulu_jax.models import config

    if settings["model_name"] == "default":
        layers, embed, mlp, heads = OWN[f"{settings['global_parameter_scale']}b"]
        sizes = dict(num_layers=layers, embed_dim=embed, mlp_dim=mlp, num_heads=heads)
        return dataclasses.replace(config.named("llama2_70b"), **sizes, num_kv_heads=heads)
    vocab = 128256 if settings["model_name"] == "llama3.1-70b" else 32000
    return dataclasses.replace(config.named("llama2_70b"), vocab_size=vocab)


def deep(folder: pathlib.Path, stem: str, topology: str):
    """What `maxtext` gives of a module, or what follows from two that have fewer layers; None where
    neither was compiled."""
    if (folder / f"{stem}.json").exists():
        return *maxtext(folder, stem, topology), ""
    names = [SHALLOW.format(stem, depth) for depth in DEPTHS]
    if not all((folder / f"{name}.json").exists() for name in names):
        return None
    (few, about), (more, _) = (maxtext(folder, name, topology) for name in names)
    times = (architecture(about["settings"]).num_layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    for part in ("matrix", "attention", "memory", "interconnect", "hidden"):
        least = getattr(few, part)
        setattr(few, part, least + times * (getattr(more, part) - least))
    return few, about, f" (from {DEPTHS[0]} and {DEPTHS[1]} layers)"


def calibrate(folder: pathlib.Path) -> dict:
    """Predicts the runs that MaxText published, from its own compiled modules, and prints the
    points of `planning/calibration.py`."""
    from tulu_jax.planning import calibration
    from tulu_jax.planning import topology as topology_lib

    points, errors = [], {}
    print(f"{'MaxText':24}     measured    predicted   error   MFU: visible, whole  waits  hidden")
    for stem, topology, published in PUBLISHED:
        found = deep(folder, stem, topology)
        if found is None:
            print(f"{stem:<24} published {published:,} not compiled")
            continue
        cost, about, how = found
        tokens, length = about["tokens_per_device"], int(about["settings"]["max_target_length"])
        peak = topology_lib.parse(topology).hardware.peak
        model = architecture(about["settings"])
        counts = [model.flops_per_token(seen) for seen in (length, 2 * length)]
        rate = published if published > 1 else published * peak * 2 / sum(counts)
        point = calibration.Point(stem, tokens / rate, cost.seconds, cost.interconnect)
        if about["rings"]:
            how = " (products in rings: no point)"
        else:
            points.append(point)
            errors[stem] = point.error
        causal, whole = (flops * tokens / cost.seconds / peak for flops in counts)
        print(
            f"{stem:<24}{rate:9,.0f} tok/s{tokens / cost.seconds:9,.0f}{-point.error:+9.1%}"
            f"{causal:12.1%}{whole:8.1%}{point.share:9.1%}{cost.hidden / cost.seconds:8.1%}"
            f"  matrix {cost.matrix:.2f} attention {cost.attention:.2f} HBM {cost.memory:.2f} "
            f"interconnect {cost.interconnect:.2f} s{how}"
        )
    for p in points:
        print(f'    Point("{p.name}", {p.measured:.2f}, {p.predicted:.2f}, {p.waits:.2f}),')
    worst = max(map(abs, errors.values()))
    return {"name": "pods_calibration", "ratio": 1 + worst, "target": 1.15, "ok": worst < 0.15,
            "errors": errors}  # fmt: skip


def against_maxtext(folder: pathlib.Path) -> dict:
    """Seconds per token a chip of a step of the same shape, theirs with full rematerialisation over
    ours; theirs is faster with a policy that keeps more."""
    stem = "llama2_70b_v5p_512-max_target_length_8192-per_device_batch_size_1-remat_policy_full"
    theirs, about = maxtext(folder, stem, "v5p:4x8x8")
    ours = dry_run("sft_70b.gin", "v5p_512_wide", "--gin.BATCH_SIZE=256", "--whole_rows")
    tokens = 256 * 8192 / 256
    print("MaxText with full rematerialisation, not its fastest policy")
    print(f"{'':<10} s a step  matrix attention    HBM interconnect  GiB temporaries")
    for name, seconds, values, temporaries in (
        ("MaxText", theirs.seconds, vars(theirs), about["bytes"]["temp"]),
        ("tulu_jax", ours["seconds"]["step"], ours["seconds"], ours["bytes"]["temporaries"]),
    ):
        print(
            f"{name:<10}{seconds:8.2f} {values['matrix']:8.2f} {values['attention']:8.2f} "
            f"{values['memory']:7.2f} {values['interconnect']:9.2f} {temporaries / 2**30:15.1f}"
        )
    ratio = (theirs.seconds / about["tokens_per_device"]) / (ours["seconds"]["step"] / tokens)
    return {
        "name": "pods_vs_maxtext",
        "ratio": ratio,
        "target": 1 / 0.85,
        "ok": ratio >= 1 / 0.85,
        "measure": "seconds a token a chip, MaxText with full rematerialisation / ours",
    }


def scaling() -> dict:
    """Tokens/s a chip at 2,048 tokens a chip on 64, 256 and 1,024 chips of v5p."""
    rates = {}
    for topology, rows in (("v5p:4x4x4", 16), ("v5p:4x8x8", 64), ("v5p:8x8x16", 256)):
        result = dry_run(
            "sft_70b.gin",
            "v5p_128",
            f"--gin.BATCH_SIZE={rows}",
            f"--topology={topology}",
        )
        rates[result["chips"]] = result["tokens_per_second_per_chip"]
        print(f"{topology:<12}{result['chips']:>6} chips {rates[result['chips']]:10,.0f} tokens/s")
    ratio = min(rates.values()) / max(rates.values())
    return {"name": "pods_weak_scaling", "ratio": ratio, "target": 0.9, "ok": ratio >= 0.9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", help="runs whose file or pod contains this", default=None)
    parser.add_argument("--calibrate", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--vs", choices=["maxtext"])
    parser.add_argument("--maxtext", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--scaling", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.calibrate:
        result = calibrate(options.calibrate)
    elif options.vs:
        if options.maxtext is None:
            parser.error("--vs=maxtext needs --maxtext=FOLDER (benchmarks/maxtext_aot.py)")
        result = against_maxtext(options.maxtext)
    elif options.scaling:
        result = scaling()
    else:
        wanted = runs() if options.all or options.only else SHORT
        if options.only:
            wanted = [run for run in wanted if any(options.only in part for part in run)]
        result = table(wanted)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
