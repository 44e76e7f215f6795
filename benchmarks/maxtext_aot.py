"""MaxText's own pre-training step, compiled for a TPU slice without one: what `pods.py` compares.

Run by an environment of Python 3.12 that holds MaxText; ours cannot (it needs 3.12):

  uv venv --python 3.12 venv-maxtext && source venv-maxtext/bin/activate
  uv pip install "maxtext[tpu]==0.2.4"
  uv pip install google-tunix==0.1.7 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 pathwaysutils
  python benchmarks/maxtext_aot.py llama2_70b_v5p_512 --out=FOLDER
  python benchmarks/maxtext_aot.py llama2_70b_v5p_512 --out=FOLDER max_target_length=8192

Writes FOLDER/<name>.hlo.txt, the optimised module, and FOLDER/<name>.json: what was compiled,
seconds, and bytes a device. `key=value` are MaxText's own; a changed setting is part of <name>.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

OVERLAP = "--xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true "
GATHERS = (
    OVERLAP
    + (  # libtpu 0.0.52 refuses it but for v5e; the recipes of v5p and v6e name it too
        "--xla_tpu_enable_async_collective_fusion=true "
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
        "--xla_tpu_enable_async_collective_fusion_multiple_steps=true "
    )
)
DATA_PARALLEL = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true "
    "--xla_tpu_data_parallel_opt_different_sized_ops=true "
)
V5P = (
    "--xla_tpu_megacore_fusion_allow_ags=false "
    "--xla_enable_async_collective_permute=true "
    "--xla_tpu_enable_ag_backward_pipelining=true "
)
# Else a product over `tensor` is a loop of smaller ones with a permute beside each.
NO_RINGS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000 "
SCATTERS = (
    "--xla_tpu_use_minor_sharding_for_major_trivial_input=true "
    "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1 "
    "--xla_tpu_assign_all_reduce_scatter_layout=true "
)
HOST = (
    "--xla_tpu_enable_all_experimental_scheduler_features=true "
    "--xla_tpu_enable_scheduler_memory_pressure_tracking=true "
    "--xla_tpu_host_transfer_overlap_limit=24 "
    "--xla_tpu_aggressive_opt_barrier_removal=ENABLED "
    "--xla_lhs_prioritize_async_depth_over_stall=ENABLED "
    "--xla_tpu_enable_ag_backward_pipelining=true "
    "--xla_should_allow_loop_variant_parameter_in_chain=ENABLED "
    "--xla_should_add_loop_invariant_op_in_chain=ENABLED "
    "--xla_max_concurrent_host_send_recv=100 "
    "--xla_tpu_scheduler_percent_shared_memory_limit=100 "
    "--xla_latency_hiding_scheduler_rerun=2 "
)
V6E_BLOCKS = "sa_use_fused_bwd_kernel=true " + " ".join(
    f"sa_block_{name}=2048"
    for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
)
V6E_70B = (
    "model_name=llama3.1-70b max_target_length=8192 remat_policy=custom decoder_layer_input="
    f"offload query_proj=offload key_proj=offload value_proj=offload {V6E_BLOCKS}"
)
V6E_FLAGS = "--xla_tpu_scoped_vmem_limit_kib=98304 " + SCATTERS + DATA_PARALLEL + OVERLAP + HOST
# MaxText's own architecture, of so many billion parameters.
OWN = "model_name=default global_parameter_scale={} max_target_length=2048 remat_policy={}"
# Runs with a published speed: MaxText's slice, its settings, its libtpu flags, and where they are.
RECIPES = {
    "llama2_70b_v5p_512": (
        "v5p-512",
        "model_name=llama2-70b per_device_batch_size=4 max_target_length=4096 "
        "remat_policy=save_dot_except_mlpwi",
        OVERLAP + DATA_PARALLEL + V5P,
        "maxtext/configs/tpu/v5p/llama2_70b.sh",
    ),
    "llama2_70b_v6e_256": (
        "v6e-256",
        "model_name=llama2-70b per_device_batch_size=3 max_target_length=4096 "
        "remat_policy=qkv_proj_offloaded "
        "ici_fsdp_parallelism=1 ici_fsdp_transpose_parallelism=-1 ici_tensor_parallelism=1 "
        "sa_block_q=1024 sa_block_q_dkv=2048 sa_block_q_dq=2048",
        OVERLAP + "--xla_tpu_scoped_vmem_limit_kib=98304 "
        "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true "
        "--xla_tpu_enable_all_reduce_offload_tracing=true "
        "--xla_tpu_use_tc_device_shape_on_sc=true "
        "--xla_sc_enable_instruction_fusion=false "
        "--xla_sc_disjoint_spmem=false "
        "--xla_sc_disable_megacore_partitioning=true ",  # and a chip name that compilers lack
        "tpu-recipes, training/trillium/Llama2-70B-MaxText",
    ),
    "llama2_70b_v5e_256": (
        "v5e-256",
        "model_name=llama2-70b per_device_batch_size=2 max_target_length=2048 "
        "remat_policy=qkv_proj_offloaded",
        GATHERS + DATA_PARALLEL,
        "maxtext/configs/tpu/v5e/llama2_70b.sh",
    ),
    "llama2_70b_v4_128": (  # the settings of the published run were not found
        "v4-128",
        "model_name=llama2-70b per_device_batch_size=2 max_target_length=2048 remat_policy=full",
        OVERLAP + DATA_PARALLEL,
        "none found; as for v5e, with full rematerialisation",
    ),
    "own_16b_v5e_256": (
        "v5e-256",
        OWN.format(16, "full") + " per_device_batch_size=6",
        GATHERS + DATA_PARALLEL,
        "maxtext/configs/v5e/16b.sh",
    ),
    "own_32b_v5e_256": (
        "v5e-256",
        OWN.format(32, "full") + " per_device_batch_size=4",
        GATHERS + DATA_PARALLEL,
        "maxtext/configs/v5e/32b.sh",
    ),
    "own_64b_v5e_256": (
        "v5e-256",
        OWN.format(64, "full") + " per_device_batch_size=2",
        GATHERS + DATA_PARALLEL,
        "maxtext/configs/v5e/64b.sh",
    ),
    "own_128b_v5e_256": (
        "v5e-256",
        OWN.format(128, "minimal_offloaded")
        + " per_device_batch_size=1 ici_fsdp_parallelism=16 ici_tensor_parallelism=16",
        GATHERS + DATA_PARALLEL,
        "maxtext/configs/v5e/128b.sh",
    ),
    "own_64b_v5p_128": (
        "v5p-128",
        OWN.format(64, "minimal") + " per_device_batch_size=3 ici_tensor_parallelism=4",
        OVERLAP + DATA_PARALLEL + V5P,
        "maxtext/configs/v5p/64b.sh",
    ),
    "own_128b_v5p_512": (
        "v5p-512",
        OWN.format(128, "minimal") + " per_device_batch_size=1 ici_tensor_parallelism=8",
        OVERLAP + DATA_PARALLEL + V5P,
        "maxtext/configs/v5p/128b.sh",
    ),
    **{
        f"llama3_1_70b_v6e_{chips}": (
            f"v6e-{chips}",
            f"{V6E_70B} per_device_batch_size={rows}",
            V6E_FLAGS,
            f"tpu-recipes, training/trillium/Llama3.1-70B-MaxText/v6e-{chips}",
        )
        for chips, rows in ((64, 2), (128, 4), (256, 5))
    },
}
ENVIRONMENT = dict(
    DECOUPLE_GCLOUD="TRUE",
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v4-8",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)


def compile_step(topology: str, settings: list[str], flags: str):
    """(compiled step, seconds it took) of MaxText with `settings`, through its own command."""
    os.environ.update(ENVIRONMENT, LIBTPU_INIT_ARGS=flags)
    import maxtext
    from maxtext.trainers.pre_train import train_compile

    found = []
    inner = train_compile.jit_and_compile

    def keep(*args, **kwargs):
        start = time.perf_counter()
        found.append((inner(*args, **kwargs), time.perf_counter() - start))
        return found[-1][0]

    train_compile.jit_and_compile = keep
    base = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
    common = (
        "run_name=aot attention=flash use_iota_embed=true hardware=tpu "
        "dataset_type=synthetic enable_checkpointing=false skip_jax_distributed_system=true "
        f"compile_topology={topology} compile_topology_num_slices=1 "
        f"base_output_directory={tempfile.mkdtemp()}"
    )
    train_compile.main(["train_compile", str(base), *common.split(), *settings])
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--without_rings", action="store_true", help="no products in windows")
    parser.add_argument("--no_flags", action="store_true", help="libtpu's own defaults")
    arguments = parser.parse_intermixed_args()  # settings may follow --out
    topology, settings, flags, source = RECIPES[arguments.recipe]
    flags = "" if arguments.no_flags else flags
    flags += NO_RINGS * arguments.without_rings
    chosen = dict(setting.split("=", 1) for setting in [*settings.split(), *arguments.settings])
    changed = [s.replace("=", "_") for s in arguments.settings]
    changed += ["no_flags"] * arguments.no_flags + ["without_rings"] * arguments.without_rings
    name = "-".join([arguments.recipe, *changed])
    compiled, seconds = compile_step(topology, [f"{k}={v}" for k, v in chosen.items()], flags)
    memory = compiled.memory_analysis()
    about = {
        "name": name,
        "topology": topology,
        "settings": chosen,
        "libtpu_flags": flags.split(),
        "source": source,
        "versions": versions(),
        "compile_seconds": seconds,
        "tokens_per_device": float(chosen["per_device_batch_size"])
        * int(chosen["max_target_length"]),
        "coordinates": coordinates(compiled),
        "bytes": {
            kind: getattr(memory, f"{kind}_size_in_bytes")
            for kind in ("argument", "output", "alias", "temp", "generated_code", "host_temp")
        },
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.hlo.txt").write_text(compiled.as_text())
    (arguments.out / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about))


def coordinates(compiled) -> list[list[int]]:
    """Of each device in the order that groups of the module count them: its place on the torus."""
    import jax

    found = [s for s in jax.tree.leaves(compiled.input_shardings) if hasattr(s, "mesh")]
    return [list(device.coords) for device in found[0].mesh.devices.flat]


def versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("maxtext", "jax", "libtpu", "flax")}


if __name__ == "__main__":
    sys.exit(main())
