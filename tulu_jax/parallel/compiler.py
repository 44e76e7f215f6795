"""What XLA is asked for on TPUs, for training and for the dry run alike.

A weight's gather and its gradient's reduce-scatter are worth little unless compute goes on beside
them. Where a chip has SparseCores (v5p, v6e) they move the data; elsewhere gathers are cut into
steps of the products that run meanwhile. `docs/pods.md` has the predicted step with and without.
"""

from tulu_jax import chips

_BESIDE = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
_SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
}
_TWO_AT_ONCE = {  # a gather or scatter on each SparseCore; slower on v5p
    "xla_tpu_enable_concurrent_sparse_core_offloading": "true",
    "xla_max_concurrent_async_all_gathers": "4",
    "xla_max_concurrent_async_reduce_scatters": "4",
}
OPTIONS = {
    "v3": _BESIDE,
    "v4": _BESIDE,
    "v5e": _BESIDE,
    "v5p": _SPARSE_CORES,
    "v6e": _SPARSE_CORES | _TWO_AT_ONCE,
}


def options(device_kind: str) -> dict[str, str]:
    """Compiler options of `jax.jit` for devices of this kind; none for those not measured."""
    return OPTIONS.get(chips.name(device_kind), {})
