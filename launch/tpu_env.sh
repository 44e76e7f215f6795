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

# Compiler options that every run wants are no flags: tulu_jax/parallel/compiler.py gives them to
# jax.jit by generation of the chip, for the run and its dry run alike. What is left depends on how
# many slices there are (GKE says MEGASCALE_NUM_SLICES, tpu_vm.sh says SLICES).
if [ "${MEGASCALE_NUM_SLICES:-${SLICES:-1}}" -gt 1 ]; then
  flags=(
    # Gradients over `data`, which spans the slices, are reduced in pieces beside the backward pass,
    # gradients of different sizes included: the network between slices is slow.
    --xla_tpu_enable_data_parallel_all_reduce_opt=true
    --xla_tpu_data_parallel_opt_different_sized_ops=true
  )
  export LIBTPU_INIT_ARGS="${flags[*]} ${LIBTPU_INIT_ARGS:-}"  # yours come last, and win
  unset flags
fi
