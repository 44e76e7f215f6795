# The environment of a training process on a TPU host; the launchers source it on every host.
# tests/launch/test_tpu_env.py compiles with each of these libtpu flags: the installed libtpu knows
# them all. What they gain was not measured on hardware.
# shellcheck shell=bash

# Compiled programs are kept, so that a run that resumes starts at once. A bucket serves all hosts.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/tulu_jax/compiled}"

# tqdm and absl write at once; a killed host leaves its last lines.
export PYTHONUNBUFFERED=1

# Tokenizers' threads and the loader's compete for the same cores.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

flags=(
  # All-gathers of weights and reduce-scatters of gradients run beside the matrix products, over
  # several of them: what fully-sharded training lives on.
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  --xla_enable_async_all_gather=true
  # Gradients over `data`, slices among them, are reduced in pieces beside the backward pass.
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)
# Yours come last, and win.
export LIBTPU_INIT_ARGS="${flags[*]} ${LIBTPU_INIT_ARGS:-}"
unset flags
